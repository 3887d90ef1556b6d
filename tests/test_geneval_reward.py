"""GenEval: the rule on hand-made scenes, the detector's read-out, and the whole on tiny real models."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from flowgrpo.evaluate.geneval import (
    COLORS,
    OBJECTS,
    Clause,
    Detection,
    Found,
    Task,
    Verdict,
    num_to_color,
    select,
    soft,
    strict,
)
from flowgrpo.evaluate.relations import OPPOSITE
from flowgrpo.experience import Prompt
from flowgrpo.prompt_sets.geneval import records
from reward_models import geneval
from reward_models.geneval import ColorClassifier, GenEval, Mask2FormerDetector

RECORDS = records()
Scene = dict[str, list[Found]]
STEP = {"left of": (-60, 0), "right of": (60, 0), "above": (0, -60), "below": (0, 60)}


def at(x: float, y: float, color: str = "") -> Found:
    """A 20x20 object around a point."""
    return Found((x - 10, y - 10, x + 10, y + 10), color)


def perfect(task: Task, flip: bool = False, color: str = "") -> Scene:
    """Just what a task asks for; ``flip`` turns its relations round, ``color`` is for every object."""
    scene: Scene = {}
    for clause in task.include:
        x, y = 100, 100
        if clause.position:
            relation = OPPOSITE[clause.position[0]] if flip else clause.position[0]
            x, y = x + STEP[relation][0], y + STEP[relation][1]
        shade = color or clause.color or ""
        scene[clause.name] = [at(x, y + i, shade) for i in range(clause.count)]
    return scene


# The rule on the benchmark's own 553 records.


@pytest.mark.parametrize("rule", [strict, soft])
def test_every_prompt_can_be_met_and_missed(rule: Any) -> None:
    for record in RECORDS:
        task = Task.read(record, record["prompt"])
        assert rule(task, perfect(task)) == Verdict(1.0, True, ())
        nothing = rule(task, {})
        assert nothing.score == 0
        assert not nothing.correct
        assert len(nothing.reasons) == len(task.include)


@pytest.mark.parametrize("rule", [strict, soft])
def test_every_part_of_a_prompt_matters(rule: Any) -> None:
    for record in RECORDS:
        task = Task.read(record, record["prompt"])
        for clause in task.include:
            scene = perfect(task)
            scene[clause.name].pop()
            assert not rule(task, scene).correct
        if any(c.position for c in task.include):
            assert not rule(task, perfect(task, flip=True)).correct
        if any(c.color for c in task.include):
            asked = {c.color for c in task.include}
            other = next(c for c in COLORS if c not in asked)
            assert not rule(task, perfect(task, color=other)).correct


def test_further_objects_fail_only_where_numbers_must_be_exact() -> None:
    for record in RECORDS:
        task = Task.read(record, record["prompt"])
        for clause in task.include:
            scene = perfect(task)
            scene[clause.name].append(at(300, 300, "white"))
            assert strict(task, scene).correct == (task.tag != "counting")
            assert not soft(task, scene).correct
        assert soft(task, perfect(task) | {"absent": [at(0, 0)]}).correct


# By hand: one clause after the other.

CUP = Task("colors", (Clause("cup", 1, "red"),))
DOGS = Task("counting", (Clause("dog", 3),), (Clause("dog", 4),))
PAIR = Task("two_object", (Clause("cat", 1), Clause("bus", 1)))
KITE = Task("position", (Clause("cow", 1), Clause("kite", 1, None, ("above", 0))))
BOTH = Task("color_attr", (Clause("cat", 1, "red"), Clause("bus", 1, "blue")))
COW = at(100, 100)


@pytest.mark.parametrize(
    ("task", "scene", "official", "credit"),
    [
        (DOGS, {"dog": [COW] * 1}, 0, 1 / 3),
        (DOGS, {"dog": [COW] * 3}, 1, 1),
        (DOGS, {"dog": [COW] * 4}, 0, 2 / 3),
        (DOGS, {"dog": [COW] * 9}, 0, -1),
        (PAIR, {"cat": [COW]}, 0, 1 / 2),
        (PAIR, {"cat": [COW], "bus": [COW] * 3}, 1, 0),
        (CUP, {"cup": [at(0, 0, "blue")]}, 0, 1 / 2),
        (CUP, {"cup": [at(0, 0, "red"), at(9, 9, "")]}, 1, 0),
        (BOTH, {"cat": [at(0, 0, "red")], "bus": [at(0, 0, "red")]}, 0, 3 / 4),
        (BOTH, {"bus": [at(0, 0, "blue")]}, 0, 1 / 2),
        (KITE, {"cow": [COW], "kite": [at(100, 40)]}, 1, 1),
        (KITE, {"cow": [COW], "kite": [at(100, 160)]}, 0, 2 / 3),
        (KITE, {"cow": [COW], "kite": [COW]}, 0, 2 / 3),
        (KITE, {"kite": [at(100, 40)]}, 0, 1 / 3),
        (KITE, {"cow": [COW]}, 0, 1 / 3),
        (KITE, {"cow": [COW], "kite": [at(100, 40), at(100, 160)]}, 1, 1 / 3),
        (KITE, {"cow": [COW], "kite": [at(100, 160), at(100, 40)]}, 0, 1 / 3),
    ],
)
def test_scores_by_hand(task: Task, scene: Scene, official: float, credit: float) -> None:
    assert strict(task, scene).score == official
    assert soft(task, scene).score == pytest.approx(credit, abs=1e-12)
    bug = task is KITE and credit == 2 / 3
    theirs = soft(task, scene, "flow_grpo")
    assert theirs.score == pytest.approx(3 / 4 if bug else credit, abs=1e-12)
    assert theirs.correct == soft(task, scene).correct


def test_only_the_surest_objects_count_for_the_official_colour() -> None:
    red, blue = at(0, 0, "red"), at(50, 0, "blue")
    assert strict(CUP, {"cup": [red, blue]}).correct
    assert not strict(CUP, {"cup": [blue, red]}).correct
    two = Task("colors", (Clause("cup", 2, "red"),))
    assert not strict(two, {"cup": [red, blue, red]}).correct
    assert soft(two, {"cup": [red, blue]}).score == pytest.approx((1 + 1 / 2) / 2)
    with pytest.raises(ValueError, match="no colours were determined for cup"):
        strict(CUP, {"cup": [at(0, 0)]})


def test_a_position_holds_for_every_pair_and_needs_its_target_met() -> None:
    task = Task("position", (Clause("cow", 2, "red"), Clause("kite", 2, None, ("above", 0))))
    cows, kites = [at(90, 100, "red"), at(110, 100, "red")], [at(90, 20), at(110, 20)]
    assert strict(task, {"cow": cows, "kite": kites}).correct
    low = [at(90, 20), at(110, 180)]
    assert strict(task, {"cow": cows, "kite": low}).reasons == (
        "kite is below its target instead of above",
    )
    blue = [at(90, 100, "red"), at(110, 100, "blue")]
    for compat in (None, "flow_grpo"):
        verdict = soft(task, {"cow": blue, "kite": kites}, compat)
        assert verdict.score == pytest.approx((1 + 1 / 2 + 1 + 0) / 4)
    assert len(strict(task, {"cow": blue, "kite": kites}).reasons) == 2


def test_select_takes_the_surest_above_the_threshold() -> None:
    box = (0.0, 0.0, 2.0, 2.0)
    found = {16: [(box, 0.5, None), (box, 0.3, None), (box, 0.9, None)], 0: [(box, 0.1, None)]}
    kept = select(found, threshold=0.3, max_objects=16)  # type: ignore[arg-type]
    assert {k: [d.score for d in v] for k, v in kept.items()} == {"dog": [0.9, 0.5]}
    assert [d.score for d in select(found, 0.0, 2)["dog"]] == [0.9, 0.5]  # type: ignore[arg-type]


def test_colours_are_asked_for_only_where_they_matter() -> None:
    assert num_to_color(CUP, {"cup": [1, 2], "dog": [1]}) == {"cup": 1}
    assert num_to_color(CUP, {"dog": [1]}) == {}
    assert num_to_color(DOGS, {"dog": [1, 2, 3]}) == {}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tag": None}, "GenEval metadata"),
        ({"include": []}, "GenEval metadata"),
        ({"include": ["dog"]}, "'dog'"),
        ({"include": [{"class": "dogg", "count": 1}]}, "did you mean 'dog'"),
        ({"include": [{"class": "dog", "count": 0}]}, "count of dog"),
        ({"include": [{"class": "dog"}]}, "count of dog"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "mauve"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "earlier clause"),
        ({"exclude": [{"class": "unicorn", "count": 1}]}, "unicorn"),
    ],
)
def test_refuses_other_metadata(change: dict[str, Any], problem: str) -> None:
    record = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], **change}
    with pytest.raises(ValueError, match=f"'my prompt'.*{problem}"):
        Task.read(record, "my prompt")


# The detector.


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former of the published kind, tiny, sure of itself, for COCO's 80 classes."""
    folder = tmp_path_factory.mktemp("mask2former")
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=16,
        mask_feature_size=16,
        hidden_dim=16,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        num_labels=80,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.mul_(100)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(detector_folder: Path) -> Mask2FormerDetector:
    return Mask2FormerDetector(str(detector_folder), min_score=0.2)


