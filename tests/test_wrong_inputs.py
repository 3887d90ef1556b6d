"""Generated wrong inputs are answered in one sentence, at once, and with the right status.

A short form of ``python -m benchmarks.wrong_inputs``; the mistakes that it found are tested by hand below.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from flowgrpo.config import ConfigError, load
from flowgrpo.config.bounds import BOUNDS, check_bounds
from flowgrpo.config.files import line_of
from flowgrpo.core.text import shorten
from flowgrpo.data.prompt_files import PromptError, read_prompts
from flowgrpo.memory import printing
from flowgrpo.rewards.settings import Reward, check_rewards
from tests import wrong_inputs as wrong
from tests.test_config_meaning import ALGORITHM_OF

SECONDS = 5.0
QUICK = settings(
    max_examples=30,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory estimate takes seconds, and looks at none of the inputs here."""
    monkeypatch.setattr(printing, "print_estimate", lambda *_: None)


def test_configurations(tmp_path: Path) -> None:
    tables = [
        wrong.valid_table(n, tmp_path / "run") for n in ("quickstart_flow_grpo", "flux_branch")
    ]
    file = tmp_path / "wrong.toml"
    for table in tables:
        file.write_bytes(wrong.toml(table))
        assert wrong.answer(["train", str(file), "--dry-run"]).status == 0

    @QUICK
    @given(wrong.configurations(tables))
    def test(given_input: tuple[bytes, list[str]]) -> None:
        data, changes = given_input
        file.write_bytes(data)
        answer = wrong.answer(["train", str(file), "--dry-run", *(f"--set={c}" for c in changes)])
        assert wrong.complaint(answer, SECONDS) == ""

    test()


def test_prompt_files(tmp_path: Path) -> None:
    table = wrong.valid_table("quickstart_flow_grpo", tmp_path / "run")
    config = tmp_path / "config.toml"

    @QUICK
    @given(wrong.prompt_files())
    def test(given_input: tuple[str, bytes]) -> None:
        suffix, data = given_input
        file = tmp_path / f"prompts{suffix}"
        file.write_bytes(data)
        table["prompts"] |= {"train": str(file), "balance": ""}
        config.write_bytes(wrong.toml(table))
        answer = wrong.answer(["train", str(config), "--dry-run"])
        assert wrong.complaint(answer, SECONDS) == ""
        assert answer.status == 0 or str(file) in answer.text

    test()


def test_model_folders(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source, place = tiny("sd15"), tmp_path / "model"

    @settings(QUICK, max_examples=6)
    @given(wrong.model_folders(source))
    def test(changes: list[tuple[str, bytes | None]]) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        for name, data in changes:
            (place / name).unlink()
            if data is not None:
                (place / name).write_bytes(data)
        assert wrong.complaint(wrong.answer(wrong.sample_command(place, tmp_path)), 60) == ""

    test()


@pytest.mark.parametrize("key", sorted(set(BOUNDS) - {"model.weights.rank", "model.weights.alpha"}))
def test_every_bound_is_of_a_key_and_is_checked(key: str) -> None:
    least, most = BOUNDS[key]
    kind = int if isinstance(least, int) and key not in FLOATS else float
    for value, words in ((least - 1, "at least"), (most + 1, "at most")):
        if abs(value) == float("inf"):
            continue
        algorithm = [f"algorithm.kind={ALGORITHM_OF[key]}"] if key in ALGORITHM_OF else []
        config = load("quickstart_flow_grpo", [*algorithm, f"{key}={kind(value)}"])
        with pytest.raises(ConfigError, match=rf"^{key} must be {words} "):
            check_bounds(config)


FLOATS = (
    "sampling.shift", "sampling.guidance_scale", "evaluation.guidance_scale", "train.weight_decay",
    "train.ema_decay", "train.spike_factor", "failures.wait", "failures.timeout", "failures.max_rate",
    "memory.prompt_cache_gb", "memory.prompt_disk_gb", "run.checkpoint_minutes",
)  # fmt: skip
"""Keys that hold numbers with a fraction, though their bounds are whole."""


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["train.groups=90000"], "samples per iteration, more than the largest number, 1,000,000"),
        (
            ["evaluation.grid_prompts=100", "evaluation.grid_samples=100"],
            "10,000 images, more than",
        ),
        (["sampling.call.prompt=x"], "sampling.call.prompt: .* prompts are in prompts.train"),
        (["sampling.call.num_inference_steps=3"], "set sampling.num_steps instead"),
        (
            ["sampling.call.generator=3"],
            "sampling.call.generator: the policy sets this argument itself",
        ),
    ],
)
def test_settings_that_end_in_no_run(setting: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("quickstart_flow_grpo", setting).check()


def test_checks_take_no_time_that_grows_with_the_run() -> None:
    config = load("quickstart_flow_grpo", ["train.iterations=10000000"])
    config.check()
    assert config.steps_by_density() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("first", "second", "zero_at"),
    [
        ([[3, 1], [4, 0]], [[3, 0], [4, 1]], None),
        ([[3, 1], [5, 0]], [[2, 1], [4.5, 0]], 5),
        ([[2.5, 0], [3, 1]], [[0, 1], [1, 0], [2, 0], [9, 0]], 1),
        ([[2, 1], [2.5, 0]], [[0, 0], [7, 0], [8, 1]], 3),
    ],
)
def test_the_first_iteration_without_a_reward(
    first: list[list[float]], second: list[list[float]], zero_at: int | None
) -> None:
    rewards = [
        Reward(model="a", schedule=tuple(tuple(map(float, p)) for p in s)) for s in (first, second)
    ]
    by_hand = [i for i in range(20) if all(r.weight_at(i) == 0 for r in rewards)]
    assert by_hand[:1] == ([] if zero_at is None else [zero_at])
    if zero_at is None:
        check_rewards(rewards, 20)
        return
    check_rewards(rewards, zero_at)
    with pytest.raises(ConfigError, match=f"weight 0 in iteration {zero_at},"):
        check_rewards(rewards, 20)


