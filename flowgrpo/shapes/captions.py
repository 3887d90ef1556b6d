"""Captions of the embedded world in GenEval's six tasks, as prompts with GenEval's metadata.

The metadata of a prompt is GenEval's record: ``tag``, ``include`` (clauses with ``class``,
``count`` and optionally ``color`` and ``position = [relation, index of the target clause]``) and,
for counting, ``exclude``.
"""

import zlib
from itertools import permutations
from typing import Any

import numpy as np

from flowgrpo.core.geneval import relations_between
from flowgrpo.shapes.world import COUNTS, SHAPES, WORLD, SceneObject, World, place

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
Record = dict[str, Any]


def plural(shape: str) -> str:
    """English plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def with_article(words: str) -> str:
    """``words`` preceded by "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def word_classes(world: World = WORLD) -> tuple[tuple[str, ...], ...]:
    """Words that can replace each other when a caption is corrupted."""
    plurals = tuple(plural(s) for s in SHAPES)
    return tuple(world.colors), tuple(COUNTS.values()), SHAPES, plurals


def _clause(shape: str, count: int = 1, **more: Any) -> Record:
    return {"class": shape, "count": count, **more}


def all_records(task: str, world: World = WORLD) -> list[Record]:
    """Every prompt of one task, in a fixed order."""
    pairs, colors = list(permutations(SHAPES, 2)), tuple(world.colors)
    rows: list[tuple[list[Record], str]] = []
    if task == "single_object":
        rows = [([_clause(s)], with_article(s)) for s in SHAPES]
    elif task == "two_object":
        rows = [([_clause(a), _clause(b)], _pair(a, world.conjunction, b)) for a, b in pairs]
    elif task == "counting":
        rows = [
            ([_clause(s, n)], f"{word} {plural(s)}") for s in SHAPES for n, word in COUNTS.items()
        ]
    elif task == "colors":
        rows = [([_clause(s, color=c)], with_article(f"{c} {s}")) for s in SHAPES for c in colors]
    elif task == "position":
        rows = [
            ([_clause(b), _clause(a, position=[r, 0])], _pair(a, words, b))
            for a, b in pairs
            for r, words in world.relations.items()
        ]
    elif task == "color_attr":
        rows = [
            (
                [_clause(a, color=c), _clause(b, color=d)],
                _pair(f"{c} {a}", world.conjunction, f"{d} {b}"),
            )
            for a, b in pairs
            for c, d in permutations(colors, 2)
        ]
    else:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    records = []
    for include, words in rows:
        record: Record = {"tag": task, "include": include}
        if task == "counting":
            record["exclude"] = [_clause(include[0]["class"], include[0]["count"] + 1)]
        records.append({**record, "prompt": world.caption.format(words)})
    return records


def _pair(first: str, words: str, second: str) -> str:
    return f"{with_article(first)} {words} {with_article(second)}"


def combination(record: Record) -> str:
    """A key for the content of a prompt, independent of word order: "a and b" equals "b and a".

    Training and held-out prompts are split by this key, so that no held-out combination is trained on.
    """
    clauses = record["include"]
    parts = sorted(f"{c.get('color', '')} {c['class']} {c['count']}" for c in clauses)
    if record["tag"] == "position":
        relation = clauses[1]["position"][0]
        a, b = clauses[1]["class"], clauses[0]["class"]
        if relation in ("right of", "below"):
            a, b, relation = b, a, {"right of": "left of", "below": "above"}[relation]
        parts = [a, relation, b]
    return f"{record['tag']}: {', '.join(parts)}"


def split(task: str, held_out: bool, share: float = 0.3, world: World = WORLD) -> list[Record]:
    """The training or held-out prompts of a task, whose combinations are disjoint.

    Args:
        task: One of :data:`TASKS`.
        held_out: Whether to return the held-out prompts.
        share: Approximate share of combinations that are held out, chosen by a hash.
        world: The world that the prompts are about.
    """
    records = all_records(task, world)
    names = sorted({combination(r) for r in records}, key=lambda name: zlib.crc32(name.encode()))
    chosen = set(names[: max(1, round(share * len(names)))])
    return [r for r in records if (combination(r) in chosen) == held_out]


def scene_for(record: Record, rng: np.random.Generator, world: World = WORLD) -> list[SceneObject]:
    """A random scene that matches a caption, with no other objects and random unspecified attributes."""
    shapes = [c["class"] for c in record["include"] for _ in range(c["count"])]
    fixed = [c.get("color") for c in record["include"] for _ in range(c["count"])]
    colors = [c or str(rng.choice(list(world.colors))) for c in fixed]
    relation = next((c["position"][0] for c in record["include"] if "position" in c), None)
    while True:
        scene = place(shapes, colors, rng, world=world)
        if relation is None or relation in relations_between(scene[1].box, scene[0].box):
            return scene


def corrupt(caption: str, rate: float, rng: np.random.Generator, world: World = WORLD) -> str:
    """Replace each colour, number, relation and shape by another of its kind with probability ``rate``."""
    relations = tuple(world.relations.values())
    relation = next((r for r in relations if f" {r} " in caption), None)
    if relation is not None and rng.random() < rate:
        others = [r for r in relations if r != relation]
        caption = caption.replace(f" {relation} ", f" {rng.choice(others)} ")
    words, classes = caption.split(), word_classes(world)
    for i, word in enumerate(words):
        family = next((f for f in classes if word in f), None)
        if family is not None and rng.random() < rate:
            words[i] = str(rng.choice([w for w in family if w != word]))
            if words[i - 1] in ("a", "an"):
                words[i - 1] = "an" if words[i][0] in "aeiou" else "a"
    return " ".join(words)


def vocabulary(world: World = WORLD) -> list[str]:
    """Every word that occurs in captions, sorted."""
    records = (r for task in TASKS for r in all_records(task, world))
    return sorted({w for r in records for w in r["prompt"].split()} | {"an"})
