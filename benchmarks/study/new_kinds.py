"""Prompts of kinds that neither pre-training nor tuning has seen, from the words of the embedded world.

The embedded model knows three shapes, six colours and captions of six kinds. The kinds here join what it
knows: colours with numbers, colours with positions, the same colour twice, one colour for two shapes,
two sorts with a number, and three shapes.
"""

import zlib
from collections.abc import Callable, Sequence
from itertools import combinations, permutations, product
from pathlib import Path

from flowgrpo.core.geneval import RELATIONS
from flowgrpo.data import strict_json
from flowgrpo.shapes.captions import Record, plural, with_article
from flowgrpo.shapes.world import SHAPES, WORLD

KINDS = (
    "colored_count", "colored_position", "same_color", "one_color", "count_and_one", "three_shapes",
)  # fmt: skip
HELD_OUT_SHARE = 0.3


def all_records(kind: str) -> list[Record]:
    """Every prompt of one of :data:`KINDS`, as a GenEval record, in a fixed order."""
    rows = _ROWS[kind]()
    return [
        {"tag": kind, "include": include, "prompt": f"a photo of {words}"}
        for include, words in rows
    ]


def split(kind: str, held_out: bool, limit: int = 60) -> list[Record]:
    """The training or held-out prompts of a kind, at most ``limit``, chosen by a hash of their text."""
    ordered = sorted(all_records(kind), key=lambda r: zlib.crc32(r["prompt"].encode()))
    cut = max(1, round(HELD_OUT_SHARE * len(ordered)))
    return (ordered[:cut] if held_out else ordered[cut:])[:limit]


def write(folder: Path) -> tuple[Path, Path]:
    """Write the training and the held-out prompts as files, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "second_world_train.jsonl", folder / "second_world_held_out.jsonl"
    for file, held_out in zip(files, (False, True), strict=True):
        kinds = [split(kind, held_out, 8 if held_out else 60) for kind in KINDS]
        file.write_text("".join(strict_json.dumps(r) + "\n" for kind in kinds for r in kind))
    return files


def _clause(shape: str, count: int = 1, **more: object) -> Record:
    return {"class": shape, "count": count, **more}


Rows = Sequence[tuple[list[Record], str]]


def _colored_count() -> Rows:
    return [
        ([_clause(s, 2, color=c)], f"two {c} {plural(s)}") for s, c in product(SHAPES, WORLD.colors)
    ]


def _colored_position() -> Rows:
    return [
        (
            [_clause(b, color=d), _clause(a, color=c, position=[r, 0])],
            f"{with_article(f'{c} {a}')} {r} {with_article(f'{d} {b}')}",
        )
        for a, b in permutations(SHAPES, 2)
        for c, d in permutations(WORLD.colors, 2)
        for r in RELATIONS
    ]


def _same_color() -> Rows:
    return [
        (
            [_clause(a, color=c), _clause(b, color=c)],
            f"{with_article(f'{c} {a}')} and {with_article(f'{c} {b}')}",
        )
        for a, b in permutations(SHAPES, 2)
        for c in WORLD.colors
    ]


def _one_color() -> Rows:
    return [
        (
            [_clause(a, color=c), _clause(b)],
            f"{with_article(f'{c} {a}')} and {with_article(b)}",
        )
        for a, b in permutations(SHAPES, 2)
        for c in WORLD.colors
    ]


def _count_and_one() -> Rows:
    return [
        ([_clause(a, 2), _clause(b)], f"two {plural(a)} and {with_article(b)}")
        for a, b in permutations(SHAPES, 2)
    ]


def _three_shapes() -> Rows:
    orders = [p for c in combinations(SHAPES, 3) for p in permutations(c)]
    return [
        ([_clause(s) for s in order], " and ".join(map(with_article, order))) for order in orders
    ]


_ROWS: dict[str, Callable[[], Rows]] = {
    "colored_count": _colored_count,
    "colored_position": _colored_position,
    "same_color": _same_color,
    "one_color": _one_color,
    "count_and_one": _count_and_one,
    "three_shapes": _three_shapes,
}
