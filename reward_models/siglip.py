"""SigLIP similarity: similarity of an image to a reference image (arXiv:2303.15343)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionModel

from reward_models.shared.checkpoints import Precision, from_pretrained, pick_device, pick_dtype
from reward_models.shared.similarity import ReferenceSimilarity, Several, squashed

__all__ = ["SigLIPSimilarity"]
WEIGHTS = ("model",)
PATHS = ("root",)

MEAN = STD = (0.5, 0.5, 0.5)
TEXT_PARTS = ("text_model.", "logit_scale", "logit_bias")
"""Prefixes of weights that only the comparison with texts uses."""


class SigLIPSimilarity(ReferenceSimilarity):
    """Cosine between the pooled SigLIP embeddings of an image and of its references, in [-1, 1].

    With several references, the highest cosine counts (Adv-GRPO, arXiv:2511.20256) or the mean.
    References are files, named by the prompt's ``metadata["reference"]``: one path or a list.

    The default is ``google/siglip-so400m-patch14-384`` (Apache-2.0; its vision tower, 1.7 GB in
    fp32). Images are resized to the model's square without keeping the aspect ratio, as on the
    model's card, with the mean and the deviation 0.5. Adv-GRPO resizes without antialiasing:
    ``antialias = false``. It was not tested with the published weights, which were not available.

    Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "google/siglip-so400m-patch14-384",
        key: str = "reference",
        root: str = "",
        several: Several = "nearest",
        antialias: bool = True,
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of a ``SiglipModel`` or a ``SiglipVisionModel``.
            key: Metadata key of a prompt's reference images.
            root: Folder that relative paths start from; by default the working directory.
            several: How the cosines with several references are combined.
            antialias: Whether images are resized with antialiasing.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        super().__init__(key, root, several)
        self.antialias = antialias
        self.model = from_pretrained(
            SiglipVisionModel, model, "SigLIP vision model", pick_dtype(dtype), TEXT_PARTS
        ).to(pick_device(device))

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        """Pooled embeddings of length 1, in fp32."""
        pixels = squashed(images, self.model.config.image_size, MEAN, STD, self.antialias)
        output = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return F.normalize(output.pooler_output.float(), dim=-1)
