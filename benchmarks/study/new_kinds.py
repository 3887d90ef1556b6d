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
MAX_PROMPTS, MAX_SHARE = 8, 0.3
"""Largest number and largest share of the prompts of a kind that are evaluated."""


def all_records(kind: str) -> list[Record]:
    """Every prompt of one of :data:`KINDS`, as a GenEval record, in a fixed order."""
    rows = _ROWS[kind]()
    return [
        {"tag": kind, "include": include, "prompt": f"a photo of {words}"}
        for include, words in rows
    ]


def chosen(kind: str) -> list[Record]:
    """The prompts of a kind that are evaluated, at most :data:`MAX_PROMPTS`, chosen by a hash of their text."""
    ordered = sorted(all_records(kind), key=lambda r: zlib.crc32(r["prompt"].encode()))
    return ordered[: min(MAX_PROMPTS, round(MAX_SHARE * len(ordered)))]


def write(folder: Path) -> Path:
    """Write the prompts as a file, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "new_kinds.jsonl"
    records = (r for kind in KINDS for r in chosen(kind))
    file.write_text("".join(strict_json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return file


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
