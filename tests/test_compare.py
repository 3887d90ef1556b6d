"""``flowgrpo compare``: paired differences against numbers computed here, verdicts, pools, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from flowgrpo import config as configuration
from flowgrpo.bench.comparison import Measured, Setting, exploitation, rows
from flowgrpo.cli.main import main
from flowgrpo.training.logs import Logs

CLASSES = ("counting", "colors")
KEYS = [
    "evaluation.images=8",
    "train.iterations=40",
    "rewards=[{model='jpeg_size', ignores_prompt=true}, {model='flowgrpo.shapes.rewards:Strict', name='strict', weight=0.0}]",
]


def measured(jpeg, strict=None, name="run", **more) -> Measured:
    """Two images of each prompt; prompts alternate between two classes."""
    number = len(jpeg) // 2
    prompts = [*range(number)] * 2
    classes = [CLASSES[p % 2] for p in prompts]
    scores = {"jpeg_size": [float(v) for v in jpeg]}
    if strict is not None:
        scores["strict"] = [float(v) for v in strict]
    return Measured(name, prompts, classes, scores, **more)


def noisy(shift: float, seed: int = 0, number: int = 80, spread: float = 1.0) -> np.ndarray:
    """Scores outside [0, 1] with a difficulty of each prompt that all models share."""
    difficulty = np.tile(np.random.default_rng(99).normal(5, 3, number), 2)
    return difficulty + shift + spread * np.random.default_rng(seed).normal(size=2 * number)


def test_differences_are_paired_over_prompts():
    first, second = noisy(0, 1), noisy(0.6, 2)
    whole, *tasks = rows(Setting("a", [measured(first)]), Setting("b", [measured(second)]))
    assert whole.difference == pytest.approx((second - first).mean())
    assert (whole.first, whole.second) == pytest.approx((first.mean(), second.mean()))
    # The interval is that of the means of each prompt's differences, not of all images.
    per_prompt = (second - first).reshape(2, -1).mean(0)
    assert whole.half_width == pytest.approx(
        1.96 * per_prompt.std() / np.sqrt(len(per_prompt)), rel=0.1
    )
    assert whole.wins == pytest.approx((per_prompt > 0).mean())
    assert [t.task for t in tasks] == ["colors", "counting"]
    odd = np.tile(np.arange(80) % 2 == 1, 2)
    assert tasks[0].difference == pytest.approx((second - first)[odd].mean())
    assert whole.verdict("A", "B") == f"B better by {whole.difference:.2f} ± {whole.half_width:.2f}"
    (back, *_) = rows(Setting("b", [measured(second)]), Setting("a", [measured(first)]))
    assert back.verdict("B", "A").startswith("B better by")
    (noise, *_) = rows(Setting("a", [measured(first)]), Setting("c", [measured(noisy(0, 3))]))
    assert noise.verdict("A", "C").startswith("within noise (")


def test_shares_are_in_points_and_failed_scores_count_for_nothing():
    one = [0.0, 1.0, np.nan, 0.0] * 2
    two = [1.0, 1.0, 1.0, 0.0] * 2
    (whole, *_) = rows(Setting("a", [measured(one)]), Setting("b", [measured(two)]))
    assert whole.in_points
    assert (whole.first, whole.second) == pytest.approx((1 / 3, 3 / 4))
    # Prompt 2 has no score of the first model; it is shared all the same, as it has one of the second.
    assert whole.wins == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert " points" in whole.verdict("A", "B")


def test_evaluations_of_different_size_are_compared_on_their_common_images():
    long, short = noisy(0, 1), noisy(0, 1)
    first = measured(long)
    part = Measured("b", first.prompts[:80], first.classes[:80], {"jpeg_size": list(short[:80])})
    (whole, *_) = rows(Setting("a", [first]), Setting("b", [part]))
    assert (whole.difference, whole.low, whole.high) == (0, 0, 0)


@pytest.mark.parametrize("paired", [False, True])
def test_the_spread_between_seeds_widens_the_interval(paired):
    seeds = [[0.0, 1.2, -0.9], [0.8, 2.2, -0.4]]
    groups = [
        [measured(noisy(s, spread=0.0), seed=i if paired else 10 * g + i) for i, s in enumerate(shifts)]
        for g, shifts in enumerate(seeds)
    ]  # fmt: skip
    # The order in which runs are named does not matter.
    (whole, *_) = rows(Setting("a", groups[0]), Setting("b", groups[1][::-1]))
    test = stats.ttest_rel(*seeds) if paired else stats.ttest_ind(*seeds, equal_var=False)
    theirs = test.confidence_interval(0.95)
    assert whole.difference == pytest.approx(np.mean(seeds[1]) - np.mean(seeds[0]))
    # Without noise of images, the interval is that of the means over seeds alone.
    assert whole.half_width == pytest.approx((theirs.high - theirs.low) / 2, rel=1e-6)
    assert whole.is_noise is not paired
    (single, *_) = rows(Setting("a", groups[0][:1]), Setting("b", groups[1][:1]))
    assert not single.is_noise


@pytest.mark.parametrize(
    ("trained", "watched", "kind", "words"),
    [
        (1.0, -1.0, "suspected", "only measured and fell: strict"),
        (1.0, 1.0, "none", "only measured and rose too: strict"),
        (1.0, 0.0, "unclear", "only measured and within noise: strict"),
        (0.0, -1.0, "none", "no reward that was trained on rose"),
        (1.0, None, "unknown", "add a reward with weight 0"),
    ],
)
def test_reward_hacking_is_named(trained, watched, kind, words):
    def scores(shift: float | None, seed: int) -> np.ndarray | None:
        return None if shift is None else noisy(shift, seed)

    before = measured(noisy(0, 1), scores(None if watched is None else 0.0, 2))
    after = measured(noisy(trained, 3), scores(watched, 4))
    setting = Setting("s", [after], [before], {"jpeg_size": 1.0, "strict": 0.0})
    found = exploitation(setting)
    assert found[0] == kind
    assert words in found[1]
    assert exploitation(Setting("s", [after]))[0] == "unknown"


def write_run(folder: Path, shift: float = 0.0, keys=(), per_image: bool = True, after=(20, 40)):
    """A finished run of eight images, evaluated before training and after it."""
    folder.mkdir(parents=True)
    loaded = configuration.load("quickstart_flow_grpo", [*KEYS, f"run.folder={folder}", *keys])
    configuration.save(loaded, folder / "config.toml")
    (folder / "inputs.json").write_text(json.dumps({"prompts.held_out": f"digest of {loaded.prompts.held_out}"}))  # fmt: skip
    logs = Logs(folder)
    for iteration in range(40):
        logs.append("metrics", {"iteration": iteration, "reward": 0.1, "nfe_per_prompt": 5.0})
        logs.append("timings", {"iteration": iteration, "total": 2.0, "rollout": 2.0})
    for iteration in (0, *after):
        jpeg = noisy(shift * iteration, 1 + iteration, 4)
        strict = np.clip(noisy(0, 2, 4) / 10, 0, 1)
        one = measured(jpeg, strict)
        each: dict[str, object] = {
            "prompt": one.prompts,
            "class": one.classes,
            "scores": one.scores,
        }
        line = {
            "iteration": iteration,
            "images": 8,
            "reward": jpeg.mean(),
            "scores": {"jpeg_size": jpeg.mean(), "strict": strict.mean()},
            "metrics": {"diversity": 0.5},
            **({"per_image": each} if per_image else {}),
        }
        guided = {**each, "scores": {"jpeg_size": (2 * jpeg).tolist(), "strict": strict.tolist()}}
        if iteration in (0, after[-1]):
            line["regimes"] = {"guidance_3": {**line, "per_image": guided}}
        logs.append("evaluations", line)
    return folder


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path, Path]:
    """Two seeds of one setting, and one run of another."""
    return (
        write_run(tmp_path / "slow_0", 0.0, ["run.seed=0"]),
        write_run(tmp_path / "slow_1", 0.0, ["run.seed=1"]),
        write_run(tmp_path / "fast", 0.2, ["train.lr=1e-3"]),
    )


def test_the_command_pools_seeds_and_writes_three_files(two, tmp_path, capsys):
    out = tmp_path / "out"
    evil = "fast <b>|"
    arguments = [str(two[0]), str(two[1]), f"{evil}={two[2]}"]
    assert main(["compare", *arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"jpeg_size: {evil} better by" in said
    assert "strict: within noise" in said
    assert "not the seed of training" in said
    found = json.loads((out / "comparison.json").read_text())
    assert [s["name"] for s in found["settings"]] == ["slow_0 (2 seeds)", evil]
    assert [m["seed"] for m in found["settings"][0]["runs"]] == [0, 1]
    assert found["configuration"] == {evil: {"train.lr": [1.5e-4, 1e-3]}}
    (pair,) = found["pairs"]
    assert [(r["reward"], r["task"]) for r in pair["rows"][:3]] == [
        ("jpeg_size", ""), ("jpeg_size", "colors"), ("jpeg_size", "counting"),
    ]  # fmt: skip
    assert pair["rows"][0]["difference"] == pytest.approx(
        noisy(8.0, 41, 4).mean() - noisy(0.0, 41, 4).mean()
    )
    (further,) = [r for r in pair["rows"] if r["reward"] == "jpeg_size, guidance 3"]
    assert further["difference"] == pytest.approx(2 * pair["rows"][0]["difference"])
    assert f"jpeg_size, guidance 3: {evil} better by" in said
    # The cost of 20 iterations: 18 prompts of 16 samples, 5 denoiser evaluations and 2 seconds each.
    point = found["curves"][evil][0][1]
    assert point["cost"] == {
        "iterations": 20, "samples": 20 * 18 * 16, "seconds": 40, "denoiser evaluations": 20 * 18 * 5,
    }  # fmt: skip
    assert found["settings"][1]["reward_hacking"]["kind"] == "unclear"
    page, table = (out / "comparison.html").read_text(), (out / "comparison.md").read_text()
    assert "<b>|" not in page
    assert "fast &lt;b&gt;|" in page
    assert page.count("<svg") == 8
    assert "fast &lt;b>\\|" in table
    assert {line.count("|") - line.count("\\|") for line in table.splitlines() if line[:1] == "|"} == {8}  # fmt: skip


def test_further_evaluations_are_compared_where_all_runs_have_the_same(two, tmp_path, capsys):
    def said(*arguments: str) -> str:
        assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 0
        return capsys.readouterr().out

    slow, fast = str(two[0]), str(two[2])
    assert "guidance 3" not in said(slow, fast, "--at", "20"), "not sampled so after 20 iterations"
    other = write_run(tmp_path / "other", 0.1, ['evaluation.regimes=[{label = "guidance_3", guidance_scale = 4.0}]'])  # fmt: skip
    found = said(slow, str(other))
    assert "jpeg_size, guidance 3" not in found
    assert "the further evaluation guidance_3 is left out: slow_0 and other sample it differently" in found  # fmt: skip
    none = write_run(tmp_path / "none", 0.1, ["evaluation.regimes=[]"])
    assert "guidance" not in said(slow, str(none))


def test_an_evaluation_is_chosen(two, tmp_path, capsys):
    out = tmp_path / "out"

    def iterations(at: str) -> list[int]:
        assert main(["compare", str(two[0]), str(two[2]), "--at", at, "--out", str(out)]) == 0
        found = json.loads((out / "comparison.json").read_text())
        return [m["iteration"] for s in found["settings"] for m in s["runs"]]

    assert iterations("20") == [20, 20]
    assert iterations("last") == [40, 40]
    best = [max((0, 20, 40), key=lambda i: noisy(s * i, 1 + i, 4).mean()) for s in (0.0, 0.2)]
    assert iterations("best") == best
    capsys.readouterr()
    assert main(["compare", str(two[0]), str(two[2]), "--at", "7"]) == 1
    assert "after 0, 20, 40 iterations" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused_in_one_sentence(two, tmp_path, capsys):
    other = write_run(tmp_path / "other", keys=["prompts.held_out=prompts/shapes_train.jsonl"])
    newer = write_run(tmp_path / "newer")
    (newer / "config.toml").write_text("future = 1\n" + (newer / "config.toml").read_text())
    (tmp_path / "empty").mkdir()
    a, b, c = map(str, two)
    for arguments, message in [
        ([a], "at least two"),
        ([a, b], "differ in their seeds only"),
        ([a, a], "named twice"),
        ([a, str(other)], "different prompts"),
        ([f"x={a}", f"x={c}"], "train.lr is 0.00015 in the one and 0.001 in the other"),
        ([f"x={a}", f"x={b}", f"x (2 seeds)={c}"], "name them apart"),
        ([a, str(newer)], "future"),
        ([a, str(tmp_path / "empty")], "neither a run directory"),
        ([a, c, "--at", "lst"], "--at must be last, best"),
        ([a, c, "--images", "0"], "--images must be at least 1"),
        ([a, c, "--reward-option", "x.y=1"], "is for a --reward"),
        ([a, c, "--generate"], "has no checkpoint yet"),
        ([a, c, "--generate", "--at", "20"], "--at with a number is for recorded scores"),
        (["m1", "m2", "--reward", "jpeg_size"], "on --prompts FILE"),
        (["m1", "m2", "--prompts", "prompts/shapes_held_out.jsonl"], "by --reward NAME"),
        (["=x", a], "expected PATH or NAME=PATH"),
    ]:
        assert main(["compare", *arguments]) in (1, 2)
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1 or "future" in message


def test_models_are_drawn_with_the_same_prompts_and_noise(tiny, tmp_path, capsys):
    model, out = str(tiny("sd3")), tmp_path / "out"
    drawn = ["--prompts", "prompts/shapes_held_out.jsonl", "--reward", "jpeg_size", "--images", "4"]
    arguments = [f"one={model}", f"other={model}", *drawn, "--steps", "2", "--out", str(out)]
    assert main(["compare", *arguments]) == 0
    assert "jpeg_size: within noise" in capsys.readouterr().out
    found = json.loads((out / "comparison.json").read_text())
    row = found["pairs"][0]["rows"][0]
    # Equal images have equal scores to the last bit.
    assert (row["difference"], row["low"], row["high"], row["wins"]) == (0, 0, 0, 0.5)
    assert row["first"] != 0
    assert found["settings"][0]["runs"][0]["images"] == 4
