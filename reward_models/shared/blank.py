"""Rewards without weights: models on the meta device at their published sizes, for estimates of memory.

A reward class offers them by ``without_weights``, which takes the options of its constructor. The result
scores tensors of which only shapes are known, with the code of the reward itself. ``device`` is where
inputs are sent, and no such device has to be present.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor, BatchEncoding, CLIPConfig, CLIPImageProcessor, CLIPModel

CLIP_L: dict[str, Any] = {
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    },
    "vision_config": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "patch_size": 14,
    },
}  # fmt: skip
"""Sizes of ``openai/clip-vit-large-patch14``."""
CLIP_H: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    },
    "vision_config": {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
        "patch_size": 14,
    },
}  # fmt: skip
"""Sizes of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, and of PickScore, which was trained from it."""


class PaddedTexts:
    """Replaces a tokenizer: every text has the largest number of tokens."""

    def __call__(self, texts: Sequence[str], *, max_length: int, **options: Any) -> BatchEncoding:
        """Ids and mask, ``(texts, max_length)``."""
        ids = torch.ones(len(texts), max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def blank(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model as rewards use it: in a precision, and not trained."""
    return model.to(dtype).eval().requires_grad_(False)


def blank_clip(model: str, published: str, sizes: dict[str, Any], dtype: torch.dtype) -> Any:
    """A ``CLIPModel``: at known sizes if it is the published one, otherwise at those of its config file.

    Raises:
        OSError: If the config file of another model is not available.
    """
    config = CLIPConfig(**sizes) if model == published else CLIPConfig.from_pretrained(model)
    with torch.device("meta"):
        return blank(CLIPModel(config), dtype)


def blank_processor(folder: str, side: int) -> Any:
    """The processor in a folder, or one that crops squares of ``side`` as CLIP's does and pads texts."""
    if any((Path(folder) / f"{p}processor_config.json").is_file() for p in ("", "pre")):
        return AutoProcessor.from_pretrained(folder)
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return SimpleNamespace(image_processor=CLIPImageProcessor(**size), tokenizer=PaddedTexts())


def blank_open_clip(architecture: str, dtype: torch.dtype, **options: Any) -> Any:
    """A model of open_clip, by the name of its architecture.

    Raises:
        ValueError: If open_clip does not know the architecture; a hub id or a folder is none.
    """
    import open_clip

    if architecture not in open_clip.list_models():
        raise ValueError(f"open_clip has no architecture {architecture!r}")
    before = logging.root.manager.disable
    # open_clip warns that the model has no weights.
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            model = open_clip.create_model(architecture, pretrained=None, device="meta", **options)
    finally:
        logging.disable(before)
    return blank(model, dtype)
