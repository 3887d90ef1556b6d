"""The estimate on the console."""

from flowgrpo.config import Config, find
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.memory.blueprint import NoEstimate
from flowgrpo.memory.budget import GB, advise, budget
from flowgrpo.memory.measure import choice_of, measure
from flowgrpo.training.console import Console


def say_memory(
    config: Config, num_processes: int, memory_gb: float | None, console: Console
) -> None:
    """Print the peak memory of one process by part, and what to change if a device is too small.

    Args:
        config: The run.
        num_processes: Among which the work is shared.
        memory_gb: Memory of the device; None asks the GPU that is here.
        console: Where to print.

    Raises:
        ValueError: If ``memory_gb`` is not above 0.
    """
    if memory_gb is not None and memory_gb <= 0:
        raise ValueError(f"--memory-gb must be above 0, got {memory_gb:g}")
    console.say("estimating the memory (nothing is loaded) ...")
    try:
        prompts = PromptSet.load(find(config.prompts.train)).prompts
        measured = measure(config, prompts, num_processes)
    except NoEstimate as error:
        console.say(f"no estimate of the memory: {error}")
        return
    choice = choice_of(config)
    found = budget(measured, choice)
    rows = [(k, gb(v), "always") for k, v in found.resident.items()]
    rows += [(k, gb(v), "largest" if k == found.phase else "") for k, v in found.phases.items()]
    training, plain = measured.training, measured.training.peak(False)
    if training.checkpointed is not None:
        scale = choice.train_batch / measured.batches[1]
        kept = f"{gb(plain * scale)} without, {gb(training.peak(True) * scale)} with"
        rows.append(("activations, gradient checkpointing", kept, ""))
    rows.append(("peak", gb(found.peak), "always + largest"))
    console.table("memory of one process, GB", ["part", "GB", ""], rows)
    unknown = [k for k, v in measured.rewards.items() if v is None]
    if unknown:
        console.say(f"not counted, for it is not known what they take: {', '.join(unknown)}")
    capacity = round(memory_gb * GB) if memory_gb is not None else _device_memory()
    if capacity is None:
        console.say("no GPU here; give --memory-gb to compare with one")
        return
    say = f"with what a device needs besides, {gb(found.needed)} GB of {gb(capacity)} GB"
    changes, fits = advise(measured, choice, capacity)
    if not changes and fits:
        console.say(f"{say}: fits")
        return
    console.say(f"{say}: does NOT fit. Change, in this order:")
    for change in changes:
        console.say(f"  {change.setting:<40} leaves a peak of {gb(change.peak)} GB")
    if not fits:
        console.say("  and even so it does not fit: a smaller image, a smaller model, or LoRA")


def gb(number: int | float) -> str:
    """Bytes as GB."""
    return f"{number / GB:.2f}"


def _device_memory() -> int | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)
