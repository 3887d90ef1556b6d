"""Which keys of a configuration may change when a run is resumed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowgrpo.config.reference import to_table
from flowgrpo.core.secrets import redact_table

if TYPE_CHECKING:
    from flowgrpo.config.schema import Config

CHANGEABLE: Mapping[str, str] = {
    "train.iterations": "a longer or shorter run; not below the iterations already trained",
    "train.lr": "from the next optimizer step on",
    "train.warmup": "the curve of the learning rate counts from the start of the run",
    "train.schedule": "the curve of the learning rate counts from the start of the run",
    "train.max_grad_norm": "from the next optimizer step on",
    "train.spike_factor": "from the next optimizer step on",
    "train.early_stopping.*": "a run that was stopped early goes on if it is extended",
    "train.rollout_batch": "less memory in sampling; results change by rounding only",
    "train.train_batch": "less memory in training; results change by rounding only",
    "memory.*": "less memory or time; `memory.quantize` and `memory.arithmetic` may not change, because the samples before and after would differ in arithmetic",
    "parallel.*": "another division of the model; results change by rounding only",
    "failures.*": "the response to failing rewards",
    "evaluation.every": "from the next iteration on",
    "evaluation.images": "earlier and later evaluations then use different images",
    "evaluation.images_during": "earlier and later evaluations then use different images",
    "evaluation.metrics": "earlier evaluations do not have the new metrics",
    "evaluation.artefacts": "earlier or later evaluations then lack the measures",
    "evaluation.bench": "earlier evaluations do not have the new benchmarks",
    "evaluation.regimes": "without those of the base model, the report leaves new ways to sample out",
    "evaluation.inspected_prompts": "another number of prompts in the report's section on credit",
    "prompts.train": "the file may move; its contents may not change",
    "prompts.held_out": "the file may move; its contents may not change",
    "run.*": "device, threads, checkpoints, trackers; `run.seed` may not change",
}
"""Keys that may change, and the effect. A key that ends with ``.*`` stands for its whole table, and so
does the name of a list of tables."""
FIXED = ("memory.quantize", "memory.arithmetic", "run.seed")
"""Exceptions from the tables in CHANGEABLE."""
REASONS: Mapping[str, str] = {
    "memory.quantize": "a quantised denoiser is another base model",
    "memory.arithmetic": "the samples before and after the change would come from different arithmetic",
    "model": "the checkpoint holds the weights and the optimizer's state of this model",
    "sampling": "the samples before and after the change would come from different samplers",
    "algorithm": "the iterations before and after the change would belong to different algorithms",
    "loss": "the iterations before and after the change would minimise different losses",
    "rewards": "the scores before and after the change, and the best checkpoint, could not be compared",
    "guard": "the iterations before and after the change would belong to different algorithms",
    "prompts": "which prompts an iteration draws depends on it",
    "train.ema": "the checkpoint holds the moving average that it defines",
    "train.optimizer": "the checkpoint holds the state of this optimizer",
    "train.betas": "the checkpoint holds moments with these decays",
    "train": "the iterations before and after the change would be of different size or kind",
    "evaluation": "the evaluations before and after the change could not be compared",
    "run.seed": "every random draw depends on it",
}
"""Why a key may not change, by the beginning of its name; the first that fits applies."""
IGNORED = ("run.folder",)
"""Keys that say where a run is, not what it does."""


def may_change(key: str) -> bool:
    """Whether a key may have another value when a run is resumed."""
    parts = key.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    inside = any(f"{a}.*" in CHANGEABLE or a in CHANGEABLE for a in above)
    if parts[0] == "rewards" and parts[-1] == "ignores_prompt":
        return True  # It only says that something is meant.
    return key not in FIXED and (key in CHANGEABLE or inside)


def why_fixed(key: str) -> str:
    """Why a key may not have another value when a run is resumed, as a clause."""
    return next((v for k, v in REASONS.items() if key.startswith(k)), "it defines the run")


def differences(there: "Config", here: "Config") -> dict[str, tuple[Any, Any]]:
    """The keys in which two configurations differ, with both values; None where a key is missing.

    Lists are compared as a whole, except lists of tables, whose keys contain the index.
    """
    one, other = flat_table(there), flat_table(here)
    keys = [*one, *(k for k in other if k not in one)]
    return {
        k: (one.get(k), other.get(k))
        for k in keys
        if one.get(k) != other.get(k) and k not in IGNORED
    }


def flat_table(config: "Config") -> dict[str, Any]:
    """A configuration as dotted keys and their values, without secrets.

    Lists of plain values are kept whole.
    """
    return _flat(redact_table(to_table(config)))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        items = list(enumerate(value))
    else:
        return {path: value}
    return {
        k: v for key, part in items for k, v in _flat(part, f"{path}.{key}".lstrip(".")).items()
    }
