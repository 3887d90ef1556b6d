"""Signs of reward hacking: each damage raises its own warning, on the console and in the report; none without."""

import numpy as np
import pytest
import torch

from flowgrpo.evaluation.artefacts import FRAMES, measure, summarise
from flowgrpo.evaluation.hacking import SIGNS, changes_between, fallen, seen
from flowgrpo.shapes.captions import all_records, scene_for
from flowgrpo.shapes.world import draw
from tests.test_report import evaluation, run

SAMPLES = 4


def scenes(seed, number=64, size=64):
    """True scenes of the embedded world, four of each of several prompts, with pixels' usual noise."""
    rng = np.random.default_rng(seed)
    records = [r for t in ("two_object", "counting", "colors") for r in all_records(t)][::7]
    chosen = [records[(i // SAMPLES) % len(records)] for i in range(number)]
    images = np.stack([draw(scene_for(r, rng), size) for r in chosen]) / 255
    noise = 0.01 * rng.standard_normal(images.shape)
    return torch.from_numpy((images + noise).clip(0.02, 0.98)).float().permute(0, 3, 1, 2)


def measured(images):
    owners = [i // SAMPLES for i in range(len(images))]
    return {"images": len(images), "artefacts": summarise([measure(i) for i in images], owners)}


def lines(images, period):
    damaged = images.clone()
    damaged[..., ::period, :] -= 0.03
    damaged[..., :, ::period] -= 0.03
    return damaged


DAMAGE = {
    "high_frequency": lambda x: (x + 0.04 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0.02, 0.98),
    "grid": lambda x: lines(x, 8),
    "saturation": lambda x: (x.mean(1, keepdim=True) + 1.6 * (x - x.mean(1, keepdim=True))).clamp(0.01, 0.99),
    "contrast": lambda x: 0.5 + 1.4 * (x - 0.5),
    "clipped": lambda x: (x + 0.1).clamp(0, 1),
    "variety": lambda x: x[torch.arange(len(x)) // SAMPLES * SAMPLES],
    "duplicates": lambda x: torch.where((torch.arange(len(x)) % 8 == 0).view(-1, 1, 1, 1), x[:1], x),
}  # fmt: skip


@pytest.fixture(scope="module")
def clean():
    return scenes(0)


@pytest.mark.parametrize("name", [s.name for s in SIGNS])
def test_each_damage_is_seen_by_its_measure_alone(clean, name):
    images = 0.5 + 0.5 * (clean - 0.5) if name == "contrast" else clean  # room for more contrast
    found = seen(measured(images), measured(DAMAGE[name](images)))
    assert name in found
    assert "The model may be exploiting the reward" in found[name]
    # Noise colours grey pixels, contrast is of each channel; copies of one image are alike in a prompt too.
    also = {
        "high_frequency": {"saturation"},
        "grid": {"high_frequency"},
        "contrast": {"saturation"},
        "duplicates": {"variety"},
    }
    assert found.keys() - {name} <= also.get(name, set())


def test_other_scenes_larger_images_and_slight_changes_are_no_sign(clean):
    first = measured(clean)
    assert not seen(first, measured(scenes(1)))
    assert not seen(first, measured((clean * 1.02).clamp(0, 0.99)))
    assert not seen({**first, "images": 49}, measured(lines(clean, 8)))  # too few to say
    assert not seen(
        {"images": 64}, measured(lines(clean, 8))
    )  # an evaluation of an earlier version


def test_a_grid_on_large_images_and_one_edge():
    flat = torch.full((3, 300, 200), 0.5)
    assert measure(flat)["values"]["grid"] < 1
    edge = flat.clone()
    edge[:, :, 100:] = 0.9  # raises a whole line of the spectrum
    assert measure(edge)["values"]["grid"] < 1
    noise = (flat + 0.02 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)  # fmt: skip
    plain, marked = (measure(x)["values"]["grid"] for x in (noise, lines(noise, 16)))
    assert plain < 1.7
    assert marked > plain + 1


def test_frames_of_videos_and_broken_images():
    video = scenes(2, 9)
    found = measure(video)
    picked = [measure(video[i])["values"] for i in (0, 3, 5, 8)]
    for key, value in found["values"].items():
        assert value == pytest.approx(sum(p[key] for p in picked) / FRAMES, rel=1e-5), key
    broken = video[0].clone()
    broken[0, 0, 0] = torch.nan
    rows = [measure(broken), measure(video[1]), measure(video[2])]
    assert rows[0] == {"values": {}, "thumbnail": []}
    summary = summarise(rows, [0, 0, 1])
    assert summary["contrast"] == pytest.approx((rows[1]["values"]["contrast"] + rows[2]["values"]["contrast"]) / 2)  # fmt: skip
    assert "variety" not in summary  # no pair of one prompt is left
    assert summarise(rows[:1], [0]) == {}


def test_a_measured_score_that_falls_while_a_trained_one_rises():
    def scored(trained, other):
        return {"scores": {"a": trained, "b": other}, "errors": {"a": 0.01, "b": 0.01}}

    weights = {"a": 1.0, "b": 0.0}
    first = scored(0.5, 0.5)
    assert list(fallen(changes_between(first, scored(0.6, 0.4)), weights)) == ["b"]
    assert not fallen(changes_between(first, scored(0.6, 0.49)), weights)  # within noise
    assert not fallen(changes_between(first, scored(0.5, 0.4)), weights)  # nothing rose
    assert not fallen(changes_between(first, scored(0.6, 0.4)), {"a": 1.0, "b": 1.0})


def test_the_report_lists_all_measures_and_warns(tmp_path, clean):
    from flowgrpo.evaluation.report import write_report

    base, tuned = (measured(x)["artefacts"] for x in (clean, lines(clean, 8)))
    evaluations = [{**evaluation(i, graded=0.5), "artefacts": a} for i, a in ((0, base), (40, tuned))]  # fmt: skip
    page = write_report(run(tmp_path, evaluations=evaluations)).read_text()
    assert "Signs of reward hacking" in page
    assert page.count("within the limit") + page.count("beyond the limit") == len(SIGNS)
    assert "images contain a periodic grid that they did not have before training" in page
