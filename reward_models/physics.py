"""Physical plausibility of a video: how well V-JEPA 2 predicts its continuation (arXiv:2502.11831)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms import functional as TF
from transformers import VJEPA2Model

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import Precision, from_pretrained, pick_device, pick_dtype
from reward_models.shared.pictures import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_media,
    eight_bits,
    finite_only,
)

__all__ = ["Physics"]
WEIGHTS = ("model",)


class Physics:
    """Minus the surprise of V-JEPA 2's predictor, at most 0; higher is more plausible.

    A window of ``window`` frames is moved over the video by ``stride`` frames. In each, the encoder
    sees the first ``context`` frames, and the predictor predicts the features of the others from
    them. The surprise is ``mean |prediction - layer_norm(features)|``, the loss that V-JEPA is
    trained with, where the features are the encoder's of the whole window, and ``layer_norm`` has
    neither weight nor bias. The score is minus the mean or the maximum of the surprise over the
    windows. The paper uses the mean to compare pairs of videos and the maximum for single ones.

    A still video is easy to predict, so combine it with ``motion``. The surprise depends on the
    content too: compare videos of one prompt, as groups do. ``every`` takes every n-th frame; the
    model was trained at about 4 frames per second.

    The default is ``facebook/vjepa2-vitl-fpc64-256`` (1.3 GB in fp32), its encoder and predictor.
    Frames are resized as by its processor: shorter side to 8/7 of the crop by the antialiased
    bilinear filter, centre crop 256, ImageNet's normalisation. It was not tested with the published
    weights, which were not available.

    Videos are rounded to 8 bits first; one with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "facebook/vjepa2-vitl-fpc64-256",
        window: int = 16,
        context: int = 8,
        stride: int = 4,
        every: int = 1,
        reduce: Literal["mean", "max"] = "mean",
        batch_size: int = 4,
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of a ``VJEPA2Model``.
            window: Frames in a window, whole tokens of 2 frames.
            context: Frames that the prediction starts from, whole tokens too.
            stride: Frames between the starts of windows; the last window ends with the video.
            every: Stride over the frames of the video, before windows are formed.
            reduce: How the surprise of several windows is combined.
            batch_size: Windows in one forward pass.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        if min(stride, every, batch_size) < 1 or reduce not in ("mean", "max"):
            raise ValueError(
                "stride, every and batch_size must be at least 1 and reduce 'mean' or 'max', got "
                f"{stride}, {every}, {batch_size}, {reduce!r}"
            )
        self.model = from_pretrained(VJEPA2Model, model, "V-JEPA 2 model", pick_dtype(dtype)).to(
            pick_device(device)
        )
        tube = self.model.config.tubelet_size
        if not 0 < context < window or context % tube or window % tube:
            raise ValueError(
                f"window and context must be multiples of {tube} with 0 < context < window, got "
                f"{window}, {context}"
            )
        self.window, self.context, self.stride, self.every = window, context, stride, every
        self.reduce, self.batch_size = reduce, batch_size

    def preprocess(
        self, frames: UInt8[Tensor, "*batch 3 h w"]
    ) -> Float[Tensor, "*batch 3 side side"]:
        """The input of the model."""
        side = self.model.config.crop_size
        resized = TF.resize(
            frames, [int(side * 256 / 224)], TF.InterpolationMode.BILINEAR, antialias=True
        )
        pixels = TF.center_crop(resized, [side, side]).float() / 255
        return TF.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))

    def __call__(
        self, media: Float[Tensor, "batch frames 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a video has fewer frames than a window.
        """
        check_media(media, prompts, video=True)
        frames = eight_bits(media[:, :: self.every])
        number = frames.shape[1]
        if number < self.window:
            raise ValueError(
                f"physics needs {self.window} frames, got {number}: set window or every"
            )
        last = number - self.window
        starts = [*range(0, last, self.stride), last]
        pixels = self.preprocess(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        windows = torch.cat([pixels[:, s : s + self.window] for s in starts])
        surprise = torch.cat([self.surprise(w) for w in windows.split(self.batch_size)])
        each = surprise.view(len(starts), len(media))
        total = each.mean(0) if self.reduce == "mean" else each.amax(0)
        return finite_only(-total, media)

    @torch.no_grad()
    def surprise(self, windows: Float[Tensor, "windows frames 3 h w"]) -> Float[Tensor, " windows"]:
        """The mean absolute error of the predicted features of each window, in fp32."""
        pixels = windows.to(self.model.device, self.model.dtype)
        # The context is encoded alone: within the whole window its tokens would know the others.
        seen = self.model.encoder(pixel_values_videos=pixels[:, : self.context]).last_hidden_state
        whole = self.model.encoder(pixel_values_videos=pixels).last_hidden_state
        # Tokens are ordered by time, then by rows and columns.
        places = torch.arange(whole.shape[1], device=whole.device).expand(len(whole), -1)
        known = seen.shape[1]
        predicted = self.model.predictor(
            encoder_hidden_states=seen,
            context_mask=[places[:, :known]],
            target_mask=[places[:, known:]],
        ).last_hidden_state
        target = F.layer_norm(whole[:, known:].float(), whole.shape[-1:])
        return (predicted.float() - target).abs().mean((1, 2)).cpu()
