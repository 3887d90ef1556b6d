"""Pipelines whose files do not fit their models."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import flowgrpo
from flowgrpo.policy.loading import load_pipeline

SHAPES = Path(flowgrpo.__file__).parent / "shapes" / "model"
PARTS = {
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_weights_that_do_not_fit_are_refused_in_any_part(tmp_path, part, kind):
    folder = tmp_path / "model"
    shutil.copytree(SHAPES, folder)
    file = folder / part / PARTS[part]
    weights = load_file(file)
    name = max(weights)
    if kind == "missing":
        del weights[name]
    else:
        name = "strange.weight"
        weights[name] = next(iter(weights.values())).clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"weights of .* do not fit: 1 {kind} \({name}\)"):
        load_pipeline(folder)
    # The libraries are as they were.
    assert load_pipeline("shapes").vae is not None
