"""The embedded world: its judge is right about true scenes, and hard to fool."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from benchmarks.verifier_agreement import labelled
from flowgrpo.core.geneval import OPPOSITE, RELATIONS, relations_between
from flowgrpo.data.prompts import Prompt
from flowgrpo.shapes.captions import (
    TASKS,
    Record,
    all_records,
    combination,
    corrupt,
    scene_for,
    split,
    vocabulary,
    word_classes,
)
from flowgrpo.shapes.rewards import Diversity, Graded, Strict, StrictAndGraded
from flowgrpo.shapes.verifier import OTHER, Detection, detect, graded, strict, strict_and_graded
from flowgrpo.shapes.world import BACKGROUND, GAP, SHAPES, WORLD, SceneObject, draw

Picture = np.ndarray


def rendered(scene: list[SceneObject]) -> Picture:
    return draw(scene).astype(np.float32) / 255


def genuine(image: Picture) -> list[str]:
    """The shapes that count as objects under the strict rule."""
    return [d.shape for d in detect(image.astype(np.float32)) if d.genuine]


@cache
def true_scenes(number: int = 200) -> list[tuple[Record, list[SceneObject]]]:
    """Prompts of every task, each with a scene that it describes."""
    rng = np.random.default_rng(0)
    pairs = []
    for task in TASKS:
        records = all_records(task)
        chosen = [records[int(i)] for i in rng.integers(len(records), size=number)]
        pairs += [(r, scene_for(r, rng)) for r in chosen]
    return pairs


@cache
def true_detections() -> list[list[Detection]]:
    return [detect(rendered(scene)) for _, scene in true_scenes()]


# The judge on true scenes.
def test_the_verifier_is_right_about_true_scenes():
    pairs = zip(true_scenes(), true_detections(), strict=True)
    scores = [strict_and_graded(found, record) for (record, _), found in pairs]
    assert len(scores) == 1200
    assert np.mean([s for s, _ in scores]) >= 0.99
    assert np.mean([g for _, g in scores]) >= 0.98
    assert all(0 <= g <= 1 for _, g in scores)
    assert all(g == pytest.approx(1) for s, g in scores if s == 1)


def test_the_verifier_finds_what_was_drawn():
    wrong = 0
    for (_, scene), detections in zip(true_scenes(), true_detections(), strict=True):
        found = Counter((d.shape, d.color) for d in detections if d.genuine)
        wrong += found != Counter((o.shape, o.color) for o in scene)
    assert wrong <= 12


def test_true_scenes_lie_on_the_canvas_and_do_not_touch():
    for _, scene in true_scenes():
        boxes = [o.box for o in scene]
        assert all(min(b) >= 0 and max(b) <= 64 for b in boxes)
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                gaps = (a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
                assert max(gaps) >= GAP


def test_the_verifier_agrees_with_labels_of_generated_pictures():
    pictures = labelled()
    agrees = np.array([p.verdict == p.about["right"] for p in pictures])
    is_base = np.array([p.about["model"] == "base" for p in pictures])
    assert len(pictures) == 360
    assert agrees.mean() >= 0.97
    # Neither model is favoured.
    assert min(agrees[is_base].mean(), agrees[~is_base].mean()) >= 0.96


# The judge on false scenes.
def of_task(task: str) -> list[tuple[Record, list[SceneObject]]]:
    return [(r, s) for r, s in true_scenes() if r["tag"] == task][:60]


def assert_fails(record: Record, scene: list[SceneObject]) -> None:
    found = detect(rendered(scene))
    assert strict(found, record) == 0
    assert 0 <= graded(found, record) < 1


def recolored(item: SceneObject, color: str) -> SceneObject:
    return SceneObject(item.shape, color, item.x, item.y, item.radius)


def test_exchanged_colors_fail():
    for record, (a, b) in of_task("color_attr"):
        assert_fails(record, [recolored(a, b.color), recolored(b, a.color)])


def test_a_wrong_color_fails():
    for record, (item,) in of_task("colors"):
        other = next(c for c in WORLD.colors if c != item.color)
        assert_fails(record, [recolored(item, other)])


def test_a_wrong_shape_fails():
    for record, (item,) in of_task("single_object"):
        other = next(s for s in SHAPES if s != item.shape)
        assert_fails(record, [SceneObject(other, item.color, item.x, item.y, item.radius)])


def test_too_few_and_too_many_fail():
    for record, scene in of_task("counting"):
        assert_fails(record, scene[1:])
        clause = {**record["include"][0], "count": len(scene) - 1}
        fewer = {**record, "include": [clause], "exclude": [{**clause, "count": len(scene)}]}
        assert_fails(fewer, scene)


def test_a_missing_object_fails():
    for record, scene in of_task("two_object"):
        assert_fails(record, scene[:1])
        assert_fails(record, scene[1:])


def test_the_opposite_relation_fails():
    for record, scene in of_task("position"):
        target, placed = record["include"]
        relation = OPPOSITE[placed["position"][0]]
        assert_fails({**record, "include": [target, {**placed, "position": [relation, 0]}]}, scene)


def test_an_empty_image_gets_nothing():
    for record, _ in true_scenes()[::40]:
        assert strict_and_graded(detect(rendered([])), record) == (0, 0)


# Things that are no objects.
def test_noise_is_no_object():
    rng = np.random.default_rng(1)
    for blur in (0, 1, 2, 4):
        for _ in range(25):
            noise = ndimage.gaussian_filter(rng.random((64, 64, 3)), (blur, blur, 0))
            noise = (noise - noise.min()) / (noise.max() - noise.min())
            assert genuine(noise) == []


@pytest.mark.parametrize("color", [*WORLD.colors.values(), BACKGROUND, (0, 0, 0), (255, 255, 255)])
def test_a_flat_color_is_no_object(color):
    assert genuine(np.full((64, 64, 3), np.asarray(color) / 255)) == []


def test_a_gradient_is_no_object():
    ramp = np.linspace(0, 1, 64)[:, None, None]
    for color in WORLD.colors.values():
        for ground in (np.asarray(BACKGROUND) / 255, np.ones(3), np.zeros(3)):
            image = np.broadcast_to(ramp * color / 255 + (1 - ramp) * ground, (64, 64, 3))
            assert genuine(image) == []
            assert genuine(image.swapaxes(0, 1)) == []


Pen = Callable[[ImageDraw.ImageDraw, np.random.Generator, tuple[int, int, int]], None]


def drawings(pen: Pen, number: int = 150) -> list[Picture]:
    """Pictures that ``pen`` draws at four times the size, in random colours of the world."""
    rng, palette = np.random.default_rng(2), list(WORLD.colors.values())
    pictures = []
    for _ in range(number):
        canvas = Image.new("RGB", (256, 256), BACKGROUND)
        pen(ImageDraw.Draw(canvas), rng, palette[int(rng.integers(len(palette)))])
        pictures.append(np.asarray(canvas.resize((64, 64), Image.Resampling.BOX)) / 255)
    return pictures


def stretched(kind: str, aspect: float) -> Pen:
    def pen(canvas: ImageDraw.ImageDraw, rng: np.random.Generator, color: tuple) -> None:
        x, y = rng.uniform(80, 176, size=2)
        radius = rng.uniform(30, 48)
        w, h = radius * aspect**0.5, radius / aspect**0.5
        w, h = (w, h) if rng.random() < 0.5 else (h, w)
        getattr(canvas, kind)([x - w, y - h, x + w, y + h], fill=color)

    return pen


def share(pictures: list[Picture], shape: str) -> float:
    return float(np.mean([shape in genuine(p) for p in pictures]))


@pytest.mark.parametrize(("kind", "shape"), [("rectangle", "square"), ("ellipse", "circle")])
def test_a_stretched_shape_is_not_the_shape(kind, shape):
    assert share(drawings(stretched(kind, 1.05)), shape) == 1
    assert share(drawings(stretched(kind, 1.35)), shape) <= 0.02
    assert share(drawings(stretched(kind, 1.5)), shape) == 0


def blob(canvas: ImageDraw.ImageDraw, rng: np.random.Generator, color: tuple) -> None:
    """A union of random ellipses."""
    x, y = rng.uniform(100, 156, size=2)
    for _ in range(int(rng.integers(2, 7))):
        a, b = rng.uniform(-32, 32, size=2)
        w, h = rng.uniform(10, 30, size=2)
        canvas.ellipse([x + a - w, y + b - h, x + a + w, y + b + h], fill=color)


def roundness(image: Picture) -> float:
    """Overlap of a picture's only blob with the disc of its area and centre; 1 if it has more."""
    mask = np.abs(image - np.asarray(BACKGROUND) / 255).sum(-1) > 0.3
    if ndimage.label(mask)[1] != 1:
        return 1.0
    rows, columns = np.nonzero(mask)
    y, x = np.mgrid[:64, :64]
    disc = (y - rows.mean()) ** 2 + (x - columns.mean()) ** 2 <= mask.sum() / np.pi
    return float((mask & disc).sum() / (mask | disc).sum())


