"""A check of previews that needs the sampling of a run besides the algorithm."""

from flowgrpo.algorithms.previews import Previews
from flowgrpo.core.errors import ConfigError
from flowgrpo.core.text import counted
from flowgrpo.policy.settings import Sampling


def check_previews(algorithm: object, sampling: Sampling) -> None:
    """Raise ConfigError if an algorithm draws previews whose number of steps has no grid."""
    steps, settings = sampling.num_steps, getattr(algorithm, "previews", Previews())
    is_given = bool(sampling.sigmas or sampling.timesteps)
    if settings.number and is_given and settings.num_steps != steps:
        key = "sigmas" if sampling.sigmas else "timesteps"
        raise ConfigError(
            f"sampling.{key} gives the grid for {counted(steps, 'step')} and none for the previews' {settings.num_steps}; "
            f"remove it, or set algorithm.previews.num_steps = {steps}"
        )
