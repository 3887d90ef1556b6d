"""Reading pictures as RGB and encoding tensors as PNG.

All of flowgrpo converts pictures here, so that prompts, rewards and servers agree on bit depth,
orientation and transparency.
"""

import io

from PIL import Image, ImageOps

from flowgrpo.core.tensors import Float, Tensor, torch

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""Errors of Pillow about a file that is not a picture, is damaged, or is too large to be opened."""
OVERSHOOT = 0.1
"""How far a decoder's values may lie outside of [0, 1] by rounding; further off is an error."""


def check_depth(image: Image.Image) -> None:
    """Raise ValueError if values have more than 8 bits, which a conversion to RGB would clip to white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"a picture of mode {image.mode!r} has more than 8 bits: save it with 8")


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB with 8 bits: rotated upright, transparent parts on white.

    Raises:
        ValueError: If it has more than 8 bits per value.
    """
    check_depth(image)
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:  # the colour values of transparent pixels are arbitrary
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")


def check_pixels(image: Tensor) -> None:
    """Raise ValueError if a tensor is not an image ``(3, H, W)`` with finite values in [0, 1]."""
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


def picture_of(image: Float[Tensor, "channels height width"]) -> Image.Image:
    """An image as an RGB picture with 8 bits, rounded as diffusers' pipelines round theirs.

    torchvision's ``to_pil_image`` cuts fractions off, which makes an image half a level darker.

    Args:
        image: Values in [0, 1]; others are clamped. 1 or 3 channels.
    """
    levels = image.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def encode_png(image: Float[Tensor, "3 height width"]) -> bytes:
    """Encode an image in [0, 1] as PNG, rounded to 8 bits.

    Raises:
        ValueError: If it is not a floating-point image, has no pixels, or has values that are not
            finite or far outside of [0, 1].
    """
    check_pixels(image)
    eight_bits = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return png_of(Image.fromarray(eight_bits.permute(1, 2, 0).contiguous().cpu().numpy()))


def png_of(image: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    # Level 1 is several times faster than the default, and hardly larger.
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
