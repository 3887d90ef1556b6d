"""A tiny family whose loop steps sound and video."""

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from .parts import family, gemma_tokenizer, lm_sizes


def ltx2() -> LTX2Pipeline:
    tokenizer = gemma_tokenizer()
    text = lm_sizes(tokenizer) | {"hidden_size": 32}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    audio = {"output_channels": 2, "mel_bins": 8, "sample_rate": 16000}
    return LTX2Pipeline(
        transformer=LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=2,
            caption_channels=32,
            rope_double_precision=False,
            rope_type="split",
        ),
        connectors=LTX2TextConnectors(
            caption_channels=32,
            text_proj_in_factor=text["num_hidden_layers"] + 1,
            **{f"{k}_connector_num_attention_heads": 4 for k in ("video", "audio")},
            **{f"{k}_connector_attention_head_dim": 8 for k in ("video", "audio")},
            **{f"{k}_connector_num_layers": 1 for k in ("video", "audio")},
            **{f"{k}_connector_num_learnable_registers": None for k in ("video", "audio")},
            connector_rope_base_seq_len=32,
            rope_theta=10000.0,
            rope_double_precision=False,
            causal_temporal_positioning=False,
            rope_type="split",
        ),
        vae=AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            timestep_conditioning=False,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        audio_vae=AutoencoderKLLTX2Audio(
            **audio,
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            in_channels=2,
            resolution=32,
            latent_channels=2,
            mid_block_add_attention=False,
            mel_hop_length=160,
        ),
        vocoder=LTX2Vocoder(
            in_channels=audio["output_channels"] * audio["mel_bins"],
            hidden_channels=32,
            out_channels=2,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=audio["sample_rate"],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=Gemma3ForConditionalGeneration(config),
        tokenizer=tokenizer,
        processor=None,
        prompt_enhancer=None,
        duration_head=None,
    )


CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "frame_rate": 25.0,
    "max_sequence_length": 16,
    "guidance_scale": 3.0,
    # Guidance that leaves blocks out asks for block 28 of the published model.
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "spatio_temporal_guidance_blocks": None,
}
SOUND = (family("ltx2", ltx2, CALL, video=True),)
