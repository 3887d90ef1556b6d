"""The state of the guards against reward hacking, which the learner applies before its updates."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from flowgrpo.algorithms.guard import (
    KEPT,
    Guard,
    adapted,
    kl_weights,
    novelty_factors,
    suspicion,
)
from flowgrpo.data.experience import Experience


class Guarding:
    """Applies the guards of a configuration, iteration by iteration.

    Attributes:
        share: Share of the samples with an uncertainty of at least 0 that get the KL.
        means: Mean uncertainties of the last iterations.
        since_reset: Iterations since the reference policy was replaced, or since the start.
        resets: How often it was replaced.
    """

    def __init__(self, settings: Guard):
        """Start with the share of the settings."""
        self.settings, self.share = settings, settings.share
        self.means: list[float] = []
        self.since_reset = self.resets = 0

    def applied(
        self, experience: Experience, advantages: Float[Tensor, "actions *rewards"]
    ) -> tuple[Experience, Float[Tensor, "actions *rewards"], dict[str, float]]:
        """The experience with KL weights, the advantages with their factors, and what to log."""
        settings, metrics = self.settings, dict[str, float]()
        if settings.kl == "uncertain":
            found = suspicion(experience, settings.measured)
            if settings.adapt:
                self.share = adapted(self.share, found.mean, self.means)
                self.means = [*self.means, found.mean][-KEPT:]
            weights, part = kl_weights(experience, found, self.share)
            experience = replace(experience, actions=replace(experience.actions, kl_weight=weights))
            metrics |= {"guard/uncertainty": found.mean, "guard/share": self.share, "guard/gated": part}  # fmt: skip
        if settings.novelty != "off":
            factors, mean = novelty_factors(experience, settings.novelty == "relative")
            factors = factors if advantages.ndim == 1 else factors[:, None]
            # Only what is better than its group: a bad sample is not better for being different.
            advantages = advantages.where(advantages <= 0, advantages * factors)
            metrics["guard/novelty"] = mean
        return experience, advantages, metrics

    def is_reset_due(self, kl: float) -> bool:
        """Whether the trained weights become the reference after an iteration with this mean KL."""
        self.since_reset += 1
        s = self.settings
        due = (0 < s.reset_every <= self.since_reset) or (0 < s.reset_above < kl)
        if due:
            self.since_reset, self.resets = 0, self.resets + 1
        return due

    def state(self) -> dict[str, Any]:
        """Values for JSON."""
        names = ("share", "means", "since_reset", "resets")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from the result of :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, value)
