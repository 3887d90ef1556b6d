"""The embedded world: its shapes, colours and words, and how scenes are laid out and drawn.

A scene is a light grey square canvas with one to four upright coloured shapes that do not touch.
Coordinates are pixels, x to the right and y downwards.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from flowgrpo.core.geneval import RELATIONS

IMAGE_SIZE = 64
BACKGROUND = (236, 236, 234)
SHAPES = ("circle", "square", "triangle")
COUNTS = {2: "two", 3: "three", 4: "four"}
GAP = 3.0
"""Smallest distance in pixels between the bounding boxes of two shapes."""
SUPERSAMPLING = 4


@dataclass(frozen=True, eq=False)
class World:
    """What differs between worlds that are drawn, described and judged by the same code.

    Attributes:
        colors: The colours by name, as RGB components from 0 to 255.
        radius: Smallest and largest scale of a shape's outline, in pixels.
        caption: A caption, with ``{}`` in the place of its content.
        conjunction: The words between two objects.
        relations: The words for each of GenEval's relations between positions.
    """

    colors: Mapping[str, tuple[int, int, int]]
    radius: tuple[float, float]
    caption: str
    conjunction: str
    relations: Mapping[str, str]


WORLD = World(
    colors={
        "red": (214, 40, 40),
        "orange": (247, 137, 20),
        "yellow": (248, 214, 42),
        "green": (44, 160, 70),
        "blue": (38, 92, 210),
        "purple": (128, 56, 176),
    },
    radius=(8.0, 13.0),
    caption="a photo of {}",
    conjunction="and",
    relations={relation: relation for relation in RELATIONS},
)
"""The world of the model that ships with flowgrpo."""


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene.

    Attributes:
        shape: One of :data:`SHAPES`.
        color: The name of one of the world's colours.
        x: Centre in pixels from the left.
        y: Centre in pixels from the top.
        radius: Scale of the outline in pixels.
    """

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The bounding box ``(x0, y0, x1, y1)``."""
        outline = self.outline()
        xs, ys = zip(*outline, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def outline(self) -> list[tuple[float, float]]:
        """The corners of the shape in pixels; a circle is a polygon with 64 corners."""
        return [
            (self.x + self.radius * u, self.y + self.radius * v)
            for u, v in unit_outline(self.shape)
        ]


@cache
def unit_outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape with radius 1, centred on the origin."""
    if shape == "circle":
        turn = [2 * math.pi * i / 64 for i in range(64)]
        return tuple((math.cos(a), math.sin(a)) for a in turn)
    if shape == "square":
        h = 0.88
        return ((-h, -h), (h, -h), (h, h), (-h, h))
    if shape == "triangle":
        return ((0.0, -0.95), (1.08, 0.88), (-1.08, 0.88))
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def draw(
    scene: list[SceneObject], size: int = IMAGE_SIZE, world: World = WORLD
) -> UInt8[np.ndarray, "h w 3"]:
    """Render a scene, anti-aliased. Raises ValueError for an unknown shape or colour."""
    scale = SUPERSAMPLING * size / IMAGE_SIZE
    canvas = Image.new("RGB", (size * SUPERSAMPLING, size * SUPERSAMPLING), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for item in scene:
        if item.color not in world.colors:
            raise ValueError(f"unknown colour {item.color!r}; known: {', '.join(world.colors)}")
        fill = world.colors[item.color]
        pen.polygon([(x * scale, y * scale) for x, y in item.outline()], fill=fill)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def place(
    shapes: list[str],
    colors: list[str],
    rng: np.random.Generator,
    max_tries: int = 200,
    world: World = WORLD,
) -> list[SceneObject]:
    """Lay out shapes at random positions and sizes so that none touch. Many shapes are smaller.

    After ``max_tries`` positions without success, the layout starts anew.
    """
    least, top = world.radius
    top -= 1.5 * max(0, len(shapes) - 2)
    while True:
        scene: list[SceneObject] = []
        for _ in range(max_tries):
            shape, color = shapes[len(scene)], colors[len(scene)]
            radius = float(rng.uniform(least, top))
            margin = 1.15 * radius + 1
            x, y = rng.uniform(margin, IMAGE_SIZE - margin, size=2)
            item = SceneObject(shape, color, float(x), float(y), radius)
            if all(_apart(item.box, other.box) for other in scene):
                scene.append(item)
            if len(scene) == len(shapes):
                return scene


def _apart(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] - b[2] >= GAP or b[0] - a[2] >= GAP or a[1] - b[3] >= GAP or b[1] - a[3] >= GAP
