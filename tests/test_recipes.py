"""Recipes beside the published settings, and the evidence that they work."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flowgrpo
from flowgrpo.cli import main
from flowgrpo.config import ConfigError, find
from flowgrpo.config.evidence import LEVELS, evidence, fingerprint, next_level
from flowgrpo.config.reference import to_table
from flowgrpo.doctor.verify import _stand_ins, standardised_rise, verify
from flowgrpo.memory.meta_pipeline import EstimateError, build
from flowgrpo.policy.weights import Trainable
from flowgrpo.training.benchmarks import load_benchmarks
from scripts.page_tables import marked_text
from scripts.recipe_table import CONFIGS, header, recipes, table, value_at
from tests.tiny import save

RECIPES = sorted(p.stem for p in CONFIGS.glob("*.toml") if not p.stem.startswith("quickstart"))
RUN = ["sd35_medium_guard", "sd35_medium_nft", "flux_branch", "z_image_pref", "skyreels_i2v_dance", "sd15_find"]  # fmt: skip
"""Recipes of different families, algorithms and kinds of weights; the others have recorded evidence."""


@pytest.mark.parametrize("recipe", RUN)
def test_recipe_runs_on_a_tiny_pipeline(recipe, tmp_path):
    record = verify(recipe, "tiny", tmp_path)
    assert record.passed, record.checks
    published = flowgrpo.load(recipe)
    used = flowgrpo.load(str(tmp_path / "run" / "config.toml"))
    for part in ("transition", "steps", "advantage", "timestep_fraction"):
        assert getattr(used.algorithm, part, None) == getattr(published.algorithm, part, None)
    assert used.loss == published.loss
    assert used.train.split == published.train.split
    assert str(tmp_path) not in record.to_json()
    assert record.metrics["failures"] == 0


def test_the_stand_ins_suit_a_recipe_with_guards(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        find("sd35_medium_ocr").read_text()
        + '[[rewards]]\nmodel = "aesthetic"\nweight = 0.0\n'
        + '[guard]\nkl = "uncertain"\nmeasured = ["aesthetic"]\nnovelty = "relative"\nfeatures = "dino"\n'
        + 'features_options = {several = "mean"}\n'
    )
    recipe = flowgrpo.load(str(file))
    recipe.check()
    used = flowgrpo.load(str(file), _stand_ins(recipe))
    used.check()
    assert [r.label for r in used.rewards] == ["darkness", "evenness"]
    assert (used.guard.kl, used.guard.novelty, used.guard.features) == ("uncertain", "relative", "")


def test_every_recipe_has_run_on_tiny_parts():
    """Run ``flowgrpo verify RECIPE --level tiny`` after a recipe was changed."""
    stale = [r for r in RECIPES if evidence(r) == "validated"]
    assert stale == [], "verify them anew: python -m flowgrpo verify RECIPE --level tiny"
    files = list((CONFIGS / "evidence").glob("*.json"))
    for file in files:
        record = json.loads(file.read_text())
        assert file.name == f"{record['recipe']}.{record['level']}.json"
        assert record["level"] in LEVELS
        assert record["passed"] == all(check["passed"] for check in record["checks"])
    assert {f.name.split(".")[0] for f in files} >= set(RECIPES)


def test_evidence_counts_while_the_recipe_is_what_was_verified(tmp_path):
    record = {"recipe": "flux_fast", "passed": True, "fingerprint": fingerprint("flux_fast")}
    file = tmp_path / "flux_fast.device.json"
    for change, level in (({}, "device"), ({"passed": False}, "validated"), ({"fingerprint": "0"}, "validated")):  # fmt: skip
        file.write_text(json.dumps(record | {"level": "device"} | change))
        assert evidence("flux_fast", tmp_path) == level
    # Of several, the strongest; comments are no settings.
    for level in ("tiny", "rises"):
        (tmp_path / f"flux_fast.{level}.json").write_text(json.dumps(record | {"level": level}))
    assert evidence("flux_fast", tmp_path) == "rises"
    copy = tmp_path / "copy.toml"
    copy.write_text("# another comment\n" + find("flux_fast").read_text())
    assert fingerprint(str(copy)) == record["fingerprint"]
    copy.write_text(find("flux_fast").read_text().replace("iterations = ", "iterations = 1"))
    assert fingerprint(str(copy)) != record["fingerprint"]
    assert [next_level(level) for level in ("validated", "tiny", "device")] == ["tiny", "device", "rises"]  # fmt: skip
    with pytest.raises(ValueError, match="only a full run shows"):
        next_level("rises")


def test_a_recipe_runs_at_its_size_with_random_weights(tmp_path):
    """At the size of a tiny pipeline whose weights are not there."""
    model = save("sd3", tmp_path / "model")
    for file in model.glob("*/*.safetensors"):
        file.unlink()
    recipe = tmp_path / "mine.toml"
    text = find("sd35_medium_ocr").read_text()
    changes = {"height = 512": "height = 16", "width = 512": "width = 16", "max_sequence_length = 128": "max_sequence_length = 16", "group_size = 24": "group_size = 4"}  # fmt: skip
    for old, new in {**changes, "stabilityai/stable-diffusion-3.5-medium": str(model)}.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    record = verify(str(recipe), "device", tmp_path / "work", device="cpu")
    assert record.passed, record.checks
    assert (record.recipe, record.environment["device"]) == ("mine", "cpu")
    assert [c.name for c in record.checks] == ["iterations", "grad_norm", "failures", "exported files"]  # fmt: skip
    assert record.metrics["nfe_per_prompt"] == 4 * 10
    with pytest.raises(ValueError, match="there are no tiny parts for"):
        verify(str(recipe), "tiny", tmp_path / "other")
    (model / "transformer" / "config.json").unlink()
    with pytest.raises(EstimateError, match="the component transformer cannot be built"):
        verify(str(recipe), "device", tmp_path / "another", device="cpu")


def test_a_rise_is_more_than_chance():
    # Quarters 1, 2 and 4, 5: means 1.5 and 4.5, each of variance 1/2, so an error of sqrt(1/2).
    rewards = [1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 4.0, 5.0]
    assert standardised_rise(rewards) == pytest.approx(3 * 2**0.5)
    assert standardised_rise(rewards[::-1]) == pytest.approx(-3 * 2**0.5)
    with pytest.raises(ValueError, match="at least 8 iterations, got 7"):
        standardised_rise(rewards[1:])


def test_verify_says_what_it_cannot_do(tmp_path, capsys):
    for arguments, message in {
        (
            "sd15_find",
            "--level",
            "tiny",
            "--iterations",
            "9",
        ): "--iterations is for the level rises",
        ("sd15_find", "--level", "rises", "--iterations", "3"): "must be at least 8",
        ("sd15_find", "--out", "nowhere/x.json"): "there is no folder nowhere",
        ("sd15_find", "--folder", str(tmp_path)): "name a new folder",
        ("quickstart", "--level", "tiny"): "verify --level rises",
    }.items():
        assert main(["verify", *arguments]) != 0
        assert message in capsys.readouterr().err


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
    pipeline = build(Path("flowgrpo/policy/published") / folder, torch.bfloat16)
    weights = flowgrpo.load(recipe).model.weights
    trained = Trainable(
        {"transformer": pipeline.transformer}, weights, seed=0, with_reference=False
    )
    number = sum(p.numel() for p in trained.parameters.values()) / 1e6
    assert len(trained.parameters) == 2 * layers
    if millions is not None:
        assert round(number, 1) == millions
