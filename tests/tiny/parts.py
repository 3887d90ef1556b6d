"""What the tiny families share: tokenizers, text encoders, VAEs, and the drawing of weights."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaTokenizer,
    LlamaTokenizer,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

SEED = 0
Prediction = Literal["flow", "epsilon", "v_prediction"]
Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]

_WORDS = """
    a an the of on in at to and or with without is are its it this that from by for no not
    left right above below under over behind front next between top bottom side inside
    one two three four five six red green blue yellow orange purple pink brown black white gray
    circle square triangle star cross ring cube sphere cone photo image picture painting drawing
    cat dog bird horse fox bear cow sheep apple banana cup bottle book clock bench car bus boat
    tree flower house street river mountain sky sun moon night day sea beach forest city snow rain
    man woman child robot astronaut monkey riding running dancing sitting standing flying eating
    small large big tiny old new bright dark blurry ugly bad good best quality detailed style
    text sign says hello world video scene camera light shadow high low realistic cartoon
    Describe detailing color shape size texture quantity spatial relationships objects
    background system user assistant
"""
WORDS = tuple(_WORDS.split())
"""Words that the tokenizers know whole; other text falls into pieces down to single bytes.

The last two lines are Qwen-Image's template: the pipeline cuts off a fixed count of its tokens.
"""


GRADIENT = Image.linear_gradient("L").convert("RGB").resize((16, 16))
"""The condition image of editing and image-to-video families."""


@dataclass(frozen=True)
class Family:
    """One kind of pipeline: how to make it, and the smallest call that it takes.

    ``num_steps`` is how many denoising steps tests take.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    call: dict[str, Any]
    video: bool = False
    prediction: Prediction = "flow"
    num_steps: int = 4


def family(
    name: str,
    make: Callable[[], DiffusionPipeline],
    call: dict[str, Any],
    *,
    outputs: tuple[str, ...] = ("transformer.proj_out", "vae.decoder.conv_out"),
    video: bool = False,
    prediction: Prediction = "flow",
    num_steps: int = 4,
) -> Family:
    """A family whose weights are seeded, nowhere zero, and of outputs O(1).

    ``outputs`` names the layers that are scaled: the last of each denoiser and of the decoder.
    """

    def build() -> DiffusionPipeline:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(SEED)
            pipe = make()
            modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
            for module in modules:
                module.eval()
                fill_zeros(module)
            pipe.set_progress_bar_config(disable=True)
            with scaled_after_call(pipe, outputs):
                pipe(prompt="a red cube", num_inference_steps=2, output_type="pt", **call)
        return pipe

    return Family(name, build, call, video, prediction, num_steps)


@torch.no_grad()
def fill_zeros(module: nn.Module, std: float = 0.05) -> None:
    """Draw every all-zero parameter anew: zero layers would cut the input and the gradients off."""
    for parameter in module.parameters():
        if not parameter.any():
            parameter.normal_(std=std)


@contextmanager
def scaled_after_call(pipe: DiffusionPipeline, outputs: Iterable[str]) -> Iterator[None]:
    """Scale each named layer after a call so that its answers have a root mean square near 1.

    The factor is a power of two, so that weights do not depend on the machine's rounding.
    A decoder is brought to 1/2 instead, or most of its pixels would be clipped.
    """
    squares: dict[str, list[Tensor]] = {name: [] for name in outputs}

    def recorder(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _layer, _inputs, output: squares[name].append(output.square().mean())

    layers = {name: pipe.components[name.partition(".")[0]] for name in outputs}
    layers = {name: part.get_submodule(name.partition(".")[2]) for name, part in layers.items()}
    handles = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        target = 0.5 if name.startswith("vae") else 1.0
        ratio = target / torch.stack(squares[name]).mean().sqrt()
        for parameter in layer.parameters():
            parameter.detach().mul_(2.0 ** ratio.log2().round())


@functools.cache
def bpe(kind: Literal["clip", "bytes", "metaspace"]) -> Vocabulary:
    """Byte-pair vocabulary and merges learnt from ``WORDS``, without special tokens.

    The trainer of ``tokenizers`` breaks ties by a random hash; here every run learns the same.
    """
    if kind == "clip":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        alphabet += [c + "</w>" for c in alphabet]
        words = [[*w[:-1], w[-1] + "</w>"] for w in WORDS]
    else:
        space = "Ġ" if kind == "bytes" else "▁"
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if kind == "metaspace":
            alphabet = ["▁", *(chr(i) for i in range(33, 127))]
        words = [list(start + w) for w in WORDS for start in ("", space)]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in words for pair in pairwise(word)):
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((a, b))
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [a, b]:
                    word[i : i + 2] = [a + b]
    tokens = dict.fromkeys([*alphabet, *(a + b for a, b in merges)])
    return {t: i for i, t in enumerate(tokens)}, merges


