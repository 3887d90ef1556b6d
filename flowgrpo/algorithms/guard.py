"""Guards against reward hacking, for every algorithm: GARDO (arXiv:2512.24138).

An algorithm's advantages and the KL to the reference policy are adapted to three measures: how far the
trained reward agrees with rewards that are only measured, how much a sample differs from the others of
its group, and how far the policy is from its reference. The state is that of
:class:`flowgrpo.training.guard.Guarding`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flowgrpo.core.guards import gated, nearest_distance, relative_to_group, uncertainty
from flowgrpo.core.tensors import Float, Tensor, torch
from flowgrpo.data.experience import Actions, Candidates, Experience


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Guards against reward hacking (GARDO). All are off by default, and each can be used by itself."""

    kl: Literal["all", "uncertain"] = "all"
    """The samples that the KL to the reference applies to: all, or those that the trained reward ranks
    much higher than the rewards with weight 0 do. ``uncertain`` needs ``loss.kl_coef`` above 0 and at
    least one reward with weight 0."""
    measured: tuple[str, ...] = ()
    """Names of the rewards with weight 0 that ``uncertain`` compares with; if empty, all of them."""
    share: float = 0.1
    """Share of the samples with an uncertainty of at least 0 that get the KL, in the first iteration."""
    adapt: bool = True
    """Whether the share grows by 10 % when the mean uncertainty is above that of the last 20 iterations,
    and falls by 10 % when it is below, within [0.02, 0.2]."""
    novelty: Literal["off", "relative", "distance"] = "off"
    """Factor of positive advantages by the distance to the nearest sample of the group, 1 minus their
    cosine: ``relative`` divides it by the mean of the group (released code), ``distance`` takes it as it
    is (paper), which makes positive advantages smaller."""
    features: str = ""
    """The reward whose features ``novelty`` compares: a name in ``reward_models``, such as ``dino``, or
    the import path of a class with a method ``embed(images)``. If empty, images of 8x8 pixels."""
    features_options: dict[str, Any] = field(default_factory=dict)
    """Arguments for that class."""
    reset_every: int = 0
    """Iterations after which the trained weights become the reference policy; 0 for never. The released
    code does it after 16, when more than 15 have passed."""
    reset_above: float = 0.0
    """Mean KL to the reference (the metric ``loss/kl``) above which they do, too; 0 for never. The
    released code has 3e-4 for Flow-GRPO and 0.15 for DiffusionNFT."""

    @property
    def resets(self) -> bool:
        """Whether the reference policy is ever replaced."""
        return self.reset_every > 0 or self.reset_above > 0

    @property
    def is_active(self) -> bool:
        """Whether any guard is on."""
        return self.kl != "all" or self.novelty != "off" or self.resets

    def check(self, weights: dict[str, float], kl_coef: float) -> None:
        """Raise ValueError if a setting is out of range, or has no effect in this configuration.

        Args:
            weights: The weight of each reward by its name.
            kl_coef: The weight of the KL in the loss.
        """
        untrained = [name for name, weight in weights.items() if weight == 0]
        if self.kl == "uncertain" and not untrained:
            raise ValueError(
                "guard.kl = 'uncertain' compares the trained reward with rewards that are only measured, and "
                "there are none; add one with weight = 0"
            )
        wrong = [name for name in self.measured if name not in untrained]
        if wrong:
            raise ValueError(
                f"guard.measured: {wrong[0]!r} is no reward with weight 0 (known: {', '.join(untrained) or 'none'})"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"guard.share must be above 0 and at most 1, got {self.share}")
        if self.adapt and self.kl == "uncertain" and not LEAST <= self.share <= MOST:
            raise ValueError(
                f"guard.share must be from {LEAST} to {MOST} if it adapts, got {self.share}; set guard.adapt = "
                "false for a fixed share"
            )
        if self.measured and self.kl == "all":
            raise ValueError("guard.measured needs guard.kl = 'uncertain'")
        if (self.kl != "all" or self.resets) and kl_coef == 0:
            raise ValueError(
                "guard.kl = 'uncertain' and the resets of the reference change the KL in the loss, and there is "
                "none; set loss.kl_coef above 0"
            )
        if self.features and self.novelty == "off":
            raise ValueError("guard.features needs guard.novelty = 'relative' or 'distance'")
        if self.features_options and not self.features:
            raise ValueError("guard.features_options needs guard.features")
        if self.reset_every < 0 or self.reset_above < 0:
            raise ValueError("guard.reset_every and guard.reset_above must be at least 0")


