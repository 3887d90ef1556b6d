"""Detects the objects in an image of the embedded world, and scores them by GenEval's rules.

Objects are connected regions that differ from the background. A region counts as an object only if its
outline matches one of the world's shapes, and clearly better than any other, and it has a single colour;
rectangles, irregular blobs and regions of mixed colours do not count. The bounds are set by labels of
360 generated pictures (``benchmarks/verifier_labels``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from flowgrpo.core.geneval import relations_between
from flowgrpo.shapes.world import BACKGROUND, SHAPES, WORLD, SceneObject, World, draw

FOREGROUND_DISTANCE = 0.2
"""RGB distance (components in [0, 1]) from the background beyond which a pixel is foreground."""
MIN_AREA = 24
"""Smallest area of a region in pixels; smaller regions are ignored."""
MAX_SIDE = 36
"""Longest side of an object in pixels; the largest objects of the world are 28 pixels wide."""
MIN_MATCH, GOOD_MATCH = 0.6, 0.76
"""Overlap (intersection over union) with the ideal outline: below the first value a region is no
object, from the second value on it is genuine, and between the two it earns partial credit."""
MAX_STRETCH = 1.15
"""Largest ratio between the aspect ratio of an object and that of its ideal shape, one pixel aside."""
MIN_LEAD = 0.06
"""Smallest difference between the overlaps with the best and the second-best outline. Squares with
round corners and domes match two outlines equally well and are neither."""
MIN_PURITY = 0.9
"""Smallest share of an object's inner pixels with the object's shade."""
MAX_COLOR_DISTANCE = 0.25
"""Largest RGB distance of a pixel from a named colour."""
MAX_SHADE_DISTANCE = 0.2
"""Largest RGB distance of a pixel from the shade of its object."""
MIN_CHROMA = 0.25
"""Smallest difference between the largest and the smallest component of a pixel that has a colour
without being near a named one, such as pink. Grey has none."""
OTHER = "other"
"""The colour of an object that has none of the named colours."""
_GRID = 24


@dataclass(frozen=True)
class Detection:
    """One region of an image.

    Attributes:
        shape: The best matching shape.
        color: The most frequent colour among its inner pixels, or :data:`OTHER`.
        box: ``(x0, y0, x1, y1)`` in pixels.
        area: Size in pixels.
        confidence: In [0, 1]; 1 for a genuine object, less for partial credit.
    """

    shape: str
    color: str
    box: tuple[float, float, float, float]
    area: int
    confidence: float

    @property
    def genuine(self) -> bool:
        """Whether the region counts as an object under the strict rule."""
        return self.confidence >= 1.0


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Ideal masks ``(shapes, grid, grid)`` inside their bounding boxes, and aspects (w / h)."""
    masks, aspects = [], []
    background = np.asarray(BACKGROUND)
    for shape in SHAPES:
        image = draw([SceneObject(shape, "blue", 32.0, 32.0, 24.0)], size=256)
        mask = np.abs(image.astype(int) - background).sum(-1) > 60
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        crop = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        masks.append(_to_grid(crop))
        aspects.append(crop.shape[1] / crop.shape[0])
    return np.stack(masks), np.asarray(aspects)


def _to_grid(mask: np.ndarray) -> np.ndarray:
    h, w = mask.shape
    rows = ((np.arange(_GRID) + 0.5) * h / _GRID).astype(int)
    cols = ((np.arange(_GRID) + 0.5) * w / _GRID).astype(int)
    return mask[rows[:, None], cols[None, :]]


@cache
def _palette(world: World) -> np.ndarray:
    """The colours of a world, and the background, with components in [0, 1]."""
    return np.asarray([*world.colors.values(), BACKGROUND], dtype=np.float32) / 255


def detect(image: Float[np.ndarray, "h w 3"], world: World = WORLD) -> list[Detection]:
    """Find the regions of one image with components in [0, 1], largest first."""
    distance = ((image[:, :, None, :] - _palette(world)) ** 2).sum(-1)
    names = (*world.colors, OTHER)
    labels, _ = ndimage.label(distance[:, :, -1] > FOREGROUND_DISTANCE**2)
    found = []
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        region = labels[window] == index
        if np.count_nonzero(region) >= MIN_AREA:
            found.append(_detection(region, image[window], distance[window], window, names))
    return sorted(found, key=lambda d: -d.area)


def _color(
    pixels: np.ndarray, distance: np.ndarray, names: Sequence[str]
) -> tuple[str, np.ndarray, float]:
    """The colour of some pixels, its shade, and the share of the pixels that have its shade.

    The shade is the mean of the pixels with the most frequent colour. A colour that drifts, such as red
    that is nearer to orange at one side, is one shade; two colours side by side are not. The share is
    0 if fewer than half of the pixels have a colour at all.

    Args:
        pixels: Components ``(pixels, 3)``.
        distance: Squared RGB distances ``(pixels, colours)`` to the named colours.
        names: The names of the colours, and that of another colour.
    """
    named = len(names) - 1
    label = distance.argmin(-1)
    unnamed = distance.min(-1) > MAX_COLOR_DISTANCE**2
    label[unnamed] = named
    label[unnamed & (np.ptp(pixels, axis=-1) < MIN_CHROMA)] = named + 1
    votes = np.bincount(label, minlength=named + 2)[:-1]
    color = int(votes.argmax())
    if 2 * votes.sum() < len(pixels):
        return names[color], pixels.mean(0), 0.0
    shade = pixels[label == color].mean(0)
    alike = ((pixels - shade) ** 2).sum(-1) <= MAX_SHADE_DISTANCE**2
    return names[color], shade, float(alike.mean())


