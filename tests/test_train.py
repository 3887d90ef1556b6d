"""Whole runs on the embedded model: learning, resuming, several processes, mistakes."""

import json
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flowgrpo
from flowgrpo import cli
from flowgrpo.config import ConfigError
from flowgrpo.core.errors import DivergenceError
from flowgrpo.evaluation.samples import load_samples
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.settings import RewardError
from flowgrpo.training import checkpoints
from flowgrpo.training.learner import Learner
from tests.processes import command

SMALL = [
    "train.iterations=4",
    "train.groups=6",
    "algorithm.group_size=4",
    "train.rollout_batch=24",
    "train.updates=2",
    "train.ema_decay=0.9",
    "loss.kl_coef=0.01",
    "evaluation.images=12",
    "evaluation.every=2",
    "evaluation.grid_prompts=2",
    "evaluation.grid_samples=2",
    "run.checkpoint_every=1",
    "run.threads=1",
    "run.device=cpu",
    "run.trackers=[]",
    "failures.probe=off",
]
ROOT = Path(__file__).parents[1]


def darkness(media, prompts):
    """A reward that any model can raise: more ink on the light ground."""
    return 1 - media.mean((1, 2, 3))


def darkness_of_any(media, prompts):
    """The same for images and videos."""
    return 1 - media.flatten(1).mean(1)


def wrong_shape(media, prompts):
    return torch.zeros(len(prompts), 1)


def never(media, prompts):
    return torch.full((len(prompts),), float("nan"))


def constant(media, prompts):
    return torch.ones(len(prompts))


def small(folder, *more):
    return flowgrpo.load("quickstart_flow_grpo", [*SMALL, f"run.folder={folder}", *more])


def reward_settings(name):
    return [f"rewards=[{{model='tests.test_train:{name}'}}]"]


def arguments(folder, *more):
    settings = [f"--set={s}" for s in (*SMALL, f"run.folder={folder}", *more)]
    return ["train", "quickstart_flow_grpo", *settings]


def start(folder, *more):
    return command(*arguments(folder, *more))


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-2000:]
    return output


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    result = flowgrpo.train(small(folder))
    assert result.finished
    return folder


def test_reward_rises_beyond_the_noise_floor(tmp_path):
    length = [
        "train.iterations=12",
        "train.groups=6",
        "algorithm.group_size=8",
        "evaluation.images=48",
        "evaluation.every=0",
    ]
    plain = ["train.updates=1", "loss.kl_coef=0", "train.ema_decay=0", "train.lr=3e-4", *length]

    def gain(folder, *more):
        result = flowgrpo.train(
            small(tmp_path / folder, *reward_settings("darkness"), *plain, *more)
        )
        first, last = result.evaluations[0], result.evaluations[-1]
        return last["scores"]["darkness"] - first["scores"]["darkness"], first["errors"]["darkness"]

    learned, error = gain("learn")
    floor, _ = gain("floor", "train.lr=1e-9", "train.iterations=2")
    # Before and after use the same prompts and noise, so that the floor is far below the error.
    assert abs(floor) < 0.02 * learned
    assert learned > 2 * error


