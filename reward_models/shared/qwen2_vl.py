"""Qwen2-VL and Qwen2.5-VL as the backbone of a reward, which is read from the hidden states of special tokens.

Checkpoints of such rewards are state dicts of subclasses that only their authors have. Current
versions of transformers would skip their language model with no more than a warning, so the weights
are renamed and loaded strictly into the plain model.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen2VLProcessor,
)

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import load_strictly, refuse

PATCH = 28
"""Side in pixels of the area of one token."""
LONGEST_RATIO = 200
FRAMES_AT_LEAST, FRAMES_AT_MOST, FRAMES_PER_TOKEN = 4, 768, 2
FRAME_PIXELS_AT_LEAST = 128 * PATCH**2
RENAMED = (
    (r"^(base_model\.model\.)", ""),  # peft's wrapper
    (r"\.base_layer\.", "."),
    (r"^model\.(visual|language_model)\.", r"\1."),  # names of transformers >= 4.52
    (r"^model\.", "language_model."),  # older ones, which called the picture's part "visual"
)


FAMILIES: Mapping[str, tuple[Any, Any, Any]] = {
    "2": (Qwen2VLConfig, Qwen2VLModel, Qwen2VLProcessor),
    "2.5": (Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2_5_VLProcessor),
}
"""Configuration, model and processor of Qwen2-VL and Qwen2.5-VL."""
HEAD = (0, 3, 5)
"""Indices of the linear layers in the published heads; between them are ReLUs and a dropout."""


class QwenReader:
    """A Qwen2-VL or Qwen2.5-VL without the language-model head, and the processor with the reward's special tokens."""

    def __init__(
        self,
        base: str,
        weights: Mapping[str, Tensor],
        tokens: Sequence[str],
        dtype: torch.dtype,
        device: str,
        source: str,
        what: str,
        family: Literal["2", "2.5"] = "2",
    ):
        """
        Args:
            base: Hub id or folder with the configuration and the processor; its weights are unused.
            weights: Those of the model, under today's names of ``Qwen2VLModel``.
            tokens: The special tokens, in the order in which the template has them.
            dtype: Precision.
            device: Where it runs.
            source: Source of the weights, for messages.
            what: Name of the expected model, for messages.
            family: Whether it is a Qwen2-VL or a Qwen2.5-VL.

        Raises:
            ValueError: If weights are missing or left over, or tokens have none.
            RuntimeError: If weights are of another shape than the base model's.
            OSError: If there is no such base model.
        """
        refuse(source, what, {"language_model.embed_tokens.weight"} - weights.keys())
        of_config, of_model, of_processor = FAMILIES[family]
        config = of_config.from_pretrained(base)
        # The authors cut or stretched the vocabulary to that of their tokenizer.
        config.text_config.vocab_size = weights["language_model.embed_tokens.weight"].shape[0]
        loaded, info = of_model.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=dtype, output_loading_info=True
        )
        refuse(source, what, info["missing_keys"], info["unexpected_keys"])
        self.model = loaded.to(device).eval().requires_grad_(False)
        self.processor: Any = of_processor.from_pretrained(base)
        self.processor.tokenizer.padding_side = "right"
        self.processor.tokenizer.add_tokens(list(tokens), special_tokens=True)
        self.ids = torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(list(tokens)))
        if int(self.ids.max()) >= config.text_config.vocab_size:
            raise ValueError(
                f"{source!r} has {config.text_config.vocab_size} tokens, the tokenizer of {base!r} "
                f"with {', '.join(tokens)} has {len(self.processor.tokenizer)}"
            )

    @torch.no_grad()
    def read(
        self,
        kind: str,
        media: Sequence[UInt8[Tensor, "*_frames 3 _height _width"]],
        questions: Sequence[str],
        prompts: Sequence[Prompt],
    ) -> Float[Tensor, "batch tokens features"]:
        """The last hidden states at the special tokens.

        Args:
            kind: ``image`` or ``video``.
            media: Images or videos, already resized: equally many per question, in order.
            questions: Text of each question.
            prompts: Prompt of each question, for messages.

        Raises:
            ValueError: If a prompt contains special tokens.
        """
        number = len(media) // len(questions)
        texts = [
            self.processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": kind}] * number + [{"type": "text", "text": question}],
                    }
                ],
                tokenize=False,
                add_generation_prompt=True,
            )
            for question in questions
        ]
        for text, prompt in zip(texts, prompts, strict=True):
            if text.count(f"<|{kind}_pad|>") != number:
                raise ValueError(f"prompt {prompt.text!r} contains a special token of Qwen2-VL")
        as_they_are = {"do_resize": False} | (
            {"do_sample_frames": False} if kind == "video" else {}
        )
        inputs = self.processor(
            text=texts,
            padding=True,
            return_tensors="pt",
            **{f"{kind}s": list(media), f"{kind}s_kwargs": as_they_are},
        ).to(self.model.device)
        here = torch.isin(inputs["input_ids"], self.ids.to(self.model.device))
        for prompt, found in zip(prompts, here.sum(1).tolist(), strict=True):
            if found != len(self.ids):
                raise ValueError(f"prompt {prompt.text!r} contains a special token of the reward")
        pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
        inputs[pixels] = inputs[pixels].to(self.model.dtype)
        # The version of transformers that these models were trained with numbered all tokens of a
        # forward pass one by one, also those of a picture, and used rows and columns in generation
        # only. Padding is on the right, so it shifts no position.
        length = inputs["input_ids"].shape[1]
        positions = torch.arange(length, device=self.model.device).expand(3, len(texts), -1)
        hidden = self.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        return hidden[here].view(len(texts), len(self.ids), -1)


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of ``Qwen2VLModel``; the language-model head is dropped."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        if not key.startswith("lm_head."):
            renamed[key] = tensor
    return renamed


