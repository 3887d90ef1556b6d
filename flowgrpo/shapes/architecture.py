"""The architecture of the embedded model: standard classes of diffusers and transformers at small size.

The pipeline is a ``CogView4Pipeline``: a rectified-flow transformer over one sequence of caption tokens
and latent patches. It pads captions to a multiple of 16 tokens, while other flow pipelines pad to 256 or
512, so its call is fast.
"""

import torch
from diffusers import (
    AutoencoderKL,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import GlmConfig, GlmModel, PreTrainedTokenizerFast

from flowgrpo.shapes.captions import vocabulary
from flowgrpo.shapes.world import IMAGE_SIZE, WORLD, World

LATENT_SIZE = IMAGE_SIZE // 8
CAPTION_TOKENS = 16
"""Tokens of an encoded caption; ``CogView4Pipeline`` pads on the left to a multiple of this."""


def build_tokenizer(world: World = WORLD) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of the captions; other words become ``<unk>``."""
    words = ["<pad>", "<unk>", "<bos>", *vocabulary(world)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # The empty caption of classifier-free guidance needs at least one token.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        padding_side="left",
        model_max_length=CAPTION_TOKENS,
    )


def build_autoencoder(latent_channels: int = 4) -> AutoencoderKL:
    """An autoencoder for 64x64 images with 8x8 latents, with few channels at high resolutions."""
    widths = (8, 16, 40, 64)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=IMAGE_SIZE,
    )


def build_text_encoder(vocab_size: int, width: int = 64) -> GlmModel:
    """A causal text encoder; the pipeline uses its second-to-last hidden state."""
    return GlmModel(
        GlmConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=width // 4,
            max_position_embeddings=2 * CAPTION_TOKENS,
            pad_token_id=0,
            eos_token_id=0,
            attention_dropout=0.0,
        )
    )


def build_transformer(
    latent_channels: int = 4, text_width: int = 64, layers: int = 6
) -> CogView4Transformer2DModel:
    """The denoiser, a transformer over 16 latent patches and 16 caption tokens."""
    heads, head_dim = 4, 32
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        text_embed_dim=text_width,
        time_embed_dim=64,
        condition_dim=8,
        pos_embed_max_size=LATENT_SIZE,
        sample_size=LATENT_SIZE,
        rope_axes_dim=(LATENT_SIZE, LATENT_SIZE),
    )
    # Every block starts as the identity and the output as zero, as in DiT (arXiv:2212.09748).
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    for layer in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def build_pipeline(
    latent_channels: int = 4, seed: int = 0, world: World = WORLD
) -> CogView4Pipeline:
    """The pipeline with random weights, which depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(world)
        return CogView4Pipeline(
            tokenizer=tokenizer,
            text_encoder=build_text_encoder(len(tokenizer)).eval(),
            vae=build_autoencoder(latent_channels).eval(),
            transformer=build_transformer(latent_channels).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )
