"""UnifiedReward, pointwise: a vision-language model grades an image or a video (arXiv:2503.05236)."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.answers import read_grades
from reward_models.shared.checkpoints import Precision, from_pretrained, pick_device, pick_dtype
from reward_models.shared.generation import answer_batch
from reward_models.shared.pictures import check_media, finite_only, pictures
from reward_models.shared.templates import template

__all__ = ["UnifiedReward"]
WEIGHTS = ("model",)

log = logging.getLogger(__name__)

GRADES = {
    "unified_reward_1": ("Final Score",),
    "unified_reward_2_image": ("Alignment Score", "Coherence Score", "Style Score"),
    "unified_reward_2_video": ("Alignment Score", "Physics Score", "Style Score"),
}
"""Grades that each template asks for, in the order of the answer."""


class UnifiedReward:
    """A weighted mean of the grades in the model's answer, 1 to 5; usually 2 to 4.

    Version ``2`` grades alignment, coherence and style of an image, or alignment, physics and style
    of a video, each by a number with decimals. Version ``1`` gives images one "Final Score". Videos
    are shown as ``num_frames`` images, every F/num_frames-th from the first; the authors' script
    shows 16.

    The default is ``CodeGoat24/UnifiedReward-2.0-qwen-7b`` (MIT; a Qwen2.5-VL-7B, 16 GB in
    bfloat16); for version 1 take ``CodeGoat24/UnifiedReward-qwen-7b``. Any image-text-to-text model
    of transformers with a chat template runs, also the Qwen3-VL and Qwen3.5 ones; the latter answer
    without thinking, as the authors serve them. Decoding is greedy. The templates are the authors'.
    The processor resizes as the model's card says. It was not tested with the published weights,
    which were not available.

    Differs from Flow-GRPO and DiffusionNFT, which report another UnifiedReward: the LLaVA model
    ``CodeGoat24/UnifiedReward-7b-v1.5`` with a shorter question, images of 512x512, the first number
    in the answer, divided by 5. That is the reward ``published_judge`` with
    ``judge = "unified_reward_1"``.

    An answer without every grade in 1..5 scores NaN, and the log says so: the released training
    scripts use 0 or the group's mean instead. Images are rounded to 8 bits first; one with NaN
    scores NaN. A large model is faster behind vLLM, with the reward ``vlm_judge``.
    """

    def __init__(
        self,
        model: str = "CodeGoat24/UnifiedReward-2.0-qwen-7b",
        version: Literal["1", "2"] = "2",
        weights: Mapping[str, float] | None = None,
        num_frames: int = 16,
        max_new_tokens: int = 512,
        batch_size: int = 8,
        dtype: Precision = "bfloat16",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of the model with its processor.
            version: Version of the authors' template.
            weights: Factors of ``alignment``, ``coherence``, ``physics`` and ``style``, where 0 is
                the default; they are divided by the sum of those that apply. All equal if unset.
            num_frames: Frames of a video that are shown.
            max_new_tokens: Longest answer; a longer one may have no grades.
            batch_size: Images or videos in one batch.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        known = ("alignment", "coherence", "physics", "style")
        factors = dict.fromkeys(known, 1.0) if weights is None else dict(weights)
        if not factors.keys() <= {*known} or any(not f >= 0 for f in factors.values()):
            raise ValueError(f"weights must be at least 0 and of {', '.join(known)}; got {factors}")
        if version not in ("1", "2") or (version == "1" and weights is not None):
            raise ValueError(
                f"version must be '1', which takes no weights, or '2'; got {version!r}, {weights}"
            )
        if min(num_frames, max_new_tokens, batch_size) < 1:
            raise ValueError(
                "num_frames, max_new_tokens and batch_size must be at least 1, "
                f"got {num_frames}, {max_new_tokens}, {batch_size}"
            )
        self.version, self.factors, self.num_frames = version, factors, num_frames
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.model = from_pretrained(
            AutoModelForImageTextToText, model, "UnifiedReward model", pick_dtype(dtype)
        ).to(pick_device(device))
        self.processor: Any = AutoProcessor.from_pretrained(model)

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch *frames 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If version 1 is asked about videos, or no weight applies.
        """
        video = media.ndim == 5
        check_media(media, prompts, video=video)
        name = self._template(video)
        factors = self._factors(name)
        scores = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            shown = [self._shown(m) for m in media[part]]
            answers = answer_batch(
                self.model,
                self.processor,
                [["image"] * len(images) for images in shown],
                [template(name).replace("{prompt}", p.text) for p in prompts[part]],
                self.max_new_tokens,
                images=shown,
            )
            texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
            for prompt, text in zip(prompts[part], texts, strict=True):
                grades = read_grades(text, GRADES[name])
                if grades is None:
                    log.warning("no grades in UnifiedReward's answer to %r: %r", prompt.text, text)
                    scores.append(math.nan)
                else:
                    scores.append(sum(f * g for f, g in zip(factors, grades, strict=True)))
        return finite_only(torch.tensor(scores), media)

    def _template(self, video: bool) -> str:
        if self.version == "2":
            return f"unified_reward_2_{'video' if video else 'image'}"
        if video:
            raise ValueError("version '1' of UnifiedReward grades images only, got videos")
        return "unified_reward_1"

    def _factors(self, name: str) -> list[float]:
        """Of each grade, adding up to 1."""
        if name == "unified_reward_1":
            return [1.0]
        asked = [grade.split()[0].lower() for grade in GRADES[name]]
        factors = [self.factors.get(grade, 0.0) for grade in asked]
        if not sum(factors):
            raise ValueError(
                f"weights {self.factors} leave nothing of {', '.join(asked)}, which are graded here"
            )
        return [f / sum(factors) for f in factors]

    def _shown(self, media: Float[Tensor, "*frames 3 h w"]) -> list[Image.Image]:
        if media.ndim == 3:
            return pictures(media[None])
        number = media.shape[0]
        return pictures(media[[i * number // self.num_frames for i in range(self.num_frames)]])
