"""Every configuration for published weights runs its whole path on a tiny pipeline of its class."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flowgrpo
from flowgrpo.cli.config import EVIDENCE
from flowgrpo.config import ConfigError, find
from flowgrpo.config.reference import to_table
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.memory.meta_pipeline import build
from flowgrpo.policy.weights import Trainable
from flowgrpo.training.benchmarks import load_benchmarks
from scripts.page_tables import marked_text
from scripts.recipe_table import CONFIGS, header, recipes, table, value_at
from tests.tiny import FAMILIES, save

RECIPES = {
    "sd15_dance": "sd15",
    "sd15_find": "sd15",
    "sdxl_dance": "sdxl",
    "sd35_medium_pickscore": "sd3",
    "sd35_medium_ocr": "sd3",
    "sd35_medium_geneval": "sd3",
    "flux_dance": "flux",
    "flux_fast": "flux",
    "wan21_t2v": "wan_t2v",
    "sd35_medium_24gb": "sd3",
    "sd35_medium_48gb": "sd3",
    "sd35_medium_80gb": "sd3",
    "flux1_dev_24gb": "flux",
    "flux1_dev_48gb": "flux",
    "flux1_dev_80gb": "flux",
    "flux_mix": "flux",
    "flux_pref": "flux",
    "flux_g2rpo": "flux",
    "flux_branch": "flux",
    "sd35_medium_tp": "sd3",
    "sd35_medium_vgpo": "sd3",
    "sd35_medium_tempflow": "sd3",
    "sd35_medium_nft": "sd3",
    "sd35_medium_nft_ocr": "sd3",
    "sd35_medium_guard": "sd3",
    "sd35_medium_fast": "sd3",
    "qwen_image": "qwen_image",
    "hunyuan_dance": "hunyuan_video",
}
SMALLER = {
    # The judge needs a server.
    "flux_pref": ["algorithm.preference={kind='compared', reward='darkness_of_any', weight=0.4}"],
    "flux_g2rpo": ["algorithm.steps.size=2", "train.updates=2"],
    "flux_branch": ["algorithm.splits=[1]"],
    "sd35_medium_tempflow": ["algorithm.seeds=1"],
    "hunyuan_dance": [
        "algorithm.best_of=2",
        "sampling.call={max_sequence_length=16, prompt_template={template='{}', crop_start=0}}",
    ],
}
"""What six steps and a group of two need."""


def test_every_recipe_is_here():
    there = {p.stem for p in find("quickstart").parent.glob("*.toml")}
    assert there == {*RECIPES, "quickstart"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_on_a_tiny_pipeline(recipe, tmp_path):
    family = FAMILIES[RECIPES[recipe]]
    folder = save(family.name, tmp_path / "model")
    sizes = {k: v for k, v in family.call.items() if k in ("height", "width", "num_frames")}
    published = flowgrpo.load(recipe)
    call = {k: v for k, v in published.sampling.call.items() if k != "max_sequence_length"}
    call |= {k: v for k, v in family.call.items() if k == "max_sequence_length"}
    train = published.train
    settings = [
        f"model.path='{folder}'",
        "model.dtype='float32'",
        # As many steps as the recipe's windows need.
        f"sampling.num_steps={min(6, published.sampling.num_steps)}",
        *(f"sampling.{k}={v}" for k, v in sizes.items()),
        "sampling.call={" + ", ".join(f"{k}={json.dumps(v)}" for k, v in call.items()) + "}",
        "algorithm.group_size=2",
        *SMALLER.get(recipe, []),
        # The published rewards need weights; what is exercised here is everything else.
        "rewards=[{model='tests.test_train:darkness_of_any'}]",
        "train.iterations=1",
        f"train.groups={train.updates if train.split == 'groups' else 1}",
        f"train.updates={min(train.updates, 1 if train.split == 'steps' else 2)}",
        "train.lr=1e-3",
        # These need an accelerator.
        "memory.quantize=none",
        "train.optimizer=adamw",
        "evaluation.every=0",
        "evaluation.images=6",
        "evaluation.bench=[]",
        "evaluation.num_steps=2",
        "evaluation.grid_prompts=1",
        "evaluation.grid_samples=1",
        f"run.folder='{tmp_path / 'run'}'",
        "run.device=cpu",
        "run.trackers=[]",
        "failures.probe=off",
    ]
    config = flowgrpo.load(recipe, settings)
    assert to_table(config.algorithm.transition) == to_table(published.algorithm.transition)
    result = flowgrpo.train(config)
    assert result.finished
    (metrics,) = (
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )
    assert metrics["failures"] == 0
    if isinstance(published.loss, ClippedLoss):
        assert metrics["log_prob/noise"] < published.loss.clip_range
    assert metrics["grad_norm"] > 0
    assert list(Path(tmp_path / "run" / "export").iterdir())


@pytest.mark.parametrize(
    ("recipe", "name", "images"),
    [
        ("sd35_medium_geneval", "geneval", 2212),
        ("sd35_medium_ocr", "text_rendering", 200),
        ("sd35_medium_nft_ocr", "text_rendering", 200),
    ],
)
def test_a_recipe_measures_the_benchmark_of_its_paper(recipe, name, images):
    (one,) = load_benchmarks(flowgrpo.load(recipe).evaluation)
    assert (one.settings.name, one.settings.when, one.images) == (name, "ends", images)


def test_the_comments_on_unigenbench_lack_nothing_but_its_data(tmp_path):
    text, file = find("flux_pref").read_text(), tmp_path / "mine.toml"
    uncommented, number = re.subn(r"(?m)^# (\[.*\]|\w+ = \".*\")$", r"\1", text)
    assert number == 8
    file.write_text(uncommented)
    config = flowgrpo.load(str(file))
    assert config.evaluation.bench[0].when == "ends"
    with pytest.raises(ConfigError, match=r"bench\[0\].*test_prompts_en\.csv.*To train without it"):
        load_benchmarks(config.evaluation)


PUBLISHED = recipes()


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda r: r.name)
def test_a_recipe_has_the_published_values_or_says_why_not(recipe):
    assert set(recipe.different) == set(recipe.why), "a value drifted, or a reason has become idle"
    assert recipe.evidence in EVIDENCE
    file = CONFIGS / f"{recipe.name}.toml"
    assert header(recipe) in file.read_text(), "run python -m scripts.recipe_table docs/recipes.md"


def test_a_value_that_drifts_is_found():
    table = to_table(flowgrpo.load("flux_dance", ["train.updates=4"]))
    assert value_at(table, "train.updates") == 4
    (dance,) = (r for r in PUBLISHED if r.name == "flux_dance")
    drifted = replace(dance, here={**dance.here, "train.updates": 4})
    assert set(drifted.different) - set(drifted.why) == {"train.updates"}


def test_the_page_has_the_table_of_the_recipes():
    assert marked_text(Path("docs/recipes.md").read_text(), "recipes") == table()


@pytest.mark.parametrize(
    ("recipe", "folder", "layers", "millions"),
    [("sd35_medium_ocr", "sd35_medium", 191, 18.8), ("flux_fast", "flux1_dev", 342, None)],
)
def test_adapters_are_on_the_layers_that_the_release_trains(recipe, folder, layers, millions):
    """On models of the published sizes, without their weights."""
    pipeline = build(Path("tests/published_configs") / folder, torch.bfloat16)
    weights = flowgrpo.load(recipe).model.weights
    trained = Trainable(
        {"transformer": pipeline.transformer}, weights, seed=0, with_reference=False
    )
    number = sum(p.numel() for p in trained.parameters.values()) / 1e6
    assert len(trained.parameters) == 2 * layers
    if millions is not None:
        assert round(number, 1) == millions
