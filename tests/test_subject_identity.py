"""Identity of several subjects on tiny models: detection, and the best assignment by trying all."""

import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Owlv2ForObjectDetection, Owlv2Processor

from flowgrpo.data.prompts import Prompt
from reward_models.subject_identity import SubjectIdentity
from tests import zoo

SUBJECTS = [{"name": n, "reference": f"{n}.png"} for n in ("cat", "dog")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models, and references."""
    folder = tmp_path_factory.mktemp("identity")
    for part, save in (("dino", zoo.save_dino), ("owl", zoo.save_owlv2)):
        (folder / part).mkdir()
        save(folder / part)
    for subject, image in zip(SUBJECTS, zoo.pil(zoo.noise(2, 30, 40, seed=4)), strict=True):
        image.save(folder / subject["reference"])
    return folder


@pytest.fixture(scope="module")
def reward(folder: Path) -> SubjectIdentity:
    return make(folder)


def make(folder: Path, **options: Any) -> SubjectIdentity:
    options = {"threshold": 0.5, "overlap": 0.9} | options
    return SubjectIdentity(
        str(folder / "dino"), str(folder / "owl"), root=str(folder), device="cpu", **options
    )


def test_boxes_are_the_detectors_in_pixels_of_the_image(
    folder: Path, reward: SubjectIdentity
) -> None:
    image = zoo.pil(zoo.noise(1, 40, 64, seed=1))[0]
    processor = Owlv2Processor.from_pretrained(folder / "owl")
    model = Owlv2ForObjectDetection.from_pretrained(folder / "owl").eval()
    inputs = processor(text=[["cat", "dog"]], images=[image], return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    (found,) = processor.post_process_grounded_object_detection(
        output, threshold=0.5, target_sizes=[(40, 64)]
    )
    assert len(found["boxes"]) > 1
    reward.overlap = 1.0
    boxes = sorted(reward.find(image, ["cat", "dog", "cat"]))
    reward.overlap = 0.9
    wanted = []
    for left, top, right, bottom in found["boxes"].tolist():
        box = (
            max(0, int(left)),
            max(0, int(top)),
            math.ceil(min(64, right)),
            math.ceil(min(40, bottom)),
        )
        if box[2] - box[0] > 1 and box[3] - box[1] > 1:
            wanted.append(box)
    assert boxes == sorted(wanted)


def test_each_subject_has_a_candidate_of_its_own(reward: SubjectIdentity, folder: Path) -> None:
    media = zoo.noise(2, 40, 64, seed=1)
    prompts = [Prompt("a cat and a dog", metadata={"subjects": SUBJECTS})] * 2
    scores = reward(media, prompts)
    for image, score in zip(zoo.pil(media), scores.tolist(), strict=True):
        crops = [image.crop(b) for b in reward.find(image, ["cat", "dog"])]
        seen = reward.embed(crops)
        wanted = torch.stack([reward._reference(folder / s["reference"]) for s in SUBJECTS])
        cosines = wanted @ seen.T
        assert len(crops) >= 2
        best = max(
            float(cosines[0, a] + cosines[1, b]) / 2 for a, b in permutations(range(len(crops)), 2)
        )
        assert score == pytest.approx(best, abs=1e-5)
    # One candidate for two subjects: the other one counts 0.
    (box, *_) = reward.find(zoo.pil(media)[0], ["cat"])
    one = make(folder)
    one.find = lambda *_: [box]  # type: ignore[method-assign]
    crop = one.embed([zoo.pil(media)[0].crop(box)])
    references = torch.stack([one._reference(folder / s["reference"]) for s in SUBJECTS])
    assert one(media[:1], prompts[:1]).item() == pytest.approx(
        float((references @ crop.T).max()) / 2, abs=1e-5
    )
    none = make(folder, threshold=0.999)
    assert none(media, prompts).tolist() == [0, 0]
    media[0, 0, 0, 0] = math.nan
    assert reward(media, prompts).isnan().tolist() == [True, False]


def test_prompts_name_their_subjects(reward: SubjectIdentity) -> None:
    reward.check([Prompt("x", metadata={"subjects": SUBJECTS})])
    for metadata in ({}, {"subjects": []}, {"subjects": ["cat"]}, {"subjects": [{"name": "cat"}]}):
        with pytest.raises(ValueError, match="needs metadata 'subjects'"):
            reward.check([Prompt("x", metadata=metadata)])
    absent = {"subjects": [{"name": "cat", "reference": "absent.png"}]}
    with pytest.raises(ValueError, match="is no file"):
        reward.check([Prompt("x", metadata=absent)])
    with pytest.raises(ValueError, match="threshold must be"):
        SubjectIdentity(threshold=1.0)
