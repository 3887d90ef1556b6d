"""What is checked before anything is loaded."""

import json
from pathlib import Path

import pytest
from PIL import Image

import flowgrpo
from flowgrpo.config import Config, ConfigError
from flowgrpo.data.prompt_files import PromptError
from flowgrpo.evaluation.comparison_grid import ComparisonGrid
from flowgrpo.training.inputs import check_inputs


def config(folder: Path, *settings: str) -> Config:
    return flowgrpo.load("quickstart_flow_grpo", [f"run.folder={folder / 'run'}", *settings])


def edits(folder: Path) -> str:
    """A prompt file whose condition images have two sizes."""
    lines = []
    for name, size in (("small", (8, 8)), ("large", (16, 8)), ("other", (16, 8))):
        Image.new("RGB", size).save(folder / f"{name}.png")
        lines.append(json.dumps({"prompt": f"edit {name}", "image": f"{name}.png"}))
    file = folder / "edits.jsonl"
    file.write_text("\n".join(lines))
    return str(file)


@pytest.mark.parametrize(
    ("settings", "sizes"), [([], 2), (["sampling.height=64", "sampling.width=64"], 1)]
)
def test_sizes_of_both_prompt_sets_follow_their_images_unless_one_is_set(tmp_path, settings, sizes):
    file = edits(tmp_path)
    files = [f"prompts.train={file}", f"prompts.held_out={file}", "prompts.balance=''"]
    prompts, held_out = check_inputs(config(tmp_path, *files, *settings), 1)
    assert len(prompts.buckets) == len(held_out.buckets) == sizes
    # The images of a grid are drawn and scored in one batch.
    grid = ComparisonGrid.of(held_out, 3, 1, 0)
    shown = {i.size for p in grid.prompts for i in p.open_images()}
    assert shown == ({(16, 8)} if sizes == 2 else {(8, 8), (16, 8)})


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("train.updates=1000", ConfigError, "cannot be divided among train.updates = 1000"),
        ("run.device=gpu", ConfigError, "run.device: there is no device 'gpu'; use 'auto', 'cpu', 'cuda'"),
        ("run.device=xpu", ConfigError, "run.device: 'xpu' is not available here"),
        ("prompts.balance=nothing", PromptError, "has no such metadata"),
        ("prompts.held_out=nowhere.txt", ConfigError, "prompts.held_out: no such file: nowhere.txt"),
        ("model.adapters=[{path='a.safetensors'}]", ConfigError, r"model.adapters\[0\].path: no such file or folder"),
        ("model.weights={kind='lora', init='./run'}", ConfigError, "model.weights.init: no such file or folder"),
        ("evaluation.metrics=['nowhere:metric']", ConfigError, r"metrics\[0\]: .* no module 'nowhere'"),
        ("rewards=[{model = 'jpeg_siz'}]", ConfigError, r"rewards\[0\].model: .* mean 'jpeg_size'"),
        ("rewards=[{model = 'nowhere:R'}]", ConfigError, r"rewards\[0\].model: .* no module 'nowhere'"),
        ("rewards=[{model = 'jpeg_size', options={qualty=9}}]", ConfigError, r"rewards\[0\].options: reward 'jpeg_size': .*'qualty'; it takes"),
        ("rewards=[{model='aesthetic', options={head='./h.pth'}}]", ConfigError, r"rewards\[0\].options.head: no such file or folder: ./h.pth"),
        ("algorithm={kind='pref_grpo', group_size=2, preference={kind='judged', model='jpeg_size', options={a=1}}}", ConfigError, r"algorithm.preference.options: .*'a'; it takes"),
        ("loss={kind='tests.test_objectives:Distances'}", ConfigError, "set train.ema_decay above 0"),
        ("run.seed=1", ConfigError, "model.path: no such folder or file: /nowhere"),
        ("loss={kind='tests.nowhere:Loss'}", ConfigError, "there is no module 'tests.nowhere'"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_is_written_or_loaded(
    tmp_path, monkeypatch, setting, error, message
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(error, match=message):
        flowgrpo.train(config(tmp_path, setting, "model.path=/nowhere"))
    assert not (tmp_path / "run").exists()