LEAST, MOST, STEP, KEPT = 0.02, 0.2, 0.1, 20
"""Limits of the share, its change, and the number of past means: those of the released code."""


@dataclass(frozen=True)
class Suspicion:
    """What the gate found in an iteration.

    Attributes:
        candidates: For each candidate of all processes, its uncertainty; NaN where a score failed.
        mean: The mean of those that are at least 0; 0 if there are none.
    """

    candidates: Float[Tensor, " candidates"]
    mean: float


def suspicion(experience: Experience, measured: Sequence[str]) -> Suspicion:
    """The uncertainty of all candidates, compared over all processes.

    Args:
        experience: With the scores of the measured rewards.
        measured: Their names; if empty, all rewards without a weight.
    """
    scores = experience.all_candidates.scores
    names = measured or [name for name in scores.raw if name not in scores.weights]
    found = uncertainty(scores.reward, [scores.raw[name] for name in names])
    high = found[found >= 0]
    return Suspicion(found, float(high.mean()) if len(high) else 0.0)


def adapted(share: float, mean: float, past: Sequence[float]) -> float:
    """The share of gated samples, after an iteration with this mean uncertainty."""
    if past and mean > max(past):
        share *= 1 + STEP
    elif past and mean < min(past):
        share *= 1 - STEP
    return min(max(share, LEAST), MOST)


def kl_weights(
    experience: Experience, suspicious: Suspicion, share: float
) -> tuple[Float[Tensor, " actions"], float]:
    """The weight of each action's KL, and the share of all candidates that are gated.

    It is 0 for samples that are not gated, and for the others 1 over the share of all candidates that
    are, so that the KL of the loss is the mean over the gated samples, as in the released code.
    """
    chosen = gated(suspicious.candidates, share)
    part = float(chosen.double().mean())
    if part == 0:
        return torch.zeros(len(experience.actions)), 0.0
    weight = of_actions(experience, own_rows(experience, chosen.double()))
    return (weight / part).float(), part


def novelty_factors(
    experience: Experience, relative: bool
) -> tuple[Float[Tensor, " actions"], float]:
    """The factor of each action's advantage, where that is positive; and the mean nearest distance.

    Candidates are compared with those of their group, step and granularity. The factor is 1 where there
    is nothing to compare with. The mean is over the candidates of all processes.
    """
    c = experience.all_candidates
    assert c.scores.features is not None, "the scorer was not asked for features"
    labels = torch.unique(
        torch.stack([c.group, c.step, c.granularity]), dim=1, return_inverse=True
    )[1]
    distance = nearest_distance(c.scores.features, labels)
    factor = relative_to_group(distance, labels) if relative else distance
    known = distance[distance.isfinite()]
    mean = float(known.mean()) if len(known) else 0.0
    own = own_rows(experience, factor.nan_to_num(nan=1.0))
    return of_actions(experience, own).float(), mean


def own_rows(experience: Experience, values: Tensor) -> Tensor:
    """The values of this process's candidates, from those of all."""
    everyone = experience.all_candidates
    return values[torch.isin(everyone.group, experience.candidates.group.unique())]


def of_actions(
    experience: Experience, values: Float[Tensor, " candidates"]
) -> Float[Tensor, " actions"]:
    """For each action, the mean over the candidates that judge its sample at its step.

    If none has its step, as where one candidate judges a whole trajectory, over all candidates of its
    sample; 1 if there are none.
    """
    actions, candidates = experience.actions, experience.candidates
    exact = _mean_by(_keys(candidates, True), values)
    whole = _mean_by(_keys(candidates, False), values)
    pairs = zip(_keys(actions, True), _keys(actions, False), strict=True)
    return torch.tensor([exact.get(a, whole.get(b, 1.0)) for a, b in pairs], dtype=torch.float64)


def _keys(rows: Actions | Candidates, with_step: bool) -> list[tuple[int, ...]]:
    columns = [rows.group, rows.sample, *([rows.step] if with_step else [])]
    return list(zip(*(c.tolist() for c in columns), strict=True))


def _mean_by(keys: Sequence[tuple[int, ...]], values: Tensor) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], list[float]] = {}
    for key, value in zip(keys, values.tolist(), strict=True):
        found.setdefault(key, []).append(value)
    return {key: sum(own) / len(own) for key, own in found.items()}
