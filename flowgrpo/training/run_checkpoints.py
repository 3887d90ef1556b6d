"""Finds a checkpoint of a run: the last one, that of an iteration, or the best one by a measured number."""

from pathlib import Path

from flowgrpo.config import load
from flowgrpo.config.files import CONFIG
from flowgrpo.core.measures import Measured, best_of
from flowgrpo.core.text import counted
from flowgrpo.evaluation.records import read_lines
from flowgrpo.training import checkpoints

BEST, LAST = "best", "last"
NAMES = "best, best:NAME (of a held-out number, such as best:strict or best:min:artefacts/grid), last or a number of iterations"


def is_name(text: str) -> bool:
    """Whether a text can name a checkpoint."""
    return (
        text in (BEST, LAST) or text.isdecimal() or (text.startswith(f"{BEST}:") and text[5:] != "")
    )


def find_checkpoint(folder: Path, name: str) -> Path:
    """The folder of a run's checkpoint.

    Args:
        folder: The run directory.
        name: ``best``, ``best:NAME``, ``last``, or the number of its iterations. ``NAME`` is a number of
            evaluations, as for ``evaluation.best``.

    Raises:
        FileNotFoundError: If there is no such checkpoint; the message names those that are there.
        ConfigError: If evaluations have no number of this name.
    """
    inside = folder / "checkpoints"
    if name.isdecimal():
        known = _by_iteration(inside)
        if int(name) not in known:
            there = ", ".join(map(str, sorted(known))) or "none"
            raise FileNotFoundError(
                f"{folder} has no checkpoint after {counted(int(name), 'iteration')} (there: {there}); "
                "run.keep_checkpoints says how many are kept"
            )
        return known[int(name)]
    if name.startswith(f"{BEST}:"):
        return _best_by(folder, Measured.parse(name.removeprefix(f"{BEST}:")))
    place = inside / BEST if name == BEST else checkpoints.newest(inside)
    if place is None or not place.exists():
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    return place


def _best_by(folder: Path, number: Measured) -> Path:
    """The checkpoint of the evaluation with the best value of a number, if it is still there."""
    inside, config = folder / "checkpoints", load(str(folder / CONFIG))
    kept = inside / (BEST if number == Measured.parse(config.evaluation.best) else number.folder)
    if kept.exists():
        return kept
    evaluations = read_lines(folder / "evaluations.jsonl", required="scores")
    if not evaluations:
        raise FileNotFoundError(f"{folder} has no evaluation yet, so no checkpoint is the best")
    number.require(evaluations[-1], "the checkpoint best")
    best = best_of(evaluations, number)
    if best is None:
        raise FileNotFoundError(f"{folder}: no evaluation has a value of {number.name!r}")
    iteration = int(best.get("weights_after", best["iteration"]))
    known = _by_iteration(inside)
    if iteration in known:
        return known[iteration]
    value = f"the best {number.name}, {number.of(best):.4g}, "
    if iteration == 0:
        raise FileNotFoundError(f"{folder}: {value}is that of the model before training")
    values = {e["iteration"]: number.of(e) for e in evaluations}
    nearest = min(known, key=lambda i: (abs(i - iteration), i), default=None)
    if nearest is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    measured = f", with {values[nearest]:.4g}" if nearest in values else ", which was not evaluated"
    raise FileNotFoundError(
        f"{folder}: {value}was measured after {counted(iteration, 'iteration')}, and that checkpoint was not kept. The "
        f"nearest is {nearest}{measured} (there: {', '.join(map(str, sorted(known)))}). To keep the best in a "
        f"run, set evaluation.keep_best = ['{number}']"
    )


def _by_iteration(inside: Path) -> dict[int, Path]:
    """The complete checkpoints by their iterations; also the best ones, whose weights were evaluated."""
    found = {}
    for place in inside.glob(f"{BEST}*"):
        if (place / checkpoints.STATE).exists():
            found[int(checkpoints.peek(place)["iteration"])] = place
    return found | {int(p.name): p for p in checkpoints.complete(inside) if p.name.isdecimal()}
