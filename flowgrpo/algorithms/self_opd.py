"""Self-OPD (arXiv:2608.26872): a student that teaches itself by branches from its own states.

At a few states of a trajectory several branches take one stochastic step, and are completed by the ODE. The
deterministic step from the same state is completed, too: what the model would have drawn without noise. A
branch is compared with that image, not with the mean of its rivals::

    A_k = (R_k - R_ode) / std        std over the branches of the state, at least 1e-4

The loss ``self_opd`` draws the mean of the step to branches with a positive advantage and away from others.
No teacher is trained. Rewards are summed before they are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from flowgrpo.algorithms.base import AlgorithmBase, CreditView, Policy, Scorer
from flowgrpo.algorithms.branches import BranchPlan, require_branches
from flowgrpo.algorithms.collection import Collection, Samples
from flowgrpo.core.random import Random
from flowgrpo.core.steps import StepSelection, Window
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.core.transitions import ODE, FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Cost, Experience
from flowgrpo.data.prompts import Group

LEAST_STD = 1e-4
"""Smallest deviation that differences are divided by, as in the released code."""


@dataclass(frozen=True)
class SelfPlan(BranchPlan):
    """Branches, and a completion without noise to compare them with.

    Attributes:
        follows_ode: Whether the trajectories are deterministic, so that each has one such completion.
    """

    follows_ode: bool = False

    def compared_at(self, step: int) -> bool:
        """Whether the deterministic step from the states at this step is completed."""
        return not self.follows_ode or step == self.steps[0]

    def cost(self, num_steps: int) -> Cost:
        """That of the branches; and for each trajectory and step ``k`` a completion in ``T - k - 1``
        evaluations, of deterministic trajectories only at the first step."""
        plain = super().cost(num_steps)
        compared = [k for k in self.steps if self.compared_at(k)]
        nfe = plain.nfe + self.num_seeds * sum(num_steps - k - 1 for k in compared)
        candidates = plain.decodes + self.num_seeds * len(compared)
        return Cost(nfe, candidates, candidates)


@dataclass(frozen=True, kw_only=True)
class SelfOPD(AlgorithmBase):
    """Step-level credit by branches, compared with the deterministic step from their state."""

    kind: Literal["self_opd"] = "self_opd"
    group_size: int = 128
    """Branches per prompt and step, at least 2 for each seed; the release has 8 for each of 16 seeds."""
    seeds: int = 16
    """Trajectories per prompt, each from a noise of its own. The branches are divided among them."""
    path: Literal["sde", "ode"] = "sde"
    """How the trajectories reach the states at which branches leave: by stochastic steps (``sde``, the
    release), or by the ODE, where the branches of all steps of a trajectory have one image to compare with."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step of the branches, and of the trajectories."""
    steps: StepSelection = field(default_factory=Window)
    """Which steps are branched at and trained. The release draws 2 of 10 steps, early ones more often:
    ``random_steps`` with ``weights``."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> SelfPlan:
        """Branches at the iteration's steps of each seed's trajectory."""
        steps = self.steps.select(num_steps, iteration, random.at("steps"))
        return SelfPlan(
            self.group_size, self.seeds, self.transition, steps, follows_ode=self.path == "ode"
        )

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample trajectories up to the last branching step, and complete branches and ODE steps."""
        plan = self.plan(policy.num_steps(), iteration, random)
        collection = Collection(policy, groups, scorer, self.transition)
        branches = Samples.of(groups, self.group_size, random)
        paths = Samples.of(groups, self.seeds, random.at("paths"))
        # The candidates without noise are numbered after the branches of their group.
        without = replace(paths, numbers=[self.group_size + n for n in paths.numbers])
        last, size = plan.steps[-1], self.group_size // self.seeds
        for rollout in policy.run(
            paths.prompts,
            paths.noise,
            nodes=range(last + 2),
            stochastic=() if plan.follows_ode else range(last),
            transition=self.transition,
            record=plan.steps,
            decode=False,
        ):
            rows = rollout.rows
            own = branches[rows.start * size : rows.stop * size]
            for record in rollout.records:
                step, node = record.step, record.step + 1
                x_next = collection.branch(own, record)
                collection.complete(own, x_next, node, step=step)
                if plan.compared_at(step):
                    interval = policy.scheduler.interval(step, node)
                    end = ODE()(record.x, record.prediction, interval).mean
                    compared = without[rows.start : rows.stop]
                    collection.complete(compared, end, node, step=step, compare=False)
        return collection.experience()

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """How much better a branch is than the step without noise, over the deviation of its rivals.

        0 where one of the two rewards failed, or fewer than two branches of the state have one.
        """
        a, c, size = experience.actions, experience.candidates, self.group_size // self.seeds
        branches: dict[tuple[int, int, int], dict[int, float]] = {}
        compared: dict[tuple[int, int, int], float] = {}
        for group, sample, step, reward in zip(
            c.group.tolist(), c.sample.tolist(), c.step.tolist(), c.scores.reward.double().tolist(), strict=True
        ):  # fmt: skip
            if sample >= self.group_size:
                compared[group, sample - self.group_size, step] = reward
            else:
                branches.setdefault((group, sample // size, step), {})[sample] = reward
        first = min(a.step.tolist(), default=0)
        found: dict[tuple[int, int, int], float] = {}
        for (group, seed, step), rewards in branches.items():
            own = compared[group, seed, first if self.path == "ode" else step]
            values = torch.tensor(list(rewards.values()), dtype=torch.float64)
            known = values[values.isfinite()]
            std = known.std().clamp(min=LEAST_STD) if len(known) > 1 else torch.tensor(torch.nan)
            difference = ((values - own) / std).nan_to_num(nan=0.0)
            found.update(
                ((group, sample, step), value)
                for sample, value in zip(rewards, difference.tolist(), strict=True)
            )
        keys = zip(a.group.tolist(), a.sample.tolist(), a.step.tolist(), strict=True)
        return torch.tensor([found[key] for key in keys], dtype=torch.float32)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        self.steps.check(num_steps)
        require_branches(self.group_size, self.seeds)

    def credit_view(self, experience: Experience) -> CreditView:
        """Candidates are branches, shown beside those of their seed and step."""
        return CreditView(rivals=self.group_size // self.seeds, candidates="branches")
