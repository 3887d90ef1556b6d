"""GenEval's detector, colours and scores on tiny models of the real classes."""

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
    Mask2FormerImageProcessor,
)

from flowgrpo.core.geneval import COLORS, OBJECTS, Detection
from flowgrpo.data.prompts import Prompt
from reward_models import geneval
from reward_models.geneval import ColorClassifier, GenEval, Mask2FormerDetector
from tests import zoo

# The detector.


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_mask2former(tmp_path_factory.mktemp("mask2former"))


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
    assert score == pytest.approx(1, abs=1e-3)
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
    labels = {"id2label": {str(i): f"class {i}" for i in range(79)}}
    config = json.loads((detector_folder / "config.json").read_text()) | labels
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=r"79|mismatch"):
        Mask2FormerDetector(str(tmp_path))


# Colours.


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_open_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def classifier(clip_folder: Path) -> ColorClassifier:
    return ColorClassifier(f"local-dir:{clip_folder}")


def test_colour_is_the_nearest_mean_of_three_phrases(classifier: ColorClassifier) -> None:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (24, 3, 4, 3), dtype=np.uint8)
    crops = [Image.fromarray(b).resize((50, 21), Image.Resampling.NEAREST) for b in blocks]
    names = ["dog", "hot dog"] * 12
    expected = []
    for image, name in zip(crops, names, strict=True):
        embedding = classifier.model.encode_image(classifier.preprocess(image)[None])[0]
        nearness = {}
        for color in COLORS:
            phrases = (f"{color} {name}", f"{color}-colored {name}", f"{color} object")
            tokens = classifier.tokenizer([f"a photo of a {p}" for p in phrases])
            texts = [t / t.norm() for t in classifier.model.encode_text(tokens)]
            nearness[color] = torch.cosine_similarity(sum(texts), embedding, dim=0).item()
        expected.append(max(nearness, key=lambda c: nearness[c]))
    assert len(set(expected)) > 1
    assert classifier(crops, names) == expected
    assert classifier(crops[:1], names[:1]) == expected[:1]
    assert classifier([], []) == []


def test_crops_show_the_object_on_grey() -> None:
    image = Image.new("RGB", (40, 30), "red")
    mask = np.zeros((30, 40), dtype=bool)
    mask[5:10, 4:20] = True
    mask[5, 4] = False
    crop = geneval.crop(image, Detection((4.0, 5.0, 20.0, 10.0), 1.0, mask))
    assert crop.size == (16, 5)
    assert crop.getpixel((0, 0)) == (0x99, 0x99, 0x99)
    assert crop.getpixel((1, 0)) == crop.getpixel((15, 4)) == (255, 0, 0)
    plain = geneval.crop(image, Detection((4.0, 5.0, 20.0, 10.0), 1.0))
    assert plain.getcolors() == [(80, (255, 0, 0))]