def merge_lora(
    state: Mapping[str, Tensor], alpha: float, source: str, what: str
) -> dict[str, Tensor]:
    """``W + (alpha / rank) B A`` for every weight that has a LoRA.

    Raises:
        ValueError: If a factor of a LoRA, or the weight that it belongs to, is missing.
    """
    merged = {k: v for k, v in state.items() if ".lora_" not in k}
    for key in (k for k in state if ".lora_" in k):
        name = re.sub(r"\.lora_[AB]\.default\.weight$", "", key)
        halves = [f"{name}.lora_{half}.default.weight" for half in "AB"]
        refuse(source, what, {*halves, f"{name}.weight"} - state.keys(), {key} - {*halves})
        if key == halves[0]:
            a, b = (state[half].float() for half in halves)
            weight = state[f"{name}.weight"]
            added = alpha / a.shape[0] * b @ a
            merged[f"{name}.weight"] = (weight.float() + added).to(weight.dtype)
    return merged


def seen_size(size: tuple[int, int], least: int, most: int) -> tuple[int, int]:
    """The size to which Qwen-VL's own tools resize a picture, a multiple of :data:`PATCH`.

    Args:
        size: Height and width of the picture.
        least: Pixels at least.
        most: Pixels at most.

    Raises:
        ValueError: If the picture is too narrow.
    """
    height, width = size
    if max(height, width) > LONGEST_RATIO * min(height, width):
        raise ValueError(f"Qwen-VL sees sides of 1:{LONGEST_RATIO} at most, got {height}x{width}")
    rows, columns = (max(1, round(length / PATCH)) for length in (height, width))
    if rows * columns * PATCH**2 > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(x / shrink / PATCH)) for x in (height, width))
    elif rows * columns * PATCH**2 < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(x * grow / PATCH) for x in (height, width))
    return rows * PATCH, columns * PATCH


def shown_frames(
    video: UInt8[Tensor, "frames 3 h w"], fps: float, rate: float, most: int, nearest: bool
) -> UInt8[Tensor, "shown 3 height width"]:
    """The frames that Qwen-VL's own tools select, an even number at ``rate`` per second, resized.

    Args:
        video: All frames.
        fps: Their number per second.
        rate: Frames per second to select.
        most: Pixels of a frame at most.
        nearest: Round the number to the nearest even one, as older tools do, or down.

    Raises:
        ValueError: If there are fewer than two frames.
    """
    total = video.shape[0]
    if total < FRAMES_PER_TOKEN:
        raise ValueError(f"a video needs {FRAMES_PER_TOKEN} frames at least, got {total}")
    upper = min(FRAMES_AT_MOST, total) // FRAMES_PER_TOKEN * FRAMES_PER_TOKEN
    wanted = min(max(total / fps * rate, FRAMES_AT_LEAST), upper) / FRAMES_PER_TOKEN
    number = (round(wanted) if nearest else math.floor(wanted)) * FRAMES_PER_TOKEN
    chosen = video[torch.linspace(0, total - 1, number).round().long()]
    size = seen_size((video.shape[-2], video.shape[-1]), FRAME_PIXELS_AT_LEAST, most)
    return TF.resize(chosen, list(size), TF.InterpolationMode.BICUBIC, antialias=True)


def frame_rates(prompts: Sequence[Prompt], fps: float) -> list[float]:
    """Frames per second of each video: its metadata ``fps``, else the option.

    Raises:
        ValueError: If neither says, or a rate is not positive.
    """
    rates: list[Any] = [p.metadata.get("fps", fps) for p in prompts]
    for prompt, rate in zip(prompts, rates, strict=True):
        if not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ValueError(
                f"the video of prompt {prompt.text!r} needs its frames per second, by the option "
                f"fps or the metadata 'fps'; got {rate!r}"
            )
    return [float(rate) for rate in rates]


def head_part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the weights with this prefix from ``weights`` and return them without it."""
    keys = [k for k in weights if k.startswith(prefix)]
    return {k.removeprefix(prefix): weights.pop(k) for k in keys}


def preference_head(state: dict[str, Tensor], source: str, what: str) -> nn.Sequential:
    """HPSv3's head, whose widths are read from the weights.

    Raises:
        ValueError: If weights are missing, left over or of other shapes.
    """
    refuse(source, what, {f"{n}.weight" for n in HEAD} - state.keys())
    shapes = [state[f"{n}.weight"].shape for n in HEAD]
    first, second, third = (nn.Linear(inputs, outputs) for outputs, inputs in shapes)
    layers = {"0": first, "1": nn.ReLU(), "3": second, "4": nn.ReLU(), "5": third}
    head = nn.Sequential(OrderedDict(layers))
    load_strictly(head, state, source, what)
    return head


def chunks(number: int, size: int) -> list[slice]:
    """Slices that divide ``number`` items into batches of at most ``size``."""
    return [slice(start, start + size) for start in range(0, number, size)]