def test_run_directory_is_complete(straight):
    names = {p.name for p in straight.iterdir()}
    assert {
        "config.toml", "environment.json", "metrics.jsonl", "timings.jsonl", "evaluations.jsonl",
        "grids", "samples", "checkpoints", "export", "report.html",
    } <= names  # fmt: skip
    assert len(load_samples(straight / "samples" / "000004.png")) >= 6
    report = (straight / "report.html").read_text()
    assert "<h2>Film strip</h2>" in report
    assert "<h2>Best and worst samples</h2>" in report
    assert [m["iteration"] for m in lines(straight / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [e["iteration"] for e in lines(straight / "evaluations.jsonl")] == [0, 2, 4]
    assert (straight / "grids" / "000004.png").stat().st_size > 5000
    assert (straight / "checkpoints" / "best").exists()
    first = lines(straight / "metrics.jsonl")[0]
    # Nothing has been updated when the first optimizer step looks at the ratios.
    assert first["log_prob/noise"] < 1e-5


def test_a_replay_that_is_no_rollout_is_told_at_once(tmp_path, monkeypatch, capsys):
    short = ["train.iterations=2", "evaluation.images=6", "evaluation.every=0"]
    flowgrpo.train(small(tmp_path / "sound", *short))
    assert "WARNING: before any update" not in capsys.readouterr().out
    init = PipelinePolicy.__init__

    def with_dropout(self, *args, **kwargs):
        init(self, *args, **kwargs)
        for layer in self.denoisers["transformer"].transformer_blocks:
            layer.register_forward_hook(
                lambda module, inputs, output: tuple(torch.dropout(o, 0.02, True) for o in output)
            )

    monkeypatch.setattr(PipelinePolicy, "__init__", with_dropout)
    flowgrpo.train(small(tmp_path / "broken", *short))
    said = capsys.readouterr().out
    assert said.count("WARNING: before any update, log-probabilities in the replay differ") == 1
    assert "flowgrpo doctor shapes" in " ".join(said.split())


def test_the_written_configuration_can_be_run_again(straight):
    again = flowgrpo.load(str(straight / "config.toml"))
    assert again == small(straight)


def test_the_export_draws_what_the_policy_draws(straight):
    from diffusers import DiffusionPipeline

    exported = DiffusionPipeline.from_pretrained(straight / "export")
    weights = load_file(straight / "checkpoints" / "000004" / "ema.safetensors")
    for name, parameter in exported.transformer.named_parameters():
        assert torch.equal(parameter, weights[f"transformer.{name}"])
    assert type(exported.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(straight, tmp_path):
    folder = tmp_path / "killed"
    survived = 0
    for moment in (1, 2):
        process = start(folder)
        deadline = time.time() + 240
        while time.time() < deadline and process.poll() is None:
            metrics = folder / "metrics.jsonl"
            if metrics.exists() and len(metrics.read_text().splitlines()) >= moment:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        survived += process.returncode == -signal.SIGKILL
    assert survived == 2
    finish(start(folder))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    for part in ("weights", "optimizer", "ema"):
        file = f"checkpoints/000004/{part}.safetensors"
        assert (folder / file).read_bytes() == (straight / file).read_bytes()


def test_two_processes_equal_one(straight, tmp_path):
    folder = tmp_path / "two"
    # KL metrics and updates are sums over processes; the groups of both updates are the same.
    finish(command(*arguments(folder, "train.groups=8"), "--nproc", "2"))
    alone = tmp_path / "one"
    finish(start(alone, "train.groups=8"))
    for one, two in zip(
        lines(alone / "evaluations.jsonl"), lines(folder / "evaluations.jsonl"), strict=True
    ):
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-4)
    for one, two in zip(
        lines(alone / "metrics.jsonl"), lines(folder / "metrics.jsonl"), strict=True
    ):
        assert one.keys() == two.keys()
        for key in (
            "reward", "reward_std", "group/zero_variance", "group/diversity", "grad_norm",
            "kl/velocity", *(k for k in one if k.endswith("/ratio_deviation")),
        ):  # fmt: skip
            assert one[key] == pytest.approx(two[key], rel=2e-3, abs=1e-6), key
    a, b = (
        load_file(f / "checkpoints" / "000004" / "weights.safetensors") for f in (alone, folder)
    )
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5


def test_ctrl_c_saves_and_says_how_to_resume(straight, tmp_path):
    folder = tmp_path / "interrupted"
    process = start(folder)
    while process.poll() is None and not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert "the same command resumes the run" in output
    finish(start(folder))
    assert (folder / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_directory_of_another_configuration_is_refused(straight):
    with pytest.raises(ConfigError, match=r"train\.groups is 6 there and 8 now"):
        flowgrpo.train(small(straight, "train.groups=8"))


def test_a_finished_run_does_nothing(straight, capsys):
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.name != "run.lock"}
    result = flowgrpo.train(small(straight))
    assert result.finished
    assert [e["iteration"] for e in result.evaluations] == [0, 2, 4]
    assert "has finished its 4 iterations: nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.name != "run.lock"} == before


def test_an_extended_run_equals_one_of_that_length(straight, tmp_path, capsys):
    folder = tmp_path / "run"
    assert flowgrpo.train(small(folder, "train.iterations=2")).finished
    given = ["train", str(folder), "--resume-with", "train.iterations=4", "run.checkpoint_every=3"]
    assert cli.main(given) == 0
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()
    for name in ("best", "000004"):
        one, other = (checkpoints.load(f / "checkpoints" / name)[0] for f in (straight, folder))
        assert one.keys() == other.keys()
        for part, tensors in one.items():
            assert all(torch.equal(t, other[part][k]) for k, t in tensors.items()), part
    assert "Changes during the run" in (folder / "report.html").read_text()
    # The command that started it finds a finished run of four iterations.
    assert flowgrpo.train(small(folder, "train.iterations=2")).finished
    assert "has finished its 4 iterations: nothing to do" in capsys.readouterr().out


def test_a_directory_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="not empty and not a run directory"):
        flowgrpo.train(small(tmp_path))


def test_a_damaged_checkpoint_costs_an_iteration_and_a_loud_line(straight, tmp_path, capsys):
    folder = tmp_path / "flipped"
    shutil.copytree(straight, folder)
    (folder / "finished.json").unlink()
    # A killed process may have left half a picture file; a finished one has no such file.
    base = folder / "grids" / "base.safetensors"
    base.write_bytes(base.read_bytes()[:100])
    file = folder / "checkpoints" / "000004" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert flowgrpo.train(small(folder)).finished
    said = " ".join(capsys.readouterr().out.split())
    assert "weights.safetensors is damaged" in said
    assert (
        "was renamed to damaged-000004, and the run resumes from the checkpoint before it" in said
    )
    assert "base.safetensors with the base model's images is damaged" in said
    for name in (
        "metrics.jsonl",
        "checkpoints/000004/weights.safetensors",
        "grids/base.safetensors",
    ):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()


def slow(media, prompts):
    """A reward that keeps a rollout waiting."""
    time.sleep(30)
    return 1 - media.mean((1, 2, 3))


def leaves(media, prompts):
    sys.exit(0)


def zero_for_anything(media, prompts):
    """A reward that hides broken images."""
    return torch.nan_to_num(media, nan=0.0).mean((1, 2, 3))


def wait_for(file, number=1):
    deadline = time.time() + 240
    while not (file.exists() and (number == 0 or len(file.read_text().splitlines()) >= number)):
        assert time.time() < deadline
        time.sleep(0.01)


def saved(folder):
    """The checkpoints that are complete, oldest first."""
    return sorted(p.parent.name for p in (folder / "checkpoints").glob("0*/state.json"))


def test_a_termination_saves_the_last_iteration_and_asks_to_be_started_again(straight, tmp_path):
    folder = tmp_path / "terminated"
    process = start(folder, "run.checkpoint_every=100")
    wait_for(folder / "metrics.jsonl")
    process.send_signal(signal.SIGUSR1)
    deadline = time.time() + 60
    while not (first := saved(folder)) and time.time() < deadline:
        time.sleep(0.01)
    assert first, "SIGUSR1 saves, and the run continues"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    assert "SIGTERM: saving and stopping" in output
    # The same iteration if the signal comes before the next one ends.
    assert saved(folder)[-1] >= first[-1]
    finish(start(folder))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.parametrize(("number", "times", "status"), [("SIGTERM", 1, 75), ("SIGINT", 2, 130)])
def test_a_slow_reward_does_not_hold_a_run_that_is_told_to_stop(tmp_path, number, times, status):
    folder = tmp_path / "slow"
    process = start(folder, *reward_settings("slow"))
    wait_for(folder / "grids" / "base.safetensors", 0)
    time.sleep(1)
    began = time.time()
    for _ in range(times):
        process.send_signal(getattr(signal, number))
        time.sleep(0.5)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert time.time() - began < 15


def test_a_reward_that_ends_the_process_fails_the_run(tmp_path):
    process = start(tmp_path / "left", *reward_settings("leaves"), "failures.retries=0")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "called sys.exit" in output
    assert not (tmp_path / "left" / "finished.json").exists()


def test_a_policy_that_diverges_stops_the_run_and_is_not_saved(tmp_path, monkeypatch):
    settings = [*reward_settings("zero_for_anything"), "evaluation.every=0", "evaluation.images=6"]
    with pytest.raises(DivergenceError, match=r"distance of its output .* Nothing was trained yet"):
        flowgrpo.train(small(tmp_path / "fast", *settings, "train.lr=1"))

    update, calls = Learner.update, []

    def breaks(self, *arguments):
        metrics = update(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            self.parameters[0].data.fill_(float("nan"))
        return metrics

    monkeypatch.setattr(Learner, "update", breaks)
    with pytest.raises(DivergenceError, match=r"weights contains NaN.*000001 is safe.*train\.lr="):
        flowgrpo.train(small(tmp_path / "nan", *settings))
    assert {p.name for p in (tmp_path / "nan" / "checkpoints").iterdir()} == {"000001", "best"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong_shape", "returned shape"),
        ("never", "no finite score"),
        ("constant", "the same score"),
    ],
)
def test_unfit_rewards_are_refused_before_training(tmp_path, name, words):
    with pytest.raises(RewardError, match=words):
        flowgrpo.train(
            small(
                tmp_path / name,
                *reward_settings(name),
                "failures.probe=refuse",
                "failures.wait=0.0",
            )
        )
    assert not (tmp_path / name / "metrics.jsonl").exists()


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capfd):
    from flowgrpo.cli import main

    for mistake, words in [
        (["train", "quickstrat"], "did you mean"),
        (
            ["train", "quickstart_flow_grpo", "--set", "train.itertions=5"],
            "did you mean 'iterations'",
        ),
        (
            ["train", "quickstart_flow_grpo", "--dry-run", "--set", "prompts.train=nowhere.jsonl"],
            "no such file",
        ),
        (
            [
                "train",
                "quickstart_flow_grpo",
                "--dry-run",
                "--set",
                "train.groups=7",
                "--set",
                "train.updates=2",
            ],
            "train.groups = 8",
        ),
        (["config", "explain", "train.lrr"], "did you mean 'lr'"),
        (
            ["sample", str(tmp_path), "a prompt", "--out", str(tmp_path / "out")],
            "no model_index.json",
        ),
        (["score", str(tmp_path), "--reward", "jpeg_size"], "has no images"),
        (["inspect", str(tmp_path / "none")], "is not a run directory: it has no config.toml"),
    ]:
        code, error = main(mistake), capfd.readouterr().err.strip()
        assert code == 1, (mistake, error)
        assert words in error, (mistake, error)
        assert len(error.splitlines()) == 1, error


