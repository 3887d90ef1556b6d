"""GenEval: a detector checks the objects, their number, colours and positions (arXiv:2310.11513)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from flowgrpo.core.geneval import (
    COLORS,
    OBJECTS,
    Box,
    Detection,
    Detector,
    Found,
    Task,
    Verdict,
    num_to_color,
    select,
    soft,
    strict,
)
from flowgrpo.data.prompts import Prompt
from reward_models.shared.checkpoints import Precision, pick_device, pick_dtype
from reward_models.shared.pictures import check_media, eight_bits

__all__ = ["GenEval"]
WEIGHTS = ("detector",)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORTEST_EDGE, LONGEST_EDGE, SIZE_DIVISOR = 800, 1333, 32
"""The test pipeline of the published detectors; the processor on the hub says 384x384 instead."""
MAX_INSTANCES = 100
BATCH_SIZE = 8
BACKGROUND = "#999"
COLOR_TEMPLATES = (
    "a photo of a {c} {name}",
    "a photo of a {c}-colored {name}",
    "a photo of a {c} object",
)


class GenEval:
    """GenEval with another detector than the official one; reports should call it "GenEval (HF detector)".

    ``strict`` is the benchmark's rule, 0 or 1. ``soft`` is Flow-GRPO's training reward, the mean
    credit over what a prompt asks for: at most 1, negative where there are far too many objects.
    Formulas: :mod:`flowgrpo.core.geneval`. The prompts' metadata are GenEval's records.

    Objects come from ``facebook/mask2former-swin-small-coco-instance`` (code MIT; card: "other";
    trained on COCO), colours from OpenAI's CLIP ViT-L/14 (MIT) as in the benchmark: the object on
    grey, cropped, against three phrases per colour. The official weights are another training of
    that detector, in mmdet, so scores come near the published ones but do not equal them; compare
    only scores of the same detector. About 1.5 GB of memory. Images are rounded to 8 bits first, as
    saved ones are. Flow-GRPO's server also swapped colour channels before detection and re-coded
    images as JPEG; this reward does neither.

    An image with NaN scores NaN.
    """

    def __init__(
        self,
        mode: Literal["soft", "strict"] = "soft",
        compat: Literal["flow_grpo"] | None = None,
        detector: str | Detector = "facebook/mask2former-swin-small-coco-instance",
        color_model: str = "ViT-L-14",
        color_pretrained: str = "openai",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        dtype: Precision = "float32",
        device: str = "auto",
    ):
        """
        Args:
            mode: The rule; see above.
            compat: ``flow_grpo`` reproduces an error in its rule for positions (``soft`` only). Results
                of Flow-GRPO and of methods that use its server have this error.
            detector: Hub id or folder of a Mask2Former for COCO instances, or any detector.
            color_model: Architecture name of open_clip, or ``hf-hub:...`` / ``local-dir:...``.
            color_pretrained: Weights of that architecture: a tag of open_clip or a file.
            threshold: Lowest score of a detection, exclusive.
            counting_threshold: The threshold for prompts of the task ``counting``.
            max_objects: Most objects of one class.
            dtype: Precision of both models.
            device: ``auto`` takes a GPU if there is one.

        Raises:
            ValueError: If an option is wrong, or the detector's checkpoint does not fit.
            OSError: If there is no such detector.
        """
        if mode not in ("soft", "strict") or compat not in (None, "flow_grpo"):
            raise ValueError(
                "mode must be 'soft' or 'strict' and compat 'flow_grpo' or nothing, "
                f"got {mode!r}, {compat!r}"
            )
        if compat and mode == "strict":
            raise ValueError("compat concerns mode 'soft' only: the strict rule is the benchmark's")
        if not (0 <= threshold < 1 and 0 <= counting_threshold < 1 and max_objects > 0):
            raise ValueError(
                "thresholds must be in [0, 1) and max_objects positive, "
                f"got {threshold}, {counting_threshold}, {max_objects}"
            )
        precision, device = pick_dtype(dtype), pick_device(device)
        self.mode, self.compat = mode, compat
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.max_objects = max_objects
        self.detector: Detector = (
            Mask2FormerDetector(
                detector, device, min(threshold, counting_threshold), dtype=precision
            )
            if isinstance(detector, str)
            else detector
        )
        self.colors = ColorClassifier(color_model, color_pretrained, device, precision)

    @property
    def title(self) -> str:
        """The name of the metric in reports."""
        return f"GenEval ({self.detector.name})"

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts have what the reward needs; called before training starts.

        Raises:
            ValueError: If one has no GenEval metadata.
        """
        for prompt in prompts:
            Task.read(prompt.metadata, prompt.text)

    def __call__(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, " batch"]:
        """
        Raises:
            ValueError: If a prompt has no GenEval metadata.
        """
        return torch.tensor([v.score for v in self.verdicts(media, prompts)], dtype=torch.float32)

    @torch.no_grad()
    def verdicts(
        self, media: Float[Tensor, "batch 3 h w"], prompts: Sequence[Prompt]
    ) -> list[Verdict]:
        """The score of each image with its reasons."""
        check_media(media, prompts)
        tasks = [Task.read(p.metadata, p.text) for p in prompts]
        pixels = eight_bits(media)
        detected = self.detector.detect(pixels.float() / 255)
        objects = [
            select(
                found,
                self.counting_threshold if task.tag == "counting" else self.threshold,
                self.max_objects,
            )
            for task, found in zip(tasks, detected, strict=True)
        ]
        colored = self._color(pixels, tasks, objects)
        finite = media.isfinite().flatten(1).all(1).tolist()
        return [
            self._verdict(task, found) if good else Verdict(math.nan, False, ("no finite image",))
            for task, found, good in zip(tasks, colored, finite, strict=True)
        ]

    def _verdict(self, task: Task, objects: Mapping[str, Sequence[Found]]) -> Verdict:
        return strict(task, objects) if self.mode == "strict" else soft(task, objects, self.compat)

    def _color(
        self,
        pixels: UInt8[Tensor, "batch 3 h w"],
        tasks: Sequence[Task],
        objects: Sequence[Mapping[str, Sequence[Detection]]],
    ) -> list[dict[str, list[Found]]]:
        """The objects, with their colour where the task asks for one."""
        places: list[tuple[int, str, int]] = []
        crops: list[Image.Image] = []
        for row, (task, found) in enumerate(zip(tasks, objects, strict=True)):
            image = Image.fromarray(pixels[row].permute(1, 2, 0).cpu().numpy())
            for name, number in num_to_color(task, found).items():
                places += [(row, name, rank) for rank in range(number)]
                crops += [crop(image, detection) for detection in found[name][:number]]
        colors = dict(zip(places, self.colors(crops, [name for _, name, _ in places]), strict=True))
        return [
            {
                name: [Found(d.box, colors.get((row, name, i), "")) for i, d in enumerate(same)]
                for name, same in found.items()
            }
            for row, found in enumerate(objects)
        ]


