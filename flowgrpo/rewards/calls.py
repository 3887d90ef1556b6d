"""How a reward is called: whether a function or a class takes that, and what an error in it means."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from flowgrpo.core.tensors import Tensor
from flowgrpo.rewards.protocols import takes_audio
from flowgrpo.rewards.settings import RewardError

MISTAKES = (AttributeError, TypeError, NameError, LookupError, ImportError)
"""Errors whose message alone often says little, such as ``KeyError: 'tag'``."""


def check_call(name: str, target: object) -> None:
    """Check that a reward takes media and prompts. Nothing is called.

    Args:
        name: Its import path or label, for the message.
        target: A function, a class, or an object.

    Raises:
        ValueError: If it takes other arguments; with what a reward is called with.
    """
    call: object = target
    arguments: tuple[None, ...] = (None, None)
    if isinstance(target, type):
        call = next((vars(c)["__call__"] for c in target.__mro__ if "__call__" in vars(c)), None)
        if inspect.isfunction(call):
            arguments = (None, None, None)  # self is one
        elif isinstance(call, staticmethod):
            call = call.__func__
    if not callable(call):
        return
    try:
        # A decorator may call the function that it wraps with other arguments.
        signature = inspect.signature(call, follow_wrapped=False)
    except (TypeError, ValueError):  # of a built-in
        return
    # An object may set ``takes_audio`` when it is made.
    may_hear = isinstance(target, type) and "audio" in signature.parameters
    sound = {"audio": None} if takes_audio(target) or may_hear else {}
    try:
        signature.bind(*arguments, **sound)
    except TypeError as error:
        given = "(media, prompts, audio)" if sound else "(media, prompts)"
        raise ValueError(
            f"{name!r} takes {signature}, but a reward is called as {given}: {error}. media is a tensor (batch, "
            "3, height, width) in [0, 1], prompts[i] has .text and .metadata; docs/extending.md, section "
            '"A reward", has a function for PIL images and one with metadata'
        ) from error


@contextmanager
def unchanged(name: str, media: Tensor) -> Iterator[None]:
    """Check that a reward which is called inside does not change its media in place.

    torch counts the changes of a tensor and of its views. Changes through a NumPy array are not counted.

    Raises:
        RewardError: If it does, because other rewards, comparison grids and updates use the same media.
    """
    before = None if media.is_inference() else media._version
    yield
    if before is not None and media._version != before:
        raise RewardError(
            f"reward {name!r} changed the media that it was given in place; other rewards and the pictures of the "
            "run are made of the same tensor: work on media.clone()"
        )


def problem_of(error: BaseException) -> str:
    """An error of a reward in words; of a mistake in its code with the kind of the error."""
    if isinstance(error, SystemExit):
        return "it called sys.exit"  # it would end the whole run, with exit status 0
    words = f"{type(error).__name__}: {error}" if isinstance(error, MISTAKES) else str(error)
    if isinstance(error, AttributeError) and "'Tensor' object" in words:
        words += " (media are tensors, not PIL images; docs/extending.md, section \"A reward\", converts them)"  # fmt: skip
    return words
