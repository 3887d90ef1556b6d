"""Pictures as they come in from files and go out to others: in one way for all of flowgrpo."""

import io

import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

OVERSHOOT = 0.1
"""How far decoders may leave [0, 1]; what is further off was never scaled to that range."""


def check_depth(image: Image.Image) -> None:
    """Raise ValueError if a value has more than 8 bits, which a conversion would cut to white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"a picture of mode {image.mode!r} has more than 8 bits: save it with 8")


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits, upright, transparency on white.

    Raises:
        ValueError: If it has more than 8 bits per value.
    """
    check_depth(image)
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:  # what lies under it was never meant to be seen
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")


def check_pixels(image: Tensor) -> None:
    """Raise ValueError for what no picture can show, before it is cut to what one can."""
    if not image.is_floating_point() or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"an image must be floating-point (3, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    if image.numel() == 0:
        raise ValueError(f"an image of size zero: {tuple(image.shape)}")
    if not bool(image.isfinite().all()):
        raise ValueError("an image holds values that are not finite")
    low, high = (float(v) for v in image.aminmax())
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ValueError(f"an image must be in [0, 1], got {low:.4g} to {high:.4g}")


def encode_png(image: Float[Tensor, "3 height width"]) -> bytes:
    """An image in [0, 1] as PNG, rounded to 8 bits.

    Raises:
        ValueError: If it is no floating-point image, has no pixels, or holds values that are not
            finite or far outside of [0, 1].
    """
    check_pixels(image)
    eight_bits = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return png_of(Image.fromarray(eight_bits.permute(1, 2, 0).contiguous().cpu().numpy()))


def png_of(image: Image.Image) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    # Level 1 is several times faster than the default, and hardly larger.
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
