"""PickScore: a CLIP model trained on human preferences between images of a prompt (arXiv:2305.01569)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoProcessor, CLIPModel

from flowgrpo.data.prompts import Prompt
from reward_models.shared.blank import CLIP_H, blank_clip, blank_processor
from reward_models.shared.checkpoints import Precision, from_pretrained, pick_device, pick_dtype
from reward_models.shared.pictures import (
    check_media,
    eight_bits,
    finite_only,
    shrunk_and_cropped_with_gradient,
)

__all__ = ["PickScore"]
WEIGHTS = ("model", "processor")

BICUBIC = 3
"""Pillow's number of the filter."""
MODEL, PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """``exp(logit_scale) * cos(image, text)``, the raw PickScore: usually 18 to 26.

    Papers also report the cosine, which is 1/100 of it (``weight = 0.01``); Flow-GRPO divides it by
    26. The default is ``yuvalkirstain/PickScore_v1`` (a CLIP ViT-H/14, 3.9 GB in fp32, half of that
    in 16 bits; no licence was found on its card) with the processor that it was trained with,
    LAION's (224x224, bicubic resize and centre crop). Prompts are cut after 77 tokens.

    Images are rounded to 8 bits first, so a saved image scores as the one in training did. An image
    with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = MODEL,
        processor: str = "",
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of a ``CLIPModel``.
            processor: Hub id or folder of its processor; by default the folder ``model`` if that
                holds one, and otherwise LAION's.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If weights are missing or left over: the folder holds another model.
            OSError: If there is no such model.
        """
        precision = pick_dtype(dtype)
        if not processor:
            own = any((Path(model) / f"{p}processor_config.json").is_file() for p in ("", "pre"))
            processor = model if own else PROCESSOR
        self.model = from_pretrained(CLIPModel, model, "PickScore model", precision).to(
            pick_device(device)
        )
        self.processor = AutoProcessor.from_pretrained(processor)

    @classmethod
    def without_weights(
        cls, model: str = MODEL, processor: str = "", dtype: Precision = "float32", device: str = ""
    ) -> "PickScore":
        """The reward at its sizes on the meta device, for estimates of memory; options as of the constructor."""
        made = cls.__new__(cls)
        made.model = blank_clip(model, MODEL, CLIP_H, pick_dtype(dtype))
        side = made.model.config.vision_config.image_size
        made.processor = blank_processor(processor or model, side)
        return made

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        check_media(media, prompts)
        pixels = self.processor.image_processor(
            images=list(eight_bits(media).cpu()),
            input_data_format="channels_first",
            return_tensors="pt",
        ).pixel_values
        return finite_only(self._scores(pixels, prompts), media)

    def scores_with_gradient(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """The scores with the gradient of the images, which are not rounded to 8 bits.

        Raises:
            ValueError: If the processor does not crop images as CLIP's does.
        """
        check_media(media, prompts)
        own = self.processor.image_processor
        side, crop = own.size.get("shortest_edge"), own.crop_size
        if side is None or own.resample != BICUBIC or crop["height"] != crop["width"]:
            raise ValueError(
                "with gradients, pick_score needs CLIP's processor: the shorter side resized by a bicubic filter, and "
                f"a square crop; this one has size {own.size}, resample {own.resample} and crop {crop}"
            )
        pixels = shrunk_and_cropped_with_gradient(
            media, side, crop["height"], own.image_mean, own.image_std, "floor"
        )
        return self._scores(pixels, prompts)

    def _scores(
        self, pixels: Float[Tensor, "batch 3 side side"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        texts = list(dict.fromkeys(p.text for p in prompts))
        tokens = self.processor.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        pixels = pixels.to(self.model.device, self.model.dtype)
        output = self.model(pixel_values=pixels, **tokens)  # embeddings of length 1
        text = output.text_embeds[[texts.index(p.text) for p in prompts]].float()
        scale = self.model.logit_scale.float().exp()
        return scale * (output.image_embeds.float() * text).sum(-1)
