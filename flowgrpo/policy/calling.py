"""Finds out how a pipeline wants to be called, and whether its call can be a policy's.

Nothing in a signature says whether a pipeline takes several prompts at once, or whether a batch
shares one condition image or needs one for each prompt. So the first call tries, and what worked is
kept.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

Result = TypeVar("Result")
Arguments = dict[str, Any]
TEXT = re.compile(r"(negative_)?prompt(_\d)?")
"""Arguments that hold one text for each prompt."""
NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")
"""Arguments without which a pipeline's call cannot be steered."""


class UnsupportedPipelineError(ValueError):
    """A pipeline cannot be a policy; the message says why."""


def check_signature(pipeline: DiffusionPipeline, call: Mapping[str, inspect.Parameter]) -> None:
    """Refuse a pipeline whose parts or arguments show that it cannot be a policy.

    Raises:
        UnsupportedPipelineError: With the reason.
    """
    name = type(pipeline).__name__
    if getattr(pipeline, "scheduler", None) is None:
        raise UnsupportedPipelineError(
            f"{name} cannot be a policy: it has no scheduler, whose steps are the actions"
        )
    missing = [a for a in NEEDED if a not in call]
    if missing:
        raise UnsupportedPipelineError(
            f"{name} cannot be a policy: its call takes no {' and no '.join(missing)}, only "
            f"{', '.join(p for p in call if p != 'self')}"
        )
    if not hasattr(pipeline, "prepare_latents") and "latents" not in call:
        raise UnsupportedPipelineError(
            f"{name} cannot be a policy: it has neither prepare_latents nor an argument latents, so "
            "that no state can be put into its loop"
        )


def check_strength(name: str, call: Mapping[str, inspect.Parameter], given: Arguments) -> None:
    """Refuse a strength below 1, which starts the loop late, from a noised image.

    Raises:
        UnsupportedPipelineError: With the value that fits.
    """
    if "strength" not in call:
        return
    strength = given.get("strength", call["strength"].default)
    if isinstance(strength, int | float) and strength < 1:
        raise UnsupportedPipelineError(
            f"{name} with strength = {strength:g} cannot be a policy: it starts from a noised image and "
            "cuts the schedule; set its call's argument strength to 1.0"
        )


class Calling:
    """Calls a pipeline in the first form that works, and later in the same one.

    Attributes:
        form: What worked with more than one prompt or, if only that works, with a single one.
    """

    def __init__(self) -> None:
        self.form: Callable[[Arguments, int], Arguments | None] | None = None

    def __call__(
        self, run: Callable[[Arguments], Result], arguments: Arguments, num_prompts: int
    ) -> Result:
        """What ``run`` returns for the arguments.

        Raises:
            UnsupportedPipelineError: If the pipeline takes one prompt at a time and several were given.
            Exception: What the plain form raised, if none works.
        """
        if self.form is alone and num_prompts > 1:
            raise UnsupportedPipelineError(
                "the pipeline takes one prompt at a time: set the batch sizes to 1"
            )
        if self.form is not None:
            return run(self.form(arguments, num_prompts) or arguments)
        failure: Exception | None = None
        for form in (together, image_each, alone):
            formed = form(arguments, num_prompts)
            if formed is None:
                continue
            try:
                result = run(formed)
            except (UnsupportedPipelineError, torch.OutOfMemoryError):
                raise
            # Pipelines object in every way there is, from ValueError to a shape inside attention.
            except Exception as error:
                failure = failure or error
                continue
            if num_prompts > 1 or form is alone:
                self.form = form
            return result
        assert failure is not None
        raise failure


def together(arguments: Arguments, num_prompts: int) -> Arguments:
    """All prompts as a list, each with the other texts, a condition image shared by them."""
    texts = {k: v for k, v in arguments.items() if isinstance(v, str) and TEXT.fullmatch(k)}
    return arguments | {k: [v] * num_prompts for k, v in texts.items()}


def image_each(arguments: Arguments, num_prompts: int) -> Arguments | None:
    """All prompts as a list, and each with a copy of the condition images."""
    images = {k: v for k, v in arguments.items() if isinstance(v, Image.Image)}
    if not images:
        return None
    return together(arguments, num_prompts) | {k: [v] * num_prompts for k, v in images.items()}


def alone(arguments: Arguments, num_prompts: int) -> Arguments | None:
    """A single prompt as a string."""
    if num_prompts > 1:
        return None
    lists = {k: v for k, v in arguments.items() if isinstance(v, list) and TEXT.fullmatch(k)}
    return arguments | {k: v[0] for k, v in lists.items()}


def generators_for(arguments: Arguments, generators: Any) -> Any:
    """The generators as the form of a call wants them: a single prompt as a string has one."""
    if isinstance(arguments["prompt"], str) and isinstance(generators, list):
        (generators,) = generators
    return generators
