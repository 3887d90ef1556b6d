"""Judges pictures by reward models, several at once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flowgrpo.bench.base import Failure, Json, Judged, Picture
from flowgrpo.bench.judging import in_batches
from flowgrpo.core.secrets import redact_table
from flowgrpo.core.tensors import Float, Tensor

if TYPE_CHECKING:
    from flowgrpo.rewards.settings import Reward


class RewardJudge:
    """The scores of rewards as judgements ``{"scores": {name: score}}``.

    A picture that one of the rewards fails on is a failure as a whole: it is judged again on resume.
    """

    def __init__(self, rewards: "Sequence[Reward]", batch: int, title: str = ""):
        """
        Args:
            rewards: The reward models; their weights are ignored.
            batch: Pictures in one call of a reward.
            title: Name in tables; by default the rewards' names.

        Raises:
            ValueError: If a reward does not exist or its options are wrong.
        """
        from flowgrpo.rewards.scorer import RewardScorer
        from flowgrpo.rewards.settings import Failures

        self.rewards, self.batch = list(rewards), batch
        self._title = title or ", ".join(r.label for r in rewards)
        self.scorer = RewardScorer(self.rewards, Failures(retries=2, then="drop", probe="off"))
        self.scorer.check_audio(False, "benchmarks score pictures and videos without sound")

    @property
    def title(self) -> str:
        """The rewards' names."""
        return self._title

    @property
    def notes(self) -> Sequence[str]:
        """Differences from the official judge."""
        return ()

    def identity(self) -> Json:
        """The rewards with their options."""
        return {
            "judge": "rewards",
            "rewards": [
                {"name": r.label, "model": r.model, "options": redact_table(_plain(r.options))}
                for r in self.rewards
            ],
        }

    def version(self) -> str:
        """Nothing runs elsewhere."""
        return ""

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Judged]:
        """The scores of each picture."""
        return in_batches(pictures, self.batch, self._scores)

    def _scores(
        self, images: Float[Tensor, "batch *frames 3 height width"], pictures: Sequence[Picture]
    ) -> Sequence[Json | Failure]:
        raw = self.scorer.score(images, [p.entry.prompt for p in pictures]).raw
        found: list[Json | Failure] = []
        for row in range(len(pictures)):
            scores = {name: float(values[row]) for name, values in raw.items()}
            failed = [name for name, value in scores.items() if value != value]
            found.append(
                Failure(f"no score by {', '.join(failed)}") if failed else {"scores": scores}
            )
        return found


def rewards_of(values: Sequence[str | Mapping[str, Any]]) -> "list[Reward]":
    """Rewards by name or as tables with the keys of ``[[rewards]]``.

    Raises:
        ValueError: If a table has an unknown key.
    """
    from flowgrpo.rewards.settings import Reward

    found = []
    for value in values:
        table = {"model": value} if isinstance(value, str) else dict(value)
        known = set(asdict(Reward(model="x")))
        if unknown := sorted(set(table) - known) or ([] if "model" in table else ["model"]):
            raise ValueError(
                f"a reward is a name or a table with 'model', 'name' and 'options', got {value!r}: "
                f"see {unknown[0]!r}"
            )
        found.append(Reward(**table))
    return found


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, str | int | float | bool) else str(v) for k, v in options.items()}
