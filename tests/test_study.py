"""A short version of the study, its order, its statistics and its second world."""

import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from scipy import stats

import flowgrpo
from benchmarks.study import (
    new_kinds,
    paper_claims,
    recommendation,
    report,
    second_world,
    statistics,
)
from benchmarks.study.__main__ import main
from benchmarks.study.entries import ALGORITHMS, COMMON, FLAWED, FURTHER, RATES
from benchmarks.study.held_out_reward import palette_share
from benchmarks.study.plan import SHORT, Choice, Job, Plan, Store, jobs
from benchmarks.study.results import AXES, Point, Run, Runs
from benchmarks.study.work import Worker, work
from flowgrpo.data.prompts import Prompt
from flowgrpo.shapes import rewards
from flowgrpo.shapes.captions import TASKS, all_records, scene_for, vocabulary
from flowgrpo.shapes.verifier import detect, strict
from flowgrpo.shapes.world import draw
from scripts import pretrain_shapes

ENTRIES = (*ALGORITHMS, *FURTHER)


class Stopped(Exception):
    """Ends the work in the middle."""


def table(page: str) -> str:
    """The tables of a page before its plots."""
    return page.split("begin -->\n")[1].split("\n\n### Plots")[0]


def test_a_short_study_resumes_and_reports(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    entry, store, done = ALGORITHMS[7], Store(tmp_path / "runs"), []
    page = tmp_path / "study.md"
    page.write_text("Before.\n<!-- study: begin -->\nformer\n<!-- study: end -->\nAfter.\n")

    def stop(line: str) -> None:
        done.append(line)
        if len(done) == 7:
            raise Stopped

    small = ["train.groups=1", "sampling.num_steps=4"]
    with pytest.raises(Stopped):
        work(store, SHORT, [entry], small, say=stop)
    assert store.chosen(entry) is not None, "the tuning comes first"
    times = {f: f.stat().st_mtime_ns for f in store.folder.rglob("*.json")}
    monkeypatch.setattr("benchmarks.study.plan.FURTHER", ())
    work(store, SHORT, [entry], small, say=done.append)
    torch.set_num_threads(threads)
    assert len(done) == len(set(done)) == 9
    assert all(f.stat().st_mtime_ns == t for f, t in times.items()), "finished jobs are done again"
    assert next(jobs(store, SHORT, [entry]), None) is None

    main(["report", "--short", "--folder", str(store.folder), "--write", str(page)])
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "former" not in text
    assert "| Matching (AWM, V-GRPO) | 1 |" in text
    assert "too few common seeds" in text
    assert {p.name for p in (tmp_path / "study").iterdir()} == {
        "methods.png", "gain.png", "diversity.png", "drift.png", "palette.png", "results.jsonl",
    }  # fmt: skip
    again = ["report", "--short", "--folder", str(tmp_path / "again")]
    main([*again, "--start", str(tmp_path / "study" / "results.jsonl")])
    assert capsys.readouterr().out.rstrip().endswith(table(text))
    (run,) = store.runs("main", entry).values()
    assert run["spent"]["images"] == 12 * len(run["seconds"])
    assert run["end"]["drift"] > 0


def test_processes_share_the_jobs_of_a_folder(tmp_path, monkeypatch):
    """Of two workers none repeats what the other does; what was claimed by a process that is gone is free."""
    entry, doing, lines = ALGORITHMS[7], [], []
    Store(tmp_path).save_unit(0.5)

    def stop(seconds: float) -> None:
        raise Stopped

    def do(self: Worker, job: Job) -> dict[str, object]:
        doing.append(self.store.file(job))
        if len(doing) == 1:
            raise Stopped
        if len(doing) == 2:  # While this job is done, another worker does what it can.
            monkeypatch.setattr(time, "sleep", stop)
            with pytest.raises(Stopped):
                work(Store(tmp_path), SHORT, [entry, ALGORITHMS[0]], say=lines.append)
        found = {"seconds": [2.0, 2.0], "reference": [1.0, 1.0], "diverged": False}
        return found | (_tuned(entry, job.choice) if job.work == "tune" else {})

    monkeypatch.setattr(Worker, "do", do)
    monkeypatch.setattr("benchmarks.study.plan.FURTHER", ())
    threads = torch.get_num_threads()
    with pytest.raises(Stopped):
        work(Store(tmp_path), SHORT, [entry])
    work(Store(tmp_path), SHORT, [entry, ALGORITHMS[0]], say=lines.append)
    torch.set_num_threads(threads)
    assert doing[0] == doing[1], "a claim outlives its process"
    assert len(set(doing[1:])) == len(doing[1:]) == len(lines)
    assert next(jobs(Store(tmp_path), SHORT, [entry, ALGORITHMS[0]]), None) is None


def test_bad_input_is_answered_in_a_sentence(tmp_path, capsys):
    packed, results = tmp_path / "results.jsonl", tmp_path / "runs"
    packed.write_text('{"file": "unit.json", "seconds": 1.0}\n{"file": "../out.json"}\n')
    cut = results / "base" / "0.json"
    cut.parent.mkdir(parents=True)
    cut.write_text('{"end": ')
    for arguments, message in (
        (["run", "--only", "PPO"], "--only PPO names no method; there are: Flow-GRPO-Fast, "),
        (["report", "--only", "DGPO"], "belong to run"),
        (["report", "--start", str(tmp_path / "gone.jsonl")], "No such file"),
        (["report", "--folder", str(results), "--start", str(packed)], "line 2: "),
        (["report", "--folder", str(results)], "0.json is damaged"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    assert not (results / "unit.json").exists()


def _tuned(entry, choice: Choice) -> dict[str, object]:
    return {
        "diverged": choice.rate == RATES[2], "score": choice.rate, "seconds": [2.0, 2.0], "reference": [1.0, 1.0],
        "choice": {"rate": choice.rate, "value": choice.value},
    }  # fmt: skip


def test_all_methods_have_a_seed_before_the_next_and_lengths_by_their_cost(tmp_path):
    """Costs of 2 s under double load are 1 s; a diverged rate is not chosen."""
    store, plan = Store(tmp_path), Plan(seconds=60, seeds=(0, 1, 2, 3))
    store.save_unit(0.5)
    order = []
    entries = ALGORITHMS[:2]
    while (job := next(jobs(store, plan, entries), None)) and len(order) < 40:
        order.append(job)
        result = {"seconds": [2.0, 2.0], "reference": [1.0, 1.0]}
        if job.work == "tune":
            result = _tuned(job.entry, job.choice)
        store.write(job, {"diverged": False, **result})
    tried = [j.choice for j in order if j.work == "tune" and j.entry == entries[0]]
    first, second = entries[0].values
    assert tried == [*(Choice(r, first) for r in RATES), Choice(RATES[1], second)]
    assert store.chosen(entries[0]).rate == RATES[1]
    main_runs = [(j.seed, j.entry) for j in order if j.work == "run" and j.kind == "main"]
    assert main_runs == [(s, e) for s in range(4) for e in entries]
    assert {j.iterations for j in order if j.work == "run" and j.kind == "main"} == {60}
    assert {j.iterations for j in order if j.kind == "long"} == {120}
    assert {j.seed for j in order if j.work == "tune"} == {plan.tuning_seed}


def test_every_entry_is_a_configuration_that_can_run():
    for entry in ENTRIES:
        for value in entry.values:
            config = flowgrpo.load("quickstart_flow_grpo", [*COMMON, *entry.with_value(value)])
            config.check()
            assert config.train.groups * config.algorithm.group_size == 72
    flowgrpo.load("quickstart_flow_grpo", [*COMMON, FLAWED]).check()
    assert len({e.slug for e in ENTRIES}) == len(ENTRIES)


def test_prompts_of_new_kinds_are_new_and_can_be_drawn(tmp_path):
    known = {r["prompt"] for task in TASKS for r in all_records(task)}
    words, rng = set(vocabulary()), np.random.default_rng(0)
    every = [r for kind in new_kinds.KINDS for r in new_kinds.chosen(kind)]
    assert not {r["prompt"] for r in every} & known
    assert {w for r in every for w in r["prompt"].split()} <= words
    for kind in new_kinds.KINDS:
        record = next(r for r in every if r["tag"] == kind)
        drawn = draw(scene_for(record, rng))
        assert strict(detect(drawn.astype(np.float32) / 255), record) == 1, record["prompt"]
    lines = new_kinds.write(tmp_path).read_text().splitlines()
    assert Counter(line.split('"')[3] for line in lines) == Counter(r["tag"] for r in every)


def test_the_second_world_has_other_words_colours_and_sizes_and_is_judged_by_its_own(tmp_path):
    rng, world = np.random.default_rng(0), second_world.WORLD
    prompts = [json.loads(line) for f in second_world.write_prompts(tmp_path) for line in f.read_text().splitlines()]  # fmt: skip
    assert not {r["prompt"] for r in prompts} & {r["prompt"] for t in TASKS for r in all_records(t)}
    assert {r["tag"] for r in prompts} == set(TASKS)
    scenes = [scene_for(r, rng, world) for r in prompts]
    assert all(world.radius[0] <= o.radius <= world.radius[1] for scene in scenes for o in scene)
    media = torch.tensor(np.stack([draw(s, world=world) for s in scenes])).permute(0, 3, 1, 2) / 255
    asked = [Prompt(r["prompt"], metadata=r) for r in prompts]
    assert second_world.Strict()(media, asked).mean() > 0.97
    assert palette_share(media, world).min() > 0.9
    colored = [i for i, r in enumerate(prompts) if r["tag"] in ("colors", "color_attr")]
    named = [asked[i] for i in colored]
    assert rewards.Strict()(media[colored], named).max() == 0, (
        "the first world knows no such colours"
    )


def test_a_model_learns_the_words_of_another_world_in_the_place_of_its_own():
    pipeline = DiffusionPipeline.from_pretrained("flowgrpo/shapes/model")
    before = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    known = pipeline.tokenizer.get_vocab()
    pretrain_shapes.adopt_words(pipeline, second_world.WORLD)
    new, after = pipeline.tokenizer.get_vocab(), pipeline.text_encoder.get_input_embeddings().weight
    assert len(after) == len(new) == pipeline.text_encoder.config.vocab_size
    for word, source in (("circle", "circle"), ("<bos>", "<bos>"), ("pink", "red"), ("navy", "purple")):  # fmt: skip
        assert torch.equal(after[new[word]], before[known[source]])
    ids = pipeline.tokenizer("a drawing with a pink circle").input_ids
    assert known["<unk>"] == new["<unk>"] not in ids


def test_the_held_out_reward_is_high_for_the_worlds_own_pictures_and_low_for_smears():
    rng = np.random.default_rng(0)
    scenes = [scene_for(r, rng) for r in all_records("color_attr")[:20]]
    own = torch.tensor(np.stack([draw(s) for s in scenes])).permute(0, 3, 1, 2) / 255
    share = palette_share(own)
    assert share.min() > 0.94
    smeared = torch.nn.functional.avg_pool2d(own, 9, stride=1, padding=4, count_include_pad=False)
    assert bool((palette_share(smeared) < share - 0.03).all())
    pink = torch.tensor([1.0, 0.5, 0.8])[:, None, None].expand(1, 3, 8, 8)
    assert float(palette_share(pink)) == 0


def test_a_run_is_read_between_its_evaluations_and_not_beyond():
    points = [
        Point({"seconds": x, "images": 10 * x, "evaluations": 0.0}, {"strict": y})
        for x, y in ((0.0, 0.3), (10.0, 0.4), (20.0, 0.6))
    ]
    run = Run(0, 2, {"plain": {"strict": 0.3}}, {"plain": {"strict": 0.6}}, points)
    assert run.gain("plain", "strict") == pytest.approx(0.3)
    assert run.gain_at("seconds", 15) == pytest.approx(0.2)
    assert run.gain_at("images", 200) == pytest.approx(0.3)
    assert math.isnan(run.gain_at("images", 201))
    short = Run(0, 2, run.before, run.after, points[:2])
    runs = Runs({"a": {0: run}, "b": {0: short}}, {})
    assert runs.least_spent("seconds") == 10
    assert report.points(runs.gains_at("seconds", 15), "b") == "not reached"


GAINS = {
    "a": {0: 0.10, 1: 0.30, 2: 0.20, 3: 0.9},
    "b": {0: 0.11, 1: 0.32, 2: 0.20},
    "c": {0: 0.02, 1: 0.20, 2: 0.11},
}


def test_intervals_pool_the_deviations_of_all_methods():
    """Deviations of 0.1, 0.1 and 0.2, each of three seeds: their mean square is 0.02."""
    gains = {
        "a": {0: 0.0, 1: 0.1, 2: 0.2},
        "b": {0: 0.5, 1: 0.4, 2: 0.6},
        "c": {0: -0.2, 1: 0.0, 2: 0.2},
        "d": {0: 0.7},
    }
    deviation, freedom = statistics.pooled(gains)
    assert (deviation, freedom) == (pytest.approx(math.sqrt(0.02)), 6)
    # Student's t with 6 degrees of freedom is 2.447.
    half = statistics.half_width(gains, 3)
    assert half == pytest.approx(2.4469 * math.sqrt(0.02 / 3), rel=1e-4)
    assert report.points(gains, "a") == f"+10.0 ± {100 * half:.1f}"
    assert report.points({"a": {0: 0.1}}, "a") == "+10.0"
    assert math.isnan(statistics.half_width({"a": {0: 0.1}}, 1))


def test_methods_are_told_apart_by_what_is_left_after_method_and_seed():
    """Against scipy's own Tukey test after the seeds' means are taken out, and its own quantile."""
    assert statistics.comparable(GAINS) == (["a", "b", "c"], [0, 1, 2])
    common = [0, 1, 2]
    table = np.array([[GAINS[m][s] for s in common] for m in GAINS])
    left = table - table.mean(0)
    errors = left - left.mean(1, keepdims=True)
    mean_square = (errors**2).sum() / 4
    expected = stats.studentized_range.ppf(0.95, 3, 4) * math.sqrt(mean_square / 3)
    assert statistics.smallest_difference(GAINS) == pytest.approx(expected)
    # The published value for three groups and four degrees of freedom is 5.04.
    assert stats.studentized_range.ppf(0.95, 3, 4) == pytest.approx(5.04, abs=0.005)
    assert statistics.leaders(GAINS) == ["b", "a"], "seeds that only one has do not count"
    late = {**GAINS, "d": {0: 0.9}}
    assert statistics.leaders(late) == ["b", "a"], "a method with one seed waits"
    assert statistics.comparable({**late, "a": {0: 0.1}})[0] == ["b", "c"]
    assert statistics.leaders({"a": {0: 0.1}, "b": {0: 0.3}}) == []


def test_a_claim_is_shown_if_the_difference_exceeds_its_interval():
    """The residuals by hand: t with 4 degrees of freedom is 2.776."""
    table = np.array([[GAINS[m][s] for s in range(3)] for m in GAINS])
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    half = 2.7764 * math.sqrt((left**2).sum() / 4) * math.sqrt(2 / 3)
    difference, found, seeds = statistics.contrast(GAINS, "a", "c")
    assert (difference, found, seeds) == (pytest.approx(0.09), pytest.approx(half, rel=1e-4), 3)
    assert math.isnan(statistics.contrast({"a": {0: 0.1}, "b": {0: 0.2}}, "a", "b")[1])
    nothing = Point(dict.fromkeys(AXES, 0.0), {"strict": 0.4})
    runs = {
        name: {s: Run(s, 2, {"plain": {"strict": 0.4}}, {"plain": {"strict": 0.4 + g}}, [nothing, Point(dict.fromkeys(AXES, 9.0), {"strict": 0.4 + g})]) for s, g in GAINS[m].items()}
        for name, m in (("MixGRPO", "a"), ("Flow-GRPO", "c"), ("DanceGRPO", "b"), ("DGPO", "c"))
    }  # fmt: skip
    rows = paper_claims.paper_claims(Runs(runs, {})).splitlines()
    verdicts = [r.split(" | ")[-1] for r in rows if "| seconds |" in r]
    assert verdicts == ["not shown |", "**shown** |", "not shown |"]
    runs["DGPO"][0].after["plain"]["strict"] = 0.2
    rows = paper_claims.paper_claims(Runs(runs, {})).splitlines()
    (row,) = (r for r in rows if r.startswith("| DGPO is"))
    assert row.endswith("| not shown: destroys the model |")


def test_a_recommendation_names_no_more_than_can_be_told_apart():
    def run(seed: int, gain: float) -> Run:
        before = {p: {"strict": 0.4, "graded": 0.6, "ink": 0.1, "palette": 0.9, "diversity/color": 0.5} for p in ("plain", "guided", "new_kinds")}  # fmt: skip
        after = {p: {k: v + gain for k, v in part.items()} for p, part in before.items()}
        nothing = {"seconds": 0.0, "images": 0.0, "evaluations": 0.0}
        points = [Point(nothing, {"strict": 0.4}), Point(dict.fromkeys(nothing, 60.0), {"strict": 0.4 + gain, "drift": 0.1})]  # fmt: skip
        return Run(seed, 20, before, after, points)

    found = Runs({m: {s: run(s, g) for s, g in each.items()} for m, each in GAINS.items()}, {})
    none = Runs({}, {})
    kinds = {"main": found, "flawed": found, "long": none, "guided": none, "second": none}
    text = recommendation.recommendation(kinds, Plan())
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text.splitlines() if " | " in line}  # fmt: skip
    deviation = 100 * statistics.half_width(GAINS, 3)
    assert rows["accuracy in 60 processor seconds"] == ["3", "b, a", f"+21.0 ± {deviation:.1f} (b)", "c |"]  # fmt: skip
    assert rows["a flawed reward: little ink"][1] == "c"
    assert "accuracy in 120 processor seconds" not in rows
    hurt = {"d": {s: run(s, g) for s, g in ((0, -0.3), (1, -0.05), (2, 0.1), (3, 0.2))}}
    worse = Runs({**found.by_method, **hurt}, {})
    assert worse.collapsed() == ["d"]
    again = recommendation.recommendation({**kinds, "flawed": worse}, Plan()).splitlines()
    row = next(line for line in again if line.startswith("| a flawed reward: the true score"))
    assert row.endswith("c, d (destroys the model) |")
    assert row.split(" | ")[:-1] == ["| a flawed reward: the true score", *rows["a flawed reward: the true score"][:-1]]  # fmt: skip
    assert {m: list(r) for m, r in found.common().by_method.items()} == {m: [0, 1, 2] for m in GAINS}  # fmt: skip
    alone = Runs({**found.by_method, "e": {0: run(0, 0.1)}}, {})
    assert alone.common() is alone, "one common seed compares nothing"
    table = report.flawed(worse).splitlines()
    assert sum("| d (destroyed the model in a run) | 4 |" in line for line in table) == 1
    assert [line for line in table if line.startswith(("| a |", "| b |"))] == [
        line for line in report.flawed(found).splitlines() if line.startswith(("| a |", "| b |"))
    ]
    for shown in (report.at_equal_time, report.at_equal_work):
        one, both = (shown(some, "Title").splitlines() for some in (found, worse))
        assert [line for line in one if line.startswith("| a |")] == [line for line in both if line.startswith("| a |")]  # fmt: skip
    alike = Runs({m: {s: run(s, g) for s, g in ((0, 0.1), (1, 0.2 + 0.1 * (m == "a")), (2, 0.25))} for m in "ab"}, {})  # fmt: skip
    text = recommendation.recommendation({**kinds, "main": alike, "flawed": none}, Plan())
    assert "| any: none can be told from the others | +18.3 to +21.7, each ± " in text


def test_results_are_kept_apart(tmp_path):
    store, entry = Store(tmp_path), ALGORITHMS[0]
    choice, other = (Choice(1e-4, v) for v in entry.values)
    some = [
        Job("run", "main", entry, 0, choice), Job("run", "main", entry, 1, choice), Job("run", "flawed", entry, 0, choice),
        Job("tune", "main", entry, 0, choice), Job("tune", "main", entry, 0, other), Job("cost", "main", entry, 0, choice),
        Job("cost", "guided", entry, 0, choice), Job("base", "main", None, 0), Job("base", "second", None, 0), Job("run", "main", ALGORITHMS[1], 0, choice),
    ]  # fmt: skip
    assert len({store.file(job) for job in some}) == len(some)
    assert all(isinstance(store.file(job), Path) for job in some)
