"""VideoScore2: Qwen2.5-VL describes a video and gives three scores (arXiv:2509.22799)."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.video_utils import VideoMetadata

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import Precision, from_pretrained, pick_device, pick_dtype
from reward_models.shared.generation import DigitRecorder, answer_batch, token_at
from reward_models.shared.pictures import check_media, eight_bits, finite_only
from reward_models.shared.qwen2_vl import chunks, frame_rates, shown_frames
from reward_models.shared.templates import template

__all__ = ["VideoScore2"]
WEIGHTS = ("model",)

log = logging.getLogger(__name__)

DIMENSIONS = {
    "visual": "visual quality",
    "alignment": "text-to-video alignment",
    "physics": "physical/common-sense consistency",
}
NAMES = {
    **{key: re.escape(name) for key, name in DIMENSIONS.items()},
    "physics": r"physical(?:\s*/\s*common-sense)? consistency",
}
"""Patterns of the dimensions' names; answers shorten the last one."""
BETWEEN = r"(?:(?!visual|text-to-video|physical)[^\d\n(;])*"
"""Text between a dimension's name and its score: its description, but no other dimension."""
FRAME_PIXELS = 768 * 28 * 28
TOTAL_PIXELS = int(128_000 * 28 * 28 * 0.9)


class VideoScore2:
    """A weighted sum of visual quality, text alignment and physical consistency, each 1 to 5.

    ``soft`` is the authors' score: the likeliest digit times its share of the probability of the
    digits 1 to 5, where the model writes that score (so 0.2 to 5). ``expected`` is the mean of the
    digits by those shares, smoother and better ordered where the model wavers; ``hard`` is the
    digit that it wrote. An answer without all three scores scores NaN; the log says so.

    The default is ``TIGER-Lab/VideoScore2`` (Apache-2.0; a Qwen2.5-VL-7B, 16 GB in bfloat16). It
    writes its reasoning first, which takes seconds per video. Videos are shown at 2 frames per
    second (an even number, at least 4), frames of 100,352 to 602,112 pixels. Decoding is greedy,
    where the released script samples at temperature 0.7: a reward should not change from call to
    call. The script also takes its shares after this temperature; ``temperature = 0.7`` does so. A
    "4" with a share of 0.7, beside another digit with 0.3, has the soft score 2.8 at temperature 1
    and 3.08 at 0.7.

    The released model repeats the descriptions of the dimensions before its scores, which the
    released script does not find; here both forms are read, after the thoughts, or inside them if
    there are none after them. The template is the
    released script's, with its blanks. It was not tested with the published weights, which were not
    available.

    Videos are rounded to 8 bits first; one with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "TIGER-Lab/VideoScore2",
        score: Literal["soft", "expected", "hard"] = "soft",
        weights: Mapping[str, float] | None = None,
        fps: float = 0.0,
        max_new_tokens: int = 1024,
        temperature: float = 1.0,
        batch_size: int = 4,
        dtype: Precision = "bfloat16",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of a Qwen2.5-VL with its processor.
            score: How a score is read from the answer.
            weights: Factors of ``visual``, ``alignment`` and ``physics``, where 0 is the default;
                all a third if unset.
            fps: Frames per second of videos whose prompts' metadata have no ``fps``.
            max_new_tokens: Longest answer; a longer one has no scores.
            temperature: Temperature of the shares of the digits, above 0; the released script has 0.7.
            batch_size: Videos in one batch.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        factors = dict.fromkeys(DIMENSIONS, 1 / 3) if weights is None else dict(weights)
        if not factors.keys() <= DIMENSIONS.keys() or not any(factors.values()):
            raise ValueError(
                f"weights must name some of {', '.join(DIMENSIONS)}, not all 0; got {factors}"
            )
        if score not in ("soft", "expected", "hard"):
            raise ValueError(f"score must be soft, expected or hard, got {score!r}")
        if batch_size < 1 or max_new_tokens < 1 or not 0 <= fps < math.inf:
            raise ValueError(
                "batch_size and max_new_tokens must be at least 1 and fps at least 0, "
                f"got {batch_size}, {max_new_tokens}, {fps}"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature
        self.weighted = weights is not None
        self.factors = torch.tensor([float(factors.get(name, 0)) for name in DIMENSIONS])
        self.score, self.fps, self.batch_size = score, fps, batch_size
        self.max_new_tokens = max_new_tokens
        self.model = from_pretrained(
            Qwen2_5_VLForConditionalGeneration, model, "VideoScore2 model", pick_dtype(dtype)
        ).to(pick_device(device))
        self.processor = Qwen2_5_VLProcessor.from_pretrained(model)
        self.template = template("video_score2")

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If the frame rate of one is unknown.
        """
        frame_rates(prompts, self.fps)

    def __call__(
        self, media: Float[Tensor, "batch frames 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a frame rate is unknown.
        """
        scores = self.dimensions(media, prompts)
        used = self.factors != 0  # so that an unused score may be absent
        return finite_only(scores[:, used] @ self.factors[used], media)

    def named_scores(
        self, media: Float[Tensor, "batch frames 3 h w"], prompts: Sequence[Prompt]
    ) -> dict[str, Float[Tensor, " batch"]]:
        """``visual``, ``alignment`` and ``physics``, for the key ``score`` of a reward."""
        if self.weighted:
            raise ValueError(
                "the option 'weights' does not apply to single scores: remove it, or 'score'"
            )
        columns = self.dimensions(media, prompts).unbind(1)
        return dict(zip(DIMENSIONS, columns, strict=True))

    @torch.no_grad()
    def dimensions(
        self, media: Float[Tensor, "batch frames 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "batch 3"]:
        """Visual quality, text alignment and physical consistency of each video; NaN if absent."""
        check_media(media, prompts, video=True)
        rates = frame_rates(prompts, self.fps)
        rows = []
        for part in chunks(len(prompts), self.batch_size):
            videos = [
                self._shown(video, fps)
                for video, fps in zip(eight_bits(media[part]), rates[part], strict=True)
            ]
            # Published: a token of time stands for two frames at 2 per second, whatever was chosen.
            times = [VideoMetadata(len(v), 2.0, frames_indices=[*range(len(v))]) for v in videos]
            digits = DigitRecorder(self.processor.tokenizer)
            answers = answer_batch(
                self.model,
                self.processor,
                [["video"]] * len(videos),
                [self.template.replace("{prompt}", p.text) for p in prompts[part]],
                self.max_new_tokens,
                digits,
                videos=videos,
                videos_kwargs={
                    "do_resize": False,
                    "do_sample_frames": False,
                    "video_metadata": times,
                },
            )
            for row, (prompt, ids) in enumerate(zip(prompts[part], answers, strict=True)):
                rows.append(self._read(prompt, ids, digits.shares(row)))
        return torch.tensor(rows)

    def _shown(self, video: Tensor, fps: float) -> Tensor:
        """The frames that the model sees; long videos are shown smaller."""
        shown = shown_frames(video, fps, 2.0, FRAME_PIXELS, nearest=False)
        if len(shown) * FRAME_PIXELS <= 2 * TOTAL_PIXELS:
            return shown
        return shown_frames(video, fps, 2.0, 2 * TOTAL_PIXELS // len(shown), nearest=False)

    def _read(
        self, prompt: Prompt, ids: list[int], shares: Float[Tensor, "tokens digits"]
    ) -> list[float]:
        """The scores in one answer."""
        text = self.processor.tokenizer.decode(ids)
        patterns = [
            re.compile(rf"{name}{BETWEEN}([1-5])(?!\d|\.\d)", re.IGNORECASE)
            for name in NAMES.values()
        ]
        begin = text.rfind("</think>") + 1
        if not any(pattern.search(text, begin) for pattern in patterns):
            begin = 0
        scores = []
        for name, pattern in zip(DIMENSIONS.values(), patterns, strict=True):
            found = list(pattern.finditer(text, begin))
            if not found:
                log.warning("no %s in VideoScore2's answer to %r: %r", name, prompt.text, text)
                scores.append(math.nan)
                continue
            at = shares[token_at(self.processor.tokenizer, ids, found[-1].start(1))]
            if self.temperature != 1:
                at = sharpened(at, self.temperature)
            scores.append(
                {
                    "hard": float(found[-1][1]),
                    "soft": float(at.argmax() + 1) * float(at.max()),
                    "expected": float(at @ torch.arange(1.0, 6.0)),
                }[self.score]
            )
        return scores


def sharpened(
    shares: Float[Tensor, "*tokens digits"], temperature: float
) -> Float[Tensor, "*tokens digits"]:
    """The shares of digits that the model's logits have at another temperature than 1."""
    raised = shares ** (1 / temperature)
    return raised / raised.sum(-1, keepdim=True)