def test_openai_weights_get_their_own_activation(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip only warns that ViT-L-14 with these weights would run on the wrong one."""
    asked: list[dict[str, Any]] = []
    tiny = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")

    def create(model: str, **options: Any) -> Any:
        asked.append({"model": model, **options})
        return tiny

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    ColorClassifier()
    ColorClassifier("ViT-B-32", "laion2b_s34b_b79k")
    assert [(a["model"], a["pretrained"], a["force_quick_gelu"]) for a in asked] == [
        ("ViT-L-14", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
    ]
    with pytest.raises(ValueError, match=r"no weights 'opena1' for 'ViT-L-14'.*openai"):
        ColorClassifier("ViT-L-14", "opena1")


def test_refuses_a_folder_without_weights(clip_folder: Path, tmp_path: Path) -> None:
    config = (clip_folder / "open_clip_config.json").read_bytes()
    (tmp_path / "open_clip_config.json").write_bytes(config)
    with pytest.raises(RuntimeError, match="weights"):
        ColorClassifier(f"local-dir:{tmp_path}")


# The whole.


class Listed:
    """A detector that says what it is told."""

    name = "listed"

    def __init__(self, *found: Mapping[int, Sequence[Detection]]):
        self.found = found

    def detect(self, images: Tensor) -> Sequence[Mapping[int, Sequence[Detection]]]:
        assert images.min() >= 0
        assert images.max() <= 1
        return self.found


def prompt(tag: str, *include: dict[str, Any]) -> Prompt:
    return Prompt(f"a {tag}", metadata={"tag": tag, "include": list(include)})


def whole(
    clip_folder: Path,
    detector: Any,
    mode: Literal["soft", "strict"] = "soft",
    **options: Any,
) -> GenEval:
    color_model = f"local-dir:{clip_folder}"
    return GenEval(mode, detector=detector, color_model=color_model, device="cpu", **options)


def test_counting_takes_only_sure_detections(clip_folder: Path) -> None:
    box = (0.0, 0.0, 9.0, 9.0)
    dogs = {16: [Detection(box, 0.95), Detection(box, 0.5), Detection(box, 0.3)]}
    reward = whole(clip_folder, Listed(dogs, dogs))
    two = {"class": "dog", "count": 2}
    media = torch.rand(2, 3, 32, 32)
    scores = reward(media, [prompt("counting", two), prompt("single_object", two)])
    assert scores.tolist() == [0.5, 1.0]
    assert reward.title == "GenEval (listed)"
    looser = whole(clip_folder, Listed(dogs), threshold=0.2, max_objects=2)
    assert looser(media[:1], [prompt("single_object", two | {"count": 3})])[0] == pytest.approx(
        2 / 3
    )


def test_colours_come_from_the_right_pixels_of_the_right_image(clip_folder: Path) -> None:
    """Each of two images has two cups; the classifier's own answer is the colour to ask for."""
    blocks = torch.rand(2, 3, 4, 16, generator=torch.Generator().manual_seed(5))
    media = blocks.repeat_interleave(16, 2).repeat_interleave(4, 3)
    boxes = [(float(x), 0.0, float(x + 16), 64.0) for x in (0, 16, 32, 48)]
    found = [
        {41: [Detection(boxes[i], 0.9), Detection(boxes[j], 0.8)], 16: [Detection(boxes[0], 0.7)]}
        for i, j in ((0, 1), (2, 3))
    ]
    reward = whole(clip_folder, Listed(*found))
    pixels = (media * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    seen = [
        reward.colors([geneval.crop(Image.fromarray(p), d) for d in f[41]], ["cup", "cup"])
        for p, f in zip(pixels, found, strict=True)
    ]
    assert len({c for pair in seen for c in pair}) > 1, seen
    for color in {c for pair in seen for c in pair}:
        asked = prompt("colors", {"class": "cup", "count": 2, "color": color})
        expected = [(1 + 1 - abs(2 - pair.count(color)) / 2) / 2 for pair in seen]
        assert reward(media, [asked, asked]).tolist() == expected


def test_broken_images_have_no_score(clip_folder: Path) -> None:
    dog = {16: [Detection((0.0, 0.0, 9.0, 9.0), 0.9)]}
    media = torch.rand(2, 3, 32, 32)
    media[0, 0, 0, 0] = math.inf
    scores = whole(clip_folder, Listed(dog, dog), "strict")(
        media, [prompt("single_object", {"class": "dog", "count": 1})] * 2
    )
    assert scores[0].isnan()
    assert scores[1] == 1


def test_runs_with_the_published_kinds_of_model(detector_folder: Path, clip_folder: Path) -> None:
    reward = whole(clip_folder, str(detector_folder), threshold=0.2)
    assert reward.title == "GenEval (HF detector)"
    media = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    pixels = (media * 255).round() / 255
    present = [set(found) for found in reward.detector.detect(pixels)]
    name = OBJECTS[min(present[0])]
    prompts = [prompt("colors", {"class": name, "count": 1, "color": c}) for c in ("red", "blue")]
    verdicts = reward.verdicts(media, prompts)
    assert verdicts[0].score != 0
    assert verdicts == reward.verdicts(media, prompts)
    assert reward(media, prompts).tolist() == pytest.approx([v.score for v in verdicts])


def test_refuses_wrong_use(clip_folder: Path) -> None:
    with pytest.raises((ValueError, TypeError), match="strct"):
        whole(clip_folder, Listed(), mode="strct")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compat"):
        whole(clip_folder, Listed(), mode="strict", compat="flow_grpo")
    with pytest.raises(ValueError, match="thresholds"):
        whole(clip_folder, Listed(), threshold=-0.1)
    with pytest.raises(ValueError, match=r"'a cat'.*GenEval metadata"):
        whole(clip_folder, Listed({}))(torch.rand(1, 3, 32, 32), [Prompt("a cat")])
    with pytest.raises(ValueError, match=r"'a cat'.*GenEval metadata"):
        whole(clip_folder, Listed({})).check([Prompt("a cat")])
