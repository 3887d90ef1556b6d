"""DINO similarity: similarity of an image to a reference image (arXiv:2304.07193)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import Dinov2Model

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import Precision, from_pretrained, pick_device, pick_dtype
from reward_models.shared.pictures import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_media,
    check_references,
    finite_only,
    pictures,
    read_image,
    reference_paths,
    shrunk_and_cropped,
)

__all__ = ["DINOSimilarity"]

UNTRAINED = ("embeddings.mask_token",)


class DINOSimilarity:
    """Cosine between the class tokens of an image and of its references, in [-1, 1].

    Usually 0.1 for unrelated images to 0.9 for near copies. With several references, the highest
    cosine counts (Adv-GRPO, arXiv:2511.20256) or the mean. References are files, named by the
    prompt's ``metadata["reference"]``: one path or a list.

    The default is ``facebook/dinov2-base`` (Apache-2.0, 0.35 GB in fp32) with the preprocessing on
    its card: shorter side to 256 by Pillow's bicubic filter, centre crop 224, ImageNet's
    normalisation. Adv-GRPO used 518x518: ``resize = 518, crop = 518``.

    Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "facebook/dinov2-base",
        key: str = "reference",
        root: str = "",
        several: Literal["nearest", "mean"] = "nearest",
        resize: int = 256,
        crop: int = 224,
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of a ``Dinov2Model``.
            key: Metadata key of a prompt's reference images.
            root: Folder that relative paths start from; by default the working directory.
            several: How the cosines with several references are combined.
            resize: Length of the shorter side before the crop.
            crop: Side of the model's input, a multiple of its patch size.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        if several not in ("nearest", "mean") or not 0 < crop <= resize:
            raise ValueError(
                "several must be 'nearest' or 'mean' and 0 < crop <= resize, "
                f"got {several!r}, {crop}, {resize}"
            )
        precision = pick_dtype(dtype)
        self.model = from_pretrained(Dinov2Model, model, "DINOv2 model", precision, UNTRAINED).to(
            pick_device(device)
        )
        if crop % self.model.config.patch_size:
            raise ValueError(
                f"crop must be a multiple of the patches of {model!r}, "
                f"{self.model.config.patch_size}, got {crop}"
            )
        self.key, self.root, self.several = key, Path(root), several
        self.resize, self.crop = resize, crop
        self._references: dict[Path, Tensor] = {}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If one names no reference, or one that is no file.
        """
        check_references(prompts, self.key, self.root)

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a prompt names no reference.
            OSError: If a reference cannot be read.
        """
        check_media(media, prompts)
        paths = [reference_paths(p, self.key, self.root) for p in prompts]
        seen = self.embed(pictures(media))
        scores = []
        for embedding, own in zip(seen, paths, strict=True):
            cosines = torch.stack([self._reference(path) for path in own]) @ embedding
            scores.append(cosines.max() if self.several == "nearest" else cosines.mean())
        return finite_only(torch.stack(scores), media)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        """Class tokens of length 1, in fp32."""
        pixels = shrunk_and_cropped(
            images, self.resize, self.crop, IMAGENET_MEAN, IMAGENET_STD, odd="floor"
        )
        output = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return F.normalize(output.pooler_output.float(), dim=-1)

    def _reference(self, path: Path) -> Float[Tensor, " width"]:
        if path not in self._references:
            self._references[path] = self.embed([read_image(path)])[0]
        return self._references[path]
