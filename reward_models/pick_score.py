"""PickScore: a CLIP model trained on human preferences between images of a prompt (arXiv:2305.01569)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoProcessor, CLIPModel

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import Precision, from_pretrained, pick_device, pick_dtype
from reward_models.shared.pictures import check_media, eight_bits, finite_only

__all__ = ["PickScore"]

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


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
        model: str = "yuvalkirstain/PickScore_v1",
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

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        check_media(media, prompts)
        texts = list(dict.fromkeys(p.text for p in prompts))
        inputs = self.processor(
            images=list(eight_bits(media).cpu()),
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
        return finite_only(scale * (output.image_embeds.float() * text).sum(-1), media)