def test_a_blob_is_no_object():
    blobs = [b for b in drawings(blob, 400) if roundness(b) < 0.75]
    assert len(blobs) > 100
    assert np.mean([bool(genuine(b)) for b in blobs]) <= 0.03


def test_a_shape_of_two_colors_is_no_object():
    rng = np.random.default_rng(3)
    for shape in SHAPES:
        for _ in range(20):
            one, other = rng.permutation(list(WORLD.colors))[:2]
            x, y = rng.uniform(22, 42, size=2)
            image, second = (
                rendered([SceneObject(shape, str(c), float(x), float(y), 11.0)])
                for c in (one, other)
            )
            image[round(y) :] = second[round(y) :]
            assert genuine(image) == []


def test_shading_is_one_color():
    image = rendered([SceneObject("square", "red", 32.0, 32.0, 12.0)])
    orange = rendered([SceneObject("square", "orange", 32.0, 32.0, 12.0)])
    # From red at the left to nearly orange at the right.
    share = np.clip((np.arange(64) - 20) / 24, 0, 1)[None, :, None] * 0.8
    (found,) = detect(((1 - share) * image + share * orange).astype(np.float32))
    assert (found.shape, found.color, found.genuine) == ("square", "red", True)


def test_a_square_with_round_sides_is_neither_square_nor_circle():
    y, x = (np.mgrid[:64, :64] - 31.5) / 13
    for power, shapes in ((2, ["circle"]), (2.9, []), (20, ["square"])):
        image = np.full((64, 64, 3), BACKGROUND) / 255
        image[np.abs(x) ** power + np.abs(y) ** power < 1] = np.asarray(WORLD.colors["blue"]) / 255
        assert genuine(image) == shapes, power


