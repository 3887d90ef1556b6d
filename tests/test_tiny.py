"""The tiny pipeline folders load as plain diffusers folders and answer to prompt and seed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.tiny import FAMILIES, Family, save


def generate(pipe: DiffusionPipeline, family: Family, prompt: str, seed: int) -> Tensor:
    """Two steps of the pipeline's own call."""
    generator = torch.Generator().manual_seed(seed)
    steps: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    output = pipe(prompt=prompt, generator=generator, **steps, **family.call)
    media: Tensor = output.frames if family.video else output.images
    return media


@pytest.mark.parametrize("name", FAMILIES)
def test_folder_loads_and_generates(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = save(name, tmp_path / name)
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 2e6
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    first = generate(pipe, family, "a red cube", 0)
    frames = (family.call["num_frames"],) if family.video else ()
    assert first.shape == (1, *frames, 3, family.call["height"], family.call["width"])
    assert first.isfinite().all()
    assert first.std() > 0.05
    assert torch.equal(first, generate(pipe, family, "a red cube", 0))
    assert (first - generate(pipe, family, "two blue dogs riding a bus", 0)).abs().max() > 0.01
    assert (first - generate(pipe, family, "a red cube", 1)).abs().max() > 0.1


def test_build_is_seeded_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one, two = (FAMILIES["sd15"].build() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(one.unet.parameters(), two.unet.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.any()
