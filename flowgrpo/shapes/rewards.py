"""Rewards and metrics of the embedded world."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.shapes import verifier
from flowgrpo.shapes.verifier import Detection, detect
from flowgrpo.shapes.world import IMAGE_SIZE, WORLD, World


def detections(images: Float[Tensor, "batch 3 h w"], world: World = WORLD) -> list[list[Detection]]:
    """The detected objects of each image."""
    return [detect(image, world) for image in images.permute(0, 2, 3, 1).numpy()]


def _record(prompt: Prompt) -> Mapping[str, object]:
    if "include" not in prompt.metadata:
        raise ValueError(
            f"prompt {prompt.text!r} has no GenEval record (tag, include) in its metadata; use the "
            "prompts in prompts/shapes_*.jsonl with the rewards of the shapes world"
        )
    return prompt.metadata


class _Verified:
    """A reward that looks for the objects of a world."""

    def __init__(self, world: World = WORLD):
        """
        Args:
            world: What the images show.
        """
        self.world = world


class Strict(_Verified):
    """1 if an image matches its prompt by GenEval's rule, else 0."""

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        found = detections(media, self.world)
        return torch.tensor(
            [verifier.strict(d, dict(_record(p))) for d, p in zip(found, prompts, strict=True)]
        )


class Graded(_Verified):
    """Partial credit in [0, 1] for the objects and attributes of the prompt that an image shows."""

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        found = detections(media, self.world)
        return torch.tensor(
            [verifier.graded(d, dict(_record(p))) for d, p in zip(found, prompts, strict=True)]
        )


class StrictAndGraded(_Verified):
    """The mean of :class:`Strict` and :class:`Graded`, with one detection per image."""

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        found = detections(media, self.world)
        return torch.tensor(
            [
                sum(verifier.strict_and_graded(d, dict(_record(p)))) / 2
                for d, p in zip(found, prompts, strict=True)
            ]
        )


class Diversity(_Verified):
    """A metric of evaluations: diversity of the attributes that a prompt leaves open.

    ``diversity/color`` is the entropy of the colours of objects whose colour the prompt does not name,
    divided by its maximum: 1 for a uniform distribution, 0 for a single colour. ``diversity/position``
    and ``diversity/size`` are standard deviations of the objects' centres and sizes within a prompt, as
    shares of the image's side.
    """

    def __call__(
        self, prompts: Sequence[Prompt], media: Sequence[Float[Tensor, "_ 3 h w"]]
    ) -> Mapping[str, float]:
        colors: Counter[str] = Counter()
        positions, sizes = [], []
        for prompt, images in zip(prompts, media, strict=True):
            found = [[d for d in ds if d.genuine] for ds in detections(images, self.world)]
            open_shapes = {
                c["class"] for c in prompt.metadata.get("include", ()) if "color" not in c
            }
            colors.update(
                d.color
                for ds in found
                for d in ds
                if d.shape in open_shapes and d.color in self.world.colors
            )
            wanted = [c["class"] for c in prompt.metadata.get("include", ())]
            for shape in wanted:
                first = [next((d for d in ds if d.shape == shape), None) for ds in found]
                boxes = torch.tensor([d.box for d in first if d is not None])
                if len(boxes) >= 2:
                    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
                    positions.append(float(centres.std(0, correction=0).mean()) / IMAGE_SIZE)
                    sizes.append(float((boxes[:, 2] - boxes[:, 0]).std(correction=0)) / IMAGE_SIZE)
        return {
            "diversity/color": entropy(colors) / math.log(len(self.world.colors)),
            "diversity/position": sum(positions) / max(1, len(positions)),
            "diversity/size": sum(sizes) / max(1, len(sizes)),
        }


def entropy(counts: Counter[str]) -> float:
    """Shannon entropy of counts in nats; 0 for none."""
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values()) if total else 0.0