class Mask2FormerDetector:
    """COCO instances from a ``Mask2FormerForUniversalSegmentation``, post-processed as in mmdet."""

    name = "HF detector"

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        device: str = "cpu",
        min_score: float = 0.3,
        batch_size: int = BATCH_SIZE,
        dtype: torch.dtype = torch.float32,
    ):
        """
        Args:
            model: Hub id or folder.
            device: Where it runs.
            min_score: Weaker detections are left out.
            batch_size: Images in one forward pass.
            dtype: Precision of the model.

        Raises:
            ValueError: If weights are missing or left over, or the classes are not COCO's 80.
        """
        self.model = _load(model, dtype).to(device).eval().requires_grad_(False)
        if self.model.config.num_labels != len(OBJECTS):
            raise ValueError(
                f"{model!r} knows {self.model.config.num_labels} classes; GenEval needs COCO's "
                f"{len(OBJECTS)} instance classes"
            )
        self.min_score, self.batch_size = min_score, batch_size

    @torch.no_grad()
    def detect(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> list[dict[int, list[Detection]]]:
        """For every image in [0, 1]: class index -> detections."""
        height, width = images.shape[-2:]
        scaled = detector_size(height, width)
        padded = with_padding(scaled)
        found = []
        for part in images.split(self.batch_size):
            pixels = F.interpolate(
                part.to(self.model.device), scaled, mode="bilinear", antialias=True
            )
            mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
            pixels = F.pad(
                (pixels - mean) / std, (0, padded[1] - scaled[1], 0, padded[0] - scaled[0])
            )
            output = self.model(pixel_values=pixels.to(self.model.dtype))
            for classes, masks in zip(
                output.class_queries_logits.float(),
                output.masks_queries_logits.float(),
                strict=True,
            ):
                found.append(instances(classes, masks, scaled, (height, width), self.min_score))
        return found


def detector_size(height: int, width: int) -> tuple[int, int]:
    """The size of an image in the detector; the aspect ratio is kept."""
    scale = min(SHORTEST_EDGE / min(height, width), LONGEST_EDGE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def with_padding(size: tuple[int, int]) -> tuple[int, int]:
    """The size with the padding on the right and below that the detector needs."""
    height, width = (math.ceil(length / SIZE_DIVISOR) * SIZE_DIVISOR for length in size)
    return height, width


def instances(
    classes: Float[Tensor, "queries classes_and_none"],
    masks: Float[Tensor, "queries mask_height mask_width"],
    scaled: tuple[int, int],
    size: tuple[int, int],
    min_score: float,
) -> dict[int, list[Detection]]:
    """Detections from the logits for one image.

    The best (query, class) pairs, each with its query's mask. Score: the class probability times
    the mean probability of the mask's pixels. A query can stand for several classes.

    Args:
        classes: Class logits; the last class is "nothing".
        masks: Mask logits of the padded image.
        scaled: Size of the image in the detector, without padding.
        size: Size of the image.
        min_score: Weaker detections are left out.
    """
    probabilities = classes.softmax(-1)[:, :-1]
    number = min(MAX_INSTANCES, probabilities.numel())
    likely, places = probabilities.flatten().topk(number)
    # A mask can only lower the score, so weaker candidates need none.
    likely, places = likely[likely > min_score], places[likely > min_score]
    if not len(likely):
        return {}
    labels, queries = places % probabilities.shape[1], places // probabilities.shape[1]
    logits = F.interpolate(masks[queries][None], with_padding(scaled), mode="bilinear")
    logits = logits[..., : scaled[0], : scaled[1]]
    logits = F.interpolate(logits, size, mode="bilinear")[0]
    inside = logits > 0
    certainty = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    found: dict[int, list[Detection]] = {}
    for label, score, mask in zip(
        labels.tolist(), (likely * certainty).tolist(), inside.cpu().numpy(), strict=True
    ):
        if score > min_score:  # so the mask is not empty
            found.setdefault(label, []).append(Detection(box_of(mask), score, mask))
    return found


def box_of(mask: Bool[np.ndarray, "height width"]) -> Box:
    """The smallest box around a mask; the second corner lies outside."""
    y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(x[0]), float(y[0]), float(x[-1] + 1), float(y[-1] + 1)


def crop(image: Image.Image, detection: Detection) -> Image.Image:
    """The object on grey, cropped: the input of the colour classifier."""
    if detection.mask is not None:
        mask = Image.fromarray(np.where(detection.mask, 255, 0).astype(np.uint8))
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), mask)
    x0, y0, x1, y1 = (round(v) for v in detection.box)
    return image.crop((x0, y0, x1, y1))


