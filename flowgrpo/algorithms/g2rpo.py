"""G2RPO, Granular-GRPO (arXiv:2510.01982): single perturbations, judged at several granularities.

One deterministic path per prompt gives the anchor states. From each anchor every sample takes one
stochastic step (singular stochastic sampling) and is completed by the ODE on sub-grids of several
step lengths (multi-granularity advantage integration), so that its credit does not depend on one
discretisation. All perturbations of an anchor share its state: training needs one forward pass per
anchor for any group size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from flowgrpo.algorithms.base import AlgorithmBase, CreditView, Policy, Scorer
from flowgrpo.algorithms.branches import BranchPlan, collect_branches
from flowgrpo.algorithms.collection import Strides
from flowgrpo.algorithms.credit import branch_advantages, refuse_separate
from flowgrpo.core.advantages import Advantage
from flowgrpo.core.multi_reward_advantages import PerReward
from flowgrpo.core.random import Random
from flowgrpo.core.steps import StepSelection, Window
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.core.transitions import FlowSDE, Transition, require_noise
from flowgrpo.data.experience import Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True, kw_only=True)
class G2RPO(AlgorithmBase):
    """Step-level credit by single perturbations of a deterministic path, at several granularities."""

    kind: Literal["g2rpo"] = "g2rpo"
    group_size: int = 12
    """Perturbations per prompt and step, at least 2."""
    transition: Transition = field(default_factory=FlowSDE)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=lambda: Window(start=0, size=8))
    """Which steps are perturbed and trained; the paper takes the first half of 16."""
    granularities: tuple[int, ...] = (1, 2, 3)
    """Grid intervals per step of each completion. The paper's best is 1, 2, 3, its released script has
    1, 2."""
    strides: Strides = "even"
    """``even`` takes steps of a granularity from the perturbed state on, as the paper; ``released`` one
    interval first, and the last step may be longer, as the released code."""
    integration: Literal["sum", "mean"] = "sum"
    """How the advantages of the granularities are combined; the paper adds them."""
    advantage: Advantage = field(default_factory=PerReward)
    """From the rewards of the perturbations of one state to advantages; its ``clip`` also bounds their
    sum over granularities. The paper adds those of several rewards."""

    def plan(self, num_steps: int, iteration: int, random: Random) -> BranchPlan:
        """Perturbations at the iteration's steps of one path, each completed at every granularity."""
        steps = self.steps.select(num_steps, iteration, random.at("steps"))
        return BranchPlan(
            self.group_size, 1, self.transition, steps, self.granularities, self.strides
        )

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample the perturbations and complete them."""
        plan = self.plan(policy.num_steps(), iteration, random)
        return collect_branches(policy, groups, scorer, random, plan)

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """``A_k^i = sum_j A_k^{i,j}`` over granularities ``j``, each standardised on its own."""
        total = branch_advantages(self.advantage, experience, self.group_size)
        if self.integration == "mean":
            total = total / len(self.granularities)
        return total.clamp(-self.advantage.clip, self.advantage.clip)

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        self.advantage.check()
        refuse_separate(self.advantage, "branches from one state")
        self.steps.check(num_steps)
        if self.group_size < 2:
            raise ValueError(f"algorithm.group_size must be at least 2, got {self.group_size}")
        sizes = self.granularities
        if not sizes or len(set(sizes)) < len(sizes) or not all(1 <= g < num_steps for g in sizes):
            raise ValueError(
                f"algorithm.granularities must be different numbers from 1 to {num_steps - 1}, the "
                f"longest completion with num_steps = {num_steps}; got {list(sizes)}"
            )

    def credit_view(self, experience: Experience) -> CreditView:
        """Candidates are perturbations of one path, compared at their step and granularity."""
        return CreditView(rivals=self.group_size, candidates="branches")
