"""DINO similarity: similarity of an image to a reference image (arXiv:2304.07193)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import Dinov2Model

from reward_models.shared.checkpoints import Precision, from_pretrained, pick_device, pick_dtype
from reward_models.shared.pictures import IMAGENET_MEAN, IMAGENET_STD, shrunk_and_cropped
from reward_models.shared.similarity import ReferenceSimilarity, Several, squashed

__all__ = ["DINOSimilarity"]
WEIGHTS = ("model",)
PATHS = ("root",)

UNTRAINED = ("embeddings.mask_token",)


class DINOSimilarity(ReferenceSimilarity):
    """Cosine between the class tokens of an image and of its references, in [-1, 1].

    Usually 0.1 for unrelated images to 0.9 for near copies. With several references, the highest
    cosine counts (Adv-GRPO, arXiv:2511.20256) or the mean. References are files, named by the
    prompt's ``metadata["reference"]``: one path or a list.

    The default is ``facebook/dinov2-base`` (Apache-2.0, 0.35 GB in fp32) with the preprocessing on
    its card: shorter side to 256 by Pillow's bicubic filter, centre crop 224, ImageNet's
    normalisation. Adv-GRPO instead resizes to 518x518 without keeping the aspect ratio and without
    antialiasing: ``fit = "squash", crop = 518, antialias = false``. Differs from it: references are
    read at their own size, where Adv-GRPO's data loader first resizes them to the size of the
    images.

    Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "facebook/dinov2-base",
        key: str = "reference",
        root: str = "",
        several: Several = "nearest",
        fit: Literal["crop", "squash"] = "crop",
        resize: int = 256,
        crop: int = 224,
        antialias: bool = True,
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of a ``Dinov2Model``.
            key: Metadata key of a prompt's reference images.
            root: Folder that relative paths start from; by default the working directory.
            several: How the cosines with several references are combined.
            fit: Whether images keep their aspect ratio and are cropped, or are resized to a square.
            resize: Length of the shorter side before the crop; unused with ``squash``.
            crop: Side of the model's input, a multiple of its patch size.
            antialias: Whether ``squash`` resizes with antialiasing; ``crop`` always does.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        super().__init__(key, root, several)
        if fit not in ("crop", "squash") or (fit == "crop" and not antialias):
            raise ValueError(
                f"fit must be 'crop' or 'squash', and antialias = false needs fit = 'squash'; got "
                f"{fit!r}, {antialias}"
            )
        if crop <= 0 or (fit == "crop" and crop > resize):
            raise ValueError(f"crop must be above 0 and at most resize, got {crop}, {resize}")
        precision = pick_dtype(dtype)
        self.model = from_pretrained(Dinov2Model, model, "DINOv2 model", precision, UNTRAINED).to(
            pick_device(device)
        )
        if crop % self.model.config.patch_size:
            raise ValueError(
                f"crop must be a multiple of the patches of {model!r}, "
                f"{self.model.config.patch_size}, got {crop}"
            )
        self.fit, self.resize, self.crop, self.antialias = fit, resize, crop, antialias

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        """Class tokens of length 1, in fp32."""
        if self.fit == "squash":
            pixels = squashed(images, self.crop, IMAGENET_MEAN, IMAGENET_STD, self.antialias)
        else:
            pixels = shrunk_and_cropped(
                images, self.resize, self.crop, IMAGENET_MEAN, IMAGENET_STD, odd="floor"
            )
        output = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return F.normalize(output.pooler_output.float(), dim=-1)
