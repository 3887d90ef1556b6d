"""Tiny video families, each with the scheduler configuration that its checkpoint ships with."""

from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import LlamaConfig, LlamaModel

from .parts import (
    GRADIENT,
    clip_text,
    clip_tokenizer,
    clip_vision,
    family,
    llama_tokenizer,
    lm_sizes,
    t5_text,
    t5_tokenizer,
)

WAN_SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def wan_vae() -> AutoencoderKLWan:
    """The VAE of Wan, which SkyReels uses too."""
    return AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def flow_unipc(shift: float) -> UniPCMultistepScheduler:
    """The multistep scheduler over flow sigmas that Wan and SkyReels ship with."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def wan_t2v() -> WanPipeline:
    tokenizer = t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer, 32, umt5=True),
        transformer=WanTransformer3DModel(**WAN_SIZES),
        vae=wan_vae(),
        scheduler=flow_unipc(3.0),
    )


def wan22() -> WanPipeline:
    """Two experts: the first for the noisy part of the way, the second below the boundary."""
    tokenizer = t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer, 32, umt5=True),
        transformer=WanTransformer3DModel(**WAN_SIZES),
        transformer_2=WanTransformer3DModel(**WAN_SIZES),
        vae=wan_vae(),
        scheduler=flow_unipc(3.0),
        boundary_ratio=0.875,
    )


def wan_i2v() -> WanImageToVideoPipeline:
    """Wan 2.1: the image's latents concatenated with the noisy ones, and CLIP's view of it in the attention."""
    tokenizer = t5_tokenizer()
    image_encoder, image_processor = clip_vision(16)
    latents_mask_image = 16 + 4 + 16
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer, 32, umt5=True),
        transformer=WanTransformer3DModel(
            **WAN_SIZES | {"in_channels": latents_mask_image},
            image_dim=16,
            added_kv_proj_dim=24,
        ),
        vae=wan_vae(),
        scheduler=flow_unipc(3.0),
        image_encoder=image_encoder,
        image_processor=image_processor,
    )


def skyreels_v2() -> SkyReelsV2Pipeline:
    tokenizer = t5_tokenizer()
    return SkyReelsV2Pipeline(
        tokenizer=tokenizer,
        text_encoder=t5_text(tokenizer, 32, umt5=True),
        transformer=SkyReelsV2Transformer3DModel(**WAN_SIZES),
        vae=wan_vae(),
        scheduler=flow_unipc(8.0),
    )


def hunyuan_video() -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline(**hunyuan_parts(in_channels=16))


def skyreels_i2v() -> HunyuanSkyreelsImageToVideoPipeline:
    """Its transformer takes the condition's latents beside those of the video."""
    return HunyuanSkyreelsImageToVideoPipeline(**hunyuan_parts(in_channels=32))


def hunyuan_parts(in_channels: int) -> dict[str, Any]:
    tokenizer, tokenizer_2 = llama_tokenizer(), clip_tokenizer()
    return {
        "text_encoder": LlamaModel(LlamaConfig(**lm_sizes(tokenizer, layers=3))),
        "tokenizer": tokenizer,
        "transformer": HunyuanVideoTransformer3DModel(
            in_channels=in_channels,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        "vae": AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": clip_text(tokenizer_2, 16),
        "tokenizer_2": tokenizer_2,
    }


def ltx() -> LTXPipeline:
    tokenizer = t5_tokenizer()
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        ),
        text_encoder=t5_text(tokenizer, 32),
        tokenizer=tokenizer,
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
    )


def cogvideox_parts(**transformer: Any) -> dict[str, Any]:
    """CogVideoX; its position table fixes the size, the frames and the text's length."""
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5_text(tokenizer, 32),
        "vae": AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            sample_height=32,
            sample_width=32,
        ),
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=32,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=16,
            **transformer,
        ),
        "scheduler": CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    }


def cogvideox() -> CogVideoXPipeline:
    """CogVideoX-2b."""
    return CogVideoXPipeline(**cogvideox_parts(in_channels=4))


def cogvideox_i2v() -> CogVideoXImageToVideoPipeline:
    """CogVideoX-5b-I2V: rotary and learned positions, the image's latents with the noisy ones."""
    return CogVideoXImageToVideoPipeline(
        **cogvideox_parts(
            in_channels=8,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        )
    )


def mochi() -> MochiPipeline:
    """Its scheduler runs over inverted sigmas, from 0 to 1."""
    tokenizer = t5_tokenizer()
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 0, 0, 0, 1),
        ),
        text_encoder=t5_text(tokenizer, 32),
        tokenizer=tokenizer,
        transformer=MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            pooled_projection_dim=16,
            text_embed_dim=32,
            time_embed_dim=16,
            max_sequence_length=16,
        ),
    )


CLIP = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
LARGER = CLIP | {"height": 32, "width": 32}
IMAGE = {"image": GRADIENT}
CONV = ("transformer.proj_out", "vae.decoder.conv_out.conv")
VIDEO = (
    family("wan_t2v", wan_t2v, CLIP | {"guidance_scale": 5.0}, video=True),
    family(
        "hunyuan_video",
        hunyuan_video,
        CLIP | {"guidance_scale": 6.0, "prompt_template": {"template": "{}", "crop_start": 0}},
        outputs=CONV,
        video=True,
    ),
    family(
        "skyreels_i2v",
        skyreels_i2v,
        CLIP
        | IMAGE
        | {
            "guidance_scale": 1.0,
            "true_cfg_scale": 5.0,
            "negative_prompt": "",
            "prompt_template": {"template": "{}", "crop_start": 0},
        },
        outputs=CONV,
        video=True,
    ),
    family("ltx", ltx, LARGER | {"guidance_scale": 3.0}, outputs=CONV, video=True),
    family(
        "cogvideox",
        cogvideox,
        LARGER | {"num_frames": 9, "guidance_scale": 6.0},
        outputs=CONV,
        video=True,
        prediction="v_prediction",
    ),
    family(
        "cogvideox_i2v",
        cogvideox_i2v,
        LARGER | IMAGE | {"num_frames": 9, "guidance_scale": 6.0},
        outputs=CONV,
        video=True,
        prediction="v_prediction",
    ),
    family("wan_i2v", wan_i2v, CLIP | IMAGE | {"guidance_scale": 5.0}, video=True),
    family(
        "mochi",
        mochi,
        LARGER | {"num_frames": 7, "guidance_scale": 4.5},
        outputs=("transformer.proj_out", "vae.decoder.proj_out"),
        video=True,
    ),
    family("skyreels_v2", skyreels_v2, CLIP | {"guidance_scale": 6.0}, video=True),
    family(
        "wan22",
        wan22,
        CLIP | {"guidance_scale": 4.0, "guidance_scale_2": 3.0},
        outputs=("transformer.proj_out", "transformer_2.proj_out", "vae.decoder.conv_out"),
        video=True,
    ),
)
