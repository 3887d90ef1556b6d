"""ImageReward: a BLIP model trained on human preferences (arXiv:2304.05977)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from flowgrpo.data.prompts import Prompt
from reward_models.shared.blank import PaddedTexts
from reward_models.shared.checkpoints import (
    Precision,
    find_file,
    load_strictly,
    numbered,
    pick_device,
    pick_dtype,
    read_state,
    refuse,
)
from reward_models.shared.pictures import (
    CLIP_MEAN,
    CLIP_STD,
    check_media,
    finite_only,
    pictures,
    shrunk_and_cropped,
    shrunk_and_cropped_with_gradient,
)

__all__ = ["ImageReward"]
WEIGHTS = ("model", "tokenizer")

FILES = ("ImageReward.pt",)
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the raw scores on the authors' validation set."""
MAX_TOKENS = 35
HEAD_WIDTH = 64
"""Width of an attention head in all published ViTs and BERTs of this kind."""
MLP_LAYERS = (0, 2, 4, 6, 7)
RENAMED = (
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^(vision\..*)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
"""Replacements, in order, from the published names of weights to those of transformers."""
PUBLISHED = {
    "vision.embeddings.patch_embedding.weight": (1024, 3, 16, 16),
    "vision.embeddings.position_embedding": (1, 197, 1024),
    "vision.encoder.layers.0.mlp.fc1.weight": (4096, 1024),
    "vision.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
    "text.embeddings.word_embeddings.weight": (30524, 768),
    "text.embeddings.position_embeddings.weight": (512, 768),
    "text.encoder.layer.0.intermediate.dense.weight": (3072, 768),
    "text.encoder.layer.11.intermediate.dense.weight": (3072, 768),
    **{f"head.{n}.weight": shape for n, shape in zip(
        MLP_LAYERS, ((1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True
    )},
}  # fmt: skip
"""Shapes of the published weights from which the sizes of the model follow, by the names of transformers."""
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Weights of pre-training, and a table that transformers computes."""


class ImageReward:
    """``(mlp(text token 0) - 0.1672) / 1.0333``: standard deviations from the mean, usually -2 to 2.

    The default is ``zai-org/ImageReward`` (Apache-2.0, once THUDM), the file ``ImageReward.pt``,
    1.8 GB in fp32, half of that in 16 bits: BLIP's ViT-L/16 at 224x224, and a BERT that reads the
    prompt with cross-attention to the image. The MLP on top (768-1024-128-64-16-1) has no
    activations and runs in fp32. Images: bicubic resize of the shorter side and centre crop by
    Pillow. Prompts are cut after 35 tokens of ``bert-base-uncased``.

    The original code does not run with current libraries; here transformers' BLIP classes load the
    same weights. The sizes are read from the checkpoint. Tests compare the classes with the
    original layers on random weights; the published weights were not available for a test.

    Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "zai-org/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id, folder or file of the checkpoint.
            tokenizer: Hub id or folder of the BERT tokenizer.
            dtype: Precision of the image and the text model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model or tokenizer.
        """
        precision, self.device = pick_dtype(dtype), pick_device(device)
        state = {
            _renamed(k): v
            for k, v in read_state(find_file(model, FILES)).items()
            if not k.startswith(UNUSED)
        }
        self.model = _empty(state, model)
        load_strictly(self.model, state, model, "ImageReward model")
        self.model.to(self.device).eval().requires_grad_(False)
        for name in ("vision", "text"):
            self.model[name].to(precision)
        self.dtype = precision
        vision: Any = self.model["vision"]
        self.side: int = vision.config.image_size
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    @classmethod
    def without_weights(
        cls, model: str = "", tokenizer: str = "", dtype: Precision = "float32", device: str = ""
    ) -> "ImageReward":
        """The reward at its sizes on the meta device, for estimates of memory; options as of the constructor."""
        made = cls.__new__(cls)
        made.dtype, made.device, made.tokenizer = pick_dtype(dtype), device, PaddedTexts()
        with torch.device("meta"):
            shapes = {name: torch.empty(shape) for name, shape in PUBLISHED.items()}
            made.model = _empty(shapes, "published").eval().requires_grad_(False)
        for name in ("vision", "text"):
            made.model[name].to(made.dtype)
        vision: Any = made.model["vision"]
        made.side = vision.config.image_size
        return made

    def preprocess(self, media: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 side side"]:
        """The preprocessed images: the input of the model."""
        return shrunk_and_cropped(pictures(media), self.side, self.side, CLIP_MEAN, CLIP_STD)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Int[Tensor, "batch tokens"]]:
        """Ids and mask of the prompts, all of one length."""
        options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
        tokens = self.tokenizer(list(texts), return_tensors="pt", **options).to(self.device)
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        check_media(media, prompts)
        return finite_only(self._scores(self.preprocess(media), prompts), media)

    def scores_with_gradient(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """The scores with the gradient of the images, which are not rounded to 8 bits."""
        check_media(media, prompts)
        pixels = shrunk_and_cropped_with_gradient(media, self.side, self.side, CLIP_MEAN, CLIP_STD)
        return self._scores(pixels, prompts)

    def _scores(
        self, pixels: Float[Tensor, "batch 3 side side"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        pixels = pixels.to(self.device, self.dtype)
        seen = self.model["vision"](pixel_values=pixels).last_hidden_state
        read = self.model["text"](
            **self.tokenize([p.text for p in prompts]),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
            is_decoder=False,  # the words see each other in both directions
        ).last_hidden_state
        raw = self.model["head"](read[:, 0].float()).squeeze(-1)
        return (raw - MEAN) / STD


def _renamed(key: str) -> str:
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def _empty(state: Mapping[str, Tensor], source: str) -> nn.ModuleDict:
    """The model without weights; its sizes are read from the renamed weights."""
    needed = {
        "vision.embeddings.patch_embedding.weight",
        "vision.embeddings.position_embedding",
        "vision.encoder.layers.0.mlp.fc1.weight",
        "text.embeddings.word_embeddings.weight",
        "text.embeddings.position_embeddings.weight",
        "text.encoder.layer.0.intermediate.dense.weight",
        *(f"head.{n}.weight" for n in MLP_LAYERS),
    }
    refuse(source, "ImageReward model", needed - state.keys())
    patch = state["vision.embeddings.patch_embedding.weight"]
    grid = round((state["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    words = state["text.embeddings.word_embeddings.weight"]
    vision = BlipVisionConfig(
        hidden_size=patch.shape[0],
        intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_depth(state, "vision.encoder.layers."),
        num_attention_heads=patch.shape[0] // HEAD_WIDTH,
        image_size=grid * patch.shape[-1],
        patch_size=patch.shape[-1],
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    text = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=patch.shape[0],
        intermediate_size=state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_depth(state, "text.encoder.layer."),
        num_attention_heads=words.shape[1] // HEAD_WIDTH,
        max_position_embeddings=state["text.embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        is_decoder=True,  # else the class has no attention to the image
    )
    return nn.ModuleDict(
        {
            "vision": BlipVisionModel(vision),
            "text": BlipTextModel(text, add_pooling_layer=False),
            "head": numbered({n: state[f"head.{n}.weight"].shape for n in MLP_LAYERS}),
        }
    )


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in state if k.startswith(prefix))
