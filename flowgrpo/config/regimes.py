"""Further ways to sample in evaluations, the tables ``[[evaluation.regimes]]``."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flowgrpo.core.errors import ConfigError
from flowgrpo.policy.settings import Sampling


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Another way to sample in evaluations, such as with guidance after training without it.

    The prompts and the noise are those of the evaluation. The best weights and the grid do not depend on
    it.
    """

    label: str = ""
    """Its name in logs and reports; by default made of the keys below, such as
    ``steps_28_guidance_3``."""
    num_steps: int | None = None
    """Denoising steps; if unset, as in the evaluation."""
    guidance_scale: float | None = None
    """Guidance scale; if unset, as in the evaluation."""
    call: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's call that differ, such as ``true_cfg_scale``."""
    when: Literal["every", "ends"] = "ends"
    """At ``every`` evaluation, or only before and after training."""
    images: int = 0
    """Number of images, at most that of the evaluation; 0 for as many."""

    @property
    def tag(self) -> str:
        """The name in logs and reports."""
        values = {"steps": self.num_steps, "guidance": self.guidance_scale, **self.call}
        parts = [f"{k}_{_plain(v)}" for k, v in values.items() if v is not None]
        return self.label or "_".join(parts)

    def sampling(self, evaluation: Sampling) -> Sampling:
        """The arguments of the pipeline's call: those of the evaluation, and what differs."""
        changed: dict[str, Any] = {
            "num_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
        }
        return replace(
            evaluation,
            **{k: v for k, v in changed.items() if v is not None},
            call={**evaluation.call, **self.call},
        )


def _plain(value: Any) -> str:
    """A value in a name: no dots, which separate keys."""
    return (f"{value:g}" if isinstance(value, float) else str(value)).replace(".", "p")


def check_regimes(regimes: Sequence[Regime], evaluation: Sampling) -> None:
    """Check further ways to sample.

    Args:
        regimes: The ways to sample.
        evaluation: Arguments of the pipeline's call in the evaluation itself.

    Raises:
        ConfigError: If one names nothing that differs or equals another, or its values are not allowed.
            One that happens to equal the evaluation is allowed: ``--set`` may have changed the latter.
    """
    seen, tags = dict[str, Sampling](), list[str]()
    for index, regime in enumerate(regimes):
        key, sampling = f"evaluation.regimes[{index}]", regime.sampling(evaluation)
        try:
            if sampling.num_steps < 1 or regime.images < 0:
                raise ValueError("num_steps must be at least 1 and images at least 0")
            sampling.check()
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        if regime.num_steps is None and regime.guidance_scale is None and not regime.call:
            raise ConfigError(
                f"{key} samples like the evaluation itself; set num_steps, guidance_scale or call"
            )
        same = next((name for name, other in seen.items() if other == sampling), "")
        if same:
            raise ConfigError(f"{key} samples like {same}; remove one, or change it")
        if not all(c.isalnum() or c in "_-" for c in regime.tag):
            raise ConfigError(
                f"{key}.label must consist of letters, digits, '_' and '-', got {regime.tag!r}"
            )
        if regime.tag in tags:
            raise ConfigError(f"{key}: there are two regimes {regime.tag!r}; give one a label")
        seen[key] = sampling
        tags.append(regime.tag)
