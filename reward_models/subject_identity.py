"""Identity of several subjects: each is found in the image and compared with its reference image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import nms
from transformers import Dinov2Model, Owlv2ForObjectDetection, Owlv2Processor

from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import Precision, from_pretrained, pick_device, pick_dtype
from reward_models.shared.pictures import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_media,
    finite_only,
    pictures,
    read_image,
    shrunk_and_cropped,
)

__all__ = ["SubjectIdentity"]
WEIGHTS = ("model", "detector")
PATHS = ("root",)

RESIZE, CROP = 256, 224


@dataclass(frozen=True)
class Subject:
    """A subject that an image should show: a few words for the detector, and its reference image."""

    name: str
    reference: Path


class SubjectIdentity:
    """The mean similarity of the subjects of an image to their references, in [-1, 1].

    An open-vocabulary detector finds candidates for all subjects by their names. Each candidate and
    each reference is embedded by DINOv2's class token, and the Hungarian algorithm assigns every
    subject a candidate of its own, so that the sum of cosines is highest. A subject without a
    candidate counts 0. An image in which one subject appears twice and the other not at all therefore
    scores low, which the similarity of whole images does not show.

    This is the idea of MultiCrafter's reward for subject fidelity (arXiv:2509.21953), which also
    matches by the Hungarian algorithm. The detector and the embedding are of our choice: the paper's
    code was not available. For faces, DINOv2 is a weak measure of identity.

    A prompt's ``metadata["subjects"]`` is a list of objects with ``name`` (such as "dog") and
    ``reference`` (a file). References show the subject alone; they are not cropped. The defaults are
    ``google/owlv2-base-patch16-ensemble`` and ``facebook/dinov2-base`` (both Apache-2.0, 1 GB
    together in fp32). Of candidates that overlap by more than ``overlap``, only the likeliest counts.
    Crops and references are resized to 256 and cropped to 224, as DINOv2's card says. It was not
    tested with the published weights, which were not available.

    Images are rounded to 8 bits first; an image with NaN scores NaN.
    """

    def __init__(
        self,
        model: str = "facebook/dinov2-base",
        detector: str = "google/owlv2-base-patch16-ensemble",
        key: str = "subjects",
        root: str = "",
        threshold: float = 0.2,
        overlap: float = 0.5,
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            model: Hub id or folder of a ``Dinov2Model``.
            detector: Hub id or folder of an ``Owlv2ForObjectDetection`` with its processor.
            key: Metadata key of a prompt's subjects.
            root: Folder that relative paths start from; by default the working directory.
            threshold: Lowest score of a candidate, exclusive.
            overlap: Highest intersection over union of two candidates.
            dtype: Precision of both models.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or weights are missing or left over.
            OSError: If there is no such model.
        """
        if not (0 <= threshold < 1 and 0 <= overlap <= 1):
            raise ValueError(
                f"threshold must be in [0, 1) and overlap in [0, 1], got {threshold}, {overlap}"
            )
        self.key, self.root = key, Path(root)
        self.threshold, self.overlap = threshold, overlap
        precision, device = pick_dtype(dtype), pick_device(device)
        self.model = from_pretrained(
            Dinov2Model, model, "DINOv2 model", precision, ("embeddings.mask_token",)
        ).to(device)
        self.detector = from_pretrained(
            Owlv2ForObjectDetection, detector, "OWLv2 detector", precision
        ).to(device)
        self.processor: Any = Owlv2Processor.from_pretrained(detector)
        self._references: dict[Path, Tensor] = {}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If one names no subjects, or a reference that is no file.
        """
        for prompt in prompts:
            for subject in self.subjects(prompt):
                if not subject.reference.is_file():
                    raise ValueError(
                        f"reference {str(subject.reference)!r} of prompt {prompt.text!r} is no file"
                    )

    def subjects(self, prompt: Prompt) -> list[Subject]:
        """The subjects of a prompt.

        Raises:
            ValueError: If it names none, or in another form.
        """
        named = prompt.metadata.get(self.key)
        entries = named if isinstance(named, list | tuple) else []
        found = []
        for entry in entries:
            parts = [
                entry.get(k) if isinstance(entry, Mapping) else None for k in ("name", "reference")
            ]
            if not all(isinstance(part, str) and part for part in parts):
                entries = []
                break
            found.append(Subject(str(parts[0]), self.root / str(parts[1])))
        if not entries:
            raise ValueError(
                f"prompt {prompt.text!r} needs metadata {self.key!r}, a list of objects with name and "
                f"reference; it has {named!r}"
            )
        return found

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a prompt names no subjects.
            OSError: If a reference cannot be read.
        """
        check_media(media, prompts)
        wanted = [self.subjects(p) for p in prompts]
        scores = []
        for image, subjects in zip(pictures(media), wanted, strict=True):
            crops = [image.crop(box) for box in self.find(image, [s.name for s in subjects])]
            if not crops:
                scores.append(0.0)
                continue
            references = torch.stack([self._reference(s.reference) for s in subjects])
            cosines = (references @ self.embed(crops).T).cpu().numpy()
            rows, columns = linear_sum_assignment(cosines, maximize=True)
            scores.append(float(cosines[rows, columns].sum()) / len(subjects))
        return finite_only(torch.tensor(scores), media)

    @torch.no_grad()
    def find(self, image: Image.Image, names: Sequence[str]) -> list[tuple[int, int, int, int]]:
        """Boxes of candidates for any of the names: left, top, right and bottom in whole pixels."""
        inputs = self.processor(
            text=[list(dict.fromkeys(names))], images=[image], return_tensors="pt"
        ).to(self.detector.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.detector.dtype)
        output = self.detector(**inputs)
        scores = output.logits[0].float().sigmoid().amax(-1)
        center, size = output.pred_boxes[0].float().chunk(2, -1)
        # The processor pads images at the right and below to a square; boxes are shares of it.
        boxes = torch.cat([center - size / 2, center + size / 2], -1) * max(image.size)
        limits = torch.tensor([*image.size, *image.size], device=boxes.device)
        boxes = torch.minimum(boxes.clamp(min=0), limits)
        likely = scores > self.threshold
        boxes, scores = boxes[likely], scores[likely]
        found = []
        for left, top, right, bottom in boxes[nms(boxes, scores, self.overlap)].tolist():
            box = (int(left), int(top), math.ceil(right), math.ceil(bottom))
            if box[2] - box[0] > 1 and box[3] - box[1] > 1:
                found.append(box)
        return found

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        """Class tokens of length 1, in fp32."""
        pixels = shrunk_and_cropped(images, RESIZE, CROP, IMAGENET_MEAN, IMAGENET_STD, odd="floor")
        output = self.model(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return F.normalize(output.pooler_output.float(), dim=-1)

    def _reference(self, path: Path) -> Float[Tensor, " width"]:
        if path not in self._references:
            self._references[path] = self.embed([read_image(path)])[0]
        return self._references[path]
