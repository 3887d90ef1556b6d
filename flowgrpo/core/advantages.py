"""Advantages: how much better a candidate is than the others of its group.

A kind of advantage answers two questions. :meth:`Advantage.inputs`: which numbers of the candidates
does it normalise? The kinds for a single reward (``group``, ``beta``, ``virtual_best``, ``best``) take the
weighted sum of all rewards. The multi-reward kinds take each reward by itself (``per_reward``,
``per_loss``, ``gdpo``), or tame some before they are summed (``log_tamed``): rewards on different scales, added up,
are dominated by the one that varies most, and different mixtures of scores with equal sums get equal
advantages. :meth:`Advantage.combine`: how do these numbers become advantages? Step-level algorithms
call ``combine`` on numbers that they derive from ``inputs``, such as differences between steps
(:func:`flowgrpo.algorithms.credit.step_advantages`); others call :func:`candidate_advantages`.

All arithmetic is in fp64. A group without variance gets exactly zero: dividing its rounding errors
by a small epsilon would make large advantages out of nothing (see ``docs/algorithms.md``). Whether a
group has variance is decided on the numbers that a kind normalises; a group of nothing but failures
does vary for :class:`VirtualBest`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import ClassVar, Literal, Protocol, runtime_checkable

from flowgrpo.core.scores import Scores, complete
from flowgrpo.core.tensors import Bool, Float, Int, Tensor, torch

RELATIVE_FLOOR = 1e-6
"""A standard deviation below this share of the rewards' magnitude is rounding, not signal."""
REWARD = ""
"""Name of the single number that the kinds for one reward normalise."""
UNCLIPPED = float("inf")


@runtime_checkable
class AdvantageKind(Protocol):
    """The interface of all kinds of advantage, which are frozen dataclasses.

    Attributes:
        clip: Advantages are clipped to ``[-clip, clip]``.
        is_binary: Whether the kind takes only rewards of 0 and 1.
        adds_best: Whether the kind compares with a candidate that has the largest possible reward.
        is_separate: Whether each reward keeps advantages of its own, a column each, for a loss of its
            own.
        over_batch: Whether it has statistics over the whole batch besides those of each group.
    """

    is_binary: ClassVar[bool]
    adds_best: ClassVar[bool]
    is_separate: ClassVar[bool]

    @property
    def clip(self) -> float: ...

    @property
    def over_batch(self) -> bool: ...

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        ...

    def inputs(self, scores: Scores) -> dict[str, Float[Tensor, " candidates"]]:
        """The numbers of each candidate that this kind normalises, by the name of their reward."""
        ...

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, "rows *rewards"]:
        """Advantages from the numbers of :meth:`inputs`, or from numbers derived from these.

        They are one per row, or with :attr:`is_separate` one per row and reward.

        Args:
            values: By the names that :meth:`inputs` gave; NaN marks a row that enters no statistic
                and gets the advantage 0.
            groups: Rows with the same label are compared.
            weights: Weight of each reward by its name.
        """
        ...


