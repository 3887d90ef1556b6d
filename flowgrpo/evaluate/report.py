"""The report of a run: one HTML file that needs no network, made from the run directory.

It says in words what the held-out scores did, by how much and whether that is more than noise, warns
about what the metrics show to be wrong, and holds every curve, the newest grid, the times and the
configuration.
"""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from flowgrpo.evaluate.charts import (
    Point,
    number,
    points,
)  # fmt: skip

RECENT = 20
"""Iterations that count as the present state of the run."""

METRICS: dict[str, tuple[str, str]] = {
    "score": ("Score", "Raw mean on training samples. Rises if trained on; must not fall if only watched."),
    "reward_std": ("Reward spread", "Standard deviation over samples. Above zero; shrinks as prompts are mastered."),
    "group/zero_variance": ("Groups without variance", "Prompts whose samples all score alike and teach nothing. Below 0.5."),
    "group/diversity": ("Diversity within groups", "How unlike one prompt's samples are. Level; a slide is collapse."),
    "group/duplicates": ("Duplicates", "Samples that repeat another of their group. Zero."),
    "log_prob/noise": ("Log-prob noise floor", "Gap between rollout and replay before an update. Far below the clip range."),
    "ratio/deviation": ("Ratio deviation", "How far updates move |ratio − 1|. Of the clip range's order or less."),
    "ratio/clip_fraction": ("Clip fraction", "Actions beyond the clip range. Below about 0.3; zero while on-policy."),
    "grad_norm": ("Gradient norm", "Before it is scaled down. One order of magnitude, no spikes."),
    "loss/policy": ("Policy loss", "Hovers around zero. Its size says nothing about progress."),
    "loss/kl": ("KL to the reference", "Grows slowly and levels off. A steep climb is drift."),
    "drift/velocity": ("Velocity drift", "Distance of the outputs from the base model's. Grows slowly and levels off."),
    "diversity": ("Diversity", "On held-out prompts. Level; a fall means that the images grow alike."),
    "lr": ("Learning rate", "Follows the schedule in the configuration."),
    "failures": ("Failed scores", "Scores that a reward model did not give. Zero."),
    "skipped_updates": ("Skipped updates", "Left out because the gradient norm spiked. Zero."),
    "nfe_per_prompt": ("Denoiser evaluations per prompt", "What a rollout costs. Constant, unless steps are drawn at random."),
    "decodes_per_prompt": ("Decodes per prompt", "Images decoded and scored. Constant."),
}  # fmt: skip
"""Title and what healthy looks like, by key or by the beginning of a key before a slash."""


@dataclass(frozen=True)
class Change:
    """One held-out score before and after.

    Attributes:
        name: The score or the task.
        before: Mean of the first evaluation; NaN if there is none.
        after: Mean of the last.
        error: Standard error of ``after - before``; ``None`` where it cannot be known.
        bounded: Whether the score lies in [0, 1] and is told in points.
    """

    name: str
    before: float
    after: float
    error: float | None
    bounded: bool

    @property
    def kind(self) -> str:
        """``rose`` or ``fell`` by more than two standard errors, ``noise``, or ``unmeasured``."""
        difference = self.after - self.before
        if not math.isfinite(difference):
            return "unmeasured"
        if abs(difference) <= 2 * (self.error or 0.0):
            return "noise"
        return "rose" if difference > 0 else "fell"

    def show(self, value: float) -> str:
        return points(value) if self.bounded else number(value)

    @property
    def difference(self) -> str:
        """Such as ``+3.1 ± 1.2``."""
        value = self.after - self.before
        text = f"{'+' if value > 0 else ''}{self.show(value)}"
        return text if self.error is None else f"{text} ± {self.show(self.error)}"

    @property
    def sentence(self) -> str:
        """HTML."""
        unit = " points" if self.bounded else ""
        span = f"{self.show(self.before)} to {self.show(self.after)}{unit} ({self.difference})"
        name = f"<b>{escape(self.name)}</b>"
        if self.kind == "unmeasured":
            return f"{name} could not be measured"
        if self.kind == "noise":
            still = "did not change" if self.error is None else "stayed within noise"
            return f"{name} {still}: {span}"
        return f"{name} {self.kind} from {span}"


