"""GenEval's rule on seeded random scenes, against a second implementation from the protocol.

The second one shares no code with the first: it works on lists of detections as the official
evaluator gets them, in plain Python.
"""

import random
from typing import Any

import pytest

from flowgrpo.bench.benchmarks.geneval import GenEval
from flowgrpo.core.geneval import (
    COLORS,
    OBJECTS,
    Detection,
    Found,
    Task,
    num_to_color,
    select,
    strict,
)

Seen = tuple[str, float, tuple[float, float, float, float], str]
"""Class, score, box and the colour that a classifier would say."""
ENTRIES = GenEval().entries()


def relation(a: tuple[float, ...], b: tuple[float, ...]) -> set[str]:
    """Of box a to box b."""
    centre = [((p[0] + p[2]) / 2, (p[1] + p[3]) / 2) for p in (a, b)]
    size = [(abs(p[2] - p[0]), abs(p[3] - p[1])) for p in (a, b)]
    offset = [centre[0][i] - centre[1][i] for i in (0, 1)]
    revised = []
    for i in (0, 1):
        left = max(abs(offset[i]) - 0.1 * (size[0][i] + size[1][i]), 0.0)
        revised.append(left if offset[i] > 0 else -left)
    if all(abs(r) < 1e-3 for r in revised):
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    x, y = revised[0] / length, revised[1] / length
    names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {n for n, holds in names.items() if holds}


def evaluate(record: dict[str, Any], seen: list[Seen]) -> bool:
    """Whether an image is correct."""
    threshold = 0.9 if record["tag"] == "counting" else 0.3
    objects: dict[str, list[Seen]] = {}
    for one in sorted(seen, key=lambda s: s[1], reverse=True):
        same = objects.setdefault(one[0], [])
        if one[1] > threshold and len(same) < 16:
            same.append(one)
    correct, groups = True, []
    for clause in record["include"]:
        found = objects.get(clause["class"], [])[: clause["count"]]
        good = len(found) >= clause["count"]
        if good and "color" in clause:
            good = [f[3] for f in found].count(clause["color"]) >= clause["count"]
        if good and "position" in clause:
            wanted, target = clause["position"]
            if groups[target] is None:
                good = False
            else:
                good = all(wanted in relation(f[2], g[2]) for f in found for g in groups[target])
        groups.append(found if good else None)
        correct = correct and good
    for clause in record.get("exclude", []):
        if len(objects.get(clause["class"], [])) >= clause["count"]:
            correct = False
    return correct


def scene(record: dict[str, Any], chance: random.Random) -> list[Seen]:
    """Detections that come near to what is asked for: some missing, some too many, some wrong."""
    seen: list[Seen] = []

    def add(name: str, color: str, at: tuple[float, float]) -> None:
        size = chance.uniform(5, 60), chance.uniform(5, 60)
        box = (at[0] - size[0], at[1] - size[1], at[0] + size[0], at[1] + size[1])
        # Scores around both thresholds; no two are equal, for their order would be undefined.
        score = chance.choice([0.3, 0.9]) + chance.uniform(-0.1, 0.09)
        seen.append((name, score, box, color))

    for clause in record["include"]:
        number = clause["count"] + chance.choice([-1, 0, 0, 0, 1, 14])
        for _ in range(number):
            at = chance.uniform(0, 400), chance.uniform(0, 400)
            color = clause.get("color") if chance.random() < 0.8 else None
            add(clause["class"], color or chance.choice(COLORS), at)
    for _ in range(chance.randrange(3)):
        add(chance.choice(OBJECTS), chance.choice(COLORS), (200.0, 200.0))
    return seen


def ours(record: dict[str, Any], seen: list[Seen]) -> bool:
    """The same by flowgrpo: thresholds, colours only where they are asked for, the rule."""
    task = Task.read(record, "")
    detections: dict[int, list[Detection]] = {}
    colors: dict[tuple[float, ...], str] = {}
    for name, score, box, color in seen:
        detections.setdefault(OBJECTS.index(name), []).append(Detection(box, score))
        colors[box] = color
    objects = select(detections, 0.9 if task.tag == "counting" else 0.3, 16)
    wanted = num_to_color(task, objects)
    found = {
        name: [
            Found(d.box, colors[d.box] if i < wanted.get(name, 0) else "")
            for i, d in enumerate(same)
        ]
        for name, same in objects.items()
    }
    return strict(task, found).correct


@pytest.mark.parametrize("seed", range(4))
def test_random_scenes_are_judged_alike(seed: int) -> None:
    chance, verdicts = random.Random(seed), {True: 0, False: 0}
    for entry in ENTRIES:
        record = dict(entry.prompt.metadata)
        for _ in range(3):
            seen = scene(record, chance)
            expected = evaluate(record, seen)
            assert ours(record, seen) == expected, (record, seen)
            verdicts[expected] += 1
    assert min(verdicts.values()) > 150