def _detection(
    region: np.ndarray,
    image: np.ndarray,
    distance: np.ndarray,
    window: tuple[slice, slice],
    names: Sequence[str],
) -> Detection:
    """Classify one region.

    Args:
        region: Mask ``(h, w)`` of the region.
        image: Components ``(h, w, 3)`` of the region's window.
        distance: Squared RGB distances ``(h, w, colours + 1)`` to the colours and the background.
        window: Position of the mask in the image.
        names: The names of the colours, and that of another colour.
    """
    inner = ndimage.binary_erosion(region)
    within = inner if inner.any() else region
    color, shade, purity = _color(image[within], distance[within][:, :-1], names)
    # Edges are anti-aliased: a pixel belongs to the object if it is nearer to the object's colour than to
    # the background.
    mask = region & (((image - shade) ** 2).sum(-1) < distance[:, :, -1])
    if not mask.any():
        mask = region
    y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    mask = mask[y[0] : y[-1] + 1, x[0] : x[-1] + 1]
    top, left = window[0].start + y[0], window[1].start + x[0]
    masks, aspects = _templates()
    height, width = mask.shape
    grid = _to_grid(mask)
    overlap = (masks & grid).sum((1, 2)) / (masks | grid).sum((1, 2))
    second, best = (int(i) for i in overlap.argsort()[-2:])
    # In a small box one pixel already changes the aspect ratio, so a difference of one is allowed.
    stretch = max(1.0, (width - 1) / (height * aspects[best]), (height - 1) * aspects[best] / width)
    quality = (overlap[best] - MIN_MATCH) / (GOOD_MATCH - MIN_MATCH)
    quality *= min(1.0, MAX_STRETCH / stretch) ** 4 * min(1.0, purity / MIN_PURITY) ** 2
    lead = float(overlap[best] - overlap[second])
    quality *= (1 + min(1.0, lead / MIN_LEAD)) / 2
    if max(width, height) > MAX_SIDE:
        quality = 0.0
    genuine = (
        quality > 0
        and overlap[best] >= GOOD_MATCH
        and lead >= MIN_LEAD
        and stretch <= MAX_STRETCH
        and purity >= MIN_PURITY
    )
    return Detection(
        shape=SHAPES[best],
        color=color,
        box=(float(left), float(top), float(left + width), float(top + height)),
        area=int(np.count_nonzero(mask)),
        confidence=1.0 if genuine else float(np.clip(quality, 0.0, 0.99)),
    )


def strict_and_graded(detections: list[Detection], record: dict[str, Any]) -> tuple[float, float]:
    """The scores :func:`strict` and :func:`graded` of an image for a prompt's record."""
    return strict(detections, record), graded(detections, record)


def strict(detections: list[Detection], record: dict[str, Any]) -> float:
    """GenEval's rule (arXiv:2310.11513): 1 if every ``include`` clause and no ``exclude`` clause holds."""
    objects = [d for d in detections if d.genuine]
    matched: list[list[Detection]] = []
    for clause in record["include"]:
        found = [d for d in objects if d.shape == clause["class"]][: clause["count"]]
        good = len(found) == clause["count"]
        if good and "color" in clause:
            good = all(d.color == clause["color"] for d in found)
        if good and "position" in clause:
            relation, target = clause["position"]
            others = matched[target]
            good = bool(others) and all(
                relation in relations_between(d.box, o.box) for d in found for o in others
            )
        matched.append(found if good else [])
        if not good:
            return 0.0
    for clause in record.get("exclude", ()):
        if sum(d.shape == clause["class"] for d in objects) >= clause["count"]:
            return 0.0
    return 1.0


def graded(detections: list[Detection], record: dict[str, Any]) -> float:
    """Partial credit in [0, 1]: the mean over the requirements of all clauses.

    Each clause requires its objects (for counting, exactly that many) and, if it names them, their
    colour and their position; a malformed object counts by its confidence. The mean is multiplied by
    the number of required objects over the number of regions, if that is below 1. The strict rule
    tolerates extra objects, and without this factor a model learns to fill the image with shapes.
    """
    exact = bool(record.get("exclude"))
    credits: list[float] = []
    best: list[Detection | None] = []
    for clause in record["include"]:
        count = clause["count"]
        found = sorted(
            (d for d in detections if d.shape == clause["class"] and d.confidence > 0),
            key=lambda d: -d.confidence,
        )
        best.append(found[0] if found else None)
        present = sum(d.confidence for d in (found if exact else found[:count]))
        credits.append(max(0.0, 1.0 - abs(count - present) / count))
        if "color" in clause:
            right = sum(d.confidence for d in found[:count] if d.color == clause["color"])
            credits.append(right / count)
        if "position" in clause:
            relation, target = clause["position"]
            one, other = best[-1], best[target]
            holds = one and other and relation in relations_between(one.box, other.box)
            credits.append(
                min(one.confidence, other.confidence) if one and other and holds else 0.0
            )
    wanted = sum(clause["count"] for clause in record["include"])
    return sum(credits) / len(credits) * min(1.0, wanted / max(1, len(detections)))
