"""Benchmarks at the evaluations of a run: the numbers of ``flowgrpo bench``, on all processes."""

import json
import multiprocessing
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from accelerate import Accelerator

import flowgrpo
from flowgrpo.bench.base import BenchError, Failure, Json, Judged, Picture
from flowgrpo.bench.benchmarks.shapes import Shapes, Verifier
from flowgrpo.bench.report import read_result
from flowgrpo.cli import main
from flowgrpo.config import ConfigError
from flowgrpo.policy import PipelinePolicy
from flowgrpo.training import checkpoints
from flowgrpo.training.benchmarks import Benchmarks
from flowgrpo.training.console import Console
from flowgrpo.training.inputs import check_inputs
from flowgrpo.training.learner import Learner
from flowgrpo.training.session import Session
from flowgrpo.training.shares import Shares

HERE = "tests.test_run_benchmarks"
OVERALL = "overall (mean over samples)"
SMALL = [
    "train.iterations=2", "train.groups=2", "train.updates=1", "train.ema_decay=0.5", "train.lr=3e-3",
    "train.rollout_batch=4", "algorithm.group_size=2", "sampling.num_steps=3", "algorithm.steps={kind='all'}",
    "evaluation.every=1", "evaluation.images=2", "evaluation.grid_prompts=1", "evaluation.grid_samples=1",
    "evaluation.metrics=[]", "evaluation.inspected_prompts=0", "rewards=[{model='jpeg_size'}]", "run.threads=1",
    "run.device=cpu", "run.trackers=[]", "run.checkpoint_every=1", "failures.probe=off",
]  # fmt: skip
BENCH = "{name='shapes', when='every', limit=5, settings={samples=2}}"


def configured(folder: Path, bench: str = BENCH, *more: str) -> flowgrpo.Config:
    settings = [*SMALL, f"run.folder={folder}", f"evaluation.bench=[{bench}]", *more]
    return flowgrpo.load("quickstart_flow_grpo", settings)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left alone, whose best weights are those of the benchmark."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    best = f"evaluation.best='shapes/{OVERALL}'"
    assert flowgrpo.train(configured(folder, BENCH, best)).finished
    return folder