def test_an_upside_down_triangle_is_none():
    image = rendered([SceneObject("triangle", "red", 32.0, 32.0, 12.0)])
    assert genuine(image) == ["triangle"]
    assert genuine(image[::-1]) == []


# GenEval's rule for positions: two boxes of 10 x 10, so that the tolerance is 2 pixels.
def box(x: float, y: float) -> tuple[float, float, float, float]:
    return x - 5.0, y - 5.0, x + 5.0, y + 5.0


@pytest.mark.parametrize(
    ("x", "y", "wanted"),
    [
        (0, 0, set()),
        (2, 0, set()),  # within the tolerance
        (4, 0, set()),  # (4 - 2) / 4 is not above 0.5
        (4.1, 0, {"right of"}),
        (-4.1, 0, {"left of"}),
        (0, 4.1, {"below"}),
        (0, -4.1, {"above"}),
        (6.7, 6.7, set()),  # (6.7 - 2) / (6.7 * 1.414) = 0.496
        (6.9, 6.9, {"right of", "below"}),
        (-6.9, -6.9, {"left of", "above"}),
        (20, 3, {"right of"}),
    ],
)
def test_relations_are_genevals(x, y, wanted):
    assert relations_between(box(x, y), box(0, 0)) == wanted
    assert relations_between(box(0, 0), box(x, y)) == {OPPOSITE[r] for r in wanted}


# Captions.
def test_corrupting_at_rate_0_changes_nothing():
    rng = np.random.default_rng(0)
    for task in TASKS:
        for record in all_records(task):
            assert corrupt(record["prompt"], 0.0, rng) == record["prompt"]


def family(word: str) -> int | None:
    return next((i for i, f in enumerate(word_classes()) if word in f), None)


@pytest.mark.parametrize("rate", [0.15, 0.6])
def test_corrupting_changes_each_kind_of_word_at_the_rate(rate):
    rng = np.random.default_rng(0)
    changed: dict[int, list[bool]] = {i: [] for i in range(len(word_classes()))}
    for task in ("colors", "counting", "color_attr"):
        for record in all_records(task) * (1 if task == "color_attr" else 20):
            before, after = record["prompt"].split(), corrupt(record["prompt"], rate, rng).split()
            for old, new in zip(before, after, strict=True):
                kind = family(old)
                assert family(new) == kind
                if kind is not None:
                    changed[kind].append(old != new)
    for flips in changed.values():
        assert np.mean(flips) == pytest.approx(
            rate, abs=4 * (rate * (1 - rate) / len(flips)) ** 0.5
        )


def test_corrupting_changes_relations_at_the_rate():
    rng, flips = np.random.default_rng(0), []
    for record in all_records("position") * 5:
        after = corrupt(record["prompt"], 0.4, rng)
        (relation,) = [r for r in RELATIONS if f" {r} " in after]
        flips.append(relation != record["include"][1]["position"][0])
    assert np.mean(flips) == pytest.approx(0.4, abs=0.1)


