"""The prompts of a run, and the reproducible order in which they are trained on."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flowgrpo.core.imports import suggest
from flowgrpo.core.random import Random
from flowgrpo.core.tensors import torch
from flowgrpo.data.examples import read_examples
from flowgrpo.data.prompt_files import PICTURES, PromptError, read_prompts
from flowgrpo.data.prompts import Group, Prompt

__all__ = ["PromptError", "PromptSet", "identity", "shared"]


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their file.

    Attributes:
        prompts: At least one.
        balance: Metadata key whose values are drawn equally often; empty for none.
        fixed_size: Whether the configuration gives a size to the prompts that have none of their
            own. If not, the size of a sample may follow from its input image.
        weights: How often the classes are drawn, by the value of the balance key, relative to each
            other; 1 for a class that is not named.
    """

    prompts: Sequence[Prompt]
    balance: str = ""
    fixed_size: bool = True
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        path: Path,
        balance: str = "",
        fixed_size: bool = True,
        num_targets: int = 0,
        weights: Mapping[str, float] | None = None,
    ) -> "PromptSet":
        """Read a prompt file or dataset; see :mod:`flowgrpo.data.prompt_files` for the formats.

        With ``num_targets``, 1 or 2, the pictures or pairs of a file or folder are read
        (:mod:`flowgrpo.data.examples`).

        Raises:
            PromptError: If the file cannot be used, a prompt lacks the balance key, or a weight names no
                class.
        """
        prompts = read_examples(path, num_targets) if num_targets else read_prompts(path)
        if balance:
            for number, prompt in enumerate(prompts, start=1):
                if balance not in prompt.metadata:
                    raise PromptError(
                        f"{path}: prompts.balance = {balance!r}, but prompt {number} ({prompt.text!r}) has no such metadata"
                    )
        known = {str(p.metadata[balance]) for p in prompts} if balance else set[str]()
        for name in weights or {}:
            if name not in known:
                raise PromptError(
                    f"prompts.weights.{name}: no prompt of {path} has {balance} = {name!r}; its values are "
                    f"{', '.join(sorted(known))}{suggest(name, sorted(known))}"
                )
        return cls(prompts, balance, fixed_size, weights or {})

    def classes(self) -> list[list[Prompt]]:
        """The prompts by the value of the balance key; one class without it."""
        return self._classes(self.prompts)

    def _classes(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        if not self.balance:
            return [list(prompts)]
        values: dict[Any, list[Prompt]] = {}
        for prompt in prompts:
            values.setdefault(str(prompt.metadata[self.balance]), []).append(prompt)
        return list(values.values())

    @cached_property
    def buckets(self) -> list[list[Prompt]]:
        """The prompts by the size of their samples; one batch holds samples of one size."""
        sizes: dict[Hashable, list[Prompt]] = {}
        for prompt in self.prompts:
            follows_image = prompt.height is None and not self.fixed_size
            images = tuple(i.size for i in prompt.open_images()) if follows_image else ()
            sizes.setdefault((prompt.size, images), []).append(prompt)
        return list(sizes.values())

    def groups(self, iteration: int, number: int, random: Random) -> list[Group]:
        """The prompts of an iteration, indexed from 0; all of one size.

        Sizes alternate in proportion to their numbers of prompts. Within a size the classes
        alternate, in proportion to their weights, and each class is read in shuffled order, shuffled anew
        in every epoch. The result
        depends only on the arguments, so that a resumed run continues with the right prompts.

        Args:
            iteration: Counted from 0.
            number: Groups of the iteration, over all processes.
            random: Keyed by the seed alone.
        """
        buckets = self.buckets
        bucket, before = _turn([len(b) for b in buckets], iteration)
        classes = self._classes(buckets[bucket])
        keys = (bucket,) if len(buckets) > 1 else ()
        turns = self._turns(bucket, classes, before * number, number)
        result = []
        for index in range(number):
            turn, which = turns[index]
            prompts = classes[which]
            epoch, place = divmod(turn, len(prompts))
            generator = random.generator("order", *keys, which, epoch)
            order = torch.randperm(len(prompts), generator=generator)
            result.append(Group(index, prompts[int(order[place])]))
        return result

    def _turns(
        self, bucket: int, classes: Sequence[Sequence[Prompt]], first: int, number: int
    ) -> list[tuple[int, int]]:
        """For each of ``number`` draws from draw ``first`` on, the draws of its class before, and the class."""
        if not self.weights:
            return [divmod(place, len(classes)) for place in range(first, first + number)]
        names = [str(prompts[0].metadata[self.balance]) for prompts in classes]
        weights = [self.weights.get(name, 1.0) for name in names]
        used, drawn = self._drawn.setdefault(bucket, ([0] * len(classes), []))
        while len(drawn) < first + number:
            which = _furthest_behind(weights, used, len(drawn))
            drawn.append((used[which], which))
            used[which] += 1
        return drawn[first : first + number]

    @cached_property
    def _drawn(self) -> dict[int, tuple[list[int], list[tuple[int, int]]]]:
        """By bucket: the draws of each class so far, and all draws, which are computed once."""
        return {}

    def spread(self, number: int) -> list[tuple[Prompt, int]]:
        """``number`` (prompt, sample) pairs for an evaluation, spread evenly over the classes.

        Within a class, sample 0 of every prompt comes before sample 1 of any prompt.
        """
        classes = self.classes()
        pairs = []
        for index in range(number):
            turn, which = divmod(index, len(classes))
            sample, place = divmod(turn, len(classes[which]))
            pairs.append((classes[which][place], sample))
        return pairs


def shared(train: PromptSet, held_out: PromptSet) -> list[Prompt]:
    """The held-out prompts that are also training prompts: equal text and equal input images.

    Evaluations on them measure what was trained, not what was learned for other prompts.
    """
    known = {identity(p) for p in train.prompts}
    return [p for p in held_out.prompts if identity(p) in known]


def identity(prompt: Prompt) -> Hashable:
    """What makes two prompts the same for a model. Pictures in memory are compared as objects."""
    pictures = [*prompt.images, *(prompt.call.get(k) for k in PICTURES)]
    images = tuple(str(i) if isinstance(i, Path) else id(i) for i in pictures if i is not None)
    return " ".join(prompt.text.split()).casefold(), images


def _turn(weights: Sequence[int], iteration: int) -> tuple[int, int]:
    """The index whose turn an iteration is, in proportion to the weights, and its number of turns before."""
    if len(weights) == 1:
        return 0, iteration
    used = [0] * len(weights)
    for i in range(iteration + 1):
        chosen = _furthest_behind(weights, used, i)
        used[chosen] += 1
    return chosen, used[chosen] - 1


def _furthest_behind(weights: Sequence[int | float], used: Sequence[int], turns: int) -> int:
    """The index that after ``turns`` turns is furthest behind its share of the next one."""
    total = sum(weights)
    return max(range(len(weights)), key=lambda w: weights[w] * (turns + 1) / total - used[w])
