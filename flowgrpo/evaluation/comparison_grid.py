"""Comparison grids: images of several models for the same prompts and the same initial noise."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.text import counted
from flowgrpo.data.audio import Audio
from flowgrpo.data.files import replacing, save_tensors
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Prompt
from flowgrpo.data.videos import frames_per_second, write_frames
from flowgrpo.evaluation.grid_drawing import GridRow, RowBoxes, animate_grid, draw_grid, tile_boxes
from flowgrpo.evaluation.grid_settings import DESCRIPTION
from flowgrpo.evaluation.samplers import Sampler
from flowgrpo.evaluation.tiles import KEY, Tile, TileRow, tiles_to_json
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.policy.other_scheduler import with_other_scheduler
from flowgrpo.rewards.scorer import RewardScorer

LONGEST_WEBP = 16383
"""Largest width and height of a WebP file."""


@dataclass(frozen=True)
class ComparisonGrid:
    """The prompts and the noise of a comparison grid; each model adds one block of columns.

    Attributes:
        prompts: One per row.
        samples: Images per row and model.
        seed: Seed of the initial noise.
    """

    prompts: Sequence[Prompt]
    samples: int
    seed: int

    @classmethod
    def of(cls, prompts: PromptSet, rows: int, samples: int, seed: int) -> "ComparisonGrid":
        """Choose the first prompts of each class in turn.

        If the prompts have several sizes, only those of the most frequent size are used, since all
        images of a grid have one shape.
        """
        alike = PromptSet(max(prompts.buckets, key=len), prompts.balance)
        chosen: dict[int, Prompt] = {}
        # Every turn has a new prompt of some class, until all have been chosen.
        for prompt, _ in alike.spread(rows * len(alike.classes())):
            if len(chosen) < rows:
                chosen.setdefault(id(prompt), prompt)
        return cls(list(chosen.values()), samples, seed)

    def generate(self, policy: PipelinePolicy, sampling: Sampling) -> Float[Tensor, "batch *media"]:
        """Generate the images of one model, row by row."""
        return self.generate_with_audio(policy, sampling)[0]

    def generate_with(
        self, policy: PipelinePolicy, sampling: Sampling, sampler: Sampler
    ) -> Float[Tensor, "batch *media"]:
        """As :meth:`generate`, with another sampler; a stochastic one injects the same noise each time.

        Raises:
            ValueError: If its transition is not defined for the model, or its scheduler does not fit it.
        """
        if sampler.scheduler:
            return with_other_scheduler(
                policy, self.expanded, self._noise, sampling, sampler.scheduler
            )
        steps = sampler.stochastic(sampling.num_steps)
        done = policy.run(
            self.expanded,
            self._noise,
            stochastic=steps,
            transition=sampler.transition,
            sampling=sampling,
            solver=sampler.solver,
        )
        return torch.cat([r.media for r in done if r.media is not None])

    def generate_with_audio(
        self, policy: PipelinePolicy, sampling: Sampling
    ) -> tuple[Float[Tensor, "batch *media"], Audio | None]:
        """As :meth:`generate`, with the sound of videos if the model makes any."""
        return policy.media_with_audio(self.expanded, self._noise, sampling)

    @property
    def _noise(self) -> SampleNoise:
        """The stream of each image, row by row, which depends on the seed and its place only."""
        return SampleNoise(
            [
                Random(self.seed).at("grid", row, sample)
                for row in range(len(self.prompts))
                for sample in range(self.samples)
            ]
        )

    @property
    def expanded(self) -> list[Prompt]:
        """The prompt of each image, row by row."""
        return [p for p in self.prompts for _ in range(self.samples)]

    def save(
        self,
        columns: Sequence[str],
        images: Sequence[Float[Tensor, "batch *media"]],
        scorer: RewardScorer,
        sampling: Sampling,
        title: str,
        path: Path | None,
        narrow: bool = False,
    ) -> None:
        """Draw the images of several models next to each other, with their scores, and save the grid.

        Videos are also written as they play, next to the picture with the ending ``.mp4``.

        Args:
            columns: Name of each model.
            images: Images of each model from :meth:`generate`.
            scorer: Its first reward that needs no sound marks each image: ✓ or ✗ if all its scores are
                0 or 1, else the score.
            sampling: Arguments with which the images were generated, for the subtitle.
            title: Headline.
            path: PNG file to write; its folder is created. None scores the images only, for processes that take
                part in their scoring.
            narrow: Draw for the screen of a phone, with the models below each other.

        Raises:
            ImportError: If the media are videos, and no MP4 can be written here.
        """
        label, notes = "", []
        for block in images:
            label, values = scorer.marks(block, self.expanded)
            notes.append([""] * len(block) if values is None else marks(values))
        if path is None:
            return
        rows = []
        for row, prompt in enumerate(self.prompts):
            part = slice(row * self.samples, (row + 1) * self.samples)
            blocks, own = [b[part] for b in images], [n[part] for n in notes]
            rows.append(GridRow(prompt.text, blocks, own, conditions(prompt)))
        height, width = images[0].shape[-2:]
        guidance = "default" if sampling.guidance_scale is None else f"{sampling.guidance_scale:g}"
        subtitle = (
            f"deterministic sampler, {counted(sampling.num_steps, 'step')}, guidance {guidance}, {width}x{height}, "
            f"seed {self.seed}, same noise in the same place{f'; marks: {label}' if label else ''}"
        )
        fps = frames_per_second(sampling.call)
        write_grid(rows, columns, path, title=title, subtitle=subtitle, fps=fps, narrow=narrow)


def marks(values: Float[Tensor, " images"]) -> list[str]:
    """A note for each image: ✓ or ✗ if all scores are 0 or 1, else the score."""
    binary = bool(((values == 0) | (values == 1)).all())
    return [("✓" if v else "✗") if binary else f"{v:.2f}" for v in values.tolist()]


def conditions(prompt: Prompt) -> list[Image.Image]:
    """The pictures of a prompt, to be shown below its text."""
    shown = [*prompt.open_images(), *prompt.open_call().values()]
    return [i for i in shown if isinstance(i, Image.Image)]


def write_grid(
    rows: Sequence[GridRow],
    columns: Sequence[str],
    path: Path,
    *,
    title: str,
    subtitle: str,
    fps: float,
    narrow: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Draw a grid and save it as PNG, and videos also as MP4. The files are replaced atomically.

    A file that ends in ``.webp`` is WebP without loss, and animated if the media are videos. A WebP file
    has at most 16,383 pixels on a side; a larger grid is written as PNG beside it.

    Args:
        rows: One row per prompt.
        columns: Name of each column.
        path: PNG or WebP file; its folder is created.
        title: Headline.
        subtitle: How the images were generated.
        fps: Frames per second of videos.
        narrow: Draw the columns below each other.
        metadata: Texts that are stored in the PNG file, besides the place of each image
            (:mod:`flowgrpo.evaluation.tiles`). In a WebP file the first of them is the description.

    Returns:
        The file that was written.

    Raises:
        ImportError: If the media are videos, and no MP4 can be written here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = draw_grid(rows, columns, title=title, subtitle=subtitle, narrow=narrow)
    if path.suffix.lower() == ".webp":
        if max(picture.size) <= LONGEST_WEBP:
            frames = [picture]
            if rows[0].blocks[0].ndim == 5:
                frames = [
                    *animate_grid(rows, columns, title=title, subtitle=subtitle, narrow=narrow)
                ]
            _save_webp(path, frames, fps, next(iter((metadata or {}).values()), ""))
            return path
        path = path.with_suffix(".png")
    boxes = tile_boxes(rows, columns, title=title, subtitle=subtitle, narrow=narrow)
    info = PngInfo()
    for key, text in {KEY: _tiles(rows, boxes), **(metadata or {})}.items():
        info.add_itxt(key, text)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)
    if rows[0].blocks[0].ndim == 5:
        moving = animate_grid(rows, columns, title=title, subtitle=subtitle, narrow=narrow)
        write_frames(path.with_suffix(".mp4"), (np.asarray(f) for f in moving), fps)
    return path


def _save_webp(path: Path, frames: Sequence[Image.Image], fps: float, text: str) -> None:
    """Write frames without loss, with a text as the EXIF description."""
    exif = Image.Exif()
    exif[DESCRIPTION] = text
    moving = {
        "save_all": True,
        "append_images": frames[1:],
        "duration": round(1000 / fps),
        "loop": 0,
    }
    with replacing(path) as temporary:
        frames[0].save(
            temporary, "WEBP", lossless=True, exif=exif, **(moving if len(frames) > 1 else {})
        )


def _tiles(rows: Sequence[GridRow], boxes: Sequence[RowBoxes]) -> str:
    """The place and the note of each image, for the picture's metadata."""
    found = []
    for row, places in zip(rows, boxes, strict=True):
        notes = row.notes or [[""] * len(b) for b in places.blocks]
        blocks = [
            [Tile(box, note) for box, note in zip(*both, strict=True)]
            for both in zip(places.blocks, notes, strict=True)
        ]
        found.append(TileRow(row.label, blocks, places.conditions))
    return tiles_to_json(found)


