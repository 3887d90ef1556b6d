"""How many devices a run needs, its denoiser divided among them, if it does not fit into one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flowgrpo.config import Config
from flowgrpo.memory.budget import Footprint, advise, budget
from flowgrpo.memory.footprint import divides, memory_options

MOST_PROCESSES = (2, 4, 8, 16, 32, 64)
"""Numbers of processes that are tried."""
SHARD = "parallel.shard"


@dataclass(frozen=True)
class Division:
    """A number of processes among which a denoiser is divided so that a run fits into their devices.

    Attributes:
        processes: Their number.
        settings: The settings to change.
        peak: The peak of one process with these settings, in bytes.
    """

    processes: int
    settings: Sequence[str]
    peak: int


def fitting_division(
    config: Config, parts: Footprint, num_processes: int, capacity: int
) -> Division | None:
    """The smallest power of two of processes on which the run fits, its denoiser divided among them.

    Args:
        config: Configuration of the run.
        parts: Its footprint on ``num_processes``.
        num_processes: Number of processes that is too small.
        capacity: Bytes of each device.

    Returns:
        None if the denoiser cannot be divided, groups cannot be shared equally, or nothing helps.
    """
    if config.parallel.context > 1:
        return None
    # Adam's moments are divided, in fp32; a denoiser is neither divided and quantised nor compiled.
    usual = {"quantize": "none", "compile": "none", "arithmetic": "autocast"}
    memory = replace(config.memory, **usual)  # type: ignore[arg-type]
    whole = replace(config, memory=memory, train=replace(config.train, optimizer="adamw"))
    settings = [f"memory.{k} = {v!r}" for k, v in usual.items() if getattr(config.memory, k) != v]
    settings += ["train.optimizer = 'adamw'"] if config.train.optimizer != "adamw" else []
    own = config.train.updates if config.train.split == "groups" else 1
    for number in MOST_PROCESSES:
        shared = config.train.groups % (number * own) == 0
        if number <= num_processes or not shared or not divides(whole, number):
            continue
        options = replace(memory_options(whole, number), parts=number)
        each = replace(parts, experience=round(parts.experience * num_processes / number))
        changes, fits = advise(each, options, capacity)
        if fits:
            peak = changes[-1].peak if changes else budget(each, options).peak
            more = [c.setting for c in changes]
            # ``parallel.shard = 'all'`` divides the denoiser too.
            shard = [] if any(m.startswith(SHARD) for m in more) else [f"{SHARD} = 'denoiser'"]
            return Division(number, (*shard, *settings, *more), peak)
    return None
