"""Held-out evaluation against a slow version: noise, means, errors, classes, grids, weights, the best."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import flowgrpo
from flowgrpo.config.regimes import Regime
from flowgrpo.core.measures import MEASURES
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Prompt
from flowgrpo.evaluation import comparison_grid, held_out
from flowgrpo.evaluation.comparison_grid import ComparisonGrid
from flowgrpo.evaluation.grid_drawing import GridRow
from flowgrpo.evaluation.samples import Sample, thumbnail
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training import checkpoints
from flowgrpo.training.evaluator import Evaluator, bench_lines
from flowgrpo.training.learner import Learner
from flowgrpo.training.session import Session
from tests.conftest import MakePolicy, sampling_of

HERE = "tests.test_evaluation"
SEED = 11
CLASSES = {"a cat": "animal", "a dog": "animal", "a cube": "thing", "one bus": "thing", "a tree": "thing"}  # fmt: skip
PROMPTS = PromptSet([Prompt(t, metadata={"tag": c}) for t, c in CLASSES.items()], "tag")


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


def length(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The length of the prompt; none for cubes."""
    return torch.tensor([math.nan if "cube" in p.text else float(len(p.text)) for p in prompts])


def is_cat(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.tensor([float("cat" in p.text) for p in prompts])


def first_and_last(prompts: Sequence[Prompt], media: Sequence[Tensor]) -> dict[str, float]:
    """A metric that depends on the order of the samples of each prompt."""
    found = [float(m[0].mean() - 2 * m[-1].mean()) for m in media]
    return {"edges": sum(found) / len(found), "samples": float(sum(len(m) for m in media))}


def scorer_of(*names: str, **options: Any) -> RewardScorer:
    rewards = [Reward(model=f"{HERE}:{n}", **options) for n in names]
    return RewardScorer(rewards, Failures(retries=0, wait=0.0, max_rate=1.0))


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> PipelinePolicy:
    """Three samples in a batch, so that batches end within prompts."""
    sampling = sampling_of("sd3", num_steps=2)
    return make_policy("sd3", sampling=sampling, batch_size=3, with_reference=True)


def image(policy: PipelinePolicy, prompt: Prompt, *keys: int | str) -> Tensor:
    return policy.images([prompt], SampleNoise([Random(SEED).at(*keys)]))[0]


def test_images_are_planned_by_class_then_prompt_then_sample() -> None:
    items = held_out.plan(PROMPTS, 9)
    assert [(i.index, i.prompt.text, i.sample) for i in items] == [
        (0, "a cat", 0), (1, "a cube", 0), (2, "a dog", 0), (3, "one bus", 0),
        (4, "a cat", 1), (5, "a tree", 0), (6, "a dog", 1), (7, "a cube", 1), (8, "a cat", 2),
    ]  # fmt: skip


def test_an_evaluation_equals_the_slow_one(policy: PipelinePolicy) -> None:
    scorer = scorer_of("brightness", "length", weight=2.0, schedule=((0.0, 0.0), (10.0, 1.0)))
    scorer.iteration, scorer.failures_seen, scorer.scored = 3, 9, 9
    items = held_out.plan(PROMPTS, 9)
    options: dict[str, Any] = {"seed": SEED, "sampling": policy.sampling, "balance": "tag"}
    samples: list[Sample] = []
    options["show"] = samples.extend
    found = held_out.evaluate(policy, scorer, items, metrics=[first_and_last], **options)
    # One image at a time; its noise depends on the seed and its position alone.
    images = [image(policy, i.prompt, "evaluation", i.index) for i in items]
    light = [float(m.mean()) for m in images]
    assert len({round(v, 6) for v in light}) == 9
    rows = [(CLASSES[i.prompt.text], v, len(i.prompt.text), "cube" not in i.prompt.text) for i, v in zip(items, light, strict=True)]  # fmt: skip

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def error(values: Sequence[float]) -> float:
        return math.sqrt(mean([(v - mean(values)) ** 2 for v in values]) / len(values))

    near = {"rel": 1e-4, "abs": 1e-6}
    assert found["images"] == 9
    # Two of the nine have no length, and so no reward.
    assert found["reward"] == pytest.approx(mean([2 * v + 2 * n for _, v, n, ok in rows if ok]), **near)  # fmt: skip
    assert (scorer.scored, scorer.failures_seen, scorer.iteration) == (9, 2, None)
    groups = {"": rows, **{c: [r for r in rows if r[0] == c] for c in ("animal", "thing")}}
    for name, part in groups.items():
        bright, lengths = [r[1] for r in part], [float(r[2]) for r in part if r[3]]
        means = {"brightness": mean(bright), "length": mean(lengths)}
        errors = {"brightness": error(bright), "length": error(lengths)}
        if not name:
            assert found["scores"] == pytest.approx(means, **near)
            assert found["errors"] == pytest.approx(errors, rel=1e-3, abs=1e-6)
        else:
            own = dict(found["by_class"][name])
            assert own.pop("images") == len(part)
            assert own.pop("errors") == pytest.approx(errors, rel=1e-3, abs=1e-6)
            assert own == pytest.approx(means, **near)
    assert list(found["by_class"]) == ["animal", "thing"]
    each = found["per_image"]
    assert each["prompt"] == [0, 1, 2, 3, 0, 4, 2, 1, 0]
    assert each["class"] == [r[0] for r in rows]
    assert each["scores"]["brightness"] == pytest.approx(light, **near)
    assert [n if n == n else None for n in each["scores"]["length"]] == [
        r[2] if r[3] else None for r in rows
    ]
    own_images: dict[str, list[Tensor]] = {}
    for item, picture in zip(items, images, strict=True):
        own_images.setdefault(item.prompt.text, []).append(picture)
    edges = [float(m[0].mean() - 2 * m[-1].mean()) for m in own_images.values()]
    assert found["metrics"] == pytest.approx({"edges": mean(edges), "samples": 9.0}, rel=1e-3)
    # The images without a reward, those of cubes, are in neither group.
    rewarded = [(2 * v + 2 * n, i) for i, (_, v, n, ok) in enumerate(rows) if ok]
    order = sorted(rewarded)[:3] + sorted(rewarded)[:-4:-1]
    assert [s.group for s in samples] == ["highest"] * 3 + ["lowest"] * 3
    for sample, (reward, index) in zip(samples[3:] + samples[:3], order, strict=True):
        assert sample.prompt == items[index].prompt.text
        assert sample.reward == pytest.approx(reward, **near)
        assert sample.scores == pytest.approx({"brightness": light[index], "length": float(rows[index][2])}, **near)  # fmt: skip
        assert np.abs(np.asarray(sample.picture, int) - np.asarray(thumbnail(images[index]), int)).max() <= 1  # fmt: skip
    # Another seed draws other images, and without a key there are no classes.
    other = held_out.evaluate(policy, scorer, items, seed=SEED + 1, sampling=policy.sampling)
    assert abs(other["scores"]["brightness"] - found["scores"]["brightness"]) > 1e-4
    assert other["by_class"] == {}
    scorer.close()


def test_processes_share_the_prompts_and_agree(policy: PipelinePolicy) -> None:
    """Two processes one after the other, whose rows are then joined."""
    items = held_out.plan(PROMPTS, 9)
    scorer = scorer_of("brightness")
    rows: list[list[Any]] = [[], []]

    def run(rank: int, gather: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
        return held_out.evaluate(
            policy, scorer, items, seed=SEED, sampling=policy.sampling, balance="tag",
            metrics=[first_and_last], artefacts=True, gather=gather, rank=rank, num_ranks=2,
        )  # fmt: skip

    for rank in (0, 1):
        run(rank, lambda own, rank=rank: rows[rank].append(own) or own)  # type: ignore[misc]
    first, second = ([r["index"] for r in own[0]] for own in rows)
    texts = [{items[i].prompt.text for i in part} for part in (first, second)]
    assert texts == [{"a cat", "a dog", "a tree"}, {"a cube", "one bus"}]
    assert sorted(first + second) == list(range(9))
    turn = iter(range(2))

    def joined(own: list[Any]) -> list[Any]:
        place = next(turn)
        return rows[1][place] + rows[0][place]

    together = run(0, joined)
    alone = held_out.evaluate(policy, scorer, items, seed=SEED, sampling=policy.sampling, balance="tag", metrics=[first_and_last], artefacts=True)  # fmt: skip
    for result in (together, alone):
        del result["seconds"]
    # A mean over prompts is that over all of them: 3 on one process, 2 on the other.
    assert [own[1][0][0] for own in rows] == [3, 2]
    edges = [result.pop("metrics")["edges"] for result in (together, alone)]
    assert edges[0] == pytest.approx(edges[1], rel=1e-5)
    assert together["by_class"].keys() == alone["by_class"].keys()
    assert together["scores"] == pytest.approx(alone["scores"], rel=1e-5)
    assert together["images"] == alone["images"] == 9
    assert together["artefacts"].keys() == {*MEASURES}
    # The images themselves differ by rounding, as they are drawn in other batches.
    assert together["artefacts"] == pytest.approx(alone["artefacts"], rel=1e-3)
    assert together["per_image"]["prompt"] == alone["per_image"]["prompt"]
    scorer.close()


def test_scores_that_failed_are_in_no_denominator() -> None:
    def row(index: int, kind: str, x: float, y: float) -> dict[str, Any]:
        return {"index": index, "class": kind, "scores": {"x": x, "y": y}, "reward": x + y}

    nan = math.nan
    rows = [row(0, "b", 1.0, nan), row(1, "a", 3.0, nan), row(2, "b", 5.0, 4.0), row(3, "b", nan, 6.0)]  # fmt: skip
    found = held_out._summary(rows)
    assert found["images"] == 4
    assert found["reward"] == 9
    assert found["scores"] == {"x": 3, "y": 5}
    assert found["errors"] == pytest.approx({"x": math.sqrt(8 / 3 / 3), "y": math.sqrt(1 / 2)})
    assert list(found["by_class"]) == ["a", "b"]
    a, b = found["by_class"]["a"], found["by_class"]["b"]
    assert (a["x"], a["images"], a["errors"]["x"]) == (3, 1, 0)
    assert math.isnan(a["y"])
    assert math.isnan(a["errors"]["y"])
    assert (b["x"], b["y"], b["images"]) == (3, 5, 3)
    assert b["errors"] == pytest.approx({"x": math.sqrt(4 / 2), "y": math.sqrt(1 / 2)})
    assert held_out._summary([])["scores"] == {}
    assert math.isnan(held_out._summary([])["reward"])


# Comparison grids.


def test_a_grid_shows_the_first_prompts_of_each_class_in_turn() -> None:
    def texts(prompts: PromptSet, rows: int) -> list[str]:
        grid = ComparisonGrid.of(prompts, rows, 2, SEED)
        assert (grid.samples, grid.seed) == (2, SEED)
        return [p.text for p in grid.prompts]

    assert texts(PROMPTS, 3) == ["a cat", "a cube", "a dog"]
    assert texts(PROMPTS, 9) == ["a cat", "a cube", "a dog", "one bus", "a tree"]
    # Classes of one prompt do not use up the rows.
    tags = {"many": 30, **{f"one {i}": 1 for i in range(9)}}
    uneven = PromptSet([Prompt(f"{t} {i}", metadata={"tag": t}) for t, n in tags.items() for i in range(n)], "tag")  # fmt: skip
    assert len(set(texts(uneven, 25))) == len(texts(uneven, 25)) == 25
    assert len(texts(uneven, 99)) == 39
    large = [Prompt(f"large {i}", height=64, width=64) for i in range(3)]
    mixed = PromptSet([Prompt("small"), *large, Prompt("small too")])
    assert texts(mixed, 5) == ["large 0", "large 1", "large 2"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each picture that is drawn, in place of it."""
    calls: list[tuple[Any, ...]] = []

    def draw(rows: Sequence[GridRow], columns: Sequence[str], *, title: str, subtitle: str, narrow: bool) -> Image.Image:  # fmt: skip
        calls.append((rows, columns, title, subtitle))
        return Image.new("RGB", (2, 2))

    monkeypatch.setattr(comparison_grid, "draw_grid", draw)
    return calls


def test_every_image_of_a_grid_is_in_its_place_with_its_mark(policy: PipelinePolicy, drawn: list[tuple[Any, ...]], tmp_path: Path) -> None:  # fmt: skip
    prompts = [Prompt("a cube"), Prompt("a cat", negative="a dog"), Prompt("one bus")]
    grid = ComparisonGrid(prompts, 2, SEED)
    images = grid.generate(policy, policy.sampling)
    for row, prompt in enumerate(prompts):
        for sample in (0, 1):
            single = image(policy, prompt, "grid", row, sample)
            torch.testing.assert_close(images[2 * row + sample], single, atol=1e-5, rtol=0)
    assert len({round(float(i.mean()), 6) for i in images}) == 6
    tuned = images.flip(0)
    for names, marks in (
        (("brightness", "is_cat"), [[[f"{float(i.mean()):.2f}" for i in block[s]] for block in (images, tuned)] for s in (slice(0, 2), slice(2, 4), slice(4, 6))]),
        (("is_cat", "brightness"), [[["✗", "✗"]] * 2, [["✓", "✓"]] * 2, [["✗", "✗"]] * 2]),
    ):  # fmt: skip
        scorer = scorer_of(*names)
        file = tmp_path / names[0] / "grid.png"
        grid.save(["base", "tuned"], [images, tuned], scorer, policy.sampling, "a title", file)
        assert file.exists()
        rows, columns, title, subtitle = drawn.pop()
        assert (columns, title) == (["base", "tuned"], "a title")
        assert f"2 steps, guidance {policy.sampling.guidance_scale:g}, 16x16, seed {SEED}" in subtitle  # fmt: skip
        assert subtitle.endswith(f"marks: {names[0]}")
        assert [r.label for r in rows] == ["a cube", "a cat", "one bus"]
        assert [[list(n) for n in r.notes] for r in rows] == marks
        for number, row in enumerate(rows):
            for shown, block in zip(row.blocks, (images, tuned), strict=True):
                assert torch.equal(shown, block[2 * number : 2 * number + 2])
            assert list(row.conditions) == []
        scorer.close()


# Evaluations of a run.


@pytest.fixture
def evaluator(policy: PipelinePolicy, tmp_path: Path, drawn: list[tuple[Any, ...]]) -> Any:
    settings = [
        f"run.folder={tmp_path / 'run'}", f"run.seed={SEED}", "run.device=cpu", "run.threads=1", "run.trackers=[]",
        "train.ema_decay=0.9", "evaluation.images=4", "evaluation.images_during=2", "evaluation.every=3",
        "evaluation.grid_prompts=2", "evaluation.grid_samples=1", f"evaluation.metrics=['{HERE}:first_and_last']",
    ]  # fmt: skip
    config = flowgrpo.load("quickstart_flow_grpo", settings)
    with Session(config) as session:
        learner = Learner(policy, config.train, ClippedLoss(), session.accelerator)
        scorer = scorer_of("brightness", ignores_prompt=True)
        subject = Evaluator(
            config.evaluation, session, scorer, policy, learner, PROMPTS,
            sampling=policy.sampling, seed=SEED, model_name="the model",
        )  # fmt: skip
        subject.keep_base_images()
        subject.resume()
        start = [p.detach().clone() for p in learner.parameters]
        yield subject
        with torch.no_grad():
            for parameter, weight in zip(learner.parameters, start, strict=True):
                parameter.copy_(weight)
        scorer.close()
        session.close()


def move(weights: Sequence[Tensor], by: float) -> None:
    with torch.no_grad():
        for number, weight in enumerate(weights):
            weight += by * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))  # fmt: skip


def test_the_moving_average_is_evaluated_drawn_and_kept_as_the_best(evaluator: Evaluator, drawn: list[tuple[Any, ...]]) -> None:  # fmt: skip
    policy, learner, session = evaluator.policy, evaluator.learner, evaluator.session
    assert learner.ema is not None
    move(learner.parameters, 0.3)
    move(learner.ema.average, 0.1)
    trained = [p.detach().clone() for p in learner.parameters]
    evaluator.evaluate(5, full=True)
    assert all(torch.equal(p, t) for p, t in zip(learner.parameters, trained, strict=True))

    # The averages put in by hand.
    def brightness_of(weights: Sequence[Tensor], number: int) -> float:
        with torch.no_grad():
            for parameter, weight in zip(learner.parameters, weights, strict=True):
                parameter.copy_(weight)
        items = held_out.plan(PROMPTS, number)
        return sum(float(image(policy, i.prompt, "evaluation", i.index).mean()) for i in items) / number  # fmt: skip

    own = brightness_of(trained, 4)
    expected = brightness_of(learner.ema.average, 4)
    grid = [image(policy, p, "grid", row, 0) for row, p in enumerate(evaluator.comparison_grid.prompts)]  # fmt: skip
    brightness_of(trained, 1)
    (result,) = evaluator.evaluations
    assert abs(own - expected) > 1e-3
    assert result["scores"]["brightness"] == pytest.approx(expected, abs=1e-5)
    assert (result["iteration"], result["images"]) == (5, 4)
    assert result["metrics"]["samples"] == 4
    ((rows, columns, title, _),) = drawn
    assert (columns, title) == (["base", "after 5 iterations"], "the model: run")
    assert session.grid(5).exists()
    for shown, base, tuned in zip(rows, evaluator.base_images, grid, strict=True):
        torch.testing.assert_close(shown.blocks[0][0], base, atol=1e-6, rtol=0)
        torch.testing.assert_close(shown.blocks[1][0], tuned, atol=1e-5, rtol=0)
    parts, state = checkpoints.load(session.checkpoints / "best")
    assert state == {"iteration": 5, "score": result["reward"]}
    for name, average in zip(learner.named, learner.ema.average, strict=True):
        assert torch.equal(parts["weights"][name], average)
    assert session.past_evaluations()[0]["scores"] == result["scores"]

    # Fewer images in between; without an average the trained weights are evaluated.
    learner.ema = None
    evaluator.evaluate(6, full=False)
    assert evaluator.evaluations[1]["images"] == 2
    assert evaluator.evaluations[1]["scores"]["brightness"] == pytest.approx(brightness_of(trained, 2), abs=1e-5)  # fmt: skip


def test_other_ways_to_sample_are_evaluated_when_they_are_due(evaluator: Evaluator, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    usual = evaluator.sampling
    regimes = (Regime(num_steps=3, images=2, when="every"), Regime(guidance_scale=5.0))
    object.__setattr__(evaluator.settings, "regimes", regimes)
    evaluator.learner.ema = None
    for iteration, full in ((0, True), (1, False)):
        evaluator.evaluate(iteration, full)
    said = " ".join(capsys.readouterr().out.split())
    first, second = evaluator.evaluations
    assert list(first["regimes"]) == ["steps_3", "guidance_5"]
    assert list(second["regimes"]) == ["steps_3"]
    for tag, sampling, number in (
        ("steps_3", dataclasses.replace(usual, num_steps=3), 2),
        ("guidance_5", dataclasses.replace(usual, guidance_scale=5.0), 4),
    ):
        items, noise = held_out.plan(PROMPTS, number), Random(SEED)
        media = [
            evaluator.policy.images([i.prompt], SampleNoise([noise.at("evaluation", i.index)]), sampling=sampling)[0]
            for i in items
        ]  # fmt: skip
        expected = sum(float(m.mean()) for m in media) / number
        table = first["regimes"][tag]
        assert table["scores"]["brightness"] == pytest.approx(expected, abs=1e-5)
        assert abs(expected - first["scores"]["brightness"]) > 1e-5
        assert (table["images"], table["metrics"]["samples"]) == (number, number)
        assert f"held out, {tag}, after 0 iterations, {number} images" in said
    # The best weights depend on the evaluation itself, and times are not among the results.
    assert checkpoints.load(evaluator.session.checkpoints / "best")[1]["score"] == first["reward"]
    stored = evaluator.session.past_evaluations()[0]["regimes"]["steps_3"]
    assert stored == {k: v for k, v in first["regimes"]["steps_3"].items() if k != "seconds"}


def test_the_best_is_the_highest_reward_so_far(evaluator: Evaluator) -> None:
    session, learner = evaluator.session, evaluator.learner
    kept = []
    for iteration, score in enumerate([0.5, 0.4, 0.5, 0.7, -1.0, 0.6]):
        session.save_best(learner, iteration, score)
        kept.append((checkpoints.load(session.checkpoints / "best")[1]["iteration"], session.best))
    assert kept == [(0, 0.5), (0, 0.5), (0, 0.5), (3, 0.7), (3, 0.7), (3, 0.7)]


def test_when_an_evaluation_is_due(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, bool]] = []
    monkeypatch.setattr(evaluator, "evaluate", lambda iteration, full: made.append((iteration, full)))  # fmt: skip
    for iteration in range(8):
        evaluator.evaluate_if_due(iteration)
    assert made == [(0, True), (3, False), (6, False)]
    made.clear()
    object.__setattr__(evaluator.settings, "every", 0)
    for iteration in range(4):
        evaluator.evaluate_if_due(iteration)
    assert made == [(0, True)]


def test_a_resumed_run_keeps_the_base_images_and_the_results(evaluator: Evaluator) -> None:
    evaluator.evaluate(0, full=False)
    base = evaluator.base_images.clone()
    move(evaluator.learner.parameters, 0.3)
    again = Evaluator(
        evaluator.settings, evaluator.session, evaluator.scorer, evaluator.policy, evaluator.learner, PROMPTS,
        sampling=evaluator.sampling, seed=SEED, model_name="the model",
    )  # fmt: skip
    again.keep_base_images()
    again.resume()
    assert torch.equal(again.base_images, base)
    expected = {k: v for k, v in evaluator.evaluations[0].items() if k != "seconds"}
    assert again.evaluations == [expected]


def test_the_first_result_of_each_benchmark_is_said() -> None:
    def table(value: float | None, **more: Any) -> dict[str, Any]:
        return {
            "title": "GenEval", "images": 20, "main": ["overall", "second"],
            "results": {"overall": value, "second": 1.0}, "intervals": {"overall": [0.25, 0.75]}, "changes": {},
        } | more  # fmt: skip

    first = table(0.5)
    better = table(0.75, changes={"overall": [0.25, 0.125, 0.375]})
    perhaps = table(0.5, changes={"overall": [-0.0625, -0.25, 0.125]})
    unknown = table(None, intervals={"overall": [None, None]}, changes={"overall": [None, None, None]})  # fmt: skip
    assert bench_lines({"a": first, "b": better, "c": perhaps, "d": unknown, "e": {"problem": "no"}}) == [
        "GenEval, 20 images: overall 0.5 (0.25 to 0.75)",
        "GenEval, 20 images: overall 0.75 (0.25 to 0.75), +0.25 since the first evaluation",
        "GenEval, 20 images: overall 0.5 (0.25 to 0.75), -0.0625 since the first evaluation, within noise",
        "GenEval, 20 images: overall unknown (unknown to unknown), unknown since the first evaluation, within noise",
    ]  # fmt: skip


def test_benchmarks_of_a_run_are_recorded(evaluator: Evaluator, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    asked: list[Any] = []

    class Benchmarks:
        def run(self, iteration: int, full: bool) -> dict[str, Any]:
            asked.append((iteration, full))
            return {"x": {"problem": "judge away"}} if iteration else {}

    evaluator.benchmarks = Benchmarks()  # type: ignore[assignment]
    for iteration in (0, 1):
        evaluator.evaluate(iteration, full=not iteration)
    assert asked == [(0, True), (1, False)]
    assert ["bench" in e for e in evaluator.evaluations] == [False, True]
    assert evaluator.session.best == max(e["reward"] for e in evaluator.evaluations)
    evaluator.benchmarks = None
    evaluator.settings = replace(evaluator.settings, images_during=0)
    evaluator.evaluate(2, full=False)
    assert evaluator.evaluations[2]["images"] == 4, "0: always all images"
    assert "held out, after 2 iterations, 4 images: brightness" in " ".join(capsys.readouterr().out.split())  # fmt: skip
