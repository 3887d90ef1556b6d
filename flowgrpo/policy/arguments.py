"""The arguments of a call of a pipeline: which prompts share a call, and in which form it takes them.

Neither a signature nor a class says whether a pipeline takes several prompts at once, or whether a batch
shares one condition image or needs an image for each prompt. :class:`Calling` therefore tries forms of
the arguments, and keeps the form that worked.
"""

import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from flowgrpo.data.prompts import Prompt
from flowgrpo.policy.call import PREPARE_LATENTS, UnsupportedPipelineError

Result = TypeVar("Result")
Arguments = dict[str, Any]
Form = Callable[[Arguments, int], Arguments | None]
"""Puts the arguments of a number of prompts into one form; None if they cannot have it."""
TEXT = re.compile(r"(negative_)?prompt(_\d)?")
"""Arguments that hold one text for each prompt."""
REQUIRED = ("prompt", "num_inference_steps", "generator", "output_type")
"""Arguments that a policy needs in the pipeline's call."""
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory|ALLOC_FAILED", re.I)
"""Messages of errors that are raised when memory runs out."""


def call_key(prompt: Prompt) -> Hashable:
    """A key of the prompts that can share a call.

    They have one size, equal conditions and arguments, and all or none of them a negative prompt: a
    pipeline treats a missing negative prompt differently from an empty one.
    """
    images = tuple(_key(i) for i in prompt.images)
    call = tuple((k, _key(prompt.call[k])) for k in sorted(prompt.call))
    return prompt.size, images, call, prompt.negative is None


def _key(value: Any) -> Hashable:
    """Equal for equal files and plain values; an image in memory equals only itself."""
    if isinstance(value, Image.Image):
        return id(value)
    return value if isinstance(value, Hashable) else repr(value)


def own_arguments(prompts: Sequence[Prompt]) -> Arguments:
    """The arguments that prompts with equal keys give to their call, ``prompt`` included."""
    first = prompts[0]
    arguments: Arguments = {"prompt": [p.text for p in prompts]}
    if first.negative is not None:
        arguments["negative_prompt"] = [p.negative for p in prompts]
    sizes = {"height": first.height, "width": first.width, "num_frames": first.num_frames}
    arguments |= {k: v for k, v in sizes.items() if v is not None}
    arguments |= first.open_call()
    if first.images:
        images = first.open_images()
        arguments["image"] = images[0] if len(images) == 1 else images
    return arguments


def keep_size(arguments: Arguments, call: Mapping[str, inspect.Parameter]) -> Arguments:
    """Add ``max_area`` where a pipeline would otherwise rescale the requested height and width to another area.

    FLUX Kontext makes images of about 1024 x 1024 pixels whatever size is asked for: it keeps the ratio
    of the sides and scales them to ``max_area``, which is 1024 * 1024 by default.

    Args:
        arguments: Those of a call.
        call: The parameters of the pipeline's call.
    """
    height, width = arguments.get("height"), arguments.get("width")
    if height is None or width is None or "max_area" in arguments or "max_area" not in call:
        return arguments
    return arguments | {"max_area": height * width}


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[range]:
    """Ranges of consecutive prompts that can share a call, at most ``size`` each, in order."""
    start = 0
    for _, alike in groupby(prompts, key=call_key):
        end = start + len(list(alike))
        for first in range(start, end, size):
            yield range(first, min(first + size, end))
        start = end


def check_signature(pipeline: DiffusionPipeline, call: Mapping[str, inspect.Parameter]) -> None:
    """Refuse a pipeline whose components or arguments show that it cannot be a policy.

    Args:
        pipeline: The pipeline.
        call: The parameters of its call.

    Raises:
        UnsupportedPipelineError: With the reason.
    """
    name = type(pipeline).__name__
    if getattr(pipeline, "scheduler", None) is None:
        raise UnsupportedPipelineError(
            f"{name} cannot be a policy: it has no scheduler, whose steps would be the actions"
        )
    missing = [a for a in REQUIRED if a not in call]
    if missing:
        raise UnsupportedPipelineError(
            f"{name} cannot be a policy: its call takes no {' and no '.join(missing)}, only "
            f"{', '.join(p for p in call if p != 'self')}"
        )
    if not hasattr(pipeline, PREPARE_LATENTS) and "latents" not in call:
        raise UnsupportedPipelineError(
            f"{name} cannot be a policy: it has neither prepare_latents nor an argument latents, so "
            "no state can be injected into its loop"
        )


def check_strength(name: str, call: Mapping[str, inspect.Parameter], given: Arguments) -> None:
    """Refuse a ``strength`` below 1, which begins the loop in the middle, at a noised image.

    Args:
        name: Class of the pipeline.
        call: The parameters of its call.
        given: The arguments that are set.

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


def is_unrelated(error: BaseException) -> bool:
    """Whether memory ran out, on the accelerator or on the host, or another process of the run was lost.

    Such an error says nothing about the pipeline, so no code may conclude anything from it.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return OUT_OF_MEMORY.search(str(error)) is not None or is_lost_rank(error)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another process ended or does not answer."""
    # Errors of gloo's transport are plain RuntimeErrors, which name the source file.
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


class Calling:
    """Calls a pipeline with the first form of its arguments that works, and keeps that form.

    Attributes:
        form: The form that worked with several prompts or, if the pipeline takes single prompts only,
            the form that worked with a single prompt. None before such a call.
    """

    def __init__(self) -> None:
        self.form: Form | None = None

    def __call__(
        self, run: Callable[[Arguments], Result], arguments: Arguments, num_prompts: int
    ) -> Result:
        """Run the call.

        Args:
            run: Calls the pipeline with arguments.
            arguments: The arguments, with texts as lists.
            num_prompts: Number of prompts among them.

        Returns:
            The result of ``run``.

        Raises:
            UnsupportedPipelineError: If the pipeline takes one prompt at a time and several were given.
            Exception: If no form works, the error of the first form. Memory errors are raised at once.
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
            except UnsupportedPipelineError:
                raise
            # Pipelines refuse a form with errors of all kinds, from a ValueError about an argument to a
            # RuntimeError about shapes inside attention.
            except Exception as error:
                if is_unrelated(error):
                    raise
                failure = failure or error
                continue
            if num_prompts > 1 or form is alone:
                self.form = form
            return result
        assert failure is not None
        raise failure


def together(arguments: Arguments, num_prompts: int) -> Arguments:
    """All prompts as a list, other texts repeated for each; a condition image is shared."""
    texts = {k: v for k, v in arguments.items() if isinstance(v, str) and TEXT.fullmatch(k)}
    return arguments | {k: [v] * num_prompts for k, v in texts.items()}


def image_each(arguments: Arguments, num_prompts: int) -> Arguments | None:
    """All prompts as a list, with every condition image repeated for each prompt."""
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
    """The generators in the form that fits the arguments: one generator for a prompt as a string."""
    if isinstance(arguments["prompt"], str) and isinstance(generators, list):
        (generators,) = generators
    return generators