def test_wrong_captions_are_still_english():
    rng, words = np.random.default_rng(0), set(vocabulary())
    for task in TASKS:
        for record in all_records(task):
            after = corrupt(record["prompt"], 0.7, rng).split()
            assert set(after) <= words
            for article, word in pairwise(after):
                if article in ("a", "an"):
                    assert (article == "an") == (word[0] in "aeiou")


@pytest.mark.parametrize("task", TASKS)
def test_no_held_out_combination_is_trained_on(task):
    train, held_out = split(task, held_out=False), split(task, held_out=True)
    assert len(train) + len(held_out) == len(all_records(task))
    ours, theirs = ({combination(r) for r in part} for part in (train, held_out))
    assert not ours & theirs
    assert len(theirs) == max(1, round(0.3 * len(ours | theirs)))
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}


def test_a_combination_does_not_depend_on_the_order_of_words():
    by_prompt = {r["prompt"][len("a photo of ") :]: combination(r) for t in TASKS for r in all_records(t)}  # fmt: skip
    same = [
        ("a circle and a triangle", "a triangle and a circle"),
        ("a circle left of a triangle", "a triangle right of a circle"),
        ("a circle above a triangle", "a triangle below a circle"),
        ("a red circle and a blue triangle", "a blue triangle and a red circle"),
    ]
    assert all(by_prompt[a] == by_prompt[b] for a, b in same)
    assert by_prompt["a circle left of a triangle"] != by_prompt["a triangle left of a circle"]
    assert (
        by_prompt["a red circle and a blue triangle"]
        != by_prompt["a blue circle and a red triangle"]
    )


# Rewards and measures.
def images(scenes: list[list[SceneObject]]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(rendered(s)).permute(2, 0, 1) for s in scenes])


def test_rewards_judge_each_image_by_its_own_prompt():
    records = [r for t in TASKS for r in all_records(t)[:2]]
    rng = np.random.default_rng(0)
    media = images([scene_for(r, rng) for r in records[::2] for _ in range(2)])
    prompts = [Prompt(r["prompt"], metadata=r) for r in records]
    scores = {kind: kind()(media, prompts) for kind in (Strict, Graded, StrictAndGraded)}
    assert scores[Strict][::2].tolist() == [1.0] * len(TASKS)
    assert (scores[Graded][1::2] < 1).any()
    assert torch.allclose(scores[StrictAndGraded], (scores[Strict] + scores[Graded]) / 2)


def test_rewards_need_genevals_metadata():
    with pytest.raises(ValueError, match=r"'a circle' has no GenEval record \(tag, include\)"):
        Strict()(images([[]]), [Prompt("a circle")])


def test_diversity_is_0_for_equal_images_and_1_for_uniform_colors():
    record = all_records("single_object")[0]
    prompt = Prompt(record["prompt"], metadata=record)
    same = images([[SceneObject("circle", "red", 32.0, 32.0, 10.0)]] * 7)
    every = images([[SceneObject("circle", c, 32.0, 32.0, 10.0)] for c in WORLD.colors])
    moved = images([[SceneObject("circle", "red", 20.0 + 8 * i, 32.0, 8.0 + i)] for i in range(4)])
    assert Diversity()([prompt], [same]) == {
        "diversity/color": 0,
        "diversity/position": 0,
        "diversity/size": 0,
    }
    assert Diversity()([prompt], [every])["diversity/color"] == pytest.approx(1)
    spread = Diversity()([prompt], [moved])
    # Centres 8 pixels apart in x only: a deviation of 8.94, mean over x and y, over 64.
    assert spread["diversity/position"] == pytest.approx(8.94 / 2 / 64, abs=0.005)
    assert spread["diversity/size"] == pytest.approx(2 * 1.118 / 64, abs=0.01)


def test_diversity_ignores_colors_that_the_prompt_asks_for():
    record = next(r for r in all_records("colors") if r["prompt"] == "a photo of a red circle")
    every = images([[SceneObject("circle", c, 32.0, 32.0, 10.0)] for c in WORLD.colors])
    assert Diversity()([Prompt("", metadata=record)], [every])["diversity/color"] == 0


def test_a_colour_must_be_near_its_name():
    y, x = np.mgrid[:64, :64]
    disc = (y - 32) ** 2 + (x - 32) ** 2 < 120
    pink = (248, 150, 190)
    for value, color in (((128, 128, 128), ""), (WORLD.colors["purple"], "purple"), (pink, OTHER)):
        image = np.full((64, 64, 3), BACKGROUND, dtype=np.float32) / 255
        image[disc] = np.asarray(value, dtype=np.float32) / 255
        (found,) = detect(image)
        assert found.shape == "circle"
        assert found.genuine is bool(color), value
        assert not color or found.color == color