def test_sample_score_and_grid(straight, tmp_path):
    from flowgrpo.cli import main
    from flowgrpo.cli.common import load_policy
    from flowgrpo.cli.main import commands, parser

    def command_of(*more):
        return ["sample", str(straight), "a photo of a red circle", "--samples", "2", *more]

    def policy(*more):
        line = command_of("--out", "x", *more)
        return load_policy(parser(commands()).parse_args(line), 28)

    # As the run is evaluated, with its own batch, where no option says otherwise.
    config = flowgrpo.load(str(straight / "config.toml"))
    sampling = config.evaluation_sampling()
    own = policy()
    assert own.sampling == sampling
    assert own.sampling.num_steps != 28
    assert (own.batch_size, str(own.device), own.dtype) == (24, "cpu", torch.float32)
    assert not own.makes_videos
    other = policy("--steps", "3", "--batch", "5", "--dtype", "bfloat16", "--weights", "base")
    assert other.sampling == replace(sampling, num_steps=3)
    assert (other.batch_size, other.dtype, other.trainable) == (5, torch.bfloat16, None)
    out = tmp_path / "images"
    assert main(command_of("--steps", "4", "--out", str(out))) == 0
    assert len(list(out.glob("*.png"))) == 2
    table = tmp_path / "scores.jsonl"
    assert main(["score", str(out), "--reward", "jpeg_size", "--out", str(table)]) == 0
    assert all(row["jpeg_size"] < 0 for row in lines(table))
    assert (
        main(
            [
                "grid",
                str(straight),
                "--rows",
                "2",
                "--samples",
                "2",
                "--out",
                str(tmp_path / "grid.png"),
            ]
        )
        == 0
    )
    assert (tmp_path / "grid.png").stat().st_size > 5000
    page = tmp_path / "inspect.html"
    assert main(["inspect", str(straight), "--number", "1", "--out", str(page)]) == 0
    assert page.read_text().count("<h4>sample") == 3
    assert "<h2>Credit</h2>" in (straight / "report.html").read_text()


