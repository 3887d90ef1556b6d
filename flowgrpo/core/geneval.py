"""GenEval's rule (arXiv:2310.11513): a verdict on an image from the objects detected in it.

No model is used here. The official evaluation is djghosh13/geneval, the graded reward is that of
Flow-GRPO's server yifan123/reward-server (both MIT); this is an independent implementation of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from flowgrpo.core.imports import suggest

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OVERLAP_TOLERANCE = 0.1
"""Share of the summed box sizes by which two centres must differ before a relation counts."""

_OBJECTS = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
    bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
    dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone,
    microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
    hair drier, toothbrush
"""
OBJECTS = tuple(name.strip() for name in _OBJECTS.split(","))
"""The object names in COCO's order. A few names differ from COCO's, so classes are matched by index."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
Box = tuple[float, float, float, float]
Mask = Bool[np.ndarray, "height width"]


class Detection(NamedTuple):
    """One object as a detector reports it.

    Attributes:
        box: ``(x0, y0, x1, y1)`` in pixels of the image.
        score: Confidence in [0, 1].
        mask: The object's pixels, as large as the image; ``None`` if the detector has only boxes.
    """

    box: Box
    score: float
    mask: Mask | None = None


@runtime_checkable
class Detector(Protocol):
    """Finds objects of the 80 classes, indexed as in COCO (and as in ``OBJECTS``).

    ``name`` appears in the title of the results, because another detector gives other numbers.
    """

    name: str

    def detect(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Sequence[Mapping[int, Sequence[Detection]]]:
        """For every image in [0, 1]: class index -> detections, in any order."""
        ...


@dataclass(frozen=True)
class Found:
    """One detected object: its box and, if the task needs it, its colour."""

    box: Box
    color: str = ""


@dataclass(frozen=True)
class Clause:
    """``count`` objects of a class, all of ``color`` and all at ``position`` if these are given.

    ``position`` is a relation and the index of the earlier clause whose objects it refers to.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Task:
    """The objects that one prompt asks for.

    Example:
        "a photo of two dogs": ``Task("counting", (Clause("dog", 2),), (Clause("dog", 3),))``
    """

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @classmethod
    def read(cls, record: Mapping[str, Any], prompt: str) -> "Task":
        """The task in a prompt's metadata.

        Raises:
            ValueError: If the metadata are not GenEval's; the message names the prompt.
        """
        where = f"prompt {prompt!r}"
        tag, include = record.get("tag"), record.get("include")
        if not isinstance(tag, str) or not include:
            raise ValueError(
                f"{where} has no GenEval metadata: it needs 'tag' and at least one clause in "
                f"'include', got the keys {sorted(record)}"
            )
        return cls(
            tag,
            tuple(_clause(clause, place, where) for place, clause in enumerate(include)),
            tuple(_clause(clause, 0, where) for clause in record.get("exclude", ())),
        )


@dataclass(frozen=True)
class Verdict:
    """The rule's result for one image.

    Attributes:
        score: 0 or 1 by the official rule; at most 1, possibly negative, by the soft one.
        correct: Whether the image has everything that the prompt asks for.
        reasons: One entry for each clause that fails, which says why.
    """

    score: float
    correct: bool
    reasons: tuple[str, ...] = ()


def select(
    detections: Mapping[int, Sequence[Detection]], threshold: float, max_objects: int
) -> dict[str, list[Detection]]:
    """The detections that score above ``threshold`` by class name, in order of falling confidence.

    Detections with equal confidence keep their order.

    Args:
        detections: By class index.
        threshold: Lowest confidence, exclusive.
        max_objects: Most objects to keep per class.
    """
    kept: dict[str, list[Detection]] = {}
    for index, found in detections.items():
        sure = sorted((d for d in found if d.score > threshold), key=lambda d: -d.score)
        if sure:
            kept[OBJECTS[index]] = sure[:max_objects]
    return kept


