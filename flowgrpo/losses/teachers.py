"""The teachers of a distillation: which weights they have, how they sample, and which prompts they teach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

KEY = "loss.teachers"
BASE = "base"
"""The teacher that is the model before training."""
PIPELINE = "pipeline"
"""The teacher that is the pipeline without trained adapters: the model before training, unless training
starts from an adapter (``model.weights.init``)."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen model that a student imitates, at the states that the student visits."""

    path: str = BASE
    """The teacher's weights: ``base`` for the model before training, which needs another guidance than
    the student's; ``pipeline`` for the same without ``model.weights.init``; or a LoRA adapter of the same
    model: a file, folder, hub id or the directory of a finished run, as in ``model.adapters``, or a
    checkpoint of a run, such as ``runs/a/checkpoints/best``."""
    weights: Literal["adapter", "model"] = "adapter"
    """What ``path`` is: an ``adapter``, or a whole ``model``, the folder or hub id of a pipeline whose denoisers
    have the student's architecture. Their weights are held in main memory, and take their place on the
    device beside the student's while the teacher is evaluated."""
    guidance_scale: float | None = None
    """Guidance scale of the teacher; if unset, that of ``sampling``. With another scale than the student's,
    guidance is distilled into the weights."""
    call: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's call for the teacher, such as ``true_cfg_scale``; they come on top
    of ``sampling.call``."""
    tags: tuple[str, ...] = ()
    """The teacher's prompts: values of the metadata key ``loss.task_key``. If empty, it teaches the prompts
    that no other teacher names."""
    share: float = 1.0
    """Its part of the prompts that no teacher names, in proportion to the shares of the other teachers
    without ``tags``. Their groups take turns, so that each iteration has the same parts."""

    @property
    def is_base(self) -> bool:
        """Whether the teacher is the model before training."""
        return self.path == BASE

    @property
    def is_named(self) -> bool:
        """Whether ``path`` names weights of its own: a file, a folder or a hub id."""
        return self.path not in (BASE, PIPELINE)


@dataclass(frozen=True)
class Teachers:
    """All teachers of a distillation.

    Attributes:
        all: The teachers.
        task_key: The key of a prompt's metadata that ``tags`` refer to.
    """

    all: Sequence[Teacher]
    task_key: str = "tag"

    @property
    def paths(self) -> list[str]:
        """The paths of the teachers' adapters, each once."""
        some = (t for t in self.all if not t.is_base and t.weights == "adapter")
        return list(dict.fromkeys(t.path for t in some))

    @property
    def models(self) -> list[str]:
        """The paths of the teachers that are whole models, each once."""
        return list(dict.fromkeys(t.path for t in self.all if t.weights == "model"))

    @property
    def use_base(self) -> bool:
        """Whether one of them is the model before training."""
        return any(t.is_base for t in self.all)

    def of(self, metadata: Mapping[str, Any], group: int) -> int:
        """The number of a prompt's teacher.

        Args:
            metadata: The prompt's.
            group: Index of its group in the iteration, over all processes.

        Raises:
            ValueError: If no teacher teaches the prompt.
        """
        tag = str(metadata.get(self.task_key, ""))
        for number, teacher in enumerate(self.all):
            if tag in teacher.tags:
                return number
        free = [i for i, teacher in enumerate(self.all) if not teacher.tags]
        if not free:
            known = ", ".join(repr(t) for teacher in self.all for t in teacher.tags)
            raise ValueError(
                f"loss.teachers: no teacher teaches prompts whose {self.task_key!r} is {tag!r} (those have tags: "
                f"{known}); add it to the tags of one, or a teacher without tags"
            )
        return free[turn([self.all[i].share for i in free], group)]

    def check(self) -> None:
        """Raise ValueError if there are no teachers, or their settings contradict each other."""
        if not self.all:
            raise ValueError(
                "loss.teachers is empty; add a table [[loss.teachers]], with guidance_scale to distil the "
                "guidance of the model itself, or with the path of an adapter"
            )
        named: dict[str, int] = {}
        for number, teacher in enumerate(self.all):
            if not teacher.path:
                raise ValueError(
                    f"loss.teachers[{number}].path is empty; use {BASE!r} for the model before training, or the "
                    "path of an adapter"
                )
            if teacher.weights == "model" and teacher.path in (BASE, PIPELINE):
                raise ValueError(
                    f"loss.teachers[{number}].path = {teacher.path!r} is the student's own model; with weights = "
                    "'model' give the folder or hub id of another pipeline"
                )
            if not 0 < teacher.share < float("inf"):
                raise ValueError(
                    f"loss.teachers[{number}].share must be above 0, got {teacher.share:g}"
                )
            if teacher.tags and teacher.share != 1.0:
                raise ValueError(
                    f"loss.teachers[{number}] has tags and a share, and a teacher with tags teaches all prompts "
                    "with them; remove one"
                )
            for tag in teacher.tags:
                if tag in named:
                    raise ValueError(
                        f"loss.teachers[{named[tag]}] and loss.teachers[{number}] both have the tag {tag!r}; a "
                        "prompt has one teacher, so remove it from one"
                    )
                named[tag] = number


def turn(shares: Sequence[float], index: int) -> int:
    """Whose turn it is at an index, if turns are taken in proportion to shares.

    Each turn goes to the one that is furthest behind its share; equal shares take turns in order.

    Args:
        shares: The shares, above 0.
        index: Counted from 0.
    """
    total, taken = sum(shares), [0] * len(shares)
    chosen = 0
    for number in range(1, index + 2):
        behind = [number * s / total - t for s, t in zip(shares, taken, strict=True)]
        # Rounding must not decide between equal ones.
        chosen = next(i for i, b in enumerate(behind) if b > max(behind) - 1e-9)
        taken[chosen] += 1
    return chosen
