"""Rubrics, the weighted questions of a judge: their files, and sparse weights fitted to preferences."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import expit

from flowgrpo.core.text import counted
from flowgrpo.data import strict_json

KEYS = ("rubric", "weight", "note")


@dataclass(frozen=True)
class Rubric:
    """One question about a picture, such as "Is the picture free of garbled text?".

    Attributes:
        text: The question; a higher score is better.
        weight: Its share in the score; not 0.
        note: A comment for readers of the file.
    """

    text: str
    weight: float = 1.0
    note: str = ""


def read_rubrics(given: str | Sequence[str | Mapping[str, Any]]) -> list[Rubric]:
    """Read rubrics from a file or from a configuration.

    A ``.txt`` file has one question per line; a ``.jsonl`` file and a list have questions, or
    objects ``{"rubric": "...", "weight": 1.0, "note": "..."}``.

    Raises:
        ValueError: Naming the line or entry and what is wrong with it.
        FileNotFoundError: If there is no such file.
    """
    if not isinstance(given, str):
        rubrics = [_rubric(entry, f"rubrics, entry {i}") for i, entry in enumerate(given)]
        return _distinct(rubrics, "rubrics")
    path = Path(given)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"rubrics: {given!r} must be a .txt or .jsonl file, or a list")
    if not path.is_file():
        raise FileNotFoundError(f"no rubric file {path}")
    rubrics = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        where, entry = f"{path}, line {number}", line.strip()
        if path.suffix == ".jsonl":
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON: {error}") from error
        rubrics.append(_rubric(entry, where))
    if not rubrics:
        raise ValueError(f"{path}: no rubrics in it")
    return _distinct(rubrics, str(path))


def write_rubrics(path: Path, rubrics: Sequence[Rubric]) -> None:
    """Write a ``.jsonl`` file for :func:`read_rubrics`."""
    records = [{"rubric": r.text, "weight": r.weight, "note": r.note} for r in rubrics]
    path.write_text("".join(strict_json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def _rubric(entry: Any, where: str) -> Rubric:
    record = {"rubric": entry} if isinstance(entry, str) else entry
    if not isinstance(record, Mapping) or not record.keys() <= set(KEYS):
        raise ValueError(
            f"{where}: expected a question, or an object with {', '.join(KEYS)}; got {entry!r}"
        )
    text, weight, note = record.get("rubric"), record.get("weight", 1.0), record.get("note", "")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: 'rubric' must be some text, got {text!r}")
    if (
        not isinstance(weight, int | float)
        or isinstance(weight, bool)
        or not math.isfinite(weight)
        or weight == 0
    ):
        raise ValueError(f"{where}: 'weight' must be a number other than 0, got {weight!r}")
    return Rubric(text.strip(), float(weight), str(note))


def _distinct(rubrics: list[Rubric], where: str) -> list[Rubric]:
    texts = [r.text for r in rubrics]
    twice = next((t for i, t in enumerate(texts) if t in texts[:i]), None)
    if twice is not None:
        raise ValueError(f"{where}: the same rubric twice: {twice!r}")
    return rubrics


@dataclass(frozen=True)
class Fit:
    """Result of a sparse logistic regression.

    Attributes:
        weights: Weight of each candidate, 0 for those that are left out; they sum to 1.
        penalty: The chosen strength of the L1 penalty.
        accuracy: Share of held-out pairs that the weights order as people did, in cross-validation.
        pairs: Number of pairs in which every candidate has an answer.
    """

    weights: Float[np.ndarray, " rubrics"]
    penalty: float
    accuracy: float
    pairs: int


def fit_rubrics(
    differences: Float[np.ndarray, "pairs rubrics"],
    *,
    most: int = 0,
    folds: int = 5,
    seed: int = 0,
) -> Fit:
    """Fit weights of rubrics to preferences between pictures (arXiv:2605.17602).

    Minimises ``mean(log(1 + exp(-d @ w))) + penalty * sum(w)`` over ``w >= 0``, with ``d`` divided
    by each rubric's root mean square. There is no intercept, because a pair has no order,
    and no negative weight, because rubrics are phrased so that a higher score is better. The penalty
    is the strongest whose cross-validated loss is within a standard error of the best.

    Args:
        differences: Score of the preferred picture less that of the other, by rubric.
        most: Keep no more than this many, those with the largest weights; 0 for no limit.
        folds: Number of folds of the cross-validation.
        seed: Seed of the division into folds.

    Raises:
        ValueError: If there are too few pairs, or no candidate agrees with the preferences.
    """
    x = differences[np.isfinite(differences).all(axis=1)]
    if folds < 2 or len(x) < 2 * folds:
        raise ValueError(
            f"{len(x)} of {counted(len(differences), 'pair')} have an answer to every rubric; {counted(folds, 'fold')} "
            f"(at least 2) need at least {2 * folds}"
        )
    scale = np.sqrt((x**2).mean(axis=0))
    x = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
    strongest = float((x.mean(axis=0) / 2).max())
    if strongest <= 0:
        raise ValueError(
            "no candidate scores preferred pictures higher on average: give other candidates"
        )
    fold = np.random.default_rng(seed).permutation(len(x)) % folds
    penalties = strongest * np.logspace(-0.05, -2.5, 16)
    losses, hits = np.zeros((len(penalties), folds)), np.zeros((len(penalties), folds))
    for i, penalty in enumerate(penalties):
        for k in range(folds):
            margin = x[fold == k] @ _solve(x[fold != k], float(penalty))
            losses[i, k] = np.logaddexp(0, -margin).mean()
            hits[i, k] = ((margin > 0) + 0.5 * (margin == 0)).mean()
    mean = losses.mean(axis=1)
    best = int(mean.argmin())
    error = losses[best].std(ddof=1) / math.sqrt(folds)
    chosen = int(np.argmax(mean <= mean[best] + error))
    weights = np.divide(
        _solve(x, float(penalties[chosen])), scale, out=np.zeros_like(scale), where=scale > 0
    )
    if most and (weights > 0).sum() > most:
        weights[weights < np.sort(weights)[-most]] = 0
    if weights.sum() <= 0:
        raise ValueError(
            "every weight is 0 at the chosen penalty: give more pairs or other candidates"
        )
    return Fit(
        weights / weights.sum(), float(penalties[chosen]), float(hits[chosen].mean()), len(x)
    )


def _solve(x: np.ndarray, penalty: float) -> np.ndarray:
    """The weights for one penalty. For ``w >= 0`` the L1 norm is a sum, so the problem is smooth."""

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = x @ w
        gradient = -(x * expit(-margin)[:, None]).mean(axis=0) + penalty
        return float(np.logaddexp(0, -margin).mean() + penalty * w.sum()), gradient

    found = minimize(
        objective,
        np.zeros(x.shape[1]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * x.shape[1],
    )
    return np.asarray(found.x)
