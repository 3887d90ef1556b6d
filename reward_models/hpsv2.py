"""HPS v2.1: a CLIP model trained on human preferences (arXiv:2306.09341)."""

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import functional as TF

from flowgrpo.data.prompts import Prompt
from reward_models.shared.blank import blank_open_clip
from reward_models.shared.checkpoints import (
    Precision,
    find_file,
    load_strictly,
    pick_device,
    pick_dtype,
    read_state,
)
from reward_models.shared.pictures import CLIP_MEAN, CLIP_STD, check_media, eight_bits, finite_only

__all__ = ["HPSv2"]
WEIGHTS = ("model",)

FILES = ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt")


class HPSv2:
    """Cosine of image and text embedding, in [-1, 1]; usually 0.20 to 0.38.

    The default is ``xswu/HPSv2`` (Apache-2.0), the file ``HPS_v2.1_compressed.pt``: a ViT-H/14 of
    open_clip, 3.9 GB in fp32, half of that in 16 bits. Its input is 224x224: the longer side
    resized to that (bicubic), black bars around the rest, CLIP's normalisation. Prompts are cut
    after 77 tokens. Published: 0.25 for SD 1.4, 0.30 for SDXL.

    The authors' transform converts an image to a tensor and then resizes it, by torchvision's default
    filter: without antialiasing before torchvision 0.17, with it since. On test pictures the two differ
    by 0.02 to 0.03 in the score, so compare only scores of one filter. ``antialias = false`` is the older
    one. For FLUX.1-dev without training, DanceGRPO publishes 0.304 (arXiv:2505.07818) and DiffusionNFT
    0.274 (arXiv:2509.16117); prompts, steps and versions of torchvision differ. It was not tested with
    the published weights, which were not available.

    Images are rounded to 8 bits first, so a saved image scores as the one in training did. An image
    with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        architecture: str = "ViT-H-14",
        antialias: bool = True,
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id, folder or file of the checkpoint. In a folder v2.1 goes before v2.0.
            architecture: Its name in open_clip.
            antialias: Whether images are resized with antialiasing; see above.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If the hub has no such file.
        """
        precision, self.device = pick_dtype(dtype), pick_device(device)
        if architecture not in open_clip.list_models():
            raise ValueError(
                f"open_clip has no model {architecture!r}; see open_clip.list_models()"
            )
        state = read_state(find_file(model, FILES))
        self.model = open_clip.create_model(architecture, pretrained=None, precision="fp32")
        load_strictly(self.model, state, model, f"HPS v2 model of architecture {architecture}")
        self.model.to(self.device, precision).eval().requires_grad_(False)
        self.dtype, self.antialias = precision, antialias
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self.side = _side(self.model)

    @classmethod
    def without_weights(
        cls,
        model: str = "",
        architecture: str = "ViT-H-14",
        antialias: bool = True,
        dtype: Precision = "float32",
        device: str = "",
    ) -> "HPSv2":
        """The reward at its sizes on the meta device, for estimates of memory; options as of the constructor."""
        made = cls.__new__(cls)
        made.dtype, made.device, made.antialias = pick_dtype(dtype), device, antialias
        made.model = blank_open_clip(architecture, made.dtype)
        made.tokenizer = open_clip.get_tokenizer(architecture)
        made.side = _side(made.model)
        return made

    def preprocess(self, media: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 side side"]:
        """The preprocessed images: the input of the model."""
        return self._fitted(eight_bits(media).float() / 255)

    def _fitted(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 side side"]:
        scale = self.side / max(pixels.shape[-2:])
        height, width = (max(1, round(length * scale)) for length in pixels.shape[-2:])
        pixels = TF.resize(
            pixels, [height, width], TF.InterpolationMode.BICUBIC, antialias=self.antialias
        )
        right, below = self.side - width, self.side - height
        bars = [right // 2, below // 2, right - right // 2, below - below // 2]
        return TF.normalize(TF.pad(pixels, bars), list(CLIP_MEAN), list(CLIP_STD))

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        check_media(media, prompts)
        return finite_only(self._scores(self.preprocess(media), prompts), media)

    def scores_with_gradient(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """The scores with the gradient of the images, which are not rounded to 8 bits.

        The filter of the resize is that of the scores: without antialiasing if these have none.
        """
        check_media(media, prompts)
        return self._scores(self._fitted(media), prompts)

    def _scores(
        self, pixels: Float[Tensor, "batch 3 side side"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        texts = list(dict.fromkeys(p.text for p in prompts))
        pixels = pixels.to(self.device, self.dtype)
        image = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        text = F.normalize(
            self.model.encode_text(self.tokenizer(texts).to(self.device)).float(), dim=-1
        )
        return (image * text[[texts.index(p.text) for p in prompts]]).sum(-1)


def _side(model: Any) -> int:
    size = model.visual.image_size
    return size if isinstance(size, int) else size[0]
