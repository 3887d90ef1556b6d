"""DeQA-Score: image quality, by the probabilities of five words (arXiv:2501.11561)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, LlamaConfig

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import (
    Precision,
    load_strictly,
    pick_device,
    pick_dtype,
    read_state,
)
from reward_models.shared.mplug_owl2 import Owl2
from reward_models.shared.pictures import check_media, finite_only, pictures

__all__ = ["DeQA"]
WEIGHTS = ("model",)

BEFORE = "USER: How would you rate the quality of this image?\n"
AFTER = "\nASSISTANT: The quality of the image is"
WORDS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
LLAMA = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling",
    "attention_bias", "hidden_act", "max_position_embeddings",
)  # fmt: skip
"""Keys of the configuration that the Llama has."""
FILES = ("*.json", "*.model", "*.safetensors", "*.bin")


class DeQA:
    """The mean of 5 for "excellent" to 1 for "bad", by the model's probabilities of these words.

    Usually 2 to 4.5; ignores the prompt. The default is ``zhiyuanyou/DeQA-Score-Mix3`` (code MIT; an
    mPLUG-Owl2 of 8 billion weights, 16 GB in float16), whose own code runs on transformers 4.36 to
    4.46 only. Here the same weights are loaded into the same layers, written with the Llama of
    current versions. Images are padded to a square in the colour of CLIP's mean and resized to 448
    by the checkpoint's CLIP processor. Flow-GRPO and DiffusionNFT report this score; Flow-GRPO's
    clients send JPEG of quality 75. It was not tested with the published weights, which were not
    available.

    Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    ignores_prompt = True

    def __init__(
        self,
        model: str = "zhiyuanyou/DeQA-Score-Mix3",
        batch_size: int = 8,
        dtype: Precision = "float16",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of the checkpoint with its configuration, tokenizer and processor.
            batch_size: Images in one forward pass.
            dtype: Precision of the model.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        precision = pick_dtype(dtype)
        folder = Path(model)
        if not folder.is_dir():
            folder = Path(snapshot_download(model, allow_patterns=list(FILES)))
        config = json.loads((folder / "config.json").read_text())
        if "visual_config" not in config:
            raise ValueError(f"{model!r} is no DeQA-Score model: its config has no visual_config")
        state = {k: v.to(precision) for k, v in _weights(folder).items()}
        with torch.device("meta"):
            self.model = Owl2(
                LlamaConfig(**{k: config[k] for k in LLAMA if k in config}),
                config["visual_config"]["visual_model"],
                config["visual_config"]["visual_abstractor"],
            )
        load_strictly(self.model, state, model, "DeQA-Score model", assign=True)
        self.model.to(pick_device(device)).eval().requires_grad_(False)
        self.processor: Any = CLIPImageProcessor.from_pretrained(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)

        def tokens(text: str) -> list[int]:
            return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

        self.before, self.after = [tokenizer.bos_token_id, *tokens(BEFORE)], tokens(AFTER)
        self.words = [tokens(word)[0] for word in WORDS]
        if len({*self.words}) < len(WORDS):
            raise ValueError(f"the tokenizer of {model!r} cannot tell {', '.join(WORDS)} apart")
        self.batch_size, self.dtype = batch_size, precision

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        check_media(media, prompts)
        device = next(self.model.parameters()).device
        values = torch.tensor(list(WORDS.values()), device=device)
        scores = []
        for start in range(0, len(media), self.batch_size):
            pixels = self.preprocess(media[start : start + self.batch_size])
            logits = self.model(self.before, pixels.to(device, self.dtype), self.after)
            scores.append(logits[:, self.words].softmax(-1) @ values)
        return finite_only(torch.cat(scores), media)

    def preprocess(self, media: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 side side"]:
        """The input of the model."""
        color = tuple(int(255 * m) for m in self.processor.image_mean)
        squares = [_square(image, color) for image in pictures(media)]
        return self.processor(squares, return_tensors="pt")["pixel_values"]


def _square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of this colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _weights(folder: Path) -> dict[str, Tensor]:
    """The weights in all files of a folder, without tables that are computed.

    Raises:
        ValueError: If there are none.
    """
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"folder {str(folder)!r} holds no *.safetensors or pytorch_model*.bin")
    found = {k: v for file in files for k, v in read_state(file).items()}
    return {k: v for k, v in found.items() if not k.endswith("rotary_emb.inv_freq")}