CPS = "transition={kind='cps', noise_level=0.7}"


def by_density(*settings):
    return small("nowhere", "sampling.num_steps=8", "train.iterations=30", *settings).steps_by_density()  # fmt: skip


def test_only_gradients_that_nothing_weighs_are_compared():
    everything = f"algorithm={{kind='dance_grpo', {CPS}}}"
    assert by_density(everything) == [0, 1, 2, 3, 4, 5, 6]
    assert by_density() == [0, 1, 2, 3]  # of a random window of one, over all iterations
    assert by_density(f"algorithm={{kind='tempflow_grpo', {CPS}}}") == []
    assert by_density(everything, "loss={ratio='guard', clip_range=1e-3}") == []
    unnormalised = CPS.replace("}", ", log_prob='unnormalised'}")
    assert by_density(f"algorithm={{kind='dance_grpo', {unnormalised}}}") == []
    assert by_density("algorithm={kind='branch_grpo', group_size=4, splits=[0, 5], steps={kind='window', start=2, size=1}}") == [0, 2, 5]  # fmt: skip


def test_a_step_that_would_drown_the_others_is_refused(tmp_path):
    """The embedded model's grid all but ends before its last step, as SD3's does."""
    steps = "steps={kind='all', skip_last=%d}"
    last = f"algorithm={{kind='flow_grpo', group_size=4, {CPS}, {steps % 1}}}"
    with pytest.raises(ValueError, match=r"step 6 .*sigma 0\.001 .*skip_last = 2"):
        flowgrpo.train(small(tmp_path / "a", "sampling.num_steps=8", last))
    for number, rest in enumerate(
        [
            [f"algorithm={{kind='flow_grpo', group_size=4, {CPS}, {steps % 2}}}"],
            [f"algorithm={{kind='flow_grpo', group_size=4, {steps % 1}}}"],  # Flow-SDE
        ]
    ):
        folder = tmp_path / str(number)
        settings = ["sampling.num_steps=8", "train.iterations=1", "evaluation.every=0", "evaluation.images=6", *rest]  # fmt: skip
        assert flowgrpo.train(small(folder, *settings)).finished
