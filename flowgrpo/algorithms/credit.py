"""Numbers by trajectory and step: from candidates to tables, from tables to advantages and actions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.core.advantages import (
    Advantage,
    BetaAdvantage,
    LogTamed,
    Scored,
    VirtualBest,
    numbers,
    of_scored,
)
from flowgrpo.data.experience import Actions, Candidates, Experience


@dataclass(frozen=True)
class StepTable:
    """A number for each trajectory and step.

    Attributes:
        group: The group of each row's trajectory.
        sample: Its index in the group.
        steps: The step of each column, ascending.
        values: NaN where there is no number.
    """

    group: Int[Tensor, " rows"]
    sample: Int[Tensor, " rows"]
    steps: Sequence[int]
    values: Float[Tensor, "rows columns"]

    @classmethod
    def of_candidates(
        cls,
        candidates: Candidates,
        numbers: Float[Tensor, " candidates"],
        steps: Sequence[int],
    ) -> "StepTable":
        """A number of each candidate after some steps; a row for each sample, by group and sample."""
        c = candidates
        keys = sorted(set(zip(c.group.tolist(), c.sample.tolist(), strict=True)))
        row = {key: i for i, key in enumerate(keys)}
        column = {step: j for j, step in enumerate(steps)}
        values = torch.full((len(keys), len(steps)), torch.nan, dtype=torch.float64)
        for g, s, step, number in zip(
            *(v.tolist() for v in (c.group, c.sample, c.step, numbers)), strict=True
        ):
            if step in column:
                values[row[g, s], column[step]] = number
        owners = torch.tensor(keys)
        return cls(owners[:, 0], owners[:, 1], steps, values)

    def with_values(
        self, values: Float[Tensor, "rows columns"], steps: Sequence[int] | None = None
    ) -> "StepTable":
        """Other numbers for the same trajectories, and for the same steps unless others are given."""
        return replace(self, values=values, steps=self.steps if steps is None else steps)

    @property
    def rivals(self) -> Int[Tensor, " cells"]:
        """A label for each cell, row by row: equal for one group at one step."""
        number = len(self.steps)
        return (self.group[:, None] * number + torch.arange(number)).flatten()

    def of(self, actions: Actions) -> Float[Tensor, " actions"]:
        """The number of each action, by its trajectory and its step."""
        row = {
            key: i
            for i, key in enumerate(zip(self.group.tolist(), self.sample.tolist(), strict=True))
        }
        column = {step: j for j, step in enumerate(self.steps)}
        rows = [row[k] for k in zip(actions.group.tolist(), actions.sample.tolist(), strict=True)]
        columns = [column[step] for step in actions.step.tolist()]
        return self.values[torch.tensor(rows), torch.tensor(columns)].float()


Derive = Callable[[Float[Tensor, " candidates"]], StepTable]
"""From a number of each candidate of all ranks, such as its reward, to one for each trajectory and
step."""


def scored_of(experience: Experience) -> Scored:
    """The candidates of all ranks as advantages see them."""
    everyone, shapes = candidates_of(experience), experience.shapes
    scores = {k: shapes[k](v) if k in shapes else v for k, v in everyone.scores.items()}
    return Scored(everyone.reward, everyone.group, scores, experience.weights)


def candidates_of(experience: Experience) -> Candidates:
    """The candidates of all ranks."""
    return experience.everyone or experience.candidates


def standings(advantage: Advantage, experience: Experience, derive: Derive) -> StepTable:
    """Where each trajectory stands in its group at each step, by any kind of advantage.

    What is compared is derived from the reward, from the tamed sum of scores, or from each reward by
    itself, as the kind has it. Zero where there is no number.
    """
    scored = scored_of(experience)
    tables = {name: derive(values) for name, values in numbers(advantage, scored).items()}
    table = next(iter(tables.values()))
    flat = {name: t.values.flatten() for name, t in tables.items()}
    one = flat.get("", table.values.flatten())
    kind = advantage.of_sum if isinstance(advantage, LogTamed) else advantage
    compared = Scored(one, table.rivals, flat, scored.weights)
    return table.with_values(of_scored(kind, compared).view_as(table.values))


def check_kind(advantage: Advantage, what: str, bounded: bool = True) -> None:
    """Raise ValueError if a kind of advantage is senseless for what an algorithm compares.

    Args:
        advantage: The kind.
        what: That which is compared, in words.
        bounded: Whether a perfect candidate has a known value of it.
    """
    advantage.check()
    if getattr(advantage, "std", "") == "batch":
        raise ValueError(
            f"algorithm.advantage.std = 'batch' is the deviation of raw rewards, but here {what} are "
            "standardised: use 'group' or 'none'"
        )
    refuse_beta(advantage, what)
    if isinstance(advantage, VirtualBest) and not bounded:
        raise ValueError(
            f"algorithm.advantage.kind = 'virtual_best' adds a candidate with the largest reward, but "
            f"here {what} are compared, of which there is no largest"
        )


def refuse_beta(advantage: Advantage, what: str) -> None:
    """Raise ValueError if a kind for rewards of 0 and 1 would compare something between."""
    if isinstance(advantage, BetaAdvantage):
        raise ValueError(
            f"algorithm.advantage.kind = 'beta' is for rewards of 0 and 1, but here {what} are compared"
        )
