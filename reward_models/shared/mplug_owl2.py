"""mPLUG-Owl2 (arXiv:2311.04257), the backbone of DeQA-Score: a ViT, a resampler, and a Llama.

The Llama has two sets of norms, keys and values: for words and for pictures. transformers has no such
class, so the layers are written here with its Llama parts, under the published names of weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Attention of ``(batch, tokens, heads * width)``, already projected."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


class VisionAttention(nn.Module):
    """Self-attention whose query, key and value are one matrix, interleaved by head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b tokens width"]:
        # (b, tokens, heads, 3, width / heads)
        parts = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1))
        q, k, v = (part.flatten(2) for part in parts.unbind(3))
        return self.dense(attend(q, k, v, self.heads))


class VisionMLP(nn.Module):
    """Two layers with CLIP's approximate GELU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b tokens width"]:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionLayer(nn.Module):
    """A layer of the ViT, with norms before attention and MLP."""

    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        width, eps = c["hidden_size"], c["layer_norm_eps"]
        self.self_attn = VisionAttention(width, c["num_attention_heads"])
        self.mlp = VisionMLP(width, c["intermediate_size"])
        self.input_layernorm = nn.LayerNorm(width, eps=eps)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Float[Tensor, "b tokens width"]) -> Float[Tensor, "b tokens width"]:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionEmbeddings(nn.Module):
    """A class token and patches, with learned positions and a norm."""

    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        width, patch = c["hidden_size"], c["patch_size"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        number = (c["image_size"] // patch) ** 2
        self.position_embedding = nn.Parameter(torch.zeros(1, number + 1, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=c["layer_norm_eps"])

    def forward(self, pixels: Float[Tensor, "b 3 side side"]) -> Float[Tensor, "b tokens width"]:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1)
        return self.pre_layernorm(tokens + self.position_embedding)


class VisionModel(nn.Module):
    """The ViT: ``(b, 3, side, side)`` to the class token and the patches."""

    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        layers = nn.ModuleList(VisionLayer(c) for _ in range(c["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])

    def forward(self, pixels: Float[Tensor, "b 3 side side"]) -> Float[Tensor, "b tokens width"]:
        x = self.embeddings(pixels)
        layers: Any = self.encoder["layers"]
        for layer in layers:
            x = layer(x)
        return self.post_layernorm(x)


class ResamplerAttention(nn.Module):
    """Attention of the queries to themselves and to the picture, with fixed positions."""

    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        width, seen = c["hidden_size"], c["encoder_hidden_size"]
        self.heads = c["num_attention_heads"]
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(seen, width), nn.Linear(seen, width)
        # Sines and cosines, which the checkpoint holds.
        tokens = (c.get("grid_size") or 32) ** 2 + 1
        self.register_buffer("q_pos_embed", torch.zeros(c["num_learnable_queries"], width))
        self.register_buffer("k_pos_embed", torch.zeros(tokens, width))

    def forward(
        self, queries: Float[Tensor, "b queries width"], seen: Float[Tensor, "b all width"]
    ) -> Float[Tensor, "b queries width"]:
        places = torch.cat([self.q_pos_embed, self.k_pos_embed])
        q = self.query(queries + self.q_pos_embed)
        return attend(q, self.key(seen + places), self.value(seen), self.heads)


class ResamplerMLP(nn.Module):
    """A gated MLP with a norm inside."""

    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        width, inner = c["hidden_size"], c["intermediate_size"]
        self.w1, self.w2, self.w3 = (
            nn.Linear(width, inner),
            nn.Linear(inner, width),
            nn.Linear(width, inner),
        )
        self.ffn_ln = nn.LayerNorm(inner, eps=c["layer_norm_eps"])

    def forward(self, x: Float[Tensor, "b queries width"]) -> Float[Tensor, "b queries width"]:
        return self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))


class ResamplerLayer(nn.Module):
    """A layer of the resampler. The residual starts from the normed queries, as published."""

    def __init__(self, c: Mapping[str, Any]):
        super().__init__()
        width = c["hidden_size"]
        output = nn.ModuleDict(
            {
                "out_proj": nn.Linear(width, width),
                "norm2": nn.LayerNorm(width),
                "mlp": ResamplerMLP(c),
            }
        )
        self.crossattention = nn.ModuleDict(
            {
                "attention": ResamplerAttention(c),
                "output": output,
                "norm1": nn.LayerNorm(width),
                "normk": nn.LayerNorm(c["encoder_hidden_size"]),
            }
        )

    def forward(
        self, queries: Float[Tensor, "b queries width"], picture: Float[Tensor, "b tokens width"]
    ) -> Float[Tensor, "b queries width"]:
        part = self.crossattention
        output: Any = part["output"]
        queries = part["norm1"](queries)
        seen = torch.cat([queries, part["normk"](picture)], 1)
        x = queries + output["out_proj"](part["attention"](queries, seen))
        return x + output["mlp"](output["norm2"](x))


class Resampler(nn.Module):
    """From the tokens of a picture to as many tokens of the Llama as there are queries, and an end."""

    def __init__(self, c: Mapping[str, Any], width: int):
        super().__init__()
        layers = nn.ModuleList(ResamplerLayer(c) for _ in range(c["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.visual_fc = nn.Linear(c["hidden_size"], width)
        number = c["num_learnable_queries"]
        self.query_embeds = nn.Parameter(torch.zeros(1, number, c["hidden_size"]))
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, picture: Float[Tensor, "b tokens seen"]) -> Float[Tensor, "b some width"]:
        x = self.query_embeds.expand(len(picture), -1, -1)
        layers: Any = self.encoder["layers"]
        for layer in layers:
            x = layer(x, picture)
        return torch.cat([self.visual_fc(x), self.vit_eos.expand(len(picture), -1, -1)], 1)


class ByModality(nn.Module):
    """Two modules of a kind: the first for words, the second for pictures."""

    def __init__(self, words: nn.Module, pictures: nn.Module):
        super().__init__()
        self.multiway = nn.ModuleList([words, pictures])

    def forward(
        self, x: Float[Tensor, "b tokens width"], picture: Bool[Tensor, " tokens"]
    ) -> Float[Tensor, "b tokens out"]:
        words, pictures = (module(x) for module in self.multiway)
        return torch.where(picture[:, None], pictures, words)


class LanguageLayer(nn.Module):
    """A layer of Llama with norms, keys and values by modality."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width = config.hidden_size
        own = width // config.num_attention_heads * config.num_key_value_heads
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads

        def linear(outputs: int) -> nn.Linear:
            return nn.Linear(width, outputs, bias=config.attention_bias)

        def norm() -> LlamaRMSNorm:
            return LlamaRMSNorm(width, eps=config.rms_norm_eps)

        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(width),
                "k_proj": ByModality(linear(own), linear(own)),
                "v_proj": ByModality(linear(own), linear(own)),
                "o_proj": linear(width),
            }
        )
        self.mlp = LlamaMLP(config)
        self.input_layernorm = ByModality(norm(), norm())
        self.post_attention_layernorm = ByModality(norm(), norm())

    def forward(
        self,
        x: Float[Tensor, "b tokens width"],
        picture: Bool[Tensor, " tokens"],
        places: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "b tokens width"]:
        part, h = self.self_attn, self.input_layernorm(x, picture)
        q = part["q_proj"](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = part["k_proj"](h, picture).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        v = part["v_proj"](h, picture).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *places)
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + part["o_proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x, picture))


class Owl2(nn.Module):
    """The whole model, with the published names of weights: ``model`` and ``lm_head``."""

    def __init__(
        self, config: LlamaConfig, vision: Mapping[str, Any], resampler: Mapping[str, Any]
    ):
        super().__init__()
        self.config, self.side = config, int(vision["image_size"])
        width = config.hidden_size
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, width),
                "layers": nn.ModuleList(
                    LanguageLayer(config) for _ in range(config.num_hidden_layers)
                ),
                "norm": LlamaRMSNorm(width, eps=config.rms_norm_eps),
                "vision_model": VisionModel(vision),
                "visual_abstractor": Resampler(resampler, width),
            }
        )
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def forward(
        self, before: list[int], pixels: Float[Tensor, "b 3 side side"], after: list[int]
    ) -> Float[Tensor, "b words"]:
        """Logits of the word that follows the tokens ``before``, a picture, and ``after``."""
        device, number = pixels.device, len(pixels)
        seen = self.model["visual_abstractor"](self.model["vision_model"](pixels))
        texts = [
            self.model["embed_tokens"](torch.tensor(ids, device=device)).expand(number, -1, -1)
            for ids in (before, after)
        ]
        x = torch.cat([texts[0], seen, texts[1]], 1)
        picture = torch.zeros(x.shape[1], dtype=torch.bool, device=device)
        picture[len(before) : len(before) + seen.shape[1]] = True
        positions = torch.arange(x.shape[1], device=device)[None]
        places = LlamaRotaryEmbedding(self.config).to(device)(x, positions)
        layers: Any = self.model["layers"]
        for layer in layers:
            x = layer(x, picture, places)
        return self.lm_head(self.model["norm"](x[:, -1])).float()
