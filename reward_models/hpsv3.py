"""HPSv3: a Qwen2-VL trained on human preferences (arXiv:2508.03789)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import (
    Precision,
    find_file,
    pick_device,
    pick_dtype,
    read_state,
)
from reward_models.shared.pictures import check_media, finite_only, pictures
from reward_models.shared.qwen2_vl import (
    QwenReader,
    chunks,
    head_part,
    modern_names,
    preference_head,
    seen_size,
)
from reward_models.shared.templates import template

__all__ = ["HPSv3"]
WEIGHTS = ("model", "base")

FILES = ("HPSv3.safetensors",)
PIXELS = 256 * 28 * 28


class HPSv3:
    """The mean of the predicted preference; its standard deviation is not used. Usually -2 to 12.

    The default is ``MizzenAI/HPSv3`` (MIT), 17 GB in bfloat16: Qwen2-VL-7B with the authors'
    question, and ``linear(relu(linear(relu(linear(h)))))`` in fp32 on the last hidden state of the
    token ``<|Reward|>``. Images are resized to about 448x448 (200,704 pixels, whole tokens of
    28x28, aspect ratio kept) by Pillow's bicubic filter. Published means: SDXL 8.2, FLUX.1-dev
    10.4.

    Configuration and processor come from ``Qwen/Qwen2-VL-7B-Instruct``, whose weights are not
    loaded. Template, preprocessing and the count of positions follow the released code; it was not
    tested with the published weights, which were not available.

    Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "MizzenAI/HPSv3",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        batch_size: int = 8,
        dtype: Precision = "bfloat16",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id, folder or file of the checkpoint.
            base: Hub id or folder of the configuration and the processor.
            batch_size: Images in one forward pass.
            dtype: Precision of all but the head.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        precision, device = pick_dtype(dtype), pick_device(device)
        weights = modern_names(read_state(find_file(model, FILES)))
        head = preference_head(head_part(weights, "rm_head."), model, "HPSv3 model")
        self.head = head.to(device).requires_grad_(False)
        self.reader = QwenReader(
            base, weights, ["<|Reward|>"], precision, device, model, "HPSv3 model"
        )
        self.template, self.batch_size = template("hpsv3"), batch_size

    @torch.no_grad()
    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a prompt contains special tokens.
        """
        check_media(media, prompts)
        height, width = seen_size((media.shape[-2], media.shape[-1]), PIXELS, PIXELS)
        scores = []
        for part in chunks(len(prompts), self.batch_size):
            images = [pil_to_tensor(i.resize((width, height))) for i in pictures(media[part])]
            questions = [self.template.replace("{prompt}", p.text) for p in prompts[part]]
            hidden = self.reader.read("image", images, questions, prompts[part])
            scores.append(self.head(hidden[:, 0].float())[:, 0])
        return finite_only(torch.cat(scores), media)
