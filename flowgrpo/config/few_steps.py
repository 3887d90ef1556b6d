"""Warnings about checkpoints that were distilled to a few steps, such as Turbo, Lightning and Schnell.

Such a model predicts where a long step ends, and not the velocity of a flow, so that methods which treat it
as a flow model can blur its images. Nothing here imports torch or diffusers.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowgrpo.core.transitions import DanceSDE, FlowSDE

NAMES = re.compile(
    r"(?<![a-z])(turbo|lightning|schnell|lcm|tcd|hyper|dmd2?|tdm|rtdmd|sprint|distilled|few-?steps?"
    r"|[1-8]-?steps?|klein(?!.{0,3}base))(?![a-z])",
    re.IGNORECASE,
)
"""Matches what the names of such checkpoints and adapters contain. FLUX.2 klein is one unless it is ``base``."""

SCHEDULERS = ("LCMScheduler", "TCDScheduler")
"""Schedulers of consistency models, which checkpoints distilled to a few steps are saved with."""


def few_step_sign(config: Any, found: Mapping[str, Any] | None = None) -> str:
    """What shows that a configuration's model was distilled to a few steps, in words; empty if nothing does.

    Args:
        config: The configuration.
        found: The configurations of a pipeline's parts, as :func:`parts_in` returns them; by default those
            in the folder ``model.path``, if it is one.
    """
    paths = [("model.path", config.model.path)]
    paths += [(f"model.adapters[{i}]", a.path) for i, a in enumerate(config.model.adapters)]
    for key, path in paths:
        # Of a path, the names of its last two parts: parents say little about a file.
        name = "/".join(Path(path).parts[-2:])
        if match := NAMES.search(name):
            return f"{key} = {path!r} is called {match[0]!r}"
    parts = parts_in(Path(config.model.path).expanduser()) if found is None else found
    index = parts.get("model_index.json", {})
    if index.get("is_distilled") is True:
        return "the pipeline's model_index.json has is_distilled = true"
    name = str(index.get("_class_name", ""))
    is_flux = name.startswith("Flux") and not name.startswith("Flux2")
    if is_flux and parts.get("transformer/config.json", {}).get("guidance_embeds") is False:
        return "the FLUX transformer has guidance_embeds = false, as FLUX.1-schnell"
    if parts.get("scheduler/scheduler_config.json", {}).get("_class_name") in SCHEDULERS:
        return f"its scheduler is {parts['scheduler/scheduler_config.json']['_class_name']}"
    return ""


def parts_in(folder: Path) -> dict[str, Any]:
    """The configurations in a pipeline's folder by their paths; none if there is no such folder."""
    found = {}
    for name in (
        "model_index.json",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
    ):
        try:
            found[name] = json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue
    return {k: v for k, v in found.items() if isinstance(v, dict)}


def few_step_notes(config: Any, found: Mapping[str, Any] | None = None) -> list[str]:
    """Sentences about a configuration whose algorithm is known to blur models of a few steps; or none.

    Reported for Z-Image-Turbo after thousands of updates of Flow-GRPO and of DiffusionNFT without a KL; on
    FLUX.2 klein, DiffusionNFT has not blurred images.

    Args:
        config: The configuration.
        found: The configurations of the loaded pipeline's parts, as :func:`few_step_sign` takes them.
    """
    sign = few_step_sign(config, found)
    if not sign:
        return []
    begin = f"the model seems to be distilled to a few steps ({sign})"
    algorithm = config.algorithm
    advice = (
        "Train the base model and add the few-step adapter afterwards, or use algorithm.kind = 'flow_grpo' with "
        "the transition 'cps' and loss.kl_coef above 0"
    )
    if algorithm.action_kind == "noised_sample":
        return [
            f"{begin}, and {type(algorithm).__name__} trains it as a flow model, which it is not: images may lose "
            f"detail. {advice}"
        ]
    notes = []
    needs = config.loss.needs
    if needs.fake_score is not None and needs.teachers.use_base:
        notes.append(
            f"{begin}, and it is its own teacher (loss.teachers): a model of a few steps does not know the scores that "
            "are matched. Set loss.teachers[0] to {path = MODEL, weights = 'model'} with the model that it was distilled from, or, if the few-step "
            "adapter is model.weights.init, to 'pipeline'"
        )
    if algorithm.action_kind == "step" and isinstance(algorithm.transition, FlowSDE | DanceSDE):
        notes.append(
            f"{begin}, and the noise of {algorithm.transition.kind!r} is exact for short steps only: rollouts are "
            "noisier than evaluations. Use algorithm.transition.kind = 'cps'"
        )
    if algorithm.action_kind == "step" and config.loss.kl_coef == 0:
        notes.append(
            f"{begin}, and there is no KL to hold it: after some thousand updates images may lose detail. Set "
            "loss.kl_coef above 0, and watch the grids and artefacts/high_frequency"
        )
    return notes
