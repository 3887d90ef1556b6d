"""PickScore: which image of a prompt people prefer, learnt by a CLIP model (arXiv:2305.01569)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoProcessor, CLIPModel

from flowgrpo.experience import Prompt

__all__ = ["PickScore"]

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """``exp(logit_scale) * cos(image, text)``, the raw PickScore: usually 18 to 26.

    Papers also give the cosine, a hundredth of it (``weight = 0.01``); Flow-GRPO trained on a 26th.
    The default is ``yuvalkirstain/PickScore_v1`` (a CLIP ViT-H/14, 3.9 GB in fp32, half of that in
    16 bits; no licence was found on its card) with the processor that it was trained with, LAION's
    (224x224, bicubic resize and centre crop). Prompts are cut after 77 tokens.

    Images are rounded to 8 bits first, so a saved image scores as the one in training did. An image
    with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "",
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
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
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if not processor:
            own = any((Path(model) / f"{p}processor_config.json").is_file() for p in ("", "pre"))
            processor = model if own else PROCESSOR
        self.model = _load(model, getattr(torch, dtype)).to(device).eval().requires_grad_(False)
        self.processor = AutoProcessor.from_pretrained(processor)

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        pixels = (media.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)
        texts = list(dict.fromkeys(p.text for p in prompts))
        inputs = self.processor(
            images=list(pixels),
            text=texts,
            input_data_format="channels_first",
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        output = self.model(**inputs)  # embeddings of length 1
        text = output.text_embeds[[texts.index(p.text) for p in prompts]].float()
        scale = self.model.logit_scale.float().exp()
        scores = (scale * (output.image_embeds.float() * text).sum(-1)).cpu()
        return scores.where(media.isfinite().flatten(1).all(1).cpu(), math.nan)


def _load(model: str, dtype: torch.dtype) -> CLIPModel:
    """The model, if every weight in it comes from the checkpoint."""
    loaded, info = CLIPModel.from_pretrained(model, dtype=dtype, output_loading_info=True)
    # Old checkpoints hold position tables too, which are computed nowadays: no weights.
    tables = {name.rsplit(".", 1)[-1] for name, _ in loaded.named_buffers()}
    left_over = {k for k in info["unexpected_keys"] if k.rsplit(".", 1)[-1] not in tables}
    for what, keys in (("missing", info["missing_keys"]), ("left over", left_over)):
        if keys:
            raise ValueError(
                f"{model!r} is no PickScore model: {len(keys)} weights are {what}, "
                f"such as {min(keys)}"
            )
    return loaded
