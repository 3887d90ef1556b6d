"""Prints the memory estimate of a run and the settings to change if it does not fit."""

from flowgrpo.config import Config
from flowgrpo.config.plan import plan
from flowgrpo.config.training_data import training_prompts
from flowgrpo.core.text import counted
from flowgrpo.memory.budget import GB, Footprint, MemoryOptions, advise, budget, trained_activations
from flowgrpo.memory.division import fitting_division
from flowgrpo.memory.footprint import estimate_footprint, memory_options
from flowgrpo.memory.meta_pipeline import EstimateError
from flowgrpo.policy.loading import DTYPES
from flowgrpo.policy.model_files import published_folder
from flowgrpo.policy.settings import LoRA
from flowgrpo.training.console import Console


def print_estimate(
    config: Config, num_processes: int, memory_gb: float | None, console: Console
) -> None:
    """Print the peak memory of one process by part, and what to change if a device is too small.

    Args:
        config: Configuration of the run.
        num_processes: Number of processes that share the work.
        memory_gb: Memory of a device in GB; ``None`` uses that of the GPU in this machine.
        console: Console to print to.

    Raises:
        ValueError: If ``memory_gb`` is not above 0.
    """
    if memory_gb is not None and memory_gb <= 0:
        raise ValueError(f"--memory-gb must be above 0, got {memory_gb:g}")
    console.say("estimating the memory (nothing is loaded) ...")
    if published_folder(config.model.path) is not None:
        console.say(f"the sizes of {config.model.path} are in the package, so no hub is needed")
    try:
        prompts = training_prompts(config).prompts
        parts = estimate_footprint(config, prompts, num_processes)
    except EstimateError as error:
        console.say(f"the memory cannot be estimated: {error}")
        return
    options = memory_options(config, num_processes)
    total = budget(parts, options)
    rows = [(k, gb(v), "always") for k, v in total.resident.items()]
    rows += [(k, gb(v), "largest" if k == total.phase else "") for k, v in total.phases.items()]
    if parts.training.checkpointed is not None:
        each = (trained_activations(parts, options, w) / options.context for w in (False, True))
        kept = "{} without, {} with".format(*map(gb, each))
        rows.append(("activations, gradient checkpointing", kept, ""))
    rows.append(("peak", gb(total.peak), "always + largest"))
    console.table("memory of one process, GB", ["part", "GB", ""], rows)
    unknown = [k for k, v in parts.rewards.items() if v is None]
    if unknown:
        console.say(f"not counted, because their size is unknown: {', '.join(unknown)}")
    encoders = parts.whole_encoders if config.parallel.divides_encoders else 0
    attention = parts.attention * DTYPES[config.model.dtype].itemsize
    work = plan(config, num_processes)
    if network := work.network(parts.trained, parts.whole, encoders, attention):
        console.say(f"network: {network}")
    capacity = round(memory_gb * GB) if memory_gb is not None else _device_memory()
    if capacity is None:
        console.say("no GPU found; use --memory-gb N to compare with a device of N GB")
        return
    _print_advice(config, parts, options, num_processes, capacity, console)


def _print_advice(
    config: Config,
    parts: Footprint,
    options: MemoryOptions,
    num_processes: int,
    capacity: int,
    console: Console,
) -> None:
    """Print whether a run fits into ``capacity`` bytes, and otherwise what to change."""
    needed = budget(parts, options).needed
    said = f"with CUDA's context and fragmentation, {gb(needed)} GB of {gb(capacity)} GB"
    changes, fits = advise(parts, options, capacity)
    if not changes and fits:
        console.say(f"{said}: fits")
        return
    console.say(
        f"{said}: does NOT fit" + (". Change these settings, in this order:" if changes else "")
    )
    for change in changes:
        console.say(f"  {change.setting:<40} leaves a peak of {gb(change.peak)} GB")
    if not fits:
        fewer = getattr(config.algorithm, "differentiated_steps", 1) > 1
        less = "a smaller algorithm.last, " if fewer else ""
        full = not isinstance(config.model.weights, LoRA)
        smaller = f"{less}a smaller image, a smaller model" + (", or LoRA" if full else "")
        even = "even then" if changes else "whatever else is changed on one device"
        console.say(f"  it does not fit {even}: use {smaller}")
        found = fitting_division(config, parts, num_processes, capacity)
        if found is not None:
            console.say(
                f"  or divide it among {counted(found.processes, 'device')}: --nproc {found.processes} with "
                f"{', '.join(found.settings)} leaves a peak of {gb(found.peak)} GB on each"
            )


def gb(number: int | float) -> str:
    """Format bytes as GB with two decimals."""
    return f"{number / GB:.2f}"


def _device_memory() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)