def num_to_color(task: Task, objects: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """For each class whose colour matters: how many of its most confident objects need a colour."""
    numbers: dict[str, int] = {}
    for clause in task.include:
        if clause.color is not None and len(objects.get(clause.name, ())) >= clause.count:
            numbers[clause.name] = max(clause.count, numbers.get(clause.name, 0))
    return numbers


def strict(task: Task, objects: Mapping[str, Sequence[Found]]) -> Verdict:
    """The benchmark's rule: 1 if every ``include`` clause is met and no ``exclude`` clause, else 0.

    Only the ``count`` most confident objects of a class count, so further objects matter only to an
    ``exclude`` clause. All of them must have the colour, and the relation to all objects of the
    target clause.

    Args:
        task: The objects that the prompt asks for.
        objects: The detected objects by class name, most confident first, with colours for as many
            as :func:`num_to_color` gives.
    """
    reasons: list[str] = []
    matched: list[Sequence[Found]] = []
    for clause in task.include:
        found = objects.get(clause.name, ())[: clause.count]
        problem = _unmet(clause, found, matched)
        matched.append(() if problem else found)
        if problem:
            reasons.append(problem)
    for clause in task.exclude:
        number = len(objects.get(clause.name, ()))
        if number >= clause.count:
            reasons.append(f"{number} {clause.name}, fewer than {clause.count} allowed")
    return Verdict(float(not reasons), not reasons, tuple(reasons))


def soft(
    task: Task,
    objects: Mapping[str, Sequence[Found]],
    compat: Literal["flow_grpo"] | None = None,
) -> Verdict:
    """Flow-GRPO's training reward: the mean credit over the requirements of the ``include`` clauses.

    Each clause earns ``1 - |number - count| / count`` for the number of its objects, extra objects
    included. If the number is right and the clause names a colour, it earns the same for the objects
    of that colour; if these are right and it names a position, it earns 1 or 0 for the position. If
    the number is wrong, colour and position together earn one 0. ``correct`` means that every
    requirement is met exactly.

    Args:
        task: The objects that the prompt asks for. ``exclude`` is ignored: numbers must be exact.
        objects: As for :func:`strict`.
        compat: ``flow_grpo`` reproduces a defect of the original: a wrong position earns a 0 *and* a
            1 there, so the image gets 0.75 where 2/3 is meant.
    """
    credits: list[float] = []
    reasons: list[str] = []
    matched: list[Sequence[Found]] = []
    for clause in task.include:
        found = objects.get(clause.name, ())
        credits.append(_nearness(len(found), clause.count))
        problem = ""
        if len(found) != clause.count:
            problem = f"{len(found)} {clause.name} instead of {clause.count}"
            if clause.color or clause.position:
                credits.append(0.0)
        if not problem and clause.color:
            right = sum(f.color == clause.color for f in found)
            credits.append(_nearness(right, clause.count))
            problem = _wrong_color(clause, found)
        if not problem and clause.position:
            problem = _wrong_position(clause, found, matched)
            credits.append(float(not problem))
            if compat == "flow_grpo" and problem and matched[clause.position[1]]:
                credits.append(1.0)
        matched.append(() if problem else found)
        if problem:
            reasons.append(problem)
    return Verdict(sum(credits) / len(credits), not reasons, tuple(reasons))


def _nearness(number: int, count: int) -> float:
    return 1 - abs(number - count) / count


def _unmet(clause: Clause, found: Sequence[Found], matched: Sequence[Sequence[Found]]) -> str:
    """The reason why the official rule fails a clause; empty if the clause is met."""
    if len(found) < clause.count:
        return f"{len(found)} {clause.name} instead of {clause.count}"
    return _wrong_color(clause, found) or _wrong_position(clause, found, matched)


def _wrong_color(clause: Clause, found: Sequence[Found]) -> str:
    if clause.color is None:
        return ""
    if not all(f.color for f in found):
        raise ValueError(f"no colours were determined for {clause.name}")
    right = sum(f.color == clause.color for f in found)
    if right == clause.count:
        return ""
    seen = ", ".join(f.color for f in found)
    return f"{right} {clause.color} {clause.name} instead of {clause.count} (colours: {seen})"


def _wrong_position(
    clause: Clause, found: Sequence[Found], matched: Sequence[Sequence[Found]]
) -> str:
    """The reason why a position is wrong; empty if it is right.

    A position relative to a clause that is not met is wrong.
    """
    if clause.position is None:
        return ""
    relation, target = clause.position
    if not matched[target]:
        return f"nothing there for {clause.name} to be {relation}"
    for item in found:
        for other in matched[target]:
            relations = relations_between(item.box, other.box)
            if relation not in relations:
                seen = (
                    " and ".join(r for r in RELATIONS if r in relations)
                    or "in no clear relation to"
                )
                return f"{clause.name} is {seen} its target instead of {relation}"
    return ""


def _clause(record: Any, place: int, where: str) -> Clause:
    """Check and read one clause; ``place`` is its index in its list."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a clause is an object with 'class' and 'count', got {record!r}")
    name = _known(record.get("class"), OBJECTS, f"{where}: unknown class")
    count, color = record.get("count"), record.get("color")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{where}: the count of {name} must be a positive integer, got {count!r}")
    if color is not None:
        _known(color, COLORS, f"{where}: unknown colour")
    match record.get("position"):
        case None:
            return Clause(name, count, color)
        case [relation, int(target)] if 0 <= target < place:
            relation = _known(relation, RELATIONS, f"{where}: unknown relation")
            return Clause(name, count, color, (relation, target))
        case position:
            raise ValueError(
                f"{where}: the position of {name} must be a relation and the index of an earlier "
                f"clause, got {position!r}"
            )


def _known(value: Any, names: Sequence[str], problem: str) -> str:
    if value not in names:
        raise ValueError(f"{problem} {value!r}{suggest(str(value), names)}")
    return str(value)


def relations_between(box: Sequence[float], other: Sequence[float]) -> frozenset[str]:
    """The relations that hold for ``box`` with respect to ``other``; empty if the boxes coincide.

    Boxes are ``(x0, y0, x1, y1)`` in pixels, x to the right and y downwards. Two relations can hold
    at once ("left of" and "above").
    """
    a = np.asarray(box, dtype=np.float64).reshape(2, 2)
    b = np.asarray(other, dtype=np.float64).reshape(2, 2)
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(np.diff(a, axis=0))[0] + np.abs(np.diff(b, axis=0))[0]
    revised = np.maximum(np.abs(offset) - OVERLAP_TOLERANCE * sizes, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return frozenset()
    # GenEval divides by the length of the offset before it was reduced.
    dx, dy = revised / np.linalg.norm(offset)
    found = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, holds in found.items() if holds)
