"""CLIPScore: cosine similarity of the CLIP embeddings of image and prompt (arXiv:2104.08718)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import functional as TF

from flowgrpo.data.prompts import Prompt
from reward_models.shared.blank import blank_open_clip
from reward_models.shared.checkpoints import Precision, pick_device, pick_dtype
from reward_models.shared.pictures import (
    check_media,
    eight_bits,
    finite_only,
    pictures,
    shrunk_and_cropped_with_gradient,
)

__all__ = ["CLIPScore"]


class CLIPScore:
    """Cosine of image and text embedding, in [-1, 1]; usually 0.15 to 0.35.

    The default is OpenAI's ViT-L/14 (MIT, 224x224). Prompts are cut after 77 tokens. About 1.7 GB in
    fp32. The shorter side is resized and the centre cropped. Three variants of the resize are in
    use; the numbers are the mean differences from the first of the pixels that CLIP sees, in 8-bit
    levels, on the picture ``docs/quickstart_flow_grpo.png``:

    - Pillow's bicubic filter (open_clip, the CLIP paper's code): ``filter = "bicubic"``, the default.
      The processor of transformers differs by less than 0.01.
    - A tensor, bilinear with antialiasing (DiffusionNFT): ``filter = "bilinear"``; 0.96.
    - A tensor, bicubic without antialiasing (torchvision before 0.17): not offered; 3.5.

    Papers also scale the cosine: 2.5 times its positive part (arXiv:2104.08718), or 100 times
    (torchmetrics, and the logits of CLIP). DanceGRPO, MixGRPO and Pref-GRPO call the cosine of
    another model CLIP score, ``apple/DFN5B-CLIP-ViT-H-14`` (research licence; 0.36 to 0.43).

    Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "ViT-L-14",
        pretrained: str = "openai",
        filter: Literal["bicubic", "bilinear"] = "bicubic",
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Architecture name of open_clip, or ``hf-hub:...`` / ``local-dir:...``.
            pretrained: Weights of that architecture: a tag of open_clip or a file.
            filter: The filter of the resize; see above.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or open_clip does not know the model or the weights.
            RuntimeError: If weights are missing or left over.
        """
        if filter not in ("bicubic", "bilinear"):
            raise ValueError(f"filter must be 'bicubic' or 'bilinear', got {filter!r}")
        self.filter = filter
        self.dtype, self.device = pick_dtype(dtype), pick_device(device)
        own_weights = ":" in model
        if not own_weights:
            known = open_clip.list_pretrained_tags_by_model(model)
            if model not in open_clip.list_models():
                raise ValueError(f"open_clip has no model {model!r}; see open_clip.list_models()")
            if pretrained not in known and not Path(pretrained).is_file():
                raise ValueError(
                    f"no weights {pretrained!r} for {model}: neither a file nor one of {', '.join(known)}"
                )
        quick = not own_weights and _is_quick(model, pretrained)
        # This function refuses a model without weights; open_clip's others draw them at random.
        self.model, self._preprocess = open_clip.create_model_from_pretrained(
            model,
            pretrained=None if own_weights else pretrained,
            force_quick_gelu=quick,
        )
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)

    @classmethod
    def without_weights(
        cls,
        model: str = "ViT-L-14",
        pretrained: str = "openai",
        filter: Literal["bicubic", "bilinear"] = "bicubic",
        dtype: Precision = "float32",
        device: str = "",
    ) -> "CLIPScore":
        """The reward at its sizes on the meta device, for estimates of memory; options as of the constructor."""
        made = cls.__new__(cls)
        made.filter, made.dtype, made.device = filter, pick_dtype(dtype), device
        quick = _is_quick(model, pretrained)
        made.model = blank_open_clip(model, made.dtype, force_quick_gelu=quick)
        made.tokenizer = open_clip.get_tokenizer(model)
        return made

    def preprocess(self, media: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 side side"]:
        """The input of the model, from images rounded to 8 bits; by default open_clip's transform."""
        if self.filter == "bilinear":
            return self._bilinear(eight_bits(media).float() / 255)
        return torch.stack([self._preprocess(image) for image in pictures(media)])

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

        Raises:
            ValueError: If the model does not crop its images as CLIP does.
        """
        check_media(media, prompts)
        visual = self.model.visual
        if self.filter == "bilinear":
            return self._scores(self._bilinear(media), prompts)
        known = visual.preprocess_cfg
        if known.get("resize_mode", "shortest") != "shortest" or known.get("interpolation") not in (
            None,
            "bicubic",
        ):
            raise ValueError(
                f"this model resizes images by {known.get('interpolation')} to the {known.get('resize_mode')}; with "
                "gradients, clip_score has bicubic and shortest only"
            )
        side = self._side
        pixels = shrunk_and_cropped_with_gradient(
            media, side, side, visual.image_mean, visual.image_std
        )
        return self._scores(pixels, prompts)

    @property
    def _side(self) -> int:
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    def _bilinear(self, pixels: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 side side"]:
        resized = TF.resize(pixels, [self._side], antialias=True)
        cropped = TF.center_crop(resized, [self._side, self._side])
        return TF.normalize(cropped, self.model.visual.image_mean, self.model.visual.image_std)

    def _scores(
        self, pixels: Float[Tensor, "batch 3 side side"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        pixels = pixels.to(self.device, self.dtype)
        tokens = self.tokenizer([p.text for p in prompts]).to(self.device)
        image = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        text = F.normalize(self.model.encode_text(tokens).float(), dim=-1)
        return (image * text).sum(-1)


def _is_quick(model: str, pretrained: str) -> bool:
    """Whether weights were trained with another activation than the architecture's name says, as OpenAI's."""
    return bool((open_clip.get_pretrained_cfg(model, pretrained) or {}).get("quick_gelu"))
