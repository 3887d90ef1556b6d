"""Sizes of reward models, and rewards without weights whose scores can be traced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo.data.prompts import Prompt
from flowgrpo.memory.budget import GB
from flowgrpo.memory.tracer import bytes_of
from flowgrpo.rewards.differentiable import DifferentiableRewards
from flowgrpo.rewards.loading import found
from flowgrpo.rewards.named import shared_key
from flowgrpo.rewards.settings import Reward

PARAMETERS = {
    "aesthetic": 428_544_482,
    "clip_score": 427_616_513,
    "hpsv2": 986_109_441,
    "image_reward": 446_206_689,
    "pick_score": 986_109_441,
}
"""Parameters of rewards that come with flowgrpo, at their default options."""
OTHER_MODEL = ("model", "architecture")
"""Options with which a reward has another model than in :data:`PARAMETERS`."""


@dataclass(frozen=True)
class Weights:
    """Weights of a reward at its default options.

    Attributes:
        parameters: Their number.
        dtype: Default precision.
        models: Options that choose a model, and the model that has this number of parameters.
    """

    parameters: int
    dtype: str
    models: Mapping[str, str]


QWEN2_VL_7B = 7_746_378_240
"""Parameters of Qwen2-VL-7B without its head for words, which the rewards on it do not load."""
QWEN25_VL_7B = 7_747_169_280
QWEN25_VL_7B_HEAD = 8_292_166_656
"""Qwen2.5-VL-7B with that head."""
DINO = "facebook/dinov2-base"
LOADED = {
    "adversarial": Weights(86_580_480, "float32", {"model": DINO}),
    "clap": Weights(153_492_890, "float32", {"model": "laion/clap-htsat-unfused"}),
    "deqa": Weights(8_197_859_328, "float16", {"model": "zhiyuanyou/DeQA-Score-Mix3"}),
    "dino": Weights(86_580_480, "float32", {"model": DINO}),
    "edit_reward": Weights(QWEN25_VL_7B, "bfloat16", {"base": "Qwen/Qwen2.5-VL-7B-Instruct"}),
    "hpsv3": Weights(QWEN2_VL_7B, "bfloat16", {"base": "Qwen/Qwen2-VL-7B-Instruct"}),
    "physics": Weights(325_971_328, "float32", {"model": "facebook/vjepa2-vitl-fpc64-256"}),
    "siglip": Weights(428_225_600, "float32", {"model": "google/siglip-so400m-patch14-384"}),
    "subject_identity": Weights(
        86_580_480 + 154_966_792,
        "float32",
        {"model": DINO, "detector": "google/owlv2-base-patch16-ensemble"},
    ),
    "unified_reward": Weights(
        QWEN25_VL_7B_HEAD, "bfloat16", {"model": "CodeGoat24/UnifiedReward-2.0-qwen-7b"}
    ),
    "video_align": Weights(2_208_985_600, "bfloat16", {"base": "Qwen/Qwen2-VL-2B-Instruct"}),
    "video_score2": Weights(QWEN25_VL_7B_HEAD, "bfloat16", {"model": "TIGER-Lab/VideoScore2"}),
}
"""Rewards that come with flowgrpo and cannot be built without weights."""
NO_WEIGHTS = ("consistency", "jpeg_size", "motion")
ON_A_SERVER = (
    "edit_verifier", "published_judge", "remote", "vlm_consistency", "vlm_judge", "vlm_ocr", "vlm_pairwise",
)  # fmt: skip
BYTES = {
    "geneval": round(1.5 * GB),
    "ocr": 0,  # It runs on the CPU.
    **dict.fromkeys((*NO_WEIGHTS, *ON_A_SERVER), 0),
}
"""Bytes on the device of further ones."""
FRAMES = ("flowgrpo.rewards.frames:FrameMean", "flowgrpo.rewards.frames:FrameScore")
"""Rewards that apply an image reward to frames."""


@dataclass(frozen=True)
class TracedRewards:
    """Rewards whose gradient is traced.

    Attributes:
        sizes: Bytes of each reward model on the device, by label; ``None`` if unknown.
        rewards: The rewards with a weight that could be built.
        made: These, without weights, in the same order.
    """

    sizes: Mapping[str, int | None]
    rewards: Sequence[Reward] = ()
    made: Sequence[Any] = field(default=())

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models of the rewards, by names that no component of a pipeline has."""
        return {
            f"reward {i} {key}": model
            for i, one in enumerate(self.made)
            for key, model in _models(one).items()
        }

    def scores(self, media: Tensor, prompts: Sequence[Prompt], texts: int) -> list[Tensor]:
        """The rewards of media for several texts; the media's sum if no reward could be built."""
        if not self.made:
            return [media.flatten(1).sum(1)]
        rewards = DifferentiableRewards(self.rewards, self.made)
        return [rewards(media, prompts) for _ in range(texts)]


