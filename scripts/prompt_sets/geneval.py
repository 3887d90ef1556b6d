"""Generates GenEval's 553 prompts (arXiv:2310.11513), and training prompts from its templates.

The lines equal ``evaluation_metadata.jsonl`` of djghosh13/geneval (MIT) byte for byte. All six tasks
draw from one random generator, so the order of the draws matters.
"""

import json
from typing import Any

import numpy as np

from flowgrpo.core.geneval import RELATIONS
from flowgrpo.data import strict_json
from flowgrpo.shapes.captions import combination, plural, with_article

Record = dict[str, Any]

OBJECTS = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "computer mouse",
    "tv remote",
    "computer keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
"""GenEval's object names in the order of COCO's classes. Some names differ from COCO's, so classes have
to be mapped by index."""
COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
NUMBERS = {2: "two", 3: "three", 4: "four"}
SEED = 43
PROMPTS_PER_TASK = 100


def records() -> list[Record]:
    """The 553 records in the benchmark's order: tag, include, exclude (counting only), prompt."""
    return [json.loads(line) for line in lines()]


def lines() -> list[str]:
    """The lines of the benchmark's file, without duplicates."""
    return list(dict.fromkeys(strict_json.dumps(record) for record in _drawn(SEED)))


def train_records(number: int = 300) -> list[Record]:
    """Training prompts from GenEval's templates, without any combination of the 553 benchmark prompts.

    Up to ``number`` per task. Single objects have none, since all 80 are in the benchmark, and counting
    has fewer, since it has only 240 prompts. Combinations are compared by content, not by wording: "a
    and b" equals "b and a", and "a left of b" equals "b right of a".
    """
    taken = {combination(r) for r in records()}
    found: dict[str, list[Record]] = {}
    for seed in range(SEED + 1, SEED + 31):
        for record in _drawn(seed):
            same = found.setdefault(record["tag"], [])
            if combination(record) not in taken and len(same) < number:
                taken.add(combination(record))
                same.append(record)
    return [record for tag in sorted(found) for record in found[tag]]


def _drawn(seed: int) -> list[Record]:
    """All drawn records, with duplicates."""
    rng = np.random.default_rng(seed)
    num_objects, num_colors = len(OBJECTS), len(COLORS)
    person = OBJECTS.index("person")
    drawn: list[Record] = []

    def add(tag: str, include: list[Record], words: str, **more: Any) -> None:
        drawn.append({"tag": tag, "include": include, **more, "prompt": f"a photo of {words}"})

    for i in rng.choice(num_objects, size=num_objects, replace=False):
        add("single_object", [_clause(OBJECTS[i])], with_article(OBJECTS[i]))

    for _ in range(PROMPTS_PER_TASK):
        a, b = (OBJECTS[i] for i in rng.choice(num_objects, size=2, replace=False))
        add("two_object", [_clause(a), _clause(b)], f"{with_article(a)} and {with_article(b)}")

    for _ in range(PROMPTS_PER_TASK):
        name = OBJECTS[rng.choice(num_objects)]
        count = int(rng.integers(2, 4, endpoint=True))
        add(
            "counting",
            [_clause(name, count)],
            f"{NUMBERS[count]} {plural(name)}",
            exclude=[_clause(name, count + 1)],
        )

    # The offset past "person" excludes people from the tasks with colours.
    for _ in range(PROMPTS_PER_TASK):
        name = OBJECTS[(rng.choice(num_objects - 1) + 1 + person) % num_objects]
        color = COLORS[rng.choice(num_colors)]
        add("colors", [_clause(name, color=color)], with_article(f"{color} {name}"))

    for _ in range(PROMPTS_PER_TASK):
        a, b = (OBJECTS[i] for i in rng.choice(num_objects, size=2, replace=False))
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        add(
            "position",
            [_clause(b), _clause(a, position=[relation, 0])],
            f"{with_article(a)} {relation} {with_article(b)}",
        )

    for _ in range(PROMPTS_PER_TASK):
        pair = rng.choice(num_objects - 1, size=2, replace=False)
        a, b = (OBJECTS[(i + 1 + person) % num_objects] for i in pair)
        c, d = (COLORS[i] for i in rng.choice(num_colors, size=2, replace=False))
        add(
            "color_attr",
            [_clause(a, color=c), _clause(b, color=d)],
            f"{with_article(f'{c} {a}')} and {with_article(f'{d} {b}')}",
        )
    return drawn


def _clause(name: str, count: int = 1, **more: Any) -> Record:
    return {"class": name, "count": count, **more}
