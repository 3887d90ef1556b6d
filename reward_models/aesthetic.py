"""LAION's aesthetic predictor v2: how much people like an image, independent of its prompt."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPModel

from flowgrpo.data.prompts import Prompt
from reward_models.shared.blank import CLIP_L, blank_clip
from reward_models.shared.checkpoints import (
    Precision,
    find_file,
    from_pretrained,
    load_strictly,
    numbered,
    pick_device,
    pick_dtype,
    read_state,
    refuse,
)
from reward_models.shared.pictures import (
    CLIP_MEAN,
    CLIP_STD,
    check_media,
    finite_only,
    pictures,
    shrunk_and_cropped,
    shrunk_and_cropped_with_gradient,
)

__all__ = ["Aesthetic"]
WEIGHTS = ("model", "head")

FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")
LAYERS = (0, 2, 4, 6, 7)
"""Indices of the linear layers in the published head; the others were dropout."""
MODEL = "openai/clip-vit-large-patch14"
WIDTHS = (1024, 128, 64, 16, 1)
"""Outputs of these layers."""


class Aesthetic:
    """A linear read-out of the CLIP embedding of length 1, trained on ratings of 1 to 10.

    Usually 4 to 7. Source: christophschuhmann/improved-aesthetic-predictor (Apache-2.0), file
    ``sac+logos+ava1-l14-linearMSE.pth``; as a download, ``trl-lib/ddpo-aesthetic-predictor``. Five
    linear layers (768-1024-128-64-16-1, without activations) on ``openai/clip-vit-large-patch14``
    (MIT; 1.7 GB in fp32, half of that in 16 bits). Input 224x224: bicubic resize of the shorter
    side and centre crop by Pillow, as CLIP does it. The head runs in fp32.

    It was not tested with the published weights, which were not available. Images are rounded to 8
    bits first; an image with NaN scores NaN.
    """

    ignores_prompt = True

    def __init__(
        self,
        model: str = MODEL,
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of a ``CLIPModel``.
            head: Hub id, folder or file of the head's weights.
            dtype: Precision of the CLIP model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, weights are missing or left over, or the head is for
                another width than the model's.
            OSError: If there is no such model.
        """
        precision, device = pick_dtype(dtype), pick_device(device)
        self.head = _head(find_file(head, FILES), head).to(device).requires_grad_(False)
        self.model = from_pretrained(CLIPModel, model, "CLIP model", precision).to(device)
        width, wanted = self.model.config.projection_dim, self.head[0].in_features
        if width != wanted:
            raise ValueError(f"head {head!r} takes {wanted} features; {model!r} has {width}")
        self.side: int = self.model.config.vision_config.image_size

    @classmethod
    def without_weights(
        cls, model: str = MODEL, head: str = "", dtype: Precision = "float32", device: str = ""
    ) -> "Aesthetic":
        """The reward at its sizes on the meta device, for estimates of memory; options as of the constructor."""
        made = cls.__new__(cls)
        made.model = blank_clip(model, MODEL, CLIP_L, pick_dtype(dtype))
        sizes = zip(WIDTHS, (made.model.config.projection_dim, *WIDTHS), strict=False)
        with torch.device("meta"):
            made.head = numbered(dict(zip(LAYERS, sizes, strict=True))).requires_grad_(False)
        made.side = made.model.config.vision_config.image_size
        return made

    def preprocess(self, media: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 side side"]:
        """The preprocessed images: the input of the model."""
        return shrunk_and_cropped(pictures(media), self.side, self.side, CLIP_MEAN, CLIP_STD)

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        check_media(media, prompts)
        return finite_only(self._scores(self.preprocess(media)), media)

    def scores_with_gradient(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """The scores with the gradient of the images, which are not rounded to 8 bits."""
        check_media(media, prompts)
        return self._scores(
            shrunk_and_cropped_with_gradient(media, self.side, self.side, CLIP_MEAN, CLIP_STD)
        )

    def _scores(self, pixels: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, " batch"]:
        pixels = pixels.to(self.model.device, self.model.dtype)
        features = self.model.get_image_features(pixel_values=pixels).pooler_output
        return self.head(F.normalize(features.float(), dim=-1)).squeeze(-1)


def _head(path: Path, source: str) -> nn.Sequential:
    """The linear layers; their widths are read from the file."""
    state = read_state(path)
    expected = {f"layers.{n}.{kind}" for n in LAYERS for kind in ("weight", "bias")}
    refuse(source, "aesthetic head", expected - state.keys(), state.keys() - expected)
    head = numbered({n: state[f"layers.{n}.weight"].shape for n in LAYERS})
    renamed = {key.removeprefix("layers."): tensor for key, tensor in state.items()}
    load_strictly(head, renamed, source, "aesthetic head")
    return head.float()