def reward_sizes(rewards: Sequence[Reward], device: str) -> dict[str, int | None]:
    """Bytes of each reward model on a device type, by label; ``None`` if unknown."""
    sizes = dict[str, int | None]()
    shared = set[str]()
    for reward in rewards:
        key = shared_key(reward)
        sizes[reward.label] = 0 if key in shared else _size(reward, device)
        shared |= {key} if key else set()
    return sizes


def traced_rewards(rewards: Sequence[Reward], device: str) -> TracedRewards:
    """Build the rewards that are differentiated, without weights."""
    sizes = reward_sizes([r for r in rewards if r.weight == 0], device)
    used, made = [], []
    for reward in (r for r in rewards if r.weight != 0):
        one = None if _is_elsewhere(reward, device) else _blank(reward, device)
        sizes[reward.label] = _size(reward, device) if one is None else _bytes(one)
        if hasattr(one, "scores_with_gradient"):
            used.append(reward)
            made.append(one)
        elif not _is_elsewhere(reward, device):
            # Without its activations the size would say too little.
            sizes[reward.label] = None
    return TracedRewards(sizes, used, made)


def _size(reward: Reward, device: str) -> int | None:
    if reward.model in FRAMES:
        name, options = str(reward.options.get("model")), dict(reward.options.get("options") or {})
        return _size(Reward(model=name, options=options), device)
    if _is_elsewhere(reward, device):
        return 0
    if reward.model in BYTES:
        return BYTES[reward.model]
    if reward.model in PARAMETERS and not any(k in reward.options for k in OTHER_MODEL):
        return PARAMETERS[reward.model] * _itemsize(reward, "float32")
    loaded = LOADED.get(reward.model)
    if loaded and all(_is(reward.options.get(k, v), v) for k, v in loaded.models.items()):
        return loaded.parameters * _itemsize(reward, loaded.dtype)
    one = _blank(reward, device)
    return None if one is None else _bytes(one)


def _itemsize(reward: Reward, usual: str) -> int:
    """Bytes of one weight."""
    dtype = getattr(torch, str(reward.options.get("dtype", usual)), getattr(torch, usual))
    return int(dtype.itemsize)


def _is(given: object, published: str) -> bool:
    """Whether an option is a published model: its hub id, or a folder with its name."""
    return str(given).rstrip("/").rsplit("/", 1)[-1] == published.rsplit("/", 1)[-1]


def _is_elsewhere(reward: Reward, device: str) -> bool:
    """Whether a reward is computed on another device than the first of this type: the CPU, or another GPU."""
    own, _, index = str(reward.options.get("device", "auto")).partition(":")
    return own != "auto" and (own != device or index not in ("", "0"))


def _blank(reward: Reward, device: str) -> Any:
    """A reward without weights; None if it cannot be built."""
    try:
        make = getattr(found(reward.model), "without_weights", None)
        return None if make is None else make(**{**reward.options, "device": device})
    # A wrong option or a missing file is reported when the reward is loaded.
    except (ImportError, OSError, TypeError, ValueError):
        return None


def _models(reward: Any) -> dict[str, nn.Module]:
    return {k: v for k, v in vars(reward).items() if isinstance(v, nn.Module)}


def _bytes(reward: Any) -> int:
    return sum(map(bytes_of, _models(reward).values()))
