"""Tiny image families, each with the scheduler configuration that its checkpoint ships with."""

from typing import Any

import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from .parts import (
    GRADIENT,
    SEED,
    clip_text,
    clip_tokenizer,
    family,
    fill_zeros,
    kl_vae,
    t5_text,
    t5_tokenizer,
)

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "trained_betas": None,
    "clip_sample": False,
}
FLUX_SHIFT = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
FLUX_SIZES = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
}


def unet(**config: Any) -> UNet2DConditionModel:
    """The two-level UNet that the three Stable Diffusion families share."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **config,
    )


def sd15() -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=kl_vae(scaling_factor=0.18215),
        text_encoder=clip_text(tokenizer, 32),
        tokenizer=tokenizer,
        unet=unet(cross_attention_dim=32, attention_head_dim=2),
        scheduler=PNDMScheduler.from_config(STABLE_DIFFUSION),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15_controlnet() -> StableDiffusionControlNetPipeline:
    """Stable Diffusion 1.5 with a ControlNet for images of twice the latents' size."""
    pipeline = sd15()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        helper = ControlNetModel.from_unet(
            pipeline.unet, conditioning_embedding_out_channels=(4, 8)
        )
        # A fresh one adds nothing.
        for layer in (*helper.controlnet_down_blocks, helper.controlnet_mid_block):
            fill_zeros(layer, 0.2)
    return StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=helper, requires_safety_checker=False
    )


def sd2_v() -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer(pad="!")
    return StableDiffusionPipeline(
        vae=kl_vae(scaling_factor=0.18215),
        text_encoder=clip_text(tokenizer, 32, act="gelu"),
        tokenizer=tokenizer,
        unet=unet(cross_attention_dim=32, attention_head_dim=(2, 4), use_linear_projection=True),
        scheduler=DDIMScheduler.from_config(STABLE_DIFFUSION | {"prediction_type": "v_prediction"}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad="!")
    euler = STABLE_DIFFUSION | {
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    }
    return StableDiffusionXLPipeline(
        vae=kl_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_text(tokenizer, 32),
        text_encoder_2=clip_text(tokenizer_2, 32, projection=32, act="gelu"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet(
            cross_attention_dim=64,
            attention_head_dim=(2, 2),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        scheduler=EulerDiscreteScheduler.from_config(euler),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=40,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=kl_vae(16, quant=False, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip_text(tokenizer, 16, projection=16),
        tokenizer=tokenizer,
        text_encoder_2=clip_text(tokenizer_2, 16, projection=16, act="gelu"),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5_text(tokenizer_3, 40),
        tokenizer_3=tokenizer_3,
    )


def flux_parts() -> dict[str, Any]:
    """Components of FLUX.1-dev, which Kontext has too."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return {
        "transformer": FluxTransformer2DModel(
            **FLUX_SIZES, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6)
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(**FLUX_SHIFT),
        "vae": kl_vae(4, quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        "text_encoder": clip_text(tokenizer, 32),
        "tokenizer": tokenizer,
        "text_encoder_2": t5_text(tokenizer_2, 32),
        "tokenizer_2": tokenizer_2,
    }


def flux() -> FluxPipeline:
    return FluxPipeline(**flux_parts())


def flux_kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(**flux_parts())


def chroma() -> ChromaPipeline:
    tokenizer = t5_tokenizer()
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            **FLUX_SIZES,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_beta_sigmas=True),
        vae=kl_vae(4, quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=t5_text(tokenizer, 32),
        tokenizer=tokenizer,
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    tokenizer = t5_tokenizer()
    return PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            cross_attention_dim=32,
            caption_channels=32,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
        vae=kl_vae(scaling_factor=0.13025),
        text_encoder=t5_text(tokenizer, 32),
        tokenizer=tokenizer,
    )


UNET = ("unet.conv_out", "vae.decoder.conv_out")
SIZE = {"height": 16, "width": 16}
LARGER = {"height": 32, "width": 32}
SHORT = SIZE | {"max_sequence_length": 16}
UNBINNED = SHORT | {"use_resolution_binning": False, "guidance_scale": 4.5}
KONTEXT = {
    "image": GRADIENT,
    "max_area": 256,
    "_auto_resize": False,
}
IMAGE = (
    family("sd15", sd15, SIZE | {"guidance_scale": 7.5}, outputs=UNET, prediction="epsilon"),
    family("sdxl", sdxl, SIZE | {"guidance_scale": 5.0}, outputs=UNET, prediction="epsilon"),
    family("sd3", sd3, SHORT | {"guidance_scale": 4.5}),
    family("flux", flux, SHORT | {"guidance_scale": 3.5}),
    family("sd2_v", sd2_v, SIZE | {"guidance_scale": 7.5}, outputs=UNET, prediction="v_prediction"),
    family("pixart_sigma", pixart_sigma, UNBINNED | {"clean_caption": False}, prediction="epsilon"),
    family("chroma", chroma, SHORT | {"guidance_scale": 5.0}),
    family("flux_kontext", flux_kontext, SHORT | KONTEXT | {"guidance_scale": 2.5}),
)
