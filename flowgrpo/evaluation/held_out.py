"""Held-out evaluation: scores images of fixed prompts, drawn deterministically from fixed noise.

The prompts are not trained on, and every evaluation of a run uses the same initial noise, so that
differences between two evaluations come from the weights alone.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.scores import Scores
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Prompt
from flowgrpo.evaluation.artefacts import measure, summarise
from flowgrpo.evaluation.samples import Sample, extremes, thumbnail
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.policy.rollout import Rollout
from flowgrpo.rewards.scorer import RewardScorer

Metric = Callable[[Sequence[Prompt], Sequence[Float[Tensor, "_ *_"]]], Mapping[str, float]]
"""A function of all samples of each prompt at once, such as a diversity. It gets prompts and, for each
of them, its media ``(samples, ...)`` in [0, 1], and returns numbers by name. Each process calls it with its
prompts, and the mean over processes, weighted by their numbers of prompts, is reported; of a mean over
prompts this is the mean over all of them."""


@dataclass(frozen=True)
class Item:
    """One image of an evaluation.

    Attributes:
        index: Position in the evaluation, from which its noise is derived.
        prompt: The prompt.
        sample: Number of the image among those of its prompt.
    """

    index: int
    prompt: Prompt
    sample: int


def plan(prompts: PromptSet, number: int) -> list[Item]:
    """Choose ``number`` images, spread evenly over the classes of prompts and the prompts of each."""
    return [Item(i, p, s) for i, (p, s) in enumerate(prompts.spread(number))]


def noise_for(items: Sequence[Item], seed: int) -> SampleNoise:
    """The noise streams of evaluation images, which depend only on the seed and the image's index."""
    return SampleNoise([Random(seed).at("evaluation", item.index) for item in items])