def test_reads_masks_out_exactly() -> None:
    classes = torch.full((3, 81), -20.0)
    classes[0, 16], classes[1, 0], classes[2, 80] = 20, 20, 20
    masks = torch.full((3, 16, 24), -40.0)
    masks[:, 4:8, 6:18] = 40
    masks[1] = -40  # an empty mask
    found = geneval.instances(classes, masks, (64, 96), (32, 48), 0.3)
    assert list(found) == [16]
    ((box, score, mask),) = found[16]
    assert box == (12.0, 8.0, 36.0, 16.0)
    assert score == pytest.approx(1, abs=1e-4)
    assert mask is not None
    assert mask.shape == (32, 48)
    assert mask.sum() == 8 * 24
    assert mask[8:16, 12:36].all()


def test_one_query_can_be_two_things_and_sure_masks_score_higher() -> None:
    classes = torch.full((1, 81), -20.0)
    classes[0, [3, 7]] = 20
    masks = torch.full((1, 16, 16), 1.0)
    found = geneval.instances(classes, masks, (64, 64), (64, 64), 0.3)
    scores = [d.score for index in (3, 7) for d in found[index]]
    assert scores == pytest.approx([0.5 / (1 + math.exp(-1))] * 2, abs=1e-5)
    assert geneval.instances(classes, masks, (64, 64), (64, 64), 0.4) == {}


