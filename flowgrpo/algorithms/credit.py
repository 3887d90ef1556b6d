"""Numbers by trajectory and step: from candidates to tables, from tables to actions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.core.advantages import GroupAdvantage
from flowgrpo.experience import Actions, Candidates


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
    def rewards(cls, candidates: Candidates, steps: Sequence[int]) -> "StepTable":
        """The rewards of the candidates after some steps; a row for each sample that has any."""
        keys = sorted(set(zip(candidates.group.tolist(), candidates.sample.tolist(), strict=True)))
        row = {key: i for i, key in enumerate(keys)}
        column = {step: j for j, step in enumerate(steps)}
        values = torch.full((len(keys), len(steps)), torch.nan, dtype=torch.float64)
        c = candidates
        for g, s, step, reward in zip(
            *(v.tolist() for v in (c.group, c.sample, c.step, c.reward)), strict=True
        ):
            if step in column:
                values[row[g, s], column[step]] = reward
        owners = torch.tensor(keys)
        return cls(owners[:, 0], owners[:, 1], steps, values)

    def with_values(
        self, values: Float[Tensor, "rows columns"], steps: Sequence[int] | None = None
    ) -> "StepTable":
        """Other numbers for the same trajectories, and for the same steps unless others are given."""
        return replace(self, values=values, steps=self.steps if steps is None else steps)

    def standardised(self, advantage: GroupAdvantage) -> Float[Tensor, "rows columns"]:
        """Each number against those of its group in its column; zero where there is none."""
        number = len(self.steps)
        labels = self.group[:, None] * number + torch.arange(number)
        flat = self.values.flatten()
        return advantage(flat, labels.flatten(), flat).view_as(self.values)

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


def require_own_std(advantage: GroupAdvantage, what: str) -> None:
    """Raise ValueError if the deviation of the raw rewards would divide what is no raw reward."""
    if advantage.std == "batch":
        raise ValueError(
            f"algorithm.advantage.std = 'batch' is the deviation of raw rewards, but here {what} are "
            "standardised: use 'group' or 'none'"
        )
