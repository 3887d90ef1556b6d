"""The method of a run in words, to be checked before a long run: what is sampled, trained and minimised."""

from collections.abc import Mapping, Sequence
from typing import Any

from flowgrpo.config.reference import to_table
from flowgrpo.core.random import Random

STEPPING = ("step", "neighbor", "step_and_generated")
"""Kinds of action whose trained steps belong to the sampler."""
CONSTANT = ("all", "window")
"""Choices of steps that are the same in all iterations."""


def method_rows(config: Any) -> dict[str, str]:
    """The algorithm, its stochastic steps, the loss and the trained weights, in words."""
    table = to_table(config)
    algorithm, loss = table["algorithm"], table["loss"]
    rows = {"algorithm": str(algorithm["kind"])}
    advantage = algorithm.get("advantage", {})
    if advantage:
        rows["algorithm"] += f"; advantages {_advantage(advantage)}"
    if config.algorithm.action_kind in STEPPING:
        rows["trained steps"] = _steps(config, algorithm)
    rows["loss"] = _loss(loss)
    rows["trained weights"] = _weights(table["model"], table["train"])
    return rows


def _advantage(advantage: Mapping[str, Any]) -> str:
    divisor = {"group": "by the group's deviation", "batch": "by the batch's deviation"}
    divided = divisor.get(str(advantage.get("std")), "not divided by a deviation")
    return f"{advantage.get('kind', 'group')}, {divided}" if "std" in advantage else str(advantage.get("kind"))  # fmt: skip


def _steps(config: Any, algorithm: Mapping[str, Any]) -> str:
    """The steps that are trained in the first iteration, how they are chosen, and the transition."""
    number = config.sampling.num_steps
    random = Random(config.run.seed).at("train", 0)
    first = sorted(config.algorithm.trained_steps(number, 0, random))
    words = f"{_ranges(first)} of 0 to {number - 1}"
    choice = str(algorithm.get("steps", {}).get("kind", ""))
    if choice and choice not in CONSTANT:
        words += f" in the first iteration ({choice})"
    transition = algorithm.get("transition", {})
    if "kind" in transition:
        values = [f"{k} {transition[k]:g}" for k in ("noise_level", "eta") if k in transition]
        words += f"; {' with '.join([str(transition['kind']), *values])}"
    return words


def _ranges(numbers: Sequence[int]) -> str:
    """``0 to 3, 5``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ", ".join(" to ".join(map(str, dict.fromkeys(run))) for run in runs)


def _loss(loss: Mapping[str, Any]) -> str:
    """The kind of a loss and the values that methods differ in."""
    words = [str(loss["kind"])]
    clipped = ["clip_range"] if words[0] in ("clipped", "neighbor") else []
    words += [f"{k} {loss[k]:g}" for k in (*clipped, "beta", "kl_coef") if loss.get(k) is not None]
    return ", ".join(words)


def _weights(model: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    """The trained weights, the base's precision and the learning rate."""
    weights = model["weights"]
    kinds = {
        "lora": f"LoRA of rank {weights.get('rank')}, alpha {weights.get('alpha')}",
        "full": "all weights" + (" that model.weights.parameters names" if weights.get("parameters") else ""),
        "noise": "the distribution of the initial noise",
    }  # fmt: skip
    kind = kinds.get(str(weights["kind"]), str(weights["kind"]))
    return f"{kind}; arithmetic in {model['dtype']}; {train['optimizer']} with learning rate {train['lr']:g}"
