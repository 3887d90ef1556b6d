"""Measures of images that have nothing to do with their prompts, to recognise reward hacking.

A policy that exploits its reward leaves traces that no reward has to notice: high-frequency noise, a
periodic grid, saturated colours, one composition for every prompt. Each measure is a number; what counts
is its change from the model before training, on the same prompts and the same noise
(:mod:`flowgrpo.evaluation.hacking`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FRAMES = 4
"""Frames of a video that are measured, at equal distances."""
LARGEST = 512
"""Side in pixels of the centre crop whose spectrum is computed."""
NEIGHBOURS = 9
"""Width of the neighbourhood in the spectrum above which a peak must stand out."""
LONGEST_PERIOD = 20
"""Longest period of a grid in pixels. Latent diffusion models leave grids of 8 pixels (the VAE's factor)
and of 16 (times the patch size); longer periods occur in what pictures show."""
THUMBNAIL = 16
"""Side of the thumbnails that are compared."""
NEAR = 0.03
"""Root mean square difference of two thumbnails below which images are near-duplicates."""
MOST_COMPARED = 1000
"""Images that are compared across prompts; of more, as many at equal distances."""


def measure(media: Float[Tensor, "*frames 3 h w"]) -> dict[str, Any]:
    """The measures of one image or video, and its thumbnail, as plain numbers that processes can exchange.

    Args:
        media: An image, or the frames of a video, in [0, 1].

    Returns:
        ``values`` by name (the mean over frames; empty if a pixel is not finite) and ``thumbnail``, a
        list of ``FRAMES`` (of a video) times ``3 * THUMBNAIL**2`` numbers.
    """
    frames = media.detach().float().cpu()
    if frames.ndim == 3:
        frames = frames[None]
    elif len(frames) > FRAMES:
        frames = frames[torch.linspace(0, len(frames) - 1, FRAMES).round().long()]
    if not bool(frames.isfinite().all()):
        return {"values": {}, "thumbnail": []}
    frames = frames.clamp(0, 1)
    luma = (frames * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    values = spectrum(luma) | {
        "saturation": float((frames.amax(1) - frames.amin(1)).mean()),
        "contrast": float(luma.flatten(1).std(1, correction=0).mean()),
        "clipped": float(((frames < 1 / 255) | (frames > 254 / 255)).float().mean()),
    }
    thumbnail = F.adaptive_avg_pool2d(frames, THUMBNAIL).flatten().half()
    return {"values": values, "thumbnail": thumbnail.tolist()}


def spectrum(luma: Float[Tensor, "frames h w"]) -> dict[str, float]:
    """The share of high frequencies and the highest spectral peak, as means over frames.

    ``high_frequency``: the share of the power, without the mean, at more than a quarter of a cycle per
    pixel (half of the Nyquist frequency).

    ``grid``: the largest ``log10`` of the power at a frequency over the geometric mean of its neighbours,
    of periods up to ``LONGEST_PERIOD``. A peak must stand out along both axes, because straight edges
    raise whole lines of the spectrum. White noise has about 1.3; a periodic pattern 2 and more.
    """
    height, width = (min(n, LARGEST) for n in luma.shape[1:])
    top, left = (luma.shape[1] - height) // 2, (luma.shape[2] - width) // 2
    crop = luma[:, top : top + height, left : left + width]
    # The window keeps the jump from one border to the other out of the spectrum.
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    mean = (crop * window).sum((1, 2), keepdim=True) / window.sum()
    power = torch.fft.fft2((crop - mean) * window).abs().square()
    fy, fx = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    radius = (fy[:, None].square() + fx.square()).sqrt()
    total = power.sum((1, 2))
    high = (power * (radius > 0.25)).sum((1, 2)) / total.clamp(min=1e-12)
    # Empty images have no spectrum: a floor far below one grey level keeps rounding out of the peaks.
    level = (power + window.square().sum() * FLOOR).log10()[:, None]
    peak = torch.minimum(level - _beside(level, 0), level - _beside(level, 1))[:, 0]
    peak = peak.where(radius >= 1 / LONGEST_PERIOD, -torch.inf)
    return {"high_frequency": float(high.mean()), "grid": float(peak.flatten(1).amax(1).mean())}


FLOOR = (0.25 / 255) ** 2
"""Power per pixel that is added to the spectrum: that of noise of a quarter of a grey level."""


def _beside(level: Float[Tensor, "frames 1 h w"], axis: int) -> Float[Tensor, "frames 1 h w"]:
    """The mean of the neighbours along one axis, without those that the window mixes with the centre."""
    half, inner = NEIGHBOURS // 2, 3
    pad = (0, 0, half, half) if axis == 0 else (half, half, 0, 0)
    kernel = torch.ones(NEIGHBOURS)
    kernel[half - inner // 2 : half + inner // 2 + 1] = 0
    kernel = (kernel / kernel.sum()).view((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1))
    return F.conv2d(F.pad(level, pad, mode="circular"), kernel)


def summarise(rows: Sequence[Mapping[str, Any]], prompts: Sequence[int]) -> dict[str, float]:
    """The measures of an evaluation.

    Args:
        rows: The result of :func:`measure` for every image, in order.
        prompts: The number of each image's prompt.

    Returns:
        The mean of each measure; ``variety``, the mean root mean square difference of the thumbnails of
        a prompt; ``duplicates``, the share of images that have a near-duplicate of another prompt. A
        measure is left out if no image, or no pair of images, has it.
    """
    names = list(dict.fromkeys(k for r in rows for k in r["values"]))
    found = {k: _mean([r["values"][k] for r in rows if k in r["values"]]) for k in names}
    kept = [i for i, r in enumerate(rows) if r["thumbnail"]]
    kept = kept[:: -(-len(kept) // MOST_COMPARED) or 1]
    if len(kept) < 2 or len({len(rows[i]["thumbnail"]) for i in kept}) > 1:
        return found
    thumbnails = torch.tensor([rows[i]["thumbnail"] for i in kept])
    owner = torch.tensor([prompts[i] for i in kept])
    distance = torch.cdist(thumbnails, thumbnails, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / thumbnails.shape[1] ** 0.5
    same = owner[:, None] == owner
    pairs = same & ~torch.eye(len(kept), dtype=torch.bool)
    if bool(pairs.any()):
        found["variety"] = float(distance[pairs].mean())
    if not bool(same.all()):
        nearest = distance.masked_fill(same, torch.inf).amin(1)
        found["duplicates"] = float((nearest < NEAR).float().mean())
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
