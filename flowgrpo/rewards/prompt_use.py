"""Finds rewards that ignore their prompts, and refuses to train on nothing else.

A policy that is trained only on such a reward is free to stop following its prompts: the cheapest way
to a higher score is often one good image for all of them.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.data.prompts import Prompt
from flowgrpo.rewards.settings import Reward

if TYPE_CHECKING:
    from flowgrpo.data.audio import Audio
    from flowgrpo.rewards.scorer import RewardScorer

log = logging.getLogger(__name__)

TOLERANCE = 0.01
"""Largest mean change of a score, in standard deviations over the images, that counts as none. Kernels
that are not deterministic change scores by less, and another prompt changes a score that depends on it by
about one standard deviation."""


def is_declared(model: object) -> bool:
    """Whether a reward's class or function says that it ignores prompts (``ignores_prompt = True``)."""
    return getattr(model, "ignores_prompt", False) is True


def shuffled(prompts: Sequence[Prompt]) -> list[Prompt] | None:
    """Each prompt replaced by the next one with another text or other metadata.

    Samples that share a prompt share its replacement. None if all prompts are alike.
    """
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(_key(prompt), prompt)
    if len(first) < 2:
        return None
    keys = list(first)
    following = dict(zip(keys, [*keys[1:], keys[0]], strict=True))
    return [first[following[_key(p)]] for p in prompts]


def _key(prompt: Prompt) -> str:
    return json.dumps([prompt.text, dict(prompt.metadata)], sort_keys=True, default=str)


def is_ignored(own: Float[Tensor, " batch"], other: Float[Tensor, " batch"]) -> bool | None:
    """Whether the scores with other prompts are those with the images' own prompts.

    Returns:
        None if the scores do not say: fewer than two are finite in both, or the own ones are all equal.
    """
    both = own.isfinite() & other.isfinite()
    own, other = own[both].double(), other[both].double()
    if len(own) < 2 or not bool((own != own[0]).any()):
        return None
    return bool((own - other).abs().mean() <= TOLERANCE * own.std(correction=0))


def find_ignoring(
    scorer: "RewardScorer",
    media: Tensor,
    prompts: Sequence[Prompt],
    audio: "Audio | None" = None,
) -> dict[str, bool | None]:
    """Which trained rewards ignore prompts: by their own declaration, or as measured.

    Each reward that declares nothing scores the media twice, with their own prompts and with shuffled
    ones.

    Args:
        scorer: The rewards.
        media: Different images or videos, of at least two prompts.
        prompts: Their prompts.
        audio: Their sound, if there is any.

    Returns:
        By name; None if unknown, because the scores do not say or a reward fails with shuffled prompts.
    """
    others, found = shuffled(prompts), dict[str, bool | None]()
    for reward, model in zip(scorer.rewards, scorer.models, strict=True):
        if reward.weight == 0:
            continue
        if is_declared(model) or others is None:
            found[reward.label] = True if is_declared(model) else None
            continue
        own = scorer.score_once(reward, media, prompts, audio)
        other = scorer.score_once(reward, media, others, audio)
        found[reward.label] = None if own is None or other is None else is_ignored(own, other)
    return found


def prompt_notes(
    rewards: Sequence[Reward], ignoring: Mapping[str, bool | None], alone: bool, refuse: bool
) -> list[str]:
    """Sentences about the trained rewards that ignore prompts and are not configured to.

    Args:
        rewards: All rewards.
        ignoring: The result of :func:`find_ignoring`, or what the classes declare.
        alone: Whether the rewards are the only training signal.
        refuse: Whether to refuse if all trained rewards ignore their prompts.

    Raises:
        ConfigError: In that case, unless all of them are meant to (``ignores_prompt = true``).
    """
    trained = [r for r in rewards if r.weight != 0]
    found = [r for r in trained if ignoring.get(r.label)]
    surprising = [r.label for r in found if not r.ignores_prompt]
    if not surprising:
        return []
    names = " and ".join(repr(n) for n in surprising)
    verb = "ignores its prompt" if len(surprising) == 1 else "ignore their prompts"
    text = f"reward {names} {verb}: scores do not change when the prompts of images are shuffled"
    if len(found) < len(trained) or not alone:
        return [text]
    index = rewards.index(next(r for r in found if not r.ignores_prompt))
    text = (
        f"{text}. Nothing else is trained on, so the model may stop following its prompts. Add a reward that "
        f"reads them, or set rewards.{index}.ignores_prompt = true if this is meant"
    )
    if refuse:
        raise ConfigError(text)
    return [text]