def test_long_files_and_values_are_answered_briefly(tmp_path: Path) -> None:
    lines = ["[a]", "b = [", *(f"    {i}," for i in range(3000)), "]", "c = 1", "[d]", "e = 2"]
    assert line_of("\n".join(lines), ("d", "e")) == len(lines)
    assert shorten("a" * 5000 + "\nb").splitlines() == ["a" * 500 + " ... " + "a" * 500, "b"]
    with pytest.raises(ConfigError) as caught:
        load("quickstart_flow_grpo", [f"run.trackers={list(range(200))}"])
    assert str(caught.value).count("\n") == 10
    assert str(caught.value).endswith("and 190 more")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "x", "negativ_prompt": "y"}', "'negativ_prompt'; did you mean 'negative_prompt'"),
        ("p.jsonl", '{"prompt": "x", "hieght": 3}', "line 1: unknown key 'hieght'; did you mean 'height'"),
        ("p.csv", "prompt,Width\nx,3", "line 2: unknown key 'Width'; did you mean 'width'"),
        ("p.jsonl", '{"prompt": "x", "prompt": "y"}', "line 1: the key 'prompt' is given twice"),
        ("p.jsonl", '{"prompt": "x", "score": NaN}', "line 1: NaN is not valid JSON"),
        ("p.jsonl", "[" * 100_000, "line 1: the JSON is nested too deeply"),
        ("p.jsonl", '{"prompt": "x", "height": 100000}', "'height' must be at most 16384, got 100000"),
        ("p.csv", "prompt,tag\nx,a,b", "line 2: 3 cells, but the header has 2"),
        ("p.csv", "prompt,tag,tag\nx,a,b", "the column 'tag' is there twice"),
        ("p.csv", "prompt\n" + "x" * 200_000, "not valid CSV: field larger than field limit"),
        ("p.parquet", "PAR1 PAR1", "p.parquet cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_mistakes_in_prompt_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(PromptError, match=message):
        read_prompts(file)


def test_keys_that_only_resemble_are_metadata(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "x", "weight": 3, "image_id": 4, "metadata": {"hieght": 1}, "callback": 2}\n'
    )
    (prompt,) = read_prompts(file)
    assert prompt.metadata == {"weight": 3, "image_id": 4, "callback": 2, "hieght": 1}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_other_encodings_are_named_with_their_line(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"p{suffix}"
    file.write_bytes("prompt\nein Würfel\n".encode("latin-1"))
    with pytest.raises(PromptError, match=rf"p{suffix}, line 2: not UTF-8"):
        read_prompts(file)


def test_a_picture_that_is_too_large_to_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x", "image": "large.png"}')
    with pytest.raises(PromptError, match=r"large\.png cannot be read: .*decompression bomb"):
        read_prompts(file)
