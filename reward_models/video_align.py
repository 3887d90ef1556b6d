"""VideoAlign (VideoReward): visual quality, motion quality and text alignment (arXiv:2501.13918)."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import (
    Precision,
    find_file,
    pick_device,
    pick_dtype,
    read_state,
    refuse,
)
from reward_models.shared.pictures import check_media, eight_bits, finite_only
from reward_models.shared.qwen2_vl import (
    QwenReader,
    chunks,
    frame_rates,
    head_part,
    merge_lora,
    modern_names,
    shown_frames,
)
from reward_models.shared.templates import template

__all__ = ["VideoAlign"]
WEIGHTS = ("model", "base")

TOKENS = {"VQ": "<|VQ_reward|>", "MQ": "<|MQ_reward|>", "TA": "<|TA_reward|>"}
MEAN, STD = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)
"""Of the raw scores on the authors' data, in the order VQ, MQ, TA."""
LORA_ALPHA = 128.0
FRAME_PIXELS = 200_704
RATE = 2.0


class VideoAlign:
    """A weighted sum of visual quality (VQ), motion quality (MQ) and text alignment (TA).

    Each is ``(w . h - mean) / std`` of the last hidden state ``h`` at its special token: standard
    deviations from the mean of the authors' data, usually -3 to 3; their sum is the authors'
    "Overall". ``normalize = false`` leaves out the mean and the deviation. DanceGRPO's code uses the
    normalised scores, and VQ alone in its script for HunyuanVideo.

    The default is ``KlingTeam/VideoReward`` (code MIT, card Apache-2.0; about 5 GB in bfloat16):
    Qwen2-VL-2B with a LoRA, which is merged here, with the authors' question. Videos are shown
    at 2 frames per second (an even number, at least 4), frames of 100,352 to 200,704 pixels in
    whole tokens of 28x28, resized by the antialiased bicubic filter. The score therefore depends on
    the frame rate: 33 frames at 16 per second show 4 frames, 53 at 8 show 14.

    Configuration and processor come from ``Qwen/Qwen2-VL-2B-Instruct``, whose weights are not
    loaded. Template, sampling and the count of positions follow the released code; it was not
    tested with the published weights, which were not available.

    Videos are rounded to 8 bits first; one with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "KlingTeam/VideoReward",
        file: str = "checkpoint-11352/model.pth",
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        weights: Mapping[str, float] | None = None,
        fps: float = 0.0,
        normalize: bool = True,
        batch_size: int = 4,
        dtype: Precision = "bfloat16",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id, folder or file of the checkpoint.
            file: Name of the weights on the hub or in the folder.
            base: Hub id or folder of the configuration and the processor.
            weights: Factors of ``VQ``, ``MQ`` and ``TA``, where 0 is the default; all 1 if unset.
            fps: Frames per second of videos whose prompts' metadata have no ``fps``.
            normalize: Whether scores are in standard deviations from the authors' mean.
            batch_size: Videos in one forward pass.
            dtype: Precision of all but the head.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        factors = dict.fromkeys(TOKENS, 1.0) if weights is None else dict(weights)
        if not factors or not factors.keys() <= TOKENS.keys() or not any(factors.values()):
            raise ValueError(
                f"weights must name some of {', '.join(TOKENS)}, not all 0; got {factors}"
            )
        if batch_size < 1 or not 0 <= fps < math.inf:
            raise ValueError(
                f"batch_size must be at least 1 and fps at least 0, got {batch_size}, {fps}"
            )
        self.weighted = weights is not None
        self.factors = torch.tensor([float(factors.get(name, 0)) for name in TOKENS])
        self.fps, self.normalize, self.batch_size = fps, normalize, batch_size
        device = pick_device(device)
        what = "VideoAlign model"
        state = modern_names(read_state(find_file(model, (file, "model.pth"))))
        state = merge_lora(state, LORA_ALPHA, model, what)
        head = head_part(state, "rm_head.")
        refuse(model, what, {"weight"} - head.keys(), head.keys() - {"weight"})
        self.head = head["weight"].float().to(device)
        if self.head.shape[0] not in (1, len(TOKENS)):
            raise ValueError(
                f"{model!r} is no {what}: its head has {self.head.shape[0]} outputs, expected 1 or 3"
            )
        self.reader = QwenReader(
            base, state, list(TOKENS.values()), pick_dtype(dtype), device, model, what
        )
        self.template = template("video_align")

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
            ValueError: If a frame rate is unknown, or a prompt contains special tokens.
        """
        return finite_only(self.dimensions(media, prompts) @ self.factors, media)

    def named_scores(
        self, media: Float[Tensor, "batch frames 3 h w"], prompts: Sequence[Prompt]
    ) -> dict[str, Float[Tensor, " batch"]]:
        """``VQ``, ``MQ`` and ``TA``, for the key ``score`` of a reward."""
        if self.weighted:
            raise ValueError(
                "the option 'weights' does not apply to single scores: remove it, or 'score'"
            )
        columns = self.dimensions(media, prompts).unbind(1)
        return dict(zip(TOKENS, columns, strict=True))

    @torch.no_grad()
    def dimensions(
        self, media: Float[Tensor, "batch frames 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "batch 3"]:
        """VQ, MQ and TA of each video."""
        check_media(media, prompts, video=True)
        rates = frame_rates(prompts, self.fps)
        scores = []
        for part in chunks(len(prompts), self.batch_size):
            videos = [
                shown_frames(video, fps, RATE, FRAME_PIXELS, nearest=True)
                for video, fps in zip(eight_bits(media[part]), rates[part], strict=True)
            ]
            questions = [self.template.replace("{prompt}", p.text) for p in prompts[part]]
            hidden = self.reader.read("video", videos, questions, prompts[part]).float()
            values = hidden @ self.head.T  # (videos, tokens, outputs)
            # A head with one output serves all tokens; one with three has one for each.
            scores.append(
                values[..., 0] if len(self.head) == 1 else values.diagonal(dim1=1, dim2=2)
            )
        raw = torch.cat(scores).cpu()
        return (raw - torch.tensor(MEAN)) / torch.tensor(STD) if self.normalize else raw