def test_the_numbers_are_those_of_the_command(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "last"
    words = ["bench", "shapes", "--model", str(whole), "--samples", "2", "--limit", "5", "--batch", "4"]  # fmt: skip
    assert main([*words, "--out", str(out), "--device", "cpu"]) == 0
    lines = evaluations(whole)
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    command = {m["name"]: m["value"] for m in read_result(out)["metrics"]}
    assert lines[2]["bench"]["shapes"]["results"] == command
    assert main(["bench", "report", str(whole / "bench/shapes/000002"), str(out)]) == 0
    assert "not compared" not in capsys.readouterr().out


def test_results_are_in_the_folder_the_report_and_the_best_weights(whole: Path) -> None:
    tables = [line["bench"]["shapes"] for line in evaluations(whole)]
    assert [t["folder"] for t in tables] == [f"bench/shapes/{i:06d}" for i in range(3)]
    for table in tables:
        assert (table["images"], table["failed"]) == (10, 0)
        low, high = table["intervals"][OVERALL]
        assert low <= table["results"][OVERALL] <= high
        folder = whole / table["folder"]
        assert (folder / "report.html").is_file()
        assert (folder / "official" / "summary.txt").is_file()
        assert not list(folder.rglob("*.png"))
    assert tables[0]["changes"] == {}
    change = tables[2]["changes"][OVERALL]
    assert change[0] == pytest.approx(tables[2]["results"][OVERALL] - tables[0]["results"][OVERALL])
    page = (whole / "report.html").read_text()
    (section,) = re.findall(r"<h2>Benchmarks</h2>.*?</section>", page, re.DOTALL)
    assert "shapes (embedded verifier)" in section
    assert OVERALL in section
    state = checkpoints.load(whole / "checkpoints" / "best")[1]
    assert state["score"] == max(t["results"][OVERALL] for t in tables)


def test_killed_at_any_moment_of_a_benchmark_it_ends_the_same(whole: Path, tmp_path: Path) -> None:
    folder, chance, kills = tmp_path / "run", random.Random(0), 0
    config = configured(folder, BENCH, f"evaluation.best='shapes/{OVERALL}'")
    for place, wanted in (("000000", 4), ("000002", 8)):
        process = multiprocessing.get_context("fork").Process(target=flowgrpo.train, args=[config])
        process.start()
        images = folder / "bench" / "shapes" / place
        while process.is_alive() and len(list(images.rglob("*.png"))) < wanted:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        kills += process.exitcode == -9
    assert kills == 2
    flowgrpo.train(config)
    assert (folder / "evaluations.jsonl").read_bytes() == (whole / "evaluations.jsonl").read_bytes()


def test_what_is_due_when(tmp_path: Path, policy: PipelinePolicy) -> None:
    three = ", ".join(BENCH.replace("every", w).replace("'shapes'", f"'shapes', label='{w}'") for w in ("every", "ends", "final"))  # fmt: skip
    due = [
        [
            one.settings.tag
            for one in subject(tmp_path, policy, three).found
            if one.is_due(iteration, full)
        ]
        for iteration, full in ((0, True), (1, False), (2, True))
    ]
    assert due == [["every", "ends"], ["every"], ["every", "ends", "final"]]


# Several processes.


class Fake(Session):
    """The part of a session that benchmarks use, of one process of several."""

    def __init__(self, folder: Path, rank: int = 0, ranks: int = 1, gather: Any = None):
        self.folder, self.gather_objects = folder, gather or (lambda values: values)  # type: ignore[method-assign]
        wait = (lambda: gather([])) if gather else (lambda: None)
        self.accelerator = Mock(
            spec=Accelerator,
            process_index=rank,
            num_processes=ranks,
            is_main_process=rank == 0,
            wait_for_everyone=wait,
        )
        self.shares, self.once = Shares(self.accelerator), lambda work: work()  # type: ignore[assignment]
        self.console = Console(enabled=False)
        self.signals = SimpleNamespace(check=lambda: None)  # type: ignore[assignment]


class NoWeights(Learner):
    """A learner that trains nothing."""

    def __init__(self) -> None:
        self.named = {}


def subject(folder: Path, policy: PipelinePolicy, bench: str = BENCH, *process: Any) -> Benchmarks:
    return Benchmarks(configured(folder, bench), Fake(folder, *process), policy, NoWeights(), policy.sampling)  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> PipelinePolicy:
    config = flowgrpo.load("quickstart_flow_grpo", SMALL)
    return PipelinePolicy.from_pretrained("shapes", sampling=config.sampling, batch_size=4)


def together(number: int, work: Callable[[int, Any], Any]) -> list[Any]:
    """Run ``work(rank, gather)`` in threads; ``gather`` concatenates lists as processes do."""
    barrier, sent, found = threading.Barrier(number, timeout=60), [[]] * number, [None] * number

    def one(rank: int) -> None:
        def gather(values: list[Any]) -> list[Any]:
            sent[rank] = values
            barrier.wait()
            everything = [v for part in sent for v in part]
            barrier.wait()
            return everything

        found[rank] = work(rank, gather)

    threads = [threading.Thread(target=one, args=[r]) for r in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_three_processes_share_the_work_and_agree(
    tmp_path: Path, policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, images = threading.Lock(), policy.images

    def one_at_a_time(*arguments: Any) -> Any:
        with lock:
            return images(*arguments)

    monkeypatch.setattr(policy, "images", one_at_a_time)

    def run(folder: Path, *process: Any) -> dict[str, Any]:
        return subject(folder, policy, BENCH, *process).run(0, full=True)

    alone = run(tmp_path / "a" / "run")
    folder = tmp_path / "b" / "run"
    found = together(3, lambda rank, gather: run(folder, rank, 3, gather))
    assert found == [alone] * 3
    judged = {
        str(f.parent.relative_to(folder)): f.read_text().count('"judgement"')
        for f in folder.rglob("scores/*.jsonl")
    }
    place = "bench/shapes/000000"
    # Ten images in batches of four.
    assert judged == {f"{place}/scores": 4, f"{place}/processes/1/scores": 4, f"{place}/processes/2/scores": 2}  # fmt: skip
    assert not list(folder.rglob("*.png"))


# Judges that fail.


class Tired(Verifier):
    """Judges the one image of the probe, and later only if it is awake."""

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        listed = list(pictures)
        if len(listed) > 1 and not Sleepy.awake:
            raise BenchError("the judge has gone to bed")
        yield from super().judge(iter(listed))


@dataclass(frozen=True, kw_only=True)
class Sleepy(Shapes):
    """A benchmark whose judge stops answering during the run."""

    awake = False
    name = "sleepy"

    def judge(self) -> Verifier:
        return Tired()


@dataclass(frozen=True, kw_only=True)
class Broken(Shapes):
    """A benchmark whose judge never gives a usable answer."""

    name = "broken"

    def judge(self) -> Verifier:
        return Useless()


class Useless(Verifier):
    title = "useless judge"

    def judge(self, pictures: Iterable[Picture]) -> Iterator[tuple[Picture, Json | Failure]]:
        yield from ((p, Failure("no usable answer")) for p in pictures)


def test_a_judge_that_stops_does_not_stop_the_run_and_its_images_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    bench = BENCH.replace("shapes", f"{HERE}:Sleepy").replace("every", "ends")
    assert flowgrpo.train(configured(folder, bench, "train.iterations=1")).finished
    said = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the benchmark Sleepy failed after 0 iterations" in said
    assert "the judge has gone to bed" in said
    assert [e["bench"]["Sleepy"] for e in evaluations(folder)] == [{"problem": "the judge has gone to bed"}] * 2  # fmt: skip
    assert "has no results after 1 iteration: the judge has gone to bed" in (folder / "report.html").read_text()  # fmt: skip
    last = folder / "bench" / "Sleepy" / "000001"
    assert len(list(last.rglob("*.png"))) == 10
    monkeypatch.setattr(Sleepy, "awake", True)
    assert main(["bench", "score", str(last), "--limit", "5"]) == 0
    assert read_result(last)["counts"]["judged"] == 10


@pytest.mark.parametrize(
    ("bench", "more", "problem"),
    [
        ("{name='shaps'}", [], r"bench\[0\]: unknown benchmark 'shaps'; did you mean 'shapes'|did you mean"),
        ("{name='shapes', settings={sample=1}}", [], r"evaluation\.bench\[0\]\.settings\.sample'.*did you mean"),
        ("{name='shapes', settings={samples='4'}}", [], r"bench\[0\]\.settings\.samples"),
        ("{name='shapes', settings={samples=0}}", [], "samples must be at least 1"),
        ("{name='shapes', dimensions=['color']}", [], "no dimension 'color'.*did you mean 'colors'"),
        ("{name='unigenbench'}", [], r"needs its data: give settings\.data_file.*To train without it"),
        ("{name='shapes', when='often'}", [], "when"),
        (f"{BENCH}, {BENCH}", [], "there are two benchmarks 'shapes'"),
        ("{name='shapes', label='a b'}", [], "label must consist of"),
        (BENCH, ["evaluation.best=shape"], "or benchmark 'shape'.*did you mean 'shapes'"),
        (BENCH.replace("every", "ends"), ["evaluation.best=shapes"], 'set when = "every"'),
        (BENCH, ["evaluation.best=shapes/colours"], "no result 'colours'.*did you mean 'colors'"),
    ],
)  # fmt: skip
def test_mistakes_are_said_before_anything_is_loaded(
    bench: str, more: list[str], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        check_inputs(configured(tmp_path / "run", bench, *more), 1)
    assert re.search(problem, str(error.value)), str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_judge_that_cannot_judge_is_refused_before_training(
    tmp_path: Path, policy: PipelinePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowgrpo.training.benchmarks.PATIENCE", 0.1)

    def probe(bench: str) -> None:
        subject(tmp_path, policy, bench).probe()

    probe(BENCH)
    with pytest.raises(ConfigError, match=r"bench\[0\]: useless judge could not judge an image: no usable"):  # fmt: skip
        probe(BENCH.replace("shapes", f"{HERE}:Broken"))
    data = tmp_path / "geneval2.jsonl"
    record = {"prompt": "a cup", "atom_count": 1, "vqa_list": [["Is there a cup?", "Yes"]], "skills": ["object"]}  # fmt: skip
    data.write_text(json.dumps(record) + "\n")
    with pytest.raises(ConfigError, match=r"could not judge an image: no answer for 0\.1 s"):
        probe(
            f"{{name='geneval2', settings={{data_file='{data}', any_data=true, judge_url='http://127.0.0.1:9/v1'}}}}"
        )
