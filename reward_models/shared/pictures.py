"""Pictures for reward models: checks of their input, 8-bit rounding, preprocessing, reference images."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from flowgrpo.data.pictures import OVERSHOOT, as_rgb
from flowgrpo.data.prompts import Prompt

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Normalisation of OpenAI's CLIP, also used by BLIP, Qwen-VL and the preference models."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_media(media: Tensor, prompts: Sequence[Prompt], video: bool = False) -> None:
    """Check shape, type and range. NaN pixels are allowed: their image gets the score NaN.

    Raises:
        ValueError: If the shape, the type or the range is wrong.
    """
    layout, ndim = ("(B, F, 3, H, W)", 5) if video else ("(B, 3, H, W)", 4)
    if media.ndim != ndim or media.shape[-3] != 3 or not media.is_floating_point():
        raise ValueError(
            f"{'videos' if video else 'images'} must be floating-point {layout}, "
            f"got {media.dtype} {tuple(media.shape)}"
        )
    if media.shape[0] != len(prompts):
        raise ValueError(f"{media.shape[0]} media for {len(prompts)} prompts")
    if 0 in media.shape[1:]:
        raise ValueError(f"media of size zero: {tuple(media.shape)}")
    low, high = media.nan_to_num(0.5, 0.5, 0.5).aminmax()
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ValueError(f"media must be in [0, 1], got {low.item():.4g} to {high.item():.4g}")


def eight_bits(media: Float[Tensor, "*any"]) -> UInt8[Tensor, "*any"]:
    """Round to 8 bits as in a saved file, so that training and files score alike; NaN becomes black."""
    return (media.nan_to_num() * 255).round().clamp(0, 255).to(torch.uint8)


def finite_only(
    scores: Float[Tensor, " batch"], media: Float[Tensor, "batch *any"]
) -> Float[Tensor, " batch"]:
    """The scores in fp32 on the CPU, NaN where a picture has NaN or infinite pixels."""
    return scores.float().cpu().where(media.isfinite().flatten(1).all(1).cpu(), math.nan)


def pictures(media: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """The images as 8-bit PIL images, as if read from a file."""
    return [Image.fromarray(p) for p in eight_bits(media).permute(0, 2, 3, 1).cpu().numpy()]


def luma(frames: UInt8[Tensor, "*any 3 h w"]) -> Float[Tensor, "*any h w"]:
    """Brightness in [0, 1], by the weights of ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=frames.device)
    return (frames.float() / 255 * weights[:, None, None]).sum(-3)


def shrunk_and_cropped(
    images: Iterable[Image.Image],
    shortest: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    odd: Literal["round", "floor"] = "round",
) -> Float[Tensor, "batch 3 crop crop"]:
    """CLIP's preprocessing: shorter side by Pillow's bicubic filter, centre crop, normalised.

    ``odd`` sets the start of the crop for an odd margin: torchvision rounds half the margin, the
    processors of transformers round it down, which shifts some crops by a pixel.
    """
    tensors = []
    for image in images:
        resized = TF.resize(image, [shortest], TF.InterpolationMode.BICUBIC)
        margins = (resized.height - crop, resized.width - crop)
        top, left = (round(m / 2) if odd == "round" else m // 2 for m in margins)
        tensors.append(TF.to_tensor(TF.crop(resized, top, left, crop, crop)))
    return TF.normalize(torch.stack(tensors), list(mean), list(std))


def shrunk_and_cropped_with_gradient(
    media: Float[Tensor, "batch 3 h w"],
    shortest: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    odd: Literal["round", "floor"] = "round",
) -> Float[Tensor, "batch 3 crop crop"]:
    """As :func:`shrunk_and_cropped`, with the gradient of images in [0, 1].

    The filter is the same (bicubic with antialiasing), and so is the clamp of its overshoot after each
    direction, horizontally first. Pillow rounds to 8 bits there, which has no gradient and is left out:
    before the normalisation the pixels of 8-bit images differ by 0.3 of 255 levels on average, and by less
    than 3.
    """
    height, width = media.shape[-2:]
    longest = int(shortest * max(height, width) / min(height, width))
    to_height, to_width = (shortest, longest) if height <= width else (longest, shortest)
    bicubic = TF.InterpolationMode.BICUBIC
    resized = TF.resize(media, [height, to_width], bicubic, antialias=True).clamp(0, 1)
    resized = TF.resize(resized, [to_height, to_width], bicubic, antialias=True).clamp(0, 1)
    height, width = resized.shape[-2:]
    margins = (height - crop, width - crop)
    top, left = (round(m / 2) if odd == "round" else m // 2 for m in margins)
    cropped = TF.crop(resized, top, left, crop, crop)
    return TF.normalize(cropped, list(mean), list(std))


def reference_paths(prompt: Prompt, key: str, root: Path) -> list[Path]:
    """The reference images of a prompt.

    Raises:
        ValueError: If it names none.
    """
    named = prompt.metadata.get(key)
    paths = [named] if isinstance(named, str) else named
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(
            f"prompt {prompt.text!r} needs metadata {key!r}, the path of a reference image or a "
            f"list of them; it has {named!r}"
        )
    return [root / path for path in paths]


def check_references(prompts: Sequence[Prompt], key: str, root: Path) -> None:
    """
    Raises:
        ValueError: If a prompt names no reference, or one that is no file.
    """
    for prompt in prompts:
        for path in reference_paths(prompt, key, root):
            if not path.is_file():
                raise ValueError(f"reference {str(path)!r} of prompt {prompt.text!r} is no file")


def read_image(path: Path) -> Image.Image:
    """An image file as RGB, turned upright, transparency on white.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it has more than 8 bits per value.
    """
    with Image.open(path) as image:
        return as_rgb(image)


def source_picture(prompt: Prompt, key: str) -> Float[Tensor, "3 height width"]:
    """The picture before the edit: the prompt's condition image, or a file named in its metadata.

    Raises:
        ValueError: If there is neither.
        OSError: If the file cannot be read.
    """
    if prompt.images:
        picture = prompt.open_images()[0]
    else:
        path = prompt.metadata.get(key)
        if not isinstance(path, str):
            raise ValueError(
                f"prompt {prompt.text!r} has no condition image, and its metadata {key!r} names no "
                f"picture before the edit: {path!r}"
            )
        picture = read_image(Path(path))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(torch.float32) / 255
