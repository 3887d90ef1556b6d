"""Weights besides those that are trained: the old policy, averages, the reference, teachers, a fake score."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flowgrpo.config import Config
from flowgrpo.config.distillation import teacher_sampling
from flowgrpo.policy.settings import Full, LoRA, Sampling


def kept_weights(config: Config) -> dict[str, Any]:
    """Which further values of the trained weights a run keeps on the device, by names of a footprint."""
    needs = config.loss.needs
    return {
        "averaged": config.train.ema_decay > 0,
        "earlier": config.train.staleness > 0,
        "fake_score": needs.fake_score is not None,
        "old_policy": needs.old_policy is not None,
    }


def evaluates_within(config: Config) -> bool:
    """Whether a loss evaluates other weights on a batch after it was replayed with gradients."""
    needs = config.loss.needs
    is_copied = needs.old_policy_is_copied and config.train.optimizer_steps == 1
    return needs.average or (needs.old_policy is not None and not is_copied)


def other_policies(
    config: Config, trained: int, whole: int, evaluated: Callable[[Sampling], int]
) -> dict[str, tuple[int, int]]:
    """The policies that are evaluated before an update, as :attr:`flowgrpo.memory.budget.Footprint.others`.

    Args:
        config: The configuration.
        trained: Bytes of values of the trained weights. The reference and adapters that teach are kept in
            main memory, and moved to the device while they are evaluated.
        whole: Bytes of the denoisers, for teachers that are whole models.
        evaluated: Activations of a rollout batch with some arguments of the pipeline's call.
    """
    needs, own = config.loss.needs, config.sampling
    found: dict[str, tuple[int, int]] = {}
    # Otherwise the reference is the model without its adapter, which is only switched off.
    weights = config.model.weights
    starts = isinstance(weights, LoRA) and weights.init != "" and weights.reference == "init"
    copies = isinstance(weights, Full) or starts
    refers = needs.reference or config.train.monitor_states > 0
    refers = refers or config.evaluation.base_after is not None
    guidance = own.guidance_scale if needs.reference_guidance is None else needs.reference_guidance
    of_reference = replace(own, guidance_scale=guidance)
    if (refers and copies) or (needs.reference and of_reference != own):
        found["reference"] = (trained if copies else 0, evaluated(of_reference))
    for teacher in needs.teachers.all if needs.teachers else ():
        size = whole if teacher.weights == "model" else trained
        if teacher.is_base and not copies:
            size = 0
        largest, most = found.get("teacher", (0, 0))
        activations = evaluated(teacher_sampling(teacher, own))
        found["teacher"] = max(largest, size), max(most, activations)
    return found
