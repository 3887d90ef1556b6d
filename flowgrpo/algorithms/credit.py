"""Credit: from the scores of candidates to one advantage per action.

Three ways, by which candidates judge an action:

- :func:`trajectory_advantages`: the sample's one candidate judges all actions of its trajectory.
- :func:`branch_advantages`: a branch's candidates judge the step at which it branched.
- :func:`step_advantages`: numbers by trajectory and step (:class:`StepTable`) are derived from the
  candidates, such as differences between steps, and compared step by step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flowgrpo.core.advantages import AdvantageKind, candidate_advantages
from flowgrpo.core.tensors import Float, Int, Tensor, torch
from flowgrpo.data.experience import Actions, Candidates, Experience


def trajectory_advantages(
    advantage: AdvantageKind, experience: Experience
) -> Float[Tensor, "actions *rewards"]:
    """The advantage of each sample's candidate, for all actions of its trajectory.

    Args:
        advantage: The kind; its statistics are over the candidates of all processes.
        experience: With one candidate per sample.
    """
    own = own_advantages(advantage, experience)
    return credit_trajectories(experience.actions, experience.candidates, own)


def own_advantages(
    advantage: AdvantageKind, experience: Experience
) -> Float[Tensor, "candidates *rewards"]:
    """The advantage of each of this process's candidates, with statistics over all processes."""
    everything = experience.all_candidates
    # A group is whole on one process, and gathering keeps the order of its candidates.
    mine = torch.isin(everything.group, experience.candidates.group.unique())
    return candidate_advantages(advantage, everything.scores, everything.group)[mine]


def credit_trajectories(
    actions: Actions, candidates: Candidates, advantage: Float[Tensor, "candidates *rewards"]
) -> Float[Tensor, "actions *rewards"]:
    """Give every action of a trajectory the advantage of the trajectory's one candidate."""
    row = {
        (int(g), int(s)): i
        for i, (g, s) in enumerate(zip(candidates.group, candidates.sample, strict=True))
    }
    rows = [row[int(g), int(s)] for g, s in zip(actions.group, actions.sample, strict=True)]
    return advantage[torch.tensor(rows)]