def load_images(path: Path) -> Tensor | None:
    """The images that :func:`save_images` wrote; ``None`` if the file does not exist.

    Raises:
        ValueError: If the file is damaged.
    """
    if not path.exists():
        return None
    problem: object = "its SHA-256 differs"
    try:
        with safe_open(path, "pt") as file:
            images, known = file.get_tensor("images"), (file.metadata() or {}).get("sha256")
        if known in (None, _digest(images)):
            return images
    except SafetensorError as error:
        problem = error
    raise ValueError(f"{path} with the base model's images is damaged ({problem})")


def load_audio(path: Path) -> Audio | None:
    """The sound of the images in an undamaged file of :func:`save_images`; ``None`` if there is none."""
    with safe_open(path, "pt") as file:
        if "audio" not in file.keys():  # noqa: SIM118
            return None
        return Audio(file.get_tensor("audio"), int(file.metadata()["rate"]))


def save_images(path: Path, images: Tensor, audio: Audio | None = None) -> None:
    """Save the base model's images, which all grids of a run show, and the sound with which rewards are
    probed. The file is replaced atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, notes = {"images": images.detach().cpu().contiguous()}, {}
    if audio is not None:
        tensors["audio"], notes["rate"] = audio.waveform.contiguous(), str(audio.rate)
    with replacing(path) as temporary:
        save_tensors(temporary, tensors, {"sha256": _digest(tensors["images"]), **notes})


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.view(torch.uint8).numpy().tobytes()).hexdigest()
