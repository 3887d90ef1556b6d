"""Tiny image families that read their prompt with a language model."""

from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PRXPipeline,
    PRXPixelPipeline,
    PRXTransformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5GemmaConfig,
    T5GemmaModuleConfig,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from .image import FLUX_SHIFT, FLUX_SIZES, LARGER, SHORT, SIZE, UNBINNED
from .parts import (
    GRADIENT,
    VISION,
    family,
    gemma_tokenizer,
    glm_tokenizer,
    kl_vae,
    lm_sizes,
    louder,
    pixtral_processor,
    qwen_tokenizer,
)


def flux2_parts(guidance_embeds: bool) -> dict[str, Any]:
    """What FLUX.2 and its small siblings share."""
    transformer = Flux2Transformer2DModel(
        **FLUX_SIZES,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    louder(transformer.transformer_blocks[0].attn.add_v_proj, 8.0)
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(**FLUX_SHIFT),
        "vae": AutoencoderKLFlux2(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        ),
    }


def flux2() -> Flux2Pipeline:
    """FLUX.2-dev, which reads prompts with a Mistral 3 that could see images too."""
    processor = pixtral_processor()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **lm_sizes(processor.tokenizer)},
        vision_config={
            "model_type": "pixtral",
            **vision,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        image_token_index=processor.tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return Flux2Pipeline(
        **flux2_parts(guidance_embeds=True),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=processor,
    )


def flux2_klein() -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        **flux2_parts(guidance_embeds=False),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**lm_sizes(tokenizer))),
        tokenizer=tokenizer,
    )


def sana() -> SanaPipeline:
    tokenizer = gemma_tokenizer()
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(Gemma2Config(**lm_sizes(tokenizer), query_pre_attn_scalar=8)),
        tokenizer=tokenizer,
    )


def lumina2() -> Lumina2Pipeline:
    """Its pipeline takes the VAE to be eight-fold whatever the VAE says."""
    tokenizer = gemma_tokenizer()
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=16,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 4, 4),
            axes_lens=(300, 32, 32),
            cap_feat_dim=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=kl_vae(16, levels=4, quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Gemma2Model(Gemma2Config(**lm_sizes(tokenizer), query_pre_attn_scalar=8)),
        tokenizer=tokenizer,
    )


def cogview4() -> CogView4Pipeline:
    tokenizer = glm_tokenizer()
    transformer = CogView4Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=32,
        condition_dim=8,
    )
    louder(transformer.transformer_blocks[0].attn1.to_v, 8.0)
    return CogView4Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
        vae=kl_vae(16, quant=False, scaling_factor=1.0),
        text_encoder=GlmModel(GlmConfig(**lm_sizes(tokenizer))),
        tokenizer=tokenizer,
    )


def qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """The vision-language model that reads Qwen-Image's prompts and, for editing, images."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    vocabulary = tokenizer.get_vocab()
    ids = {n: vocabulary[t] for n, t in zip(names, VISION, strict=True) if t in vocabulary}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=lm_sizes(tokenizer) | {"rope_parameters": rope},
            vision_config=vision | {"out_hidden_size": 16, "fullatt_block_indexes": [0]},
            **ids,
        )
    )


def qwen_image_parts() -> dict[str, Any]:
    """The transformer and the scheduler of Qwen-Image and Qwen-Image-Edit."""
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    louder(transformer.transformer_blocks[0].attn.add_v_proj, 8.0)
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )
    return {"transformer": transformer, "scheduler": scheduler}


def qwen_image() -> QwenImagePipeline:
    tokenizer = qwen_tokenizer()
    return QwenImagePipeline(
        **qwen_image_parts(),
        vae=AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
    )


def qwen_image_edit() -> QwenImageEditPipeline:
    """Its pipeline scales every image to a megapixel, so the VAE is 64-fold in place of 8-fold."""
    tokenizer = qwen_tokenizer(*VISION)
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    parts = qwen_image_parts()
    louder(parts["transformer"].transformer_blocks[0].attn.add_v_proj, 8.0)
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        dim_mult=[1] * 7,
        num_res_blocks=0,
        temperal_downsample=[False, False, False, False, True, True],
    )
    for level in vae.decoder.up_blocks[:-1]:
        louder(level.upsamplers[0].resample[1])
    return QwenImageEditPipeline(
        **parts,
        vae=vae,
        text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        processor=Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessor(size=pixels),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(size=pixels),
            chat_template=tokenizer.chat_template,
        ),
    )


def z_image() -> ZImagePipeline:
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for uninitialised in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(uninitialised, std=0.02)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=kl_vae(16, quant=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**lm_sizes(tokenizer))),
        tokenizer=tokenizer,
    )


def prx_parts(channels: int) -> dict[str, Any]:
    """Diffusers reads the encoder's sizes from a field that the encoder alone does not save."""
    tokenizer = gemma_tokenizer()
    tokenizer.model_max_length = 16
    sizes = T5GemmaModuleConfig(**lm_sizes(tokenizer), query_pre_attn_scalar=8)
    config = T5GemmaConfig(encoder=sizes, decoder=sizes, vocab_size=len(tokenizer)).encoder
    config.encoder = config.to_dict()
    transformer = PRXTransformer2DModel(
        patch_size=2,
        in_channels=channels,
        context_in_dim=16,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    louder(transformer.txt_in, 8.0)
    return {
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": T5GemmaEncoder(config),
        "tokenizer": tokenizer,
    }


def prx() -> PRXPipeline:
    return PRXPipeline(
        **prx_parts(16),
        vae=kl_vae(16, quant=False, scaling_factor=0.3611, shift_factor=0.1159),
    )


def prx_pixel() -> PRXPixelPipeline:
    """Its states are images, and its noise has twice the usual size."""
    return PRXPixelPipeline(**prx_parts(3), default_sample_size=512, prompt_max_tokens=16)


IMAGE_LM = (
    family("sana", sana, UNBINNED | LARGER | {"complex_human_instruction": None}),
    family(
        "lumina2",
        lumina2,
        LARGER | {"max_sequence_length": 24, "system_prompt": "", "guidance_scale": 4.0},
        outputs=("transformer.norm_out.linear_2", "vae.decoder.conv_out"),
    ),
    family("cogview4", cogview4, SHORT | {"guidance_scale": 5.0}),
    family(
        "flux2_klein",
        flux2_klein,
        SHORT | {"guidance_scale": 4.0, "text_encoder_out_layers": (1, 2)},
    ),
    family(
        "qwen_image",
        qwen_image,
        LARGER | {"max_sequence_length": 32, "true_cfg_scale": 4.0},
    ),
    family(
        "qwen_image_edit",
        qwen_image_edit,
        {"image": GRADIENT, "height": 256, "width": 256, "true_cfg_scale": 4.0},
        num_steps=3,
    ),
    family(
        "flux2",
        flux2,
        # As many tokens as the pipeline's system message needs before the prompt.
        SIZE
        | {"max_sequence_length": 160, "guidance_scale": 4.0, "text_encoder_out_layers": (1, 2)},
    ),
    family(
        "z_image",
        z_image,
        SHORT | {"guidance_scale": 4.0},
        outputs=("transformer.all_final_layer.2-1.linear", "vae.decoder.conv_out"),
    ),
    family(
        "prx",
        prx,
        SIZE | {"use_resolution_binning": False, "guidance_scale": 4.0},
        outputs=("transformer.final_layer.linear", "vae.decoder.conv_out"),
    ),
    family(
        "prx_pixel",
        prx_pixel,
        SIZE | {"use_resolution_binning": False, "guidance_scale": 4.0},
        outputs=("transformer.final_layer.linear",),
    ),
)
