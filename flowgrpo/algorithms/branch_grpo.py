"""BranchGRPO (arXiv:2509.06040): a tree of trajectories per prompt.

All samples of a prompt are one branch until the first split; at each split every branch becomes
several, and the leaves are the images. Steps that leaves share are computed once. The reward of a
branch at a step is the mean reward of the leaves below it, compared with the other branches at the
same step.

TreeGRPO (arXiv:2512.08153) standardises the rewards of the leaves and averages these advantages up the
tree, in place of comparing branches with each other (``rivals``); its splits are a few steps in a row that
begin at a random one (``shift_ratio``), and all other steps follow the ODE (``between``).

A branch is recorded under the index of its first leaf: with 4 leaves and splits into 2 children at
steps 0 and 2, the branches after step 0 are samples 0 and 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from flowgrpo.algorithms.base import AlgorithmBase, CreditView, Policy, Scorer
from flowgrpo.algorithms.collection import Collection, Samples
from flowgrpo.algorithms.credit import (
    Derive,
    StepTable,
    check_kind,
    refuse_separate,
    step_advantages,
)
from flowgrpo.core.advantages import Advantage, candidate_advantages
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import GroupAdvantage
from flowgrpo.core.steps import AllSteps, StepSelection
from flowgrpo.core.tensors import Bool, Float, Tensor, torch
from flowgrpo.core.transitions import DanceSDE, Transition, require_noise
from flowgrpo.data.experience import Candidates, Cost, Experience
from flowgrpo.data.prompts import Group


@dataclass(frozen=True, kw_only=True)
class BranchGRPO(AlgorithmBase):
    """Step-level credit by a tree of trajectories, compared depth by depth."""

    kind: Literal["branch_grpo"] = "branch_grpo"
    group_size: int = 16
    """Leaves per prompt: ``children`` to the power of the number of splits."""
    splits: tuple[int, ...] = (0, 3, 6, 9)
    """The steps at which every branch becomes several, ascending."""
    children: int = 2
    """Number of branches into which each branch splits, at least 2."""
    transition: Transition = field(default_factory=DanceSDE)
    """The stochastic step."""
    steps: StepSelection = field(default_factory=AllSteps)
    """Which steps after the first split are stochastic besides the splits. All steps before it, which
    all samples share, follow the ODE."""
    between: Literal["sde", "ode"] = "sde"
    """Whether steps besides the splits can be stochastic, as ``steps`` selects (BranchGRPO), or all follow
    the ODE (TreeGRPO)."""
    shift_ratio: float = 0.0
    """In each iteration all splits move towards the data by ``i`` steps, with a probability proportional
    to ``shift_ratio ** i``, as far as the grid has stochastic steps; TreeGRPO has 0.5. 0 moves none."""
    rivals: Literal["branches", "leaves"] = "branches"
    """What is compared within a group: the rewards of all ``branches`` at a step (BranchGRPO), or the
    rewards of the ``leaves``, whose advantages are then fused up the tree (TreeGRPO)."""
    fusion: Literal["mean", "path_probability"] = "mean"
    """How a branch's reward, or its advantage, follows from those of its children at a split: their mean,
    or their mean weighted by the softmax of the log-probabilities of their steps."""
    width: Literal["all", "best_of_siblings", "extremes", "half_of_branch", "half_of_tree"] = "all"
    """What is trained besides (width pruning): ``all``; paths to ``best_of_siblings``, the best child of
    each last split; or paths to ``extremes``, the best and the worst leaves of the group. The released
    code prunes only after the last split: ``half_of_branch`` (its mode 1) keeps half of each branch's
    actions, those of largest advantage, and with equal advantages, as without failures all of them
    are, the first ones; ``half_of_tree`` (its mode 2) keeps half of all actions, in equal numbers
    those of the largest and of the smallest advantages."""
    extremes: int = 0
    """Number of leaves that ``width = "extremes"`` keeps, half the best and half the worst; even."""
    depths: StepSelection = field(default_factory=AllSteps)
    """Which of the stochastic steps are trained (depth pruning); with a ``sliding_window`` these change
    during training."""
    pruned: tuple[int, ...] = ()
    """Steps that are sampled but not trained (depth pruning as in the released code, whose depth d is
    step d - 1), ascending."""
    pruned_every: int = 0
    """Iterations after which all ``pruned`` steps move one step towards the noise; 0 for never."""
    pruned_until: int = 0
    """The step at which the first of the ``pruned`` steps stops moving."""
    advantage: Advantage = field(default_factory=lambda: GroupAdvantage(ddof=1, epsilon=1e-8))
    """From the rewards of a tree's branches, depth by depth, to advantages."""

    def collect(
        self,
        policy: Policy,
        groups: Sequence[Group],
        scorer: Scorer,
        random: Random,
        iteration: int,
    ) -> Experience:
        """Sample a tree per prompt, and keep the actions of the trained depths."""
        num_steps = policy.num_steps()
        if self.shift_ratio:
            drawn = self._shifted(num_steps, random)
            return drawn.collect(policy, groups, scorer, random, iteration)
        selected = self._selected(num_steps, iteration, random)
        collection = Collection(policy, groups, scorer, self.transition)
        self._grow(collection, groups, random, selected)
        experience = collection.experience()
        depths = self._depths(num_steps, iteration, random)
        rows = torch.isin(experience.actions.step, torch.tensor(depths)).nonzero().squeeze(1)
        if not len(rows):
            raise ValueError(
                f"algorithm.depths and algorithm.pruned leave steps {depths}, none of which is stochastic "
                f"here: {sorted(experience.step_std)}"
            )
        return replace(experience, actions=experience.actions.select(rows))

    def advantages(self, experience: Experience) -> Float[Tensor, " actions"]:
        """Each branch's reward against those at its step; zero if all leaves below it are pruned."""
        if self.shift_ratio:
            return self._as_sampled(experience).advantages(experience)
        c, chances = experience.all_candidates, self._chances(experience)
        steps = sorted(set(experience.actions.step.tolist()))

        def branches(combine: Callable[[Tensor, Tensor], Tensor]) -> Derive:
            """Combine the numbers and chances of the leaves below each branch, ``(..., leaves)``."""

            def derive(numbers: Tensor) -> StepTable:
                table = StepTable.of_candidates(c, numbers, [int(c.step.max())])
                leaves = table.values.view(-1, self.group_size)  # (groups, leaves)
                values = torch.full((*leaves.shape, len(steps)), torch.nan, dtype=torch.float64)
                for j, below in enumerate(map(self._leaves_below, steps)):
                    # Branches are recorded at their first leaf, every ``below`` leaves.
                    values[:, ::below, j] = combine(
                        leaves.unflatten(1, (-1, below)), chances.unflatten(1, (-1, below))
                    )
                return table.with_values(values.flatten(0, 1), steps)

            return derive

        if self.rivals == "leaves":
            of_leaves = candidate_advantages(self.advantage, c.scores, c.group)
            found = branches(_expected)(torch.where(c.valid, of_leaves.double(), torch.nan))
            found = found.with_values(found.values.nan_to_num())
        else:
            found = step_advantages(self.advantage, experience, branches(_expected))
        kept = branches(lambda leaves, _: leaves.amax(-1))(self._kept(c))
        result = found.of(experience.actions) * kept.of(experience.actions)
        if self.width in ("half_of_branch", "half_of_tree"):
            result = result * self._half(experience, result)
        return result

    def check(self, num_steps: int) -> None:
        """Raise ValueError if the settings contradict each other or the grid."""
        require_noise(self.transition)
        if self.rivals == "leaves":
            self.advantage.check()
            refuse_separate(self.advantage, "leaves of a tree")
        else:
            check_kind(self.advantage, "rewards of branches")
        s = self.splits
        if not s or any(b <= a for a, b in pairwise(s)) or s[0] < 0 or s[-1] > num_steps - 2:
            raise ValueError(
                f"algorithm.splits must be ascending steps from 0 to {num_steps - 2} (the last one ends "
                f"at sigma 0) with num_steps = {num_steps}, got {list(s)}"
            )
        if self.children < 2 or self.group_size != self.children ** len(s):
            raise ValueError(
                f"algorithm.group_size = {self.group_size} must be the number of leaves: children to the "
                f"power of the number of splits, {self.children} ** {len(s)} = {self.children ** len(s)}, "
                "with at least 2 children"
            )
        self.steps.check(num_steps)
        self.depths.check(num_steps)
        self._check_pruning()
        if self.between == "ode" and self.steps != AllSteps():
            raise ValueError(
                "algorithm.steps has no effect with algorithm.between = 'ode', where only the splits are "
                "stochastic; remove one of them"
            )
        if not 0 <= self.shift_ratio < 1:
            raise ValueError(
                f"algorithm.shift_ratio must be at least 0 and below 1, got {self.shift_ratio}"
            )
        if self.shift_ratio and (self.depths != AllSteps() or self.pruned):
            raise ValueError(
                "algorithm.shift_ratio moves the splits, so that algorithm.depths and algorithm.pruned would "
                "name other branches in every iteration; remove them, or set shift_ratio to 0"
            )

    def trained_steps(self, num_steps: int, iteration: int, random: Random) -> Sequence[int]:
        """The splits and the stochastic steps after the first of them, if their depth is trained."""
        if self.shift_ratio:
            return self._shifted(num_steps, random).trained_steps(num_steps, iteration, random)
        selected = self._selected(num_steps, iteration, random)
        depths = self._depths(num_steps, iteration, random)
        stochastic = {*self.splits, *(s for s in selected if s > self.splits[0])}
        return sorted(stochastic & set(depths))

    def cost(self, num_steps: int, iteration: int, random: Random) -> Cost:
        """Work per prompt: at each step one evaluation per branch, ``children ** (splits before)``.

        It does not depend on which steps are stochastic besides the splits.
        """
        if self.shift_ratio:
            return self._shifted(num_steps, random).cost(num_steps, iteration, random)
        nfe = sum(
            self.children ** sum(split < step for split in self.splits) for step in range(num_steps)
        )
        return Cost(float(nfe), float(self.group_size), float(self.group_size))

    def credit_view(self, experience: Experience) -> CreditView:
        """Candidates are leaves; the actions of a leaf are those of the branches above it."""
        sampled = self._as_sampled(experience) if self.shift_ratio else self
        return CreditView(rivals=self.group_size, action_sample=sampled.branch_of)

    def branch_of(self, leaf: int, step: int) -> int:
        """The sample under which a leaf's branch is recorded at a step: the branch's first leaf."""
        below = self._leaves_below(step)
        return leaf // below * below

    def _selected(self, num_steps: int, iteration: int, random: Random) -> Sequence[int]:
        """The steps that are stochastic besides the splits, if they come after the first of these."""
        if self.between == "ode":
            return []
        return self.steps.select(num_steps, iteration, random.at("steps"))

    def _shifted(self, num_steps: int, random: Random) -> "BranchGRPO":
        """The algorithm with the splits of an iteration (TreeGRPO, eq. 7)."""
        places = num_steps - 1 - self.splits[-1]
        chance = self.shift_ratio ** torch.arange(places, dtype=torch.float64)
        shift = int(chance.multinomial(1, generator=random.generator("shift")))
        return replace(self, splits=tuple(s + shift for s in self.splits), shift_ratio=0.0)

    def _as_sampled(self, experience: Experience) -> "BranchGRPO":
        """The algorithm with the splits by which an experience was sampled; the first is its first step."""
        shift = int(experience.actions.step.min()) - self.splits[0]
        return replace(self, splits=tuple(s + shift for s in self.splits), shift_ratio=0.0)

    def _depths(self, num_steps: int, iteration: int, random: Random) -> list[int]:
        """The steps whose actions are trained in an iteration, if they are stochastic."""
        moved = 0
        if self.pruned and self.pruned_every:
            moved = min(iteration // self.pruned_every, max(0, self.pruned[0] - self.pruned_until))
        pruned = {step - moved for step in self.pruned}
        selected = self.depths.select(num_steps, iteration, random.at("depths"))
        return [step for step in selected if step not in pruned]

    def _half(
        self, experience: Experience, advantages: Float[Tensor, " actions"]
    ) -> Bool[Tensor, " actions"]:
        """The actions that the released width pruning keeps: all of them up to the last split."""
        a = experience.actions
        kept = a.step <= self.splits[-1]
        later = ~kept & experience.has_reward(a)
        for group in a.group[later].unique():
            rows = (later & (a.group == group)).nonzero().squeeze(1)
            rows = rows[a.step[rows].argsort(stable=True)]
            rows = rows[
                a.sample[rows].argsort(stable=True)
            ]  # leaf by leaf, each from noise to data
            if self.width == "half_of_tree":
                order = rows[advantages[rows].argsort(descending=True, stable=True)]
                number = max(2, len(order) // 2)
                kept[order[: number // 2]] = kept[order[len(order) - (number - number // 2) :]] = (
                    True
                )
                continue
            for sample in a.sample[rows].unique():
                own = rows[a.sample[rows] == sample]
                order = own[advantages[own].argsort(descending=True, stable=True)]
                kept[order[: max(1, len(order) // 2)]] = True
        return kept

    def _check_pruning(self) -> None:
        if list(self.pruned) != sorted(set(self.pruned)) or min(self.pruned, default=0) < 0:
            raise ValueError(
                f"algorithm.pruned must be ascending steps from 0, got {list(self.pruned)}"
            )
        if min(self.pruned_every, self.pruned_until) < 0:
            raise ValueError("algorithm.pruned_every and algorithm.pruned_until must be at least 0")
        if self.width == "extremes" and (
            self.extremes % 2 or not 2 <= self.extremes <= self.group_size
        ):
            raise ValueError(
                f"algorithm.extremes must be even, and from 2 to group_size = {self.group_size}, with "
                f"algorithm.width = 'extremes'; got {self.extremes}"
            )
        if self.width != "extremes" and self.extremes:
            raise ValueError(
                f"algorithm.extremes = {self.extremes} needs algorithm.width = 'extremes', got "
                f"{self.width!r}"
            )
        if (
            self.fusion == "path_probability"
            and self.advantage.over_batch
            and self.rivals == "branches"
        ):
            # Advantages with std = 'batch' are refused before, so the kind is 'gdpo'.
            raise ValueError(
                "algorithm.fusion = 'path_probability' knows the branches of one process only, but "
                "algorithm.advantage.kind = 'gdpo' has statistics over all processes: use fusion "
                "'mean' or advantage 'per_reward'"
            )
        if self.fusion == "path_probability" and (self.depths != AllSteps() or self.pruned):
            raise ValueError(
                "algorithm.fusion = 'path_probability' needs the steps at all splits, which "
                f"algorithm.depths = {self.depths} or algorithm.pruned = {list(self.pruned)} may prune: use "
                "fusion 'mean', or depths 'all' without algorithm.pruned"
            )

    def _leaves_below(self, step: int) -> int:
        """The number of leaves that descend from a branch after a step."""
        return self.group_size // self.children ** sum(split <= step for split in self.splits)

    def _grow(
        self,
        collection: Collection,
        groups: Sequence[Group],
        random: Random,
        selected: Sequence[int],
    ) -> None:
        """Run every branch from split to split, and the leaves to their images.

        ``x`` are the states after the last split, one per branch.
        """
        policy, end = collection.policy, collection.policy.num_steps()
        leaves, x, start = Samples.of(groups, self.group_size, random, 1), None, 0
        for split in (*self.splits, end):
            # The branches before the split, and their children after it.
            branches = leaves[:: self._leaves_below(start - 1)]
            stochastic = [s for s in selected if start <= s < split] if start else []
            children = leaves[:: self._leaves_below(split)]
            states: list[Tensor] = []
            for rollout in policy.run(
                branches.prompts,
                branches.noise,
                nodes=range(start, min(split + 1, end) + 1),
                x=x,
                stochastic=stochastic,
                transition=self.transition,
                record={*stochastic, split},
                decode=split == end,
            ):
                begin, stop = rollout.rows.start, rollout.rows.stop
                for record in rollout.records:
                    if record.step == split:
                        own = children[begin * self.children : stop * self.children]
                        states.append(collection.branch(own, record))
                    else:
                        collection.add_step(branches[begin:stop], record)
                if rollout.media is not None:
                    collection.submit(
                        branches[begin:stop], rollout.media, end - 1, audio=rollout.audio
                    )
            x, start = (torch.cat(states) if states else None), split + 1

    def _chances(self, experience: Experience) -> Float[Tensor, "groups leaves"]:
        """The weight of each leaf in the branches above it, up to a factor common to the branch.

        Groups are in ascending order. Leaves of other processes, whose actions are not known here,
        all have weight 1; no statistic of this process's groups depends on them.
        """
        a, groups = experience.actions, experience.all_candidates.group.unique()
        chances = torch.ones(len(groups), self.group_size, dtype=torch.float64)
        if self.fusion == "mean":
            return chances
        for split in self.splits:
            for row, group in enumerate(groups):
                rows = ((a.group == group) & (a.step == split)).nonzero().squeeze(1)
                if not len(rows):
                    continue
                rows = rows[a.sample[rows].argsort()]
                # (parents, children): the probability of each child among its siblings.
                siblings = a.old_log_prob[rows].double().view(-1, self.children).softmax(1)
                chances[row] *= siblings.flatten().repeat_interleave(self._leaves_below(split))
        return chances

    def _kept(self, candidates: Candidates) -> Float[Tensor, " leaves"]:
        """1 for leaves that are kept, 0 for pruned ones; leaves without a reward are always pruned."""
        kept = torch.zeros_like(candidates.reward)
        for group in candidates.group.unique():
            rows = (candidates.group == group).nonzero().squeeze(1)
            rows = rows[candidates.sample[rows].argsort()]
            kept[rows] = self._kept_of(candidates.reward[rows]).to(kept.dtype)
        return kept

    def _kept_of(self, reward: Float[Tensor, " leaves"]) -> Bool[Tensor, " leaves"]:
        """The leaves of one tree that are kept."""
        finite = reward.isfinite()
        if self.width not in ("best_of_siblings", "extremes"):
            return finite
        kept = torch.zeros_like(finite)
        if self.width == "best_of_siblings":
            siblings = reward.nan_to_num(nan=-torch.inf).view(-1, self.children)
            best = siblings.argmax(1) + self.children * torch.arange(len(siblings))
            kept[best] = True
            return kept & finite
        order = finite.nonzero().squeeze(1)
        order = order[reward[order].argsort(stable=True)]
        half = min(self.extremes // 2, len(order) // 2)
        kept[order[:half]] = kept[order[len(order) - half :]] = True
        return kept


def _expected(
    leaves: Float[Tensor, "groups branches below"], chances: Float[Tensor, "groups branches below"]
) -> Float[Tensor, "groups branches"]:
    """The mean of the leaves below each branch, weighted by their chances; NaN if all of them failed."""
    known = chances * leaves.isfinite()
    return (known * leaves.nan_to_num()).sum(-1) / known.sum(-1)
