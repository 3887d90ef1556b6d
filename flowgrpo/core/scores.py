"""The scores of candidates: one raw score per reward, and their weighted sum, the reward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flowgrpo.core.tensors import Bool, Float, Int, Tensor, torch


@dataclass(frozen=True)
class Scores:
    """The scores of ``N`` candidates, as the reward scorer, advantages and evaluations use them.

    Attributes:
        raw: Score of each reward by its name, as its model returned it; NaN where it failed.
        reward: The weighted sum that is trained on; NaN where a reward with a weight failed.
        weights: Weight of each trained reward in this iteration. A reward that is only measured has
            no weight here.
        shaping: The function from a reward's raw score to the number that its weight multiplies.
            Rewards without one count with their raw score.
        features: A vector for each candidate, if the scorer was asked for features.

    Example:
        ``Scores({"aesthetic": a, "clip": c}, 0.7 * a + 0.3 * c, {"aesthetic": 0.7, "clip": 0.3})``
    """

    raw: Mapping[str, Float[Tensor, " candidates"]]
    reward: Float[Tensor, " candidates"]
    weights: Mapping[str, float] = field(default_factory=dict)
    shaping: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    features: Float[Tensor, "candidates size"] | None = None

    def __len__(self) -> int:
        return self.reward.shape[0]

    @property
    def valid(self) -> Bool[Tensor, " candidates"]:
        """Which candidates have a reward. The others take no part in training."""
        return self.reward.isfinite()

    def shaped(self, name: str) -> Float[Tensor, " candidates"]:
        """The scores of one reward as they enter the weighted sum."""
        values = self.raw[name]
        return self.shaping[name](values) if name in self.shaping else values

    def parts(self) -> dict[str, Float[Tensor, " candidates"]]:
        """The summand of each trained reward in the weighted sum, by its name."""
        return {name: weight * self.shaped(name) for name, weight in self.weights.items()}

    def trained(self) -> dict[str, Float[Tensor, " candidates"]]:
        """Shaped scores of each reward with a weight, in fp64.

        A candidate for which one of these rewards failed is NaN in all of them, so that every
        statistic is over the same candidates.

        Raises:
            ValueError: If no reward has a weight, or one has no scores.
        """
        names = [name for name, weight in self.weights.items() if weight != 0]
        if not names or any(name not in self.raw for name in names):
            raise ValueError(
                "multi-reward advantages need the weight of each reward; known weights: "
                f"{dict(self.weights)}, known scores: {list(self.raw)}"
            )
        return complete({name: self.shaped(name).double() for name in names})

    def with_score(
        self, name: str, values: Float[Tensor, " candidates"], weight: float
    ) -> "Scores":
        """The scores with one more reward, which is added to the weighted sum."""
        return Scores(
            raw={**self.raw, name: values},
            reward=self.reward + weight * values,
            weights={**self.weights, name: weight},
            shaping=self.shaping,
            features=self.features,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "Scores":
        """Apply a function to each tensor, such as one that gathers it from all processes."""
        raw = {name: function(values) for name, values in self.raw.items()}
        features = None if self.features is None else function(self.features)
        return Scores(raw, function(self.reward), self.weights, self.shaping, features)

    def select(self, rows: Int[Tensor, " rows"] | Bool[Tensor, " candidates"]) -> "Scores":
        """The scores of some candidates, by their indices or by a mask."""
        return self.map(lambda values: values[rows])

    @staticmethod
    def concatenate(parts: Sequence["Scores"]) -> "Scores":
        """Join the scores of several batches of one iteration."""
        first = parts[0]
        features = [p.features for p in parts if p.features is not None]
        return Scores(
            raw={name: torch.cat([p.raw[name] for p in parts]) for name in first.raw},
            reward=torch.cat([p.reward for p in parts]),
            weights=first.weights,
            shaping=first.shaping,
            features=torch.cat(features) if features else None,
        )


def complete(values: Mapping[str, Float[Tensor, " rows"]]) -> dict[str, Float[Tensor, " rows"]]:
    """Set rows to NaN in every column where any column is not finite."""
    whole = torch.stack([v.isfinite() for v in values.values()]).all(0)
    return {name: torch.where(whole, v, torch.nan) for name, v in values.items()}
