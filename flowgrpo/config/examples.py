"""Checks and words of training on given pictures."""

from typing import Any

from flowgrpo.core.errors import ConfigError


def check_examples(config: Any) -> None:
    """Check the settings of a run that trains on given pictures.

    Raises:
        ConfigError: If a setting belongs to pictures that are sampled, or does not fit the algorithm.
    """
    algorithm, loss = config.algorithm, config.loss
    if not algorithm.num_targets:
        return
    kind, loss_kind = getattr(algorithm, "kind", ""), getattr(loss, "kind", "")
    if algorithm.num_targets == 1 and loss.needs.whole_groups:
        raise ConfigError(
            f"loss.kind = {loss_kind!r} compares pictures of one prompt, and algorithm.kind = {kind!r} has one for "
            "each: use loss.kind = 'supervised', or pairs with algorithm.kind = 'pairs'"
        )
    if algorithm.num_targets == 2 and loss_kind == "supervised":
        raise ConfigError(
            "loss.kind = 'supervised' would train away from rejected pictures without a bound: use loss.kind = 'dpo', "
            "or name the chosen pictures alone and use algorithm.kind = 'pictures'"
        )
    if config.sampling.guidance_scale is None:
        raise ConfigError(
            f"sampling.guidance_scale: set it with algorithm.kind = {kind!r}. 1.0 trains the model itself, as in "
            "pre-training; evaluation.guidance_scale is that of evaluations. Models with distilled guidance, such as "
            "FLUX.1-dev, need the value at which they are trained"
        )