def branch_advantages(
    advantage: AdvantageKind, experience: Experience, branches_per_seed: int
) -> Float[Tensor, " actions"]:
    """For each branch, the sum over granularities of its advantages over branches from its state.

    Each comparison is among the branches of one seed at one step and granularity. A candidate whose
    reward failed adds nothing. Kinds of advantage with statistics over the batch take them over all
    candidates, of every step and granularity.
    """
    a, c = experience.actions, experience.all_candidates
    rivals = torch.stack([c.group, c.sample // branches_per_seed, c.step, c.granularity])
    labels = torch.unique(rivals, dim=1, return_inverse=True)[1]
    found = candidate_advantages(advantage, c.scores, labels)
    sums: dict[tuple[int, ...], float] = {}
    for *key, value in zip(*(v.tolist() for v in (c.group, c.sample, c.step, found)), strict=True):
        sums[tuple(key)] = sums.get(tuple(key), 0.0) + value
    keys = zip(a.group.tolist(), a.sample.tolist(), a.step.tolist(), strict=True)
    return torch.tensor([sums[key] for key in keys])


@dataclass(frozen=True)
class StepTable:
    """A number for each trajectory and step.

    Attributes:
        group: The group of each row's trajectory.
        sample: The index of each row's sample in its group.
        steps: The step of each column, ascending.
        values: NaN where a number is missing.
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
        """The candidates' numbers at some steps; one row per sample, sorted by group and sample."""
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
        """The same trajectories with other values, and with other steps if these are given."""
        return replace(self, values=values, steps=self.steps if steps is None else steps)

    @property
    def rivals(self) -> Int[Tensor, " cells"]:
        """A label for each cell, row by row; cells of one group at one step have the same label."""
        number = len(self.steps)
        return (self.group[:, None] * number + torch.arange(number)).flatten()

    def of(self, actions: Actions) -> Float[Tensor, " actions"]:
        """The value of each action, by its trajectory and its step."""
        row = {
            key: i
            for i, key in enumerate(zip(self.group.tolist(), self.sample.tolist(), strict=True))
        }
        column = {step: j for j, step in enumerate(self.steps)}
        rows = [row[k] for k in zip(actions.group.tolist(), actions.sample.tolist(), strict=True)]
        columns = [column[step] for step in actions.step.tolist()]
        return self.values[torch.tensor(rows), torch.tensor(columns)].float()


Derive = Callable[[Float[Tensor, " candidates"]], StepTable]
"""From a number of each candidate of all processes, such as its reward, to a table by trajectory and
step."""


def step_advantages(
    advantage: AdvantageKind, experience: Experience, derive: Derive, jointly: bool = False
) -> StepTable:
    """The advantage of each trajectory in its group at each step, for any kind of advantage.

    ``derive`` is applied to each number that the kind normalises: the reward, the tamed sum of
    scores, or each reward by itself. The derived numbers of a group are compared step by step, or
    ``jointly`` over all its steps; cells without a number get zero.
    """
    scores = experience.all_candidates.scores
    tables = {name: derive(values) for name, values in advantage.inputs(scores).items()}
    table = next(iter(tables.values()))
    cells = {name: t.values.flatten() for name, t in tables.items()}
    rivals = table.group.repeat_interleave(len(table.steps)) if jointly else table.rivals
    found = advantage.combine(cells, rivals, scores.weights)
    return table.with_values(found.view_as(table.values))


def check_kind(advantage: AdvantageKind, compared: str, bounded: bool = True) -> None:
    """Raise ValueError if a kind of advantage has no meaning for the numbers that are compared.

    Args:
        advantage: The kind.
        compared: The numbers in words, for the message.
        bounded: Whether these numbers have a largest possible value.
    """
    advantage.check()
    if getattr(advantage, "std", "") == "batch":
        raise ValueError(
            f"algorithm.advantage.std = 'batch' is the deviation of raw rewards, but here {compared} are "
            "standardised: use 'group' or 'none'"
        )
    if getattr(advantage, "centre", "group") == "none":
        raise ValueError(
            f"algorithm.advantage.centre = 'none' gives uncentred rewards, but here {compared} are "
            "compared: use 'group'"
        )
    refuse_binary(advantage, compared)
    refuse_separate(advantage, compared)
    if advantage.adds_best and not bounded:
        raise ValueError(
            f"algorithm.advantage.kind = 'virtual_best' adds a candidate with the largest reward, but "
            f"here {compared} are compared, of which there is no largest"
        )


def refuse_separate(advantage: AdvantageKind, compared: str) -> None:
    """Raise ValueError if a kind with a loss for each reward would have to add advantages up."""
    if advantage.is_separate:
        raise ValueError(
            f"algorithm.advantage.kind = 'per_loss' is for whole samples, but here {compared} are "
            "compared: use 'per_reward'"
        )


def refuse_binary(advantage: AdvantageKind, compared: str) -> None:
    """Raise ValueError if a kind for rewards of 0 and 1 would compare other numbers."""
    if advantage.is_binary:
        raise ValueError(
            f"algorithm.advantage.kind = 'beta' is for rewards of 0 and 1, but here {compared} are compared"
        )


def extremes(
    advantage: Float[Tensor, "candidates *rewards"],
    group: Int[Tensor, " candidates"],
    number: int,
) -> Float[Tensor, "candidates *rewards"]:
    """Set all but the ``number / 2`` largest and smallest advantages of each group to zero.

    Advantages of several rewards are ordered by their sum.
    """
    kept = torch.zeros_like(advantage)
    total = advantage if advantage.ndim == 1 else advantage.sum(1)
    for g in group.unique():
        rows = (group == g).nonzero().squeeze(1)
        order = rows[total[rows].argsort(stable=True)]
        for part in (order[: number // 2], order[len(order) - number // 2 :]):
            kept[part] = advantage[part]
    return kept


def check_best_of(number: int, group_size: int) -> None:
    """Raise ValueError if :func:`extremes` cannot choose this many samples of a group; 0 is allowed."""
    if number % 2 or not 0 <= number <= group_size:
        raise ValueError(
            f"algorithm.best_of must be even and at most group_size = {group_size}, got {number}"
        )