def evaluate(
    policy: PipelinePolicy,
    scorer: RewardScorer,
    items: Sequence[Item],
    *,
    seed: int,
    sampling: Sampling,
    balance: str = "",
    metrics: Sequence[Metric] = (),
    artefacts: bool = False,
    gather: Callable[[list[Any]], list[Any]] = lambda rows: rows,
    rank: int = 0,
    num_ranks: int = 1,
    show: Callable[[Sequence[Sample]], None] | None = None,
) -> dict[str, Any]:
    """Generate and score held-out images.

    Args:
        policy: The policy, with the weights to evaluate.
        scorer: Runs the reward models.
        items: The images of all ranks, from :func:`plan`.
        seed: Seed of the noise.
        sampling: Arguments of the pipeline's call.
        balance: Metadata key by whose values scores are also reported; empty for none.
        metrics: Functions of all samples of a prompt.
        artefacts: Whether to measure the images apart from their prompts.
        gather: Concatenates the lists of all ranks.
        rank: Index of this process.
        num_ranks: Number of processes; each takes every ``num_ranks``-th prompt.
        show: Gets the images of highest and of lowest reward, on every rank. All ranks give it or none.

    Returns:
        ``images`` (their number), ``reward`` (mean), ``scores`` (means by reward), ``errors`` (standard
        errors of these means), ``by_class`` (the same by value of ``balance``), ``metrics``,
        ``artefacts`` (:func:`flowgrpo.evaluation.artefacts.summarise`), ``per_image`` (lists in the order
        of the images: ``prompt``, the number of the prompt among the evaluated ones; ``class``;
        ``scores`` by reward) and ``seconds``.
    """
    began = time.perf_counter()
    scorer.reset()
    scorer.iteration = None  # full weights, whatever their schedule, to be comparable over time
    # Prompts are identified as objects, since one text may occur with several condition images.
    keys = {id(p): n for n, p in enumerate({id(i.prompt): i.prompt for i in items}.values())}
    mine = [i for i in items if keys[id(i.prompt)] % num_ranks == rank]
    with policy.together():
        own = policy.run([i.prompt for i in mine], noise_for(mine, seed), sampling=sampling)
        rows, images = _scored(own, scorer, mine, keys, balance, artefacts)
    rows = sorted(gather(rows), key=lambda r: r["index"])
    if show is not None:
        show(_samples(rows, {i.index: i.prompt.text for i in items}, images, gather))
    return {
        **_summary(rows),
        "metrics": _metrics(metrics, mine, keys, images, gather),
        **({"artefacts": _artefacts(rows)} if artefacts else {}),
        "per_image": _per_image(rows),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _scored(
    rollouts: Iterable[Rollout],
    scorer: RewardScorer,
    items: Sequence[Item],
    keys: Mapping[int, int],
    balance: str,
    artefacts: bool,
) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """A row for each image, and the images by index, scored while the next ones are drawn."""
    rows: list[dict[str, Any]] = []
    images: dict[int, Tensor] = {}
    measured: dict[int, dict[str, Any]] = {}
    pending = []
    for rollout in rollouts:
        assert rollout.media is not None
        part = items[rollout.rows.start : rollout.rows.stop]
        scores = scorer.submit(rollout.media, [i.prompt for i in part], rollout.audio)
        pending.append((part, scores))
        for item, image in zip(part, rollout.media, strict=True):
            if artefacts:
                measured[item.index] = measure(image)
            images[item.index] = image
    for part, future in pending:
        rows += _rows(part, keys, future.result(), balance)
    return [{**r, "measured": measured.get(r["index"])} for r in rows], images


def _rows(
    items: Sequence[Item], keys: Mapping[int, int], scores: Scores, balance: str
) -> list[dict[str, Any]]:
    """One plain dictionary per image of a batch, which processes can exchange.

    Args:
        items: The images of the batch.
        keys: The number of each prompt, by its identity as an object.
        scores: Their scores.
        balance: Metadata key of the class.
    """
    return [
        {
            "index": item.index,
            "prompt": keys[id(item.prompt)],
            "class": str(item.prompt.metadata.get(balance, "")) if balance else "",
            "scores": {k: float(v[row]) for k, v in scores.raw.items()},
            "reward": float(scores.reward[row]),
        }
        for row, item in enumerate(items)
    ]


def _samples(
    rows: Sequence[Mapping[str, Any]],
    texts: Mapping[int, str],
    images: Mapping[int, Tensor],
    gather: Callable[[list[Any]], list[Any]],
) -> list[Sample]:
    """The images of highest and of lowest reward.

    Args:
        rows: The images of all ranks, from :func:`_rows`.
        texts: The prompt of each image, by its index.
        images: The images of this rank, by their index.
        gather: Concatenates the lists of all ranks.
    """
    chosen = extremes(rows)
    pictures = dict(gather([(n, thumbnail(images[n])) for n in chosen if n in images]))
    known = {r["index"]: r for r in rows}
    found = []
    for n, group in chosen.items():
        scores = {k: v for k, v in known[n]["scores"].items() if math.isfinite(v)}
        found.append(Sample(group, texts[n], known[n]["reward"], scores, pictures[n]))
    return found


def _per_image(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The prompt, the class and the scores of each image, as lists."""
    names = rows[0]["scores"] if rows else ()
    return {
        "prompt": [r["prompt"] for r in rows],
        "class": [r["class"] for r in rows],
        "scores": {k: [r["scores"][k] for r in rows] for k in names},
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and their standard errors, over all images and by class."""
    classes: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row)
    return {
        "images": len(rows),
        # Without any reward there is no number.
        "reward": _mean([r["reward"] for r in rows if r["scores"]]),
        "scores": _means(rows),
        "errors": _errors(rows),
        "by_class": {
            name: {**_means(part), "errors": _errors(part), "images": len(part)}
            for name, part in sorted(classes.items())
            if name
        },
    }


def _artefacts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return summarise([r["measured"] for r in rows], [r["prompt"] for r in rows])


def _metrics(
    metrics: Sequence[Metric],
    items: Sequence[Item],
    keys: Mapping[int, int],
    images: Mapping[int, Tensor],
    gather: Callable[[list[Any]], list[Any]],
) -> dict[str, float]:
    """The numbers of all metrics: means over the ranks, weighted by their numbers of prompts.

    Args:
        metrics: The metrics.
        items: The images of this rank.
        keys: The number of each prompt, by its identity as an object.
        images: The images, by their index.
        gather: Concatenates the lists of all ranks.
    """
    prompts = {keys[id(i.prompt)]: i.prompt for i in items}
    media: dict[int, list[Tensor]] = {}
    for item in items:
        media.setdefault(keys[id(item.prompt)], []).append(images[item.index])
    names = sorted(media)
    measured: dict[str, float] = {}
    if names:  # There may be more processes than prompts.
        stacked = [torch.stack(media[n]) for n in names]
        own = [prompts[n] for n in names]
        measured = {k: v for m in metrics for k, v in m(own, stacked).items()}
    return _joined(gather([(len(names), measured)]))


def _joined(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The metrics of all processes: means weighted by their numbers of prompts, without NaN."""
    result = {}
    for name in dict.fromkeys(name for _, part in parts for name in part):
        known = [(n, part[name]) for n, part in parts if name in part and part[name] == part[name]]
        total = sum(n for n, _ in known)
        result[name] = sum(n / total * v for n, v in known) if known else float("nan")
    return result


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {k: _mean([r["scores"][k] for r in rows]) for k in (rows[0]["scores"] if rows else ())}


def _errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Standard errors of the means, over images with a finite score."""
    result = {}
    for name in rows[0]["scores"] if rows else ():
        finite = torch.tensor(
            [r["scores"][name] for r in rows if r["scores"][name] == r["scores"][name]]
        )
        result[name] = (
            float(finite.std(correction=0) / len(finite) ** 0.5) if len(finite) else float("nan")
        )
    return result


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = [v for v in values if v == v]
    return sum(finite) / len(finite) if finite else float("nan")
