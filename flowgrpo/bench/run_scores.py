"""The recorded scores and costs of runs, and which runs are seeds of one setting."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.bench.base import BenchError
from flowgrpo.bench.comparison import Measured
from flowgrpo.core.text import counted
from flowgrpo.evaluation.curves import total
from flowgrpo.evaluation.records import Records

if TYPE_CHECKING:
    from flowgrpo.config import Config
    from flowgrpo.policy import Sampling

AXES = ("iterations", "samples", "seconds", "denoiser evaluations")
"""The costs over which learning curves are drawn."""
SEED = "run."
"""Keys with this prefix (seed, device, threads, ...) do not make another setting."""


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation of a run.

    Attributes:
        cost: What was spent before it, by the names in :data:`AXES`; NaN if it is not recorded.
        scores: Mean of each reward.
    """

    cost: Mapping[str, float]
    scores: Mapping[str, float]


class RecordedRun:
    """A run directory with evaluations.

    Attributes:
        folder: The run directory.
        config: Its configuration.
        records: Its logs.
    """

    def __init__(self, folder: Path):
        """Read the configuration and the logs.

        Raises:
            ConfigError: If the configuration cannot be read, such as one of a newer version.
            ValueError: If a log is invalid, or there is none.
        """
        from flowgrpo.config import load

        self.folder = folder
        self.config: Config = load(str(folder / "config.toml"))
        self.records = Records(folder)

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.folder.resolve().name

    @cached_property
    def has_scores(self) -> bool:
        """Whether an evaluation recorded the scores of each image."""
        return any("per_image" in e for e in self.records.evaluations)

    def measured(self, at: str) -> Measured:
        """The scores of one evaluation.

        Args:
            at: ``last``, ``best`` (the highest held-out reward) or the number of iterations.

        Raises:
            BenchError: If there is no such evaluation with the scores of each image.
        """
        known = [e for e in self.records.evaluations if "per_image" in e]
        if at == "last":
            chosen = known[-1:]
        elif at == "best":
            rewards = [
                e for e in known if e.get("reward") is not None and math.isfinite(e["reward"])
            ]
            chosen = [max(rewards, key=lambda e: e["reward"])] if rewards else []
        else:
            chosen = [e for e in known if e["iteration"] == int(at)]
        if not chosen:
            there = ", ".join(str(e["iteration"]) for e in known)
            advice = f"choose one of the evaluations after {counted(there, 'iteration')} with --at" if there else (
                "draw the images again with --generate"
            )  # fmt: skip
            raise BenchError(f"{self.folder} has no recorded scores for --at {at}: {advice}")
        return Measured.of(self.name, chosen[0], self.config.run.seed)

    def before(self) -> Measured | None:
        """The scores before training, if each image's are recorded."""
        first = self.records.evaluations[0] if self.records.evaluations else {}
        if first.get("iteration") != 0 or "per_image" not in first:
            return None
        return Measured.of(self.name, first, self.config.run.seed)

    def in_regime(self, tag: str, iteration: int | None) -> Measured | None:
        """The scores of one evaluation, sampled in one of the ways of ``evaluation.regimes``.

        Returns:
            None if the evaluation after these iterations did not sample that way.
        """
        for line in self.records.evaluations:
            found = line.get("regimes", {}).get(tag)
            if line["iteration"] == iteration and found is not None and "per_image" in found:
                return Measured.of(
                    self.name, {"iteration": iteration, **found}, self.config.run.seed
                )
        return None

    @cached_property
    def regimes(self) -> "dict[str, Sampling]":
        """The further ways in which evaluations sample, by their names."""
        usual = self.config.evaluation_sampling()
        return {r.tag: r.sampling(usual) for r in self.config.evaluation.regimes}

    @cached_property
    def prompts(self) -> tuple[str, str]:
        """The SHA-256 of the held-out prompts, or their place if it is not recorded; and the balance key."""
        try:
            digest = json.loads((self.folder / "inputs.json").read_text())["prompts.held_out"]
        except (OSError, ValueError, KeyError, TypeError):
            digest = ""
        return str(digest or self.config.prompts.held_out), self.config.prompts.balance

    def rewards(self) -> dict[str, Any]:
        """The model and the options of each reward, by its name in tables."""
        return {r.label: (r.model, dict(r.options)) for r in self.config.rewards}

    def weights(self) -> dict[str, float]:
        """The weight of each reward in training, by its name in tables."""
        return {r.label: r.weight for r in self.config.rewards}

    def curve(self) -> list[CurvePoint]:
        """The mean scores of each evaluation, and what was spent before it."""
        train, size = self.config.train, self.config.algorithm.group_size
        nfe = {m["iteration"]: m.get("nfe_per_prompt", math.nan) for m in self.records.metrics}
        seconds = {t["iteration"]: total(t) for t in self.records.timings}
        found = []
        for line in self.records.evaluations:
            done = range(line["iteration"])
            cost = {
                "iterations": float(len(done)),
                "samples": float(len(done) * train.groups * size),
                "seconds": float(sum(seconds.get(i, math.nan) for i in done)),
                "denoiser evaluations": float(
                    sum(nfe.get(i, math.nan) * train.groups for i in done)
                ),
            }
            scores = {k: math.nan if v is None else float(v) for k, v in line["scores"].items()}
            found.append(CurvePoint(cost, scores))
        return found

    def differences(self, other: "RecordedRun") -> dict[str, tuple[Any, Any]]:
        """The keys in which the settings of two runs differ; keys of ``[run]`` are left out."""
        from flowgrpo.config.changes import differences

        found = differences(self.config, other.config)
        return {k: v for k, v in found.items() if not k.startswith(SEED)}


def pooled(
    runs: Sequence[tuple[str | None, RecordedRun]],
) -> list[tuple[str, list[RecordedRun]]]:
    """Runs as settings: those that differ in their seed only are one setting.

    Args:
        runs: Name given by the user, or None, and the run.

    Raises:
        BenchError: If runs of one name are of different settings, or one run is there twice.
    """
    groups: list[tuple[str | None, list[RecordedRun]]] = []
    seen: set[Path] = set()
    for name, run in runs:
        if run.folder.resolve() in seen:
            raise BenchError(f"{run.folder} is named twice; name each run once")
        seen.add(run.folder.resolve())
        for known, members in groups:
            changed = members[0].differences(run)
            if name is not None and name == known and changed:
                key, (one, other) = next(iter(changed.items()))
                raise BenchError(
                    f"{members[0].folder} and {run.folder} are both named {name!r}, but {key} is "
                    f"{one!r} in the one and {other!r} in the other: only runs that differ in their "
                    "seed are pooled; give them different names"
                )
            same_seed = any(m.config.run.seed == run.config.run.seed for m in members)
            if not changed and name == known and not (same_seed and name is None):
                members.append(run)
                break
        else:
            groups.append((name, [run]))
    return [(_name(name, members), members) for name, members in groups]


def _name(name: str | None, members: Sequence[RecordedRun]) -> str:
    """The name of a setting, in which the number of its seeds is said."""
    base = name or members[0].name
    return base if len(members) == 1 else f"{base} ({counted(len(members), 'seed')})"