class _SingleReward:
    """The shared part of the kinds for a single reward, which normalise the weighted sum."""

    is_binary: ClassVar[bool] = False
    adds_best: ClassVar[bool] = False
    is_separate: ClassVar[bool] = False

    @property
    def over_batch(self) -> bool:
        return getattr(self, "std", "") == "batch"

    def inputs(self, scores: Scores) -> dict[str, Float[Tensor, " candidates"]]:
        """The weighted sum."""
        return {REWARD: scores.reward}

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, " rows"]:
        """Advantages of the one number."""
        return self(values[REWARD], groups)

    def __call__(
        self, rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GroupAdvantage(_SingleReward):
    """``(reward - mean of the group) / std``, clipped."""

    is_default: ClassVar[bool] = True
    kind: Literal["group"] = "group"
    std: Literal["group", "batch", "none"] = "group"
    """Which standard deviation divides: ``group`` the group's own; ``batch`` that of all rewards of
    the iteration on all processes (Flow-GRPO's ``global_std``); ``none`` divides by nothing
    (Dr. GRPO)."""
    ddof: Literal[0, 1] = 0
    """0 divides by G, 1 by G - 1. Flow-GRPO uses 0, DanceGRPO 1."""
    epsilon: float = 1e-4
    """Added to the standard deviation. Flow-GRPO uses 1e-4, DanceGRPO 1e-8."""
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def __call__(
        self, rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"]:
        """The advantage of each candidate; zero for candidates without a finite reward.

        Args:
            rewards: The rewards of all processes; NaN marks a candidate whose reward failed, which
                enters no statistic.
            groups: The group of each candidate.
        """
        result = torch.zeros_like(rewards)
        finite = rewards[rewards.isfinite()].double()
        for rows, values in members(rewards, groups):
            if has_no_variance(values):
                continue
            centred = values - values.mean()
            if self.std != "none":
                spread = values if self.std == "group" else finite
                centred = centred / (spread.std(correction=self.ddof) + self.epsilon)
            result[rows] = centred.clamp(-self.clip, self.clip).to(result.dtype)
        return result


@dataclass(frozen=True, kw_only=True)
class BetaAdvantage(_SingleReward):
    """For rewards of 0 and 1: ``(reward - p) / f(p)`` with a Beta density f (BNPO, arXiv:2506.02864).

    ``p`` is the group's mean. Over the groups of an iteration it is modelled as Beta(a, b), fitted
    by its mean and variance; ``f`` is the density of Beta(1 + a / 3, 1 + b / 3), for which the
    gradient varies least. As training changes the distribution of ``p``, ``f`` changes with it.
    Beta(3/2, 3/2) is the group's standard deviation up to a factor (GRPO); Beta(1, 1) divides by
    nothing.
    """

    is_binary: ClassVar[bool] = True
    kind: Literal["beta"] = "beta"
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero."""
        check_clip(self.clip)

    def __call__(
        self, rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"]:
        """Advantages as those of :class:`GroupAdvantage`; a group of equal rewards gets zero.

        Raises:
            ValueError: If a finite reward is neither 0 nor 1.
        """
        finite = rewards[rewards.isfinite()]
        if bool(((finite != 0) & (finite != 1)).any()):
            odd = float(finite[(finite != 0) & (finite != 1)][0])
            raise ValueError(
                f"algorithm.advantage.kind = 'beta' needs rewards of 0 and 1, but one is {odd:g}"
            )
        result = torch.zeros_like(rewards)
        found = list(members(rewards, groups))
        alpha, beta = beta_parameters(torch.stack([v.mean() for _, v in found])) if found else (1.0, 1.0)  # fmt: skip
        log_constant = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
        for rows, values in found:
            if has_no_variance(values):
                continue
            p = float(values.mean())
            log_density = (alpha - 1) * math.log(p) + (beta - 1) * math.log(1 - p) - log_constant
            advantage = (values - p) / math.exp(log_density)
            result[rows] = advantage.clamp(-self.clip, self.clip).to(result.dtype)
        return result


def beta_parameters(means: Float[Tensor, " groups"]) -> tuple[float, float]:
    """BNPO's ``alpha`` and ``beta`` for the mean rewards of groups.

    If all means are equal, or there is only one, no Beta distribution fits; the result is then
    (3/2, 3/2), as in GRPO.
    """
    if has_no_variance(means):
        return 1.5, 1.5
    mean, variance = float(means.mean()), float(means.var(correction=0))
    # 0 if the mean of every group is 0 or 1: no variance can be larger.
    total = max(0.0, mean * (1 - mean) / variance - 1)
    return 1 + total * mean / 3, 1 + total * (1 - mean) / 3


@dataclass(frozen=True, kw_only=True)
class VirtualBest(_SingleReward):
    """``(reward - mean) / std``, with one perfect candidate added to the statistics (NGRPO, arXiv:2509.18851).

    A group in which all candidates fail has variance then: each gets ``-1 / sqrt(G)`` (``ddof`` 0),
    and the model moves away from them. A group in which all candidates are perfect gets zero.
    Advantages sum to less than zero; the paper bounds this with a narrower clip range for falling
    ratios than for rising ones (``loss.clip_high`` above ``loss.clip_range``).
    """

    adds_best: ClassVar[bool] = True
    kind: Literal["virtual_best"] = "virtual_best"
    best: float = 1.0
    """The largest possible reward. A larger one is an error."""
    ddof: Literal[0, 1] = 0
    """0 divides by G + 1, 1 by G."""
    epsilon: float = 1e-4
    """Added to the standard deviation."""
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def __call__(
        self, rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"]:
        """Advantages as those of :class:`GroupAdvantage`.

        Raises:
            ValueError: If a reward exceeds ``best``.
        """
        finite = rewards[rewards.isfinite()]
        if finite.numel() and float(finite.max()) > self.best * (1 + RELATIVE_FLOOR):
            raise ValueError(
                f"algorithm.advantage.best = {self.best:g} must be the largest possible reward, but "
                f"one is {float(finite.max()):g}"
            )
        result = torch.zeros_like(rewards)
        for rows, values in members(rewards, groups):
            with_best = torch.cat([values, values.new_tensor([self.best])])
            if len(values) < 2 or has_no_variance(with_best):
                continue
            std = with_best.std(correction=self.ddof) + self.epsilon
            advantage = (values - with_best.mean()) / std
            result[rows] = advantage.clamp(-self.clip, self.clip).to(result.dtype)
        return result


@dataclass(frozen=True, kw_only=True)
class BestAdvantage(_SingleReward):
    """1 for the best samples of a group and 0 for the others: rejection sampling (RAFT, arXiv:2304.06767).

    A sample that equals the last chosen one is chosen, too, as in Flow-GRPO's released code, whose
    ``keep`` is 1. A group of equal rewards gets zero (the released code trains on all of it).
    """

    kind: Literal["best"] = "best"
    keep: int = 1
    """Samples that are chosen of each group, at least 1 and below the group size."""

    @property
    def clip(self) -> float:
        """Advantages are at most 1."""
        return 1.0

    def check(self) -> None:
        """Raise ValueError if no sample would be chosen."""
        if self.keep < 1:
            raise ValueError(f"advantage.keep must be at least 1, got {self.keep}")

    def __call__(
        self, rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
    ) -> Float[Tensor, " candidates"]:
        """1 or 0 for each candidate; 0 without a finite reward.

        If failures leave a group no more than ``keep`` rewards, those above the lowest are chosen.
        """
        result = torch.zeros_like(rewards)
        for rows, values in members(rewards, groups):
            if has_no_variance(values):
                continue
            last = values.topk(min(self.keep, len(values))).values[-1]
            chosen = values >= last if self.keep < len(values) else values > last
            result[rows] = chosen.to(result.dtype)
        return result


class _MultiReward:
    """The shared part of the kinds that normalise each reward by itself."""

    is_binary: ClassVar[bool] = False
    adds_best: ClassVar[bool] = False
    is_separate: ClassVar[bool] = False

    @property
    def over_batch(self) -> bool:
        """Whether the standard deviations are those of the whole batch."""
        return getattr(self, "std", "") == "batch"

    def inputs(self, scores: Scores) -> dict[str, Float[Tensor, " candidates"]]:
        """Each reward with a weight."""
        return scores.trained()


@dataclass(frozen=True, kw_only=True)
class PerReward(_MultiReward):
    """``sum over rewards of weight * (score - mean of the group) / std`` (DanceGRPO, MixGRPO, Pref-GRPO).

    Weights are used as they are; published ones mostly sum to 1. For actions within the clip range
    this equals the weighted sum of one loss per reward (:class:`PerLoss`).
    """

    kind: Literal["per_reward"] = "per_reward"
    std: Literal["group", "batch", "none"] = "group"
    """As for ``group``, of each reward."""
    ddof: Literal[0, 1] = 1
    """0 divides by G, 1 by G - 1."""
    epsilon: float = 1e-8
    """Added to each standard deviation."""
    clip: float = 5.0
    """The sum is clipped to [-clip, clip]."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, " rows"]:
        """The weighted sum of each reward's advantages; zero where one of them failed."""
        each = GroupAdvantage(std=self.std, ddof=self.ddof, epsilon=self.epsilon, clip=UNCLIPPED)
        return _weighted_sum(each, complete(values), groups, weights).clamp(-self.clip, self.clip)


@dataclass(frozen=True, kw_only=True)
class PerLoss(_MultiReward):
    """``weight * (score - mean of the group) / std`` for each reward by itself, with a loss for each.

    The loss of an action is the sum of the losses for the advantages of each reward, as in DanceGRPO's
    code for HunyuanVideo (visual and motion quality). It differs from ``per_reward`` for actions beyond
    the clip range about which the rewards disagree: the part that would lead further away has no
    gradient there, and the other part keeps its own. Samples are ranked (``best_of``) by the sum.
    """

    is_separate: ClassVar[bool] = True
    kind: Literal["per_loss"] = "per_loss"
    std: Literal["group", "batch", "none"] = "group"
    """As for ``group``, of each reward."""
    ddof: Literal[0, 1] = 1
    """0 divides by G, 1 by G - 1."""
    epsilon: float = 1e-8
    """Added to each standard deviation."""
    clip: float = 5.0
    """The advantages of each reward are clipped to [-clip, clip], before its weight."""

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, "rows rewards"]:
        """Each reward's weighted advantages, a column each; zero where one of them failed."""
        each = GroupAdvantage(std=self.std, ddof=self.ddof, epsilon=self.epsilon, clip=self.clip)
        columns = [weights[n] * each(column, groups) for n, column in complete(values).items()]
        return torch.stack(columns, 1)


@dataclass(frozen=True, kw_only=True)
class GDPO(_MultiReward):
    """As ``per_reward``, then normalised over the whole batch (arXiv:2601.05242).

    The second normalisation keeps the size of advantages the same for any number of rewards.
    """

    kind: Literal["gdpo"] = "gdpo"
    ddof: Literal[0, 1] = 1
    """0 divides by the number of values, 1 by one less; in both normalisations."""
    epsilon: float = 1e-4
    """Added to each standard deviation."""
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""

    @property
    def over_batch(self) -> bool:
        """Whether there are statistics over the batch: always, in the second normalisation."""
        return True

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, or of the wrong sign."""
        check_clip(self.clip, self.epsilon)

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, " rows"]:
        """The normalised sums; zero where a reward failed or no group has variance."""
        values = complete(values)
        each = GroupAdvantage(ddof=self.ddof, epsilon=self.epsilon, clip=UNCLIPPED)
        total = _weighted_sum(each, values, groups, weights)
        known = total[next(iter(values.values())).isfinite()]
        if has_no_variance(known):
            return torch.zeros_like(total)
        normal = (total - known.mean()) / (known.std(correction=self.ddof) + self.epsilon)
        # A group without variance is exactly zero before this normalisation and stays so: the mean
        # that would be subtracted is rounding.
        normal = torch.where(total == 0, total, normal)
        return normal.clamp(-self.clip, self.clip)


@dataclass(frozen=True, kw_only=True)
class LogTamed:
    """``log(1 + score)`` for rewards that vary much for their size, then as ``group`` (PaCo-RL, arXiv:2512.04784).

    A reward varies much if ``std / (mean + 1e-6)`` over the whole batch exceeds a threshold.
    """

    is_binary: ClassVar[bool] = False
    adds_best: ClassVar[bool] = False
    is_separate: ClassVar[bool] = False
    kind: Literal["log_tamed"] = "log_tamed"
    threshold: Literal["mean", "median", "fixed"] = "mean"
    """The mean or the median of the ratios of all rewards, or ``fixed`` as given by ``above``."""
    above: float = 1.0
    """The threshold, if it is fixed."""
    centre: Literal["group", "none"] = "group"
    """``group`` subtracts the mean of the group. ``none`` subtracts nothing, so that with ``std`` =
    ``none`` the tamed sum itself is the advantage, as in the released code, whose aggregation
    functions return advantages; with positive rewards, all samples then have positive advantages."""
    std: Literal["group", "batch", "none"] = "group"
    """As for ``group``, of the sum."""
    ddof: Literal[0, 1] = 0
    """0 divides by G, 1 by G - 1."""
    epsilon: float = 1e-4
    """Added to the standard deviation."""
    clip: float = 5.0
    """Advantages are clipped to [-clip, clip]."""

    @property
    def over_batch(self) -> bool:
        """Whether the standard deviation is that of the whole batch."""
        return self.std == "batch"

    def check(self) -> None:
        """Raise ValueError if every advantage would be zero, of the wrong sign, or of no bounded size."""
        check_clip(self.clip, self.epsilon)
        if self.centre == "none" and self.std == "group":
            raise ValueError(
                "advantage.centre = 'none' keeps the rewards of groups that do not vary, which std = 'group' "
                "would divide by 0; use std = 'none', as the released code, or 'batch'"
            )

    def inputs(self, scores: Scores) -> dict[str, Float[Tensor, " candidates"]]:
        """The weighted sum, in which the rewards that vary much are tamed.

        Raises:
            ValueError: If a score to be tamed is -1 or less.
        """
        trained = scores.trained()
        finite = [v[v.isfinite()] for v in trained.values()]
        if not len(finite[0]):
            return {REWARD: torch.full_like(scores.reward, torch.nan).double()}
        ratios = [float(v.std(correction=0) / (v.mean() + 1e-6)) for v in finite]
        threshold = {"mean": mean(ratios), "median": median(ratios), "fixed": self.above}
        total = torch.zeros_like(scores.reward).double()
        for (name, values), ratio, known in zip(trained.items(), ratios, finite, strict=True):
            tamed = values
            if ratio > threshold[self.threshold]:
                if float(known.min()) <= -1:
                    raise ValueError(
                        "algorithm.advantage.kind = 'log_tamed' needs scores above -1, but one is "
                        f"{float(known.min()):g}; shift the reward"
                    )
                tamed = torch.log1p(values)
            total = total + scores.weights[name] * tamed
        return {REWARD: total}

    def combine(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        groups: Int[Tensor, " rows"],
        weights: Mapping[str, float],
    ) -> Float[Tensor, " rows"]:
        """Advantages of the tamed sum, as :class:`GroupAdvantage` computes them, or uncentred."""
        if self.centre == "none":
            return self._uncentred(values[REWARD])
        of_sum = GroupAdvantage(std=self.std, ddof=self.ddof, epsilon=self.epsilon, clip=self.clip)
        return of_sum(values[REWARD], groups)

    def _uncentred(self, values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """The numbers themselves, by their deviation over the batch if ``std`` asks for it; 0 for NaN."""
        result, finite = values.double(), values[values.isfinite()].double()
        if self.std == "batch":
            if has_no_variance(finite):
                return torch.zeros_like(values)
            result = result / (finite.std(correction=self.ddof) + self.epsilon)
        return result.clamp(-self.clip, self.clip).nan_to_num().to(values.dtype)


Advantage = (
    GroupAdvantage
    | BetaAdvantage
    | VirtualBest
    | BestAdvantage
    | PerReward
    | PerLoss
    | GDPO
    | LogTamed
)
"""The kinds of advantage that a configuration can name."""


def candidate_advantages(
    advantage: AdvantageKind, scores: Scores, groups: Int[Tensor, " candidates"]
) -> Float[Tensor, "candidates *rewards"]:
    """The advantage of each candidate within its group; zero where a trained reward failed.

    A kind with separate losses gives a column for each reward.

    Args:
        advantage: The kind.
        scores: The candidates of all processes.
        groups: Candidates with the same label are compared.
    """
    found = advantage.combine(advantage.inputs(scores), groups, scores.weights)
    return found.to(scores.reward.dtype)


def check_clip(clip: float, epsilon: float = 0.0) -> None:
    """Raise ValueError if every advantage would be zero, or of the wrong sign."""
    if not clip > 0:
        raise ValueError(f"advantage.clip must be above 0, got {clip}")
    if not epsilon >= 0:
        raise ValueError(f"advantage.epsilon must be at least 0, got {epsilon}")


def has_no_variance(values: Float[Tensor, " values"]) -> bool:
    """Whether rewards are equal up to rounding, or fewer than two."""
    if values.numel() < 2:
        return True
    scale = float(values.abs().max())
    return float(values.max() - values.min()) <= RELATIVE_FLOOR * max(scale, 1e-12)


def zero_variance_groups(
    rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
) -> Bool[Tensor, " groups"]:
    """For each group, in ascending order, whether its rewards have no variance."""
    flags = [has_no_variance(rewards[(groups == g) & rewards.isfinite()]) for g in groups.unique()]
    return torch.tensor(flags, dtype=torch.bool)


def members(
    rewards: Float[Tensor, " candidates"], groups: Int[Tensor, " candidates"]
) -> Iterator[tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]]:
    """For each group, in ascending order: its rows with a finite reward, and these rewards in fp64."""
    for group in groups.unique():
        rows = ((groups == group) & rewards.isfinite()).nonzero().squeeze(1)
        if len(rows):
            yield rows, rewards[rows].double()


def _weighted_sum(
    each: GroupAdvantage,
    values: Mapping[str, Float[Tensor, " rows"]],
    groups: Int[Tensor, " rows"],
    weights: Mapping[str, float],
) -> Float[Tensor, " rows"]:
    """The weighted sum of each reward's advantages."""
    parts = [weights[name] * each(column, groups) for name, column in values.items()]
    return torch.stack(parts).sum(0)