def with_specials(kind: Literal["bytes", "metaspace"], *specials: str) -> dict[str, Any]:
    """``vocab`` and ``merges`` with special tokens at the first ids."""
    vocab, merges = bpe(kind)
    if kind == "metaspace":
        specials += tuple(f"<0x{i:02X}>" for i in range(256))
    return {
        "vocab": {t: i for i, t in enumerate((*specials, *vocab))},
        "merges": merges,
    }


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer; as in the real one, "!" is 0 and start and end are the two last ids."""
    vocab, merges = bpe("clip")
    vocab = {t: i for i, t in enumerate((*vocab, "<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)


def clip_text(
    tokenizer: CLIPTokenizer, width: int, *, projection: int | None = None, act: str = "quick_gelu"
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """CLIP's text model for ``tokenizer``; with ``projection`` the class that has one."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or width,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    louder(model.text_model.final_layer_norm if projection else model.final_layer_norm)
    return model


def clip_vision(width: int) -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    """CLIP's vision model, whose last layer but one Wan reads, and its preprocessing."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        hidden_act="gelu",
    )
    side = {"height": 32, "width": 32}
    return CLIPVisionModel(config), CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side)


def t5_tokenizer() -> T5Tokenizer:
    """T5's unigram tokenizer: the words at one price, single characters at a higher one."""
    characters = ["▁", *(chr(i) for i in range(33, 127))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(f"▁{w}", -5.0) for w in WORDS]
    vocab += [(c, -9.0) for c in characters if c not in dict(vocab)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def t5_text(
    tokenizer: T5Tokenizer, width: int = 32, *, umt5: bool = False
) -> T5EncoderModel | UMT5EncoderModel:
    """T5's encoder, or the multilingual one that Wan ships with."""
    sizes = {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = UMT5EncoderModel(UMT5Config(**sizes)) if umt5 else T5EncoderModel(T5Config(**sizes))
    louder(model.encoder.final_layer_norm)
    return model


@torch.no_grad()
def louder(layer: nn.Module, gain: float = 4.0) -> None:
    """Enlarge what comes from the text: random attention averages most of the prompt away."""
    layer.get_parameter("weight").mul_(gain)


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's tokenizer, which starts every text with ``<bos>`` and pads on the left."""
    parts = with_specials("metaspace", "<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    return GemmaTokenizer(**parts, add_bos_token=True, model_max_length=512)


def llama_tokenizer() -> LlamaTokenizer:
    """Llama's tokenizer, padding on the right."""
    parts = with_specials("metaspace", "<unk>", "<s>", "</s>", "<pad>")
    return LlamaTokenizer(
        **parts, pad_token="<pad>", padding_side="right", add_bos_token=True, model_max_length=512
    )


VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Qwen's tokens around and in place of an image."""


def qwen_tokenizer(*more: str) -> Qwen2Tokenizer:
    """Qwen's tokenizer with a chat template as short as its real one's effect here.

    ``more`` are special tokens beyond those of texts.
    """
    parts = with_specials("bytes", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *more)
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return Qwen2Tokenizer(
        **parts,
        chat_template=template,
        extra_special_tokens=["<|im_start|>", "<|im_end|>", *more],
        model_max_length=1024,
    )


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the plain fast class, padding on the left, as GLM-4's does."""
    parts = with_specials("bytes", "<|endoftext|>", "[gMASK]", "<sop>")
    backend = Tokenizer(models.BPE(**parts))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    prefix = ("[gMASK]", "<sop>")
    backend.post_processor = processors.TemplateProcessing(
        single=[*prefix, "$A"], special_tokens=[(t, parts["vocab"][t]) for t in prefix]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        extra_special_tokens=list(prefix),
        padding_side="left",
        model_max_length=512,
    )


def pixtral_processor() -> PixtralProcessor:
    """The processor that FLUX.2 reads prompts with: Mistral's chat format, padding on the left."""
    pictures = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    frame = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")
    parts = with_specials("bytes", "<unk>", "<s>", "</s>", "<pad>", *pictures, *frame)
    backend = Tokenizer(models.BPE(**parts))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=[*pictures, *frame],
        padding_side="left",
        model_max_length=512,
    )
    template = (
        "<s>{% for m in messages %}{% set t = m['content'][-1]['text'] %}"
        "{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ t }}[/SYSTEM_PROMPT]"
        "{% else %}[INST]{{ t }}[/INST]{% endif %}{% endfor %}"
    )
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(patch_size={"height": 8, "width": 8}),
        tokenizer=tokenizer,
        patch_size=8,
        chat_template=template,
    )


def lm_sizes(
    tokenizer: PreTrainedTokenizerBase, width: int = 16, layers: int = 2
) -> dict[str, Any]:
    """The configuration that the decoder-only text encoders have in common.

    The default initialisation suits large widths; at this one, texts would hardly differ.
    """
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.25,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def kl_vae(
    channels: int = 4, *, levels: int = 2, quant: bool = True, **config: Any
) -> AutoencoderKL:
    """The image VAE, two-fold in space instead of eight-fold (which is four ``levels``)."""
    return AutoencoderKL(
        block_out_channels=(*(8,) * (levels - 1), 16),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **config,
    )
