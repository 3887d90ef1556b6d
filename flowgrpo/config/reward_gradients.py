"""What a loss that differentiates rewards excludes."""

from typing import Any

from flowgrpo.core.errors import ConfigError


def check_reward_gradients(config: Any) -> None:
    """Check the settings of a :class:`flowgrpo.config.Config` against a loss that differentiates rewards.

    Raises:
        ConfigError: With the key that it excludes, and what to set.
    """
    if not config.loss.needs.reward_gradient:
        return
    name = type(config.loss).__name__
    if config.parallel.is_sharded:
        raise ConfigError(
            f"parallel.shard = {config.parallel.shard!r} is not possible with the loss {name}: its backward pass goes "
            "through several steps of the denoiser, for which the processes do not gather the parameters in one "
            "order; set it to 'off'"
        )
    if config.memory.offload_vae:
        raise ConfigError(
            f"memory.offload_vae is not possible with the loss {name}: the backward pass goes through the VAE after "
            "it has left the device; set it to false (memory.gradient_checkpointing and memory.decode_batch = 1 save "
            "memory)"
        )
    if config.train.refill:
        raise ConfigError(
            f"train.refill replaces groups of equal rewards, which the loss {name} can train on: its samples are not "
            "compared; set it to 0"
        )
    if config.train.staleness:
        raise ConfigError(
            f"train.staleness = 1 is not possible with the loss {name}: its states have no ratio to the weights that "
            "sampled them; set it to 0"
        )