def test_padding_is_no_part_of_the_image() -> None:
    classes = torch.full((2, 81), -20.0)
    classes[0, 5], classes[1, 6] = 20, 20
    masks = torch.full((2, 16, 16), 40.0)
    masks[1, :13] = -40  # all of it below the image, of which 40 of 64 rows are real
    found = geneval.instances(classes, masks, (40, 64), (20, 32), 0.3)
    assert {k: [d.box for d in v] for k, v in found.items()} == {5: [(0.0, 0.0, 32.0, 20.0)]}


def test_agrees_with_transformers_where_that_is_right() -> None:
    """At 384x384, the one size that its post-processing is made for."""
    random = torch.Generator().manual_seed(0)
    classes = 4 * torch.randn(1, 40, 81, generator=random)
    coarse = torch.randn(1, 40, 6, 6, generator=random)
    masks = 5 * torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic")
    output = type("Output", (), {"class_queries_logits": classes, "masks_queries_logits": masks})
    theirs = Mask2FormerImageProcessor().post_process_instance_segmentation(
        output, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    ours = geneval.instances(classes[0], masks[0], (384, 384), (384, 384), 0.3)
    flat = sorted((d.score, label, d.mask) for label, same in ours.items() for d in same)
    maps = zip(theirs["segments_info"], theirs["segmentation"], strict=True)
    expected = sorted((info["score"], info["label_id"], mask) for info, mask in maps)
    assert len(flat) == len(expected) > 5
    for (score, label, mask), (their_score, their_label, their_mask) in zip(
        flat, expected, strict=True
    ):
        assert label == their_label
        assert score == pytest.approx(their_score, abs=1e-5)
        assert mask is not None
        assert np.array_equal(mask, their_mask.numpy() > 0)


@pytest.mark.parametrize(
    ("size", "scaled", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((60, 120), (667, 1333), (672, 1344)),
        ((768, 512), (1200, 800), (1216, 800)),
    ],
)
def test_detector_sizes(size: tuple[int, int], scaled: Any, padded: Any) -> None:
    assert geneval.detector_size(*size) == scaled
    assert geneval.with_padding(scaled) == padded


def test_the_detector_sees_normalised_pixels(detector: Mask2FormerDetector) -> None:
    seen: list[Tensor] = []
    handle = detector.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (geneval.MEAN, geneval.STD))
    detector.detect((mean + std).expand(1, 3, 60, 120))
    handle.remove()
    assert seen[0].shape == (1, 3, 672, 1344)
    torch.testing.assert_close(seen[0][:, :, :667, :1333], torch.ones(1, 3, 667, 1333))
    assert not seen[0][:, :, 667:].any()
    assert not seen[0][:, :, :, 1333:].any()


def test_detector_runs_alike_alone_and_in_a_batch(detector: Mask2FormerDetector) -> None:
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    together = detector.detect(images)
    alone = detector.detect(images[1:])
    assert together[0]
    assert set(together[1]) == set(alone[0])
    for index, same in together[1].items():
        for one, other in zip(same, alone[0][index], strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)
            assert 0.2 < one.score <= 1
            assert one.mask is not None
            assert one.mask.shape == (64, 48)
            x0, y0, x1, y1 = one.box
            assert 0 <= x0 < x1 <= 48
            assert 0 <= y0 < y1 <= 64


def changed(folder: Path, to: Path, drop: str = "", add: str = "") -> str:
    """A copy of the checkpoint with one key less or more."""
    weights = load_file(folder / "model.safetensors")
    assert not drop or drop in weights
    weights = {k: v for k, v in weights.items() if k != drop}
    weights |= {add: torch.zeros(16)} if add else {}
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return str(to)


def test_refuses_checkpoints_that_do_not_fit(detector_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 weights are missing, such as class_predictor\.bias"):
        Mask2FormerDetector(changed(detector_folder, tmp_path, drop="class_predictor.bias"))
    with pytest.raises(ValueError, match=r"1 weights are left over, such as other\.weight"):
        Mask2FormerDetector(changed(detector_folder, tmp_path, add="other.weight"))
    prefix = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"
    Mask2FormerDetector(changed(detector_folder, tmp_path, add=f"{prefix}.relative_position_index"))
    config = json.loads((detector_folder / "config.json").read_text())
    labels = {str(i): f"class {i}" for i in range(80)}
    assert len(config["id2label"]) == len(labels)
