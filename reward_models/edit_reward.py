"""EditReward: a Qwen2.5-VL trained on preferences between edits (arXiv:2509.26346)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import (
    Precision,
    find_file,
    pick_device,
    pick_dtype,
    read_state,
)
from reward_models.shared.pictures import check_media, finite_only, pictures, source_picture
from reward_models.shared.qwen2_vl import (
    QwenReader,
    chunks,
    head_part,
    modern_names,
    preference_head,
    seen_size,
)
from reward_models.shared.templates import template

__all__ = ["EditReward"]
WEIGHTS = ("model", "base")

FILES = ("model.safetensors", "model.pth")
PIXELS = 256 * 28 * 28
DIMENSIONS = ("following", "quality")
"""Questions, in the order of the heads ``head_0`` and ``head_1``."""


class EditReward:
    """The mean of an edit's predicted instruction following and visual quality.

    Each is the mean of a predicted distribution on the authors' scale; its deviation is not used.
    The model sees the picture before the edit and the one after it, each resized to about 448x448
    (200,704 pixels, whole tokens of 28x28, aspect ratio kept) by Pillow's bicubic filter, and is
    asked once about each, with ``linear(relu(linear(relu(linear(h)))))`` in fp32 on the last hidden
    state of the token ``<|Reward|>``. The picture before the edit is the prompt's condition image.

    ``model`` is a checkpoint of TIGER-Lab (code MIT; about 17 GB in bfloat16) based on
    Qwen2.5-VL-7B-Instruct, or on MiMo-VL-7B-SFT-2508 with
    ``base = "XiaomiMiMo/MiMo-VL-7B-SFT-2508"``. Those based on Qwen3-VL are not supported.
    Configuration and processor come from ``base``, whose weights are not loaded. Questions,
    preprocessing and the count of positions follow the released code; it was not tested with the
    published weights, which were not available.

    Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    def __init__(
        self,
        model: str,
        base: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        source_key: str = "image",
        batch_size: int = 4,
        dtype: Precision = "bfloat16",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id, folder or file of the checkpoint.
            base: Hub id or folder of the configuration and the processor.
            source_key: Metadata key of the file with the picture before the edit, for prompts
                without a condition image.
            batch_size: Edits in one forward pass.
            dtype: Precision of all but the heads.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        precision, device = pick_dtype(dtype), pick_device(device)
        what = "EditReward model"
        weights = modern_names(read_state(find_file(model, FILES)))
        self.heads = nn.ModuleList(
            preference_head(head_part(weights, f"rm_heads.head_{n}."), model, what)
            for n in range(len(DIMENSIONS))
        )
        self.heads.to(device).requires_grad_(False)
        self.reader = QwenReader(
            base, weights, ["<|Reward|>"], precision, device, model, what, family="2.5"
        )
        self.templates = [template(f"edit_reward_{name}") for name in DIMENSIONS]
        self.source_key, self.batch_size = source_key, batch_size

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If one has no picture before the edit.
            OSError: If the picture cannot be read.
        """
        for prompt in prompts:
            source_picture(prompt, self.source_key)

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a prompt has no picture before the edit, or contains special tokens.
        """
        return finite_only(self.dimensions(media, prompts).mean(1), media)

    def named_scores(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> dict[str, Float[Tensor, " batch"]]:
        """``instruction`` and ``quality``, for the key ``score`` of a reward."""
        columns = self.dimensions(media, prompts).unbind(1)
        return dict(zip(("instruction", "quality"), columns, strict=True))

    @torch.no_grad()
    def dimensions(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "batch 2"]:
        """Instruction following and visual quality of each edit."""
        check_media(media, prompts)
        rows = []
        for part in chunks(len(prompts), self.batch_size):
            shown = [
                _seen(picture)
                for prompt, result in zip(prompts[part], media[part], strict=True)
                for picture in (source_picture(prompt, self.source_key), result)
            ]
            columns = []
            for head, text in zip(self.heads, self.templates, strict=True):
                questions = [text.replace("{text_prompt}", p.text) for p in prompts[part]]
                hidden = self.reader.read("image", shown, questions, prompts[part])
                columns.append(head(hidden[:, 0].float())[:, 0])
            rows.append(torch.stack(columns, 1))
        return torch.cat(rows).cpu()


def _seen(picture: Float[Tensor, "3 h w"]) -> UInt8[Tensor, "3 height width"]:
    """What the model sees of a picture."""
    height, width = seen_size((picture.shape[-2], picture.shape[-1]), PIXELS, PIXELS)
    return pil_to_tensor(pictures(picture[None])[0].resize((width, height)))
