"""Signs of reward hacking: changes from the model before training that no reward has to notice."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from flowgrpo.evaluation.charts import number
from flowgrpo.evaluation.curves import section
from flowgrpo.evaluation.records import Change, Records

FEWEST = 50
"""Images of an evaluation below which the measures are too noisy for a warning."""


@dataclass(frozen=True)
class Sign:
    """A measure of :mod:`flowgrpo.evaluation.artefacts`, and the change that is a warning.

    Attributes:
        name: Its name in ``evaluations.jsonl``.
        title: Its name in the report.
        meaning: What a larger change means, as a clause.
        factor: Largest healthy ratio to the value before training; below 1, the smallest. None if the
            difference counts.
        difference: Largest healthy difference, if ``factor`` is None.
    """

    name: str
    title: str
    meaning: str
    factor: float | None = None
    difference: float = 0.0

    def limit(self, before: float) -> float:
        """The value beyond which there is a warning."""
        return before + self.difference if self.factor is None else before * self.factor

    def is_seen(self, before: float, after: float) -> bool:
        """Whether the measure has passed its limit; not if a value is missing."""
        falls = self.factor is not None and self.factor < 1
        return after < self.limit(before) if falls else after > self.limit(before)


SIGNS = (
    Sign("high_frequency", "High frequencies, share of the spectrum", "images contain more fine noise or texture than before training", factor=1.5),
    Sign("grid", "Highest peak of the spectrum, log10", "images contain a periodic grid that they did not have before training", difference=0.4),
    Sign("saturation", "Saturation", "colours are more saturated than before training", factor=1.3),
    Sign("contrast", "Contrast", "contrast is higher than before training", factor=1.3),
    Sign("clipped", "Clipped values, share", "more values than before training are black or white", difference=0.05),
    Sign("variety", "Difference between images of a prompt", "images of a prompt are more alike than before training", factor=0.8),
    Sign("duplicates", "Near-duplicates of other prompts, share", "different prompts get nearly the same image", difference=0.05),
)  # fmt: skip
"""The limits are argued in docs/metrics.md: above what a healthy run changes, below damage that is hard to
see."""


def seen(first: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """The signs of an evaluation, compared with the one before training.

    Args:
        first: The evaluation of the model before training, as a line of ``evaluations.jsonl``.
        now: A later one.

    Returns:
        A sentence for each measure beyond its limit, by its name.
    """
    found: dict[str, str] = {}
    if min(first.get("images", 0), now.get("images", 0)) < FEWEST:
        return found
    for sign in SIGNS:
        before, after = _value(first, sign), _value(now, sign)
        if sign.is_seen(before, after):
            found[sign.name] = (
                f"{sign.name} changed from {number(before)} to {number(after)} (limit "
                f"{number(sign.limit(before))}): {sign.meaning}. The model may be "
                "exploiting the reward; look at the images."
            )
    return found


def fallen(changes: Sequence[Change], weights: Mapping[str, float]) -> dict[str, str]:
    """A sentence for each score that is not trained on and fell while a trained one rose, by its name."""
    trained_rose = any(c.kind == "rose" and weights.get(c.name, 1) > 0 for c in changes)
    return {
        c.name: f"{c.name} is not trained on, and fell ({c.difference}) while a score that is trained on "
        "rose. The model may be exploiting the reward; look at the images."
        for c in changes
        if trained_rose and c.kind == "fell" and weights.get(c.name, 1) == 0
    }


def changes_between(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The change of each score between two evaluations, with its standard error."""
    found = []
    for name in now["scores"]:
        errors = [e.get("errors", {}).get(name) for e in (first, now)]
        error = math.hypot(*map(_float, errors))
        before, after = (_float(e["scores"].get(name)) for e in (first, now))
        in_points = all(0 <= v <= 1 for v in (before, after))
        known = error if math.isfinite(error) else None
        found.append(Change(name, before, after, known, in_points))
    return found


def hacking_section(records: Records) -> str:
    """A table of all measures before training and in the last evaluation, with their limits."""
    if len(records.evaluations) < 2:
        return ""
    first, last = records.evaluations[0], records.evaluations[-1]
    found = seen(first, last)
    rows = []
    for sign in SIGNS:
        before, after = _value(first, sign), _value(last, sign)
        if not (math.isfinite(before) and math.isfinite(after)):
            continue
        mark = "▼ beyond the limit" if sign.name in found else "within the limit"
        cells = [sign.title, number(before), number(after), number(sign.limit(before)), mark]
        rows.append("".join(f"<td>{escape(c)}</td>" for c in cells))
    if not rows:
        return ""
    names = ("", "before", "after", "limit", "")
    head = "".join(f"<th>{n}</th>" for n in names)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    note = (
        "Properties of held-out images that no reward has to notice. The limits follow from the values "
        "before training."
    )
    few = min(first.get("images", 0), last.get("images", 0)) < FEWEST
    if few:
        note += f" With fewer than {FEWEST} images they are too noisy to warn."
    table = f'<div class="card scroll"><table><tr>{head}</tr>{body}</table></div>'
    return section("Signs of reward hacking", note, table)


def _value(evaluation: Mapping[str, Any], sign: Sign) -> float:
    return _float(evaluation.get("artefacts", {}).get(sign.name))


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