def standard_error(mean: float, images: int) -> float:
    """Of the mean of ``images`` scores in [0, 1]: a proportion's, the largest such a mean can have.

    One success and one failure are added (Agresti and Caffo, 2000), so that 5 out of 5 is not sure.
    """
    share = (mean * images + 1) / (images + 2)
    return math.sqrt(share * (1 - share) / (images + 2))


class Records:
    """What a run directory holds; every file but one of metrics and evaluations may be missing."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics = _lines(folder / "metrics.jsonl")
        self.timings = _lines(folder / "timings.jsonl")
        self.evaluations = _lines(folder / "evaluations.jsonl", nested=True)
        if not self.metrics and not self.evaluations:
            raise ValueError(f"{folder}: neither metrics.jsonl nor evaluations.jsonl has a line")
        self.config_text = _text(folder / "config.toml")
        try:
            self.config = tomllib.loads(self.config_text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{folder / 'config.toml'}: not valid TOML: {error}") from error
        self.environment = _object(
            _text(folder / "environment.json") or "{}", folder / "environment.json"
        )
        grids = sorted((folder / "grids").glob("*.png"))
        newest = max((_iteration(g) for g in grids), default=0)
        self.grids = [g for g in grids if _iteration(g) == newest]

    def setting(self, key: str) -> Any:
        """A dotted key of the configuration, or ``None``."""
        here: Any = self.config
        for part in key.split("."):
            here = here.get(part) if isinstance(here, dict) else None
        return here

    def weights(self) -> dict[str, float]:
        """The weight of each reward by its name in metrics; zero is only watched."""
        rewards = self.config.get("rewards", [])
        label = (lambda r: r.get("name") or re.split(r"[.:]", str(r.get("model")))[-1])  # fmt: skip
        return {label(r): float(r.get("weight", 1.0)) for r in rewards}

    def series(self, key: str) -> list[Point]:
        """A metric over iterations; ``null`` becomes NaN."""
        return [(m["iteration"], _float(m[key])) for m in self.metrics if key in m]

    def measures(self) -> dict[str, list[Point]]:
        """What evaluations measured besides scores, over iterations."""
        found: dict[str, list[Point]] = {}
        for line in self.evaluations:
            extra = {k: v for k, v in line.items() if "/" in k} | line.get("measures", {})
            for key, value in extra.items():
                found.setdefault(key, []).append((line["iteration"], _float(value)))
        return found

    def bounded(self, score: str) -> bool:
        """Whether a held-out score is always in [0, 1], over all evaluations and tasks."""
        tables = [
            t for e in self.evaluations for t in (e["scores"], *e.get("by_class", {}).values())
        ]
        return all(0 <= t[score] <= 1 for t in tables if math.isfinite(_float(t.get(score))))

    def error(self, table: Mapping[str, Any], score: str, mean: float) -> float | None:
        """Standard error of a mean: the one recorded under ``errors``, or a proportion's."""
        if score in table.get("errors", {}):
            return float(table["errors"][score])
        images = table.get("images", 0)
        known = images > 0 and math.isfinite(mean) and self.bounded(score)
        return standard_error(mean, images) if known else None

    def change(self, score: str, task: str | None = None) -> Change:
        """From the first evaluation to the last, of all images or of one task."""
        tables = [e if task is None else e.get("by_class", {}).get(task, {}) for e in self._ends()]
        means = [_float((t["scores"] if task is None else t).get(score)) for t in tables]
        errors = [self.error(t, score, mean) for t, mean in zip(tables, means, strict=True)]
        known = [e for e in errors if e is not None]
        error = math.hypot(*known) if len(known) == len(errors) else None
        return Change(task or score, means[0], means[-1], error, self.bounded(score))

    def _ends(self) -> list[dict[str, Any]]:
        return [self.evaluations[0], self.evaluations[-1]]

    def scores(self) -> list[str]:
        """The held-out scores, those that are trained on first."""
        names = list(dict.fromkeys(k for e in self.evaluations for k in e["scores"]))
        return sorted(names, key=lambda name: self.weights().get(name, 1) == 0)

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(k for e in self._ends() for k in e.get("by_class", {})))


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _iteration(path: Path) -> int:
    """The number that a grid's name begins with."""
    found = re.match(r"\d+", path.stem)
    return int(found[0]) if found else -1


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""