class ColorClassifier:
    """The colour of a cropped object, zero-shot by CLIP."""

    def __init__(
        self,
        model: str = "ViT-L-14",
        pretrained: str = "openai",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        """
        Raises:
            ValueError: If open_clip does not know the weights.
            RuntimeError: If there are no weights.
        """
        own_weights = ":" in model
        options: dict[str, Any] = {"device": device}
        if not own_weights:
            if not Path(pretrained).is_file():
                known = open_clip.list_pretrained_tags_by_model(model)
                if pretrained not in known:
                    raise ValueError(
                        f"no weights {pretrained!r} for {model!r}: neither a file nor one of "
                        f"{', '.join(known) or 'any known tags'}"
                    )
            # open_clip only warns where weights want another activation than the architecture has.
            config = open_clip.get_pretrained_cfg(model, pretrained)
            options |= {
                "pretrained": pretrained,
                "force_quick_gelu": bool(config.get("quick_gelu")),
            }
        self.model, self.preprocess = open_clip.create_model_from_pretrained(model, **options)
        self.model.to(dtype).eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.device, self.dtype = device, dtype
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        """The most likely of GenEval's colours for each crop of an object of a class."""
        if not crops:
            return []
        pixels = torch.stack([self.preprocess(image) for image in crops])
        parts = pixels.split(BATCH_SIZE)
        seen = [self.model.encode_image(p.to(self.device, self.dtype)) for p in parts]
        embeddings = F.normalize(torch.cat(seen).float(), dim=-1)
        return [
            COLORS[int((self._embeddings(name) @ embedding).argmax())]
            for name, embedding in zip(names, embeddings, strict=True)
        ]

    def _embeddings(self, name: str) -> Float[Tensor, "colors width"]:
        """One embedding per colour: the mean over the phrases."""
        if name not in self._texts:
            texts = [t.format(c=c, name=name) for c in COLORS for t in COLOR_TEMPLATES]
            tokens = self.tokenizer(texts).to(self.device)
            phrases = F.normalize(self.model.encode_text(tokens).float(), dim=-1)
            means = phrases.unflatten(0, (len(COLORS), len(COLOR_TEMPLATES))).mean(1)
            self._texts[name] = F.normalize(means, dim=-1)
        return self._texts[name]


def _load(model: str, dtype: torch.dtype) -> Mask2FormerForUniversalSegmentation:
    """The detector, if every weight in it comes from the checkpoint."""
    loaded, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        model, dtype=dtype, output_loading_info=True
    )
    # Old checkpoints hold tables that transformers computes, and weights of the loss.
    tables = {name.rsplit(".", 1)[-1] for name, _ in loaded.named_buffers()}
    left_over = {k for k in info["unexpected_keys"] if k.rsplit(".", 1)[-1] not in tables}
    missing = {k for k in info["missing_keys"] if not k.startswith("criterion.")}
    for what, keys in (("missing", missing), ("left over", left_over)):
        if keys:
            raise ValueError(
                f"{model!r} is no Mask2Former: {len(keys)} weights are {what}, such as {min(keys)}"
            )
    return loaded
