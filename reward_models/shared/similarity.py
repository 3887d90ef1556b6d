"""Similarity of images to reference images by the cosine of their embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from flowgrpo.data.prompts import Prompt
from reward_models.shared.pictures import (
    check_media,
    check_references,
    finite_only,
    pictures,
    read_image,
    reference_paths,
)

Several = Literal["nearest", "mean"]
"""How the cosines with several references are combined: the highest one, or their mean."""


class ReferenceSimilarity:
    """The cosine between the embeddings of an image and of its references, in [-1, 1].

    A subclass defines :meth:`embed`. Embeddings of references are computed once.
    """

    def __init__(self, key: str, root: str, several: Several):
        """
        Args:
            key: Metadata key of a prompt's reference images: one path or a list.
            root: Folder that relative paths start from.
            several: How the cosines with several references are combined.

        Raises:
            ValueError: If ``several`` is another word.
        """
        if several not in ("nearest", "mean"):
            raise ValueError(f"several must be 'nearest' or 'mean', got {several!r}")
        self.key, self.root, self.several = key, Path(root), several
        self._references: dict[Path, Tensor] = {}

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        """Embeddings of length 1, in fp32."""
        raise NotImplementedError

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

    def _reference(self, path: Path) -> Float[Tensor, " width"]:
        if path not in self._references:
            self._references[path] = self.embed([read_image(path)])[0]
        return self._references[path]


def squashed(
    images: Sequence[Image.Image],
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    antialias: bool,
) -> Float[Tensor, "images 3 side side"]:
    """The images resized to a square without keeping the aspect ratio, bicubic, and normalised.

    Without ``antialias`` this is ``torch.nn.functional.interpolate`` as Adv-GRPO calls it.
    """
    resized = [
        F.interpolate(TF.to_tensor(i)[None], (side, side), mode="bicubic", antialias=antialias)
        for i in images
    ]
    return TF.normalize(torch.cat(resized), list(mean), list(std))
