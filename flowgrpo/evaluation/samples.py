"""The images of highest and of lowest reward of an evaluation, which the report shows."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowgrpo.core.tensors import Float, Tensor
from flowgrpo.data import strict_json
from flowgrpo.data.files import replacing
from flowgrpo.data.pictures import picture_of
from flowgrpo.evaluation.tiles import LONGEST, open_picture

FOLDER = "samples"
"""Folder of a run directory with a picture of each evaluation."""
KEY = "flowgrpo-samples"
"""Name of the text chunk of a PNG file that holds the prompts, the scores and the places as JSON."""
NUMBER = 6
"""Images of each group."""
GAP = 4
"""Pixels between images."""

Group = Literal["highest", "lowest"]


@dataclass(frozen=True)
class Sample:
    """An image with its scores.

    Attributes:
        group: Whether its reward is one of the highest or of the lowest.
        prompt: The text of its prompt.
        reward: The weighted sum of its scores.
        scores: The finite ones of its scores, by reward.
        picture: The image; of a video the first, the middle and the last frame.
    """

    group: str
    prompt: str
    reward: float
    scores: Mapping[str, float]
    picture: Image.Image


def extremes(rows: Sequence[Mapping[str, Any]], number: int = NUMBER) -> dict[int, Group]:
    """Choose the images of highest and of lowest reward.

    Of equal rewards the first in the order of the evaluation are chosen, which spreads over the classes
    of prompts. No image is in both groups.

    Args:
        rows: ``index`` and ``reward`` of each image.
        number: Images of each group.

    Returns:
        The group of each chosen image, by its index; first the highest, from above, then the lowest,
        from below.
    """
    known = [r for r in rows if math.isfinite(r["reward"])]
    number = min(number, len(known) // 2)
    highest = sorted(known, key=lambda r: (-r["reward"], r["index"]))[:number]
    lowest = sorted(known, key=lambda r: (r["reward"], r["index"]))[:number]
    found: dict[int, Group] = {r["index"]: "highest" for r in highest}
    # If all rewards are equal, the two groups would be the same images.
    return found | {r["index"]: "lowest" for r in lowest if r["index"] not in found}


def thumbnail(media: Float[Tensor, "*frames channels height width"]) -> Image.Image:
    """An image, or three frames of a video side by side, reduced to 256 pixels each.

    Args:
        media: The image or video in [0, 1], with 1 or 3 channels.
    """
    frames = media if media.ndim == 4 else media[None]
    numbers = sorted({0, len(frames) // 2, len(frames) - 1})
    pictures = [still(frames[number]) for number in numbers]
    width, height = pictures[0].size
    canvas = Image.new("RGB", (len(pictures) * (width + 2) - 2, height), "white")
    for place, picture in enumerate(pictures):
        canvas.paste(picture, (place * (width + 2), 0))
    return canvas


def still(image: Float[Tensor, "channels height width"]) -> Image.Image:
    """An image in [0, 1], reduced to 256 pixels."""
    picture = picture_of(image)
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return picture


def save_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples as one PNG file. The file is replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width = max((s.picture.width for s in samples), default=1)
    canvas = Image.new("RGB", (width, sum(s.picture.height + GAP for s in samples) or 1), "white")
    records, top = [], 0
    for sample in samples:
        canvas.paste(sample.picture, (0, top))
        records.append(
            {
                "group": sample.group,
                "prompt": sample.prompt,
                "reward": sample.reward,
                "scores": dict(sample.scores),
                "box": [0, top, sample.picture.width, top + sample.picture.height],
            }
        )
        top += sample.picture.height + GAP
    info = PngInfo()
    info.add_itxt(KEY, strict_json.dumps(records, ensure_ascii=False))
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG", pnginfo=info)


def load_samples(path: Path) -> list[Sample]:
    """The samples of :func:`save_samples`; none if the file is missing or damaged."""
    picture = open_picture(path)
    if picture is None:
        return []
    try:
        return [
            Sample(r["group"], r["prompt"], r["reward"], r["scores"], picture.crop(r["box"]))
            for r in json.loads(getattr(picture, "text", {}).get(KEY, "[]"))
        ]
    except (ValueError, KeyError, TypeError):
        return []
