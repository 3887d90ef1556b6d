"""Judging of benchmark folders: official rules and texts, resumed at any moment, nothing twice."""

import json
import multiprocessing
import random
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from flowgrpo.bench.base import BenchError, Entry, Failure, Picture, load_benchmark, select
from flowgrpo.bench.benchmarks.geneval import OVERALL, SAMPLES, GenEval, official_summary
from flowgrpo.bench.benchmarks.shapes import Shapes, Verifier
from flowgrpo.bench.judging import in_batches, in_flight
from flowgrpo.bench.page import write_html
from flowgrpo.bench.report import compared, read_points, read_result
from flowgrpo.bench.run import Part, import_results, score_folder
from flowgrpo.core.geneval import OBJECTS, Detection
from flowgrpo.shapes.captions import scene_for
from flowgrpo.shapes.world import draw
from tests import zoo

SHARED = Path(__file__).parents[1].resolve() / ".." / "shared" / "data"
SAMPLES_EACH = 2
WRONG = 5
"""Every prompt whose number is a multiple of this gets images of another prompt."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that somebody else drew: each prompt's scene, some of them wrong."""
    folder, benchmark = tmp_path_factory.mktemp("drawn"), Shapes(samples=SAMPLES_EACH)
    entries, rng = benchmark.entries(), np.random.default_rng(0)
    for number, entry in enumerate(entries):
        shown = entries[(number + 7) % len(entries)] if number % WRONG == 0 else entry
        for sample in range(SAMPLES_EACH):
            path = folder / benchmark.files(entry, sample)[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            image = draw(scene_for({**shown.prompt.metadata, "prompt": shown.prompt.text}, rng))
            Image.fromarray(image).save(path)
        (path.parents[1] / "metadata.jsonl").write_text(
            json.dumps({**entry.prompt.metadata, "prompt": entry.prompt.text})
        )
    return folder


def scored(out: Path, images: Path, **options: Any) -> dict[str, Any]:
    benchmark = options.pop("benchmark", Shapes(samples=SAMPLES_EACH))
    return score_folder(out, benchmark, Part(), "mine", images, **options)


def value(result: Mapping[str, Any], name: str) -> float:
    return next(m["value"] for m in result["metrics"] if m["name"] == name)


def test_a_folder_made_elsewhere_is_scored_as_it_is(drawn: Path, tmp_path: Path) -> None:
    before = sorted(drawn.rglob("*"))
    result = scored(tmp_path, drawn)
    assert sorted(drawn.rglob("*")) == before
    entries = Shapes().entries()
    right = [n % WRONG != 0 for n in range(len(entries))]
    assert value(result, SAMPLES) == pytest.approx(100 * sum(right) / len(right), abs=1e-4)
    assert result["counts"] == {
        "prompts": 39, "prompts_of_benchmark": 39, "samples": 2, "judged": 78, "failed": 0, "missing": 0
    }  # fmt: skip
    assert any("made elsewhere" in w for w in result["warnings"])
    page = (tmp_path / "report.html").read_text()
    assert "overall (mean over tasks)" in page
    assert page.count("data:image/jpeg") >= 16


def test_both_means_and_the_official_text(drawn: Path, tmp_path: Path) -> None:
    """An independent reader of the official text, and the means by hand."""
    result = scored(tmp_path, drawn)
    text = (tmp_path / "official" / "summary.txt").read_text()
    (log,) = (tmp_path / "scores").glob("*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()][1:]
    tags = {e.key: e.prompt.metadata["tag"] for e in Shapes().entries()}
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[str, bool] = {}
    for line in lines:
        correct = line["judgement"]["correct"]
        by_tag.setdefault(tags[line["key"]], []).append(correct)
        by_prompt[line["key"]] = by_prompt.get(line["key"], False) or correct
    means = {t: sum(c) / len(c) for t, c in by_tag.items()}
    over_tasks = sum(means.values()) / len(means)
    over_samples = sum(sum(c) for c in by_tag.values()) / len(lines)
    assert over_tasks != pytest.approx(over_samples)
    assert value(result, OVERALL) == pytest.approx(100 * over_tasks, abs=1e-4)
    assert value(result, SAMPLES) == pytest.approx(100 * over_samples, abs=1e-4)
    read = dict(re.findall(r"^(\w+) += ([\d.]+)% \(", text, re.MULTILINE))
    assert {k: float(v) for k, v in read.items()} == {
        k: pytest.approx(100 * v, abs=0.006) for k, v in means.items()
    }
    assert f"Overall score (avg. over tasks): {over_tasks:.5f}\n" in text
    assert f"Overall score (avg. over samples): {over_samples:.5f}\n" in text
    assert f"% correct images: {over_samples:.2%}\n" in text
    assert f"% correct prompts: {sum(by_prompt.values()) / 39:.2%}\n" in text
    assert "Total images: 78\nTotal prompts: 39\n" in text


def test_intervals_hold_the_value_and_singletons_have_none(drawn: Path, tmp_path: Path) -> None:
    result = scored(tmp_path, drawn)
    rows = {m["name"]: m for m in result["metrics"]}
    assert rows["single_object"]["low"] is None
    assert rows[OVERALL]["low"] < rows[OVERALL]["value"] < rows[OVERALL]["high"]
    assert rows["color_attr"]["low"] <= rows["color_attr"]["value"] <= rows["color_attr"]["high"]


# Judging can stop at any moment.


class Slow(Verifier):
    """Writes down whom it judged, and can be slow or fail."""

    def __init__(self, record: Path, seconds: float = 0.0, failing: Sequence[str] = ()):
        self.record, self.seconds, self.failing = record, seconds, failing
        self.says = ""

    def version(self) -> str:
        return self.says

    def judge(self, pictures: Iterable[Picture]) -> Iterator[Any]:
        for picture, judgement in in_batches(pictures, 4, self._verdicts):
            time.sleep(self.seconds)
            if picture.entry.key in self.failing:
                yield picture, Failure("it fell asleep")
                continue
            with self.record.open("a") as file:
                file.write(f"{picture.entry.key} {picture.sample}\n")
            yield picture, judgement


def numbers(result: Mapping[str, Any]) -> Any:
    return result["metrics"], result["counts"]


def test_killed_while_judging_it_resumes_and_judges_nothing_twice(
    drawn: Path, tmp_path: Path
) -> None:
    record, chance = tmp_path / "record.txt", random.Random(1)
    record.touch()
    for wanted in (3, 20, 41, 60):
        process = multiprocessing.get_context("fork").Process(
            target=scored, args=[tmp_path / "out", drawn], kwargs={"judge": Slow(record, 0.002)}
        )
        process.start()
        while len(record.read_text().splitlines()) < wanted and process.is_alive():
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.003))
        process.kill()
        process.join()
        assert process.exitcode == -9
    resumed = scored(tmp_path / "out", drawn, judge=Slow(record))
    straight = scored(tmp_path / "straight", drawn)
    assert numbers(resumed) == numbers(straight)
    judged = record.read_text().splitlines()
    # What was judged in the instant of a kill may not have been written yet.
    assert 78 <= len(judged) <= 78 + 4
    assert len(set(judged)) == 78


def test_failures_are_counted_kept_apart_and_judged_again(drawn: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.txt"
    failing = ["00001", "00002"]
    first = scored(tmp_path / "out", drawn, judge=Slow(record, failing=failing))
    assert first["counts"]["failed"] == 4
    assert first["counts"]["judged"] == 74
    rows = {m["name"]: m for m in first["metrics"]}
    assert rows[SAMPLES]["strict"] == pytest.approx(rows[SAMPLES]["value"] * 74 / 78, abs=1e-4)
    assert any("4 images could not be judged" in w for w in first["warnings"])
    record.write_text("")
    second = scored(tmp_path / "out", drawn, judge=Slow(record))
    assert sorted(record.read_text().split()) == sorted(
        f for k in failing for s in "01" for f in (k, s)
    )
    assert second["counts"]["failed"] == 0
    assert all("strict" not in m for m in second["metrics"])


def test_a_broken_judge_stops_the_run(drawn: Path, tmp_path: Path) -> None:
    every = [e.key for e in Shapes().entries()]
    with pytest.raises(BenchError, match=r"20 judgements in a row failed.*fell asleep"):
        scored(tmp_path, drawn, judge=Slow(tmp_path / "record", failing=every))


def test_a_judge_that_became_another_is_refused(drawn: Path, tmp_path: Path) -> None:
    judge = Slow(tmp_path / "record.txt")
    scored(tmp_path / "out", drawn, judge=judge)  # its version is not known yet
    judge.says = "model a"
    scored(tmp_path / "out", drawn, judge=judge)
    judge.says = ""
    scored(tmp_path / "out", drawn, judge=judge)
    judge.says = "model b"
    with pytest.raises(BenchError, match=r"changed from 'model a' to 'model b'.*kept"):
        scored(tmp_path / "out", drawn, judge=judge)


def test_a_judge_that_changes_in_the_middle_stops(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowgrpo.bench.scoring.LOOK_AGAIN", 0.0)
    record = tmp_path / "record.txt"

    class Changing(Slow):
        def version(self) -> str:
            return f"after {min(1, len(record.read_text().splitlines()) // 30)}"

    record.touch()
    with pytest.raises(BenchError, match="changed from 'after 0' to 'after 1'"):
        scored(tmp_path / "out", drawn, judge=Changing(record))
    assert 30 <= len(record.read_text().splitlines()) < 78


def test_an_image_that_changed_is_judged_again(drawn: Path, tmp_path: Path) -> None:
    images, record = tmp_path / "images", tmp_path / "record.txt"
    shutil.copytree(drawn, images)
    scored(tmp_path / "out", images, judge=Slow(record))
    record.write_text("")
    shutil.copy(images / "00002/samples/0000.png", images / "00001/samples/0001.png")
    scored(tmp_path / "out", images, judge=Slow(record))
    assert record.read_text() == "00001 1\n"


# Bad input.


def test_missing_truncated_and_foreign_images(drawn: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(drawn, images)
    (images / "00003/samples/0001.png").unlink()
    broken = images / "00004/samples/0000.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(BenchError, match=r"1 of 78 images is missing.*00003/samples/0001\.png"):
        scored(tmp_path / "out", images)
    result = scored(tmp_path / "out", images, allow_missing=True)
    assert result["counts"]["missing"] == 1
    assert result["counts"]["failed"] == 1
    rows = {m["name"]: m for m in result["metrics"]}
    assert rows[SAMPLES]["strict"] == pytest.approx(rows[SAMPLES]["value"] * 76 / 78, abs=1e-4)
    (log,) = (tmp_path / "out" / "scores").glob("*.jsonl")
    assert "0000.png cannot be read" in log.read_text()
    with pytest.raises(BenchError, match="holds no image of shapes"):
        scored(tmp_path / "nothing", tmp_path / "out", allow_missing=True)


def test_metadata_of_another_version_are_refused(drawn: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(drawn, images)
    shutil.copy(images / "00001/metadata.jsonl", images / "00000/metadata.jsonl")
    with pytest.raises(BenchError, match=r"00000/metadata\.jsonl is not of this version"):
        scored(tmp_path / "out", images)


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match="did you mean 'geneval'"):
        load_benchmark("genevl")
    with pytest.raises(ValueError, match="no setting 'sample'; did you mean 'samples'"):
        load_benchmark("geneval", {"sample": 3})
    with pytest.raises(
        ValueError, match=r"category must be one of color.*got 'colour'; did you mean 'color'"
    ):
        load_benchmark("t2i_compbench", {"category": "colour"})
    with pytest.raises(ValueError, match="samples must be of type int"):
        load_benchmark("t2i_compbench", {"samples": 2.5})
    with pytest.raises(ValueError, match="no dimension 'color'; did you mean 'colors'"):
        select(GenEval().entries(), None, ["color"])
    with pytest.raises(BenchError, match=r"none of the published files.*any_data=true"):
        GenEval(data_file="prompts/shapes_held_out.jsonl").entries()


def test_parts_are_spread_over_the_tasks() -> None:
    entries = GenEval().entries()
    assert len(select(entries, None, ["counting"])) == 80
    assert {e.stratum for e in select(entries, 12, [])} == {e.stratum for e in entries}
    assert select(entries, 9999, []) == entries


# Comparisons.


def test_two_folders_are_compared_by_pairs(drawn: Path, tmp_path: Path) -> None:
    scored(tmp_path / "base", drawn)
    better, benchmark = tmp_path / "images", Shapes(samples=SAMPLES_EACH)
    shutil.copytree(drawn, better)
    rng = np.random.default_rng(1)
    for entry in benchmark.entries():
        record = {**entry.prompt.metadata, "prompt": entry.prompt.text}
        Image.fromarray(draw(scene_for(record, rng))).save(better / benchmark.files(entry, 0)[0])
    scored(tmp_path / "tuned", better)
    rows = {r["name"]: r for r in compared(tmp_path / "base", tmp_path / "tuned")}
    assert rows[SAMPLES]["verdict"] == "higher"
    assert rows[SAMPLES]["value"] == pytest.approx(rows[SAMPLES]["second"] - rows[SAMPLES]["first"])
    same = {r["name"]: r for r in compared(tmp_path / "base", tmp_path / "base")}
    assert all(r["value"] == 0 for r in same.values())
    # One task has a single prompt, of which there is no interval.
    assert {r["verdict"] for r in same.values() if r["low"] is not None} == {"noise"}
    assert {r["verdict"] for r in same.values() if r["low"] is None} == {"unknown"}
    page = write_html([tmp_path / "base", tmp_path / "tuned"], tmp_path / "page.html").read_text()
    assert "difference" in page
    assert "higher" in page
    table, metrics = read_points(tmp_path / "base")
    assert len(table.keys) == 39
    assert metrics == list(benchmark.metrics())
    result = read_result(tmp_path / "base")
    result["data"]["sha256"] = "0"
    (tmp_path / "tuned" / "bench.json").write_text(json.dumps(result))
    with pytest.raises(BenchError, match="differ in data"):
        compared(tmp_path / "base", tmp_path / "tuned")


# GenEval.


class Boxes:
    """Finds rectangles of one colour each; the colour says which object it is."""

    name = "box detector"

    def detect(self, images: torch.Tensor) -> list[dict[int, list[Detection]]]:
        found = []
        for image in (images * 255).round().int().permute(0, 2, 3, 1).numpy():
            objects: dict[int, list[Detection]] = {}
            labels, _ = ndimage.label(image[..., 2] == 200)
            for place in ndimage.find_objects(labels):
                y, x = place
                index = int(image[y.start, x.start, 0]) // 3
                box = (float(x.start), float(y.start), float(x.stop), float(y.stop))
                objects.setdefault(index, []).append(Detection(box, 0.95))
            found.append(objects)
        return found


STEP = {"left of": (-22, 0), "right of": (22, 0), "above": (0, -22), "below": (0, 22)}


def picture(entry: Entry, wrong: bool) -> Image.Image:
    """What a prompt asks for, as rectangles; a wrong one lacks the first object."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    for place, clause in enumerate(entry.prompt.metadata["include"]):
        for number in range(clause["count"] - (wrong and place == 0)):
            x, y = (28, 28) if "position" in clause or place == 0 else (6, 50)
            if "position" in clause:
                x, y = (a + b for a, b in zip((28, 28), STEP[clause["position"][0]], strict=True))
            x += 12 * (number - 1) if clause["count"] > 1 else 0
            pixels[y : y + 6, x : x + 6] = (3 * OBJECTS.index(clause["class"]), 0, 200)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def geneval(tmp_path_factory: pytest.TempPathFactory) -> GenEval:
    clip = zoo.save_open_clip(tmp_path_factory.mktemp("clip"))
    return GenEval(
        samples=1, detector=f"{__name__}:Boxes", options={"color_model": f"local-dir:{clip}"}
    )


def test_geneval_from_a_folder_to_the_official_files_and_back(
    geneval: GenEval, tmp_path: Path
) -> None:
    tasks = ["single_object", "two_object", "counting", "position"]
    entries = select(geneval.entries(), None, tasks)
    expected = {}
    for number, entry in enumerate(entries):
        path = tmp_path / "images" / geneval.files(entry, 0)[1]
        path.parent.mkdir(parents=True)
        expected[entry.key] = number % 4 != 0
        picture(entry, wrong=number % 4 == 0).save(path)
    out = tmp_path / "out"
    result = score_folder(out, geneval, Part(dimensions=tasks), "mine", tmp_path / "images")
    assert result["title"] == "GenEval (box detector)"
    rows = [json.loads(li) for li in (out / "official" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 359
    by_key = {e.key: e for e in entries}
    assert {r["filename"].split("/")[-3]: r["correct"] for r in rows} == expected
    for row in rows:
        entry = by_key[row["filename"].split("/")[-3]]
        assert json.loads(row["metadata"]) == {**entry.prompt.metadata, "prompt": row["prompt"]}
        assert row["reason"] == "" if row["correct"] else row["reason"]
    shuffled = random.Random(0).sample(rows, len(rows))
    file = tmp_path / "theirs.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in shuffled))
    theirs = import_results(tmp_path / "imported", geneval, file, "mine")
    assert theirs["title"] == "GenEval (official evaluator)"
    assert [value(theirs, t) for t in tasks] == [value(result, t) for t in tasks]
    assert theirs["counts"]["missing"] == 553 - 359
    assert official_summary(rows) == (out / "official" / "summary.txt").read_text()
    file.write_text(json.dumps({**rows[0], "metadata": "{}"}))
    with pytest.raises(BenchError, match=r"theirs\.jsonl, line 1.*another version"):
        import_results(tmp_path / "x", geneval, file, "mine")


def test_the_published_geneval_file_is_ours() -> None:
    path = SHARED / "geneval" / "evaluation_metadata.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    theirs = replace(GenEval(), data_file=str(path))
    assert theirs.entries() == GenEval().entries()
    assert theirs.data().name
    assert len(theirs.entries()) == 553


# Rewards as judges.


def test_preference_scores_any_prompts_by_any_rewards(tmp_path: Path) -> None:
    from reward_models.jpeg_size import JPEGSize

    file = tmp_path / "PartiPrompts.tsv"
    file.write_text("Prompt\tCategory\nbob\tPeople\na cat\tAnimals\nbob\tPeople\n")
    benchmark = load_benchmark(
        "preference",
        {"data_file": str(file), "rewards": ["jpeg_size"], "category": "Category", "samples": 1},
    )
    assert [e.prompt.text for e in benchmark.entries()] == ["bob", "a cat", "bob"]
    images, expected = tmp_path / "images", []
    images.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (32 + 8 * i, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
        medium = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        expected.append(float(JPEGSize()(medium, [benchmark.entries()[i].prompt])))
    result = score_folder(tmp_path / "out", benchmark, Part(), "mine", images)
    assert value(result, "jpeg_size") == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert value(result, "jpeg_size: People") == pytest.approx((expected[0] + expected[2]) / 2)
    assert value(result, "jpeg_size: Animals") == pytest.approx(expected[1])


def test_flow_grpos_text_prompts_are_read() -> None:
    path = SHARED / "ocr" / "test_head200.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    entries = load_benchmark("text_rendering", {"data_file": str(path)}).entries()
    assert len(entries) == 200


def test_text_rendering_says_when_a_page_is_full_of_text(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a sign that says \\"Stop it\\""}\n' * 3)
    benchmark = load_benchmark(
        "text_rendering", {"data_file": str(file), "reader": f"{__name__}:read"}
    )
    for i, width in enumerate((16, 17, 18)):
        Image.new("RGB", (width, 16)).save(tmp_path / f"0000{i}_0.png")
    result = score_folder(tmp_path / "out", benchmark, Part(), "mine", tmp_path)
    accuracy = [1, 1, 1 - 1 / 6]
    assert value(result, "OCR accuracy") == pytest.approx(100 * sum(accuracy) / 3, abs=1e-4)
    assert value(result, "exact") == pytest.approx(100 / 3, abs=1e-4)
    similar = [1, 6 / 12, 1 - 1 / 6]
    # "stopit" of six letters, twelve and six read.
    assert value(result, "similarity") == pytest.approx(100 * sum(similar) / 3, abs=1e-4)


def read(image: np.ndarray) -> Sequence[str]:
    return {16: ["STOP", "it"], 17: ["stop it", "stop it"], 18: ["stip it"]}[image.shape[1]]


# Many at a time.


def test_a_slow_call_holds_back_no_other() -> None:
    pictures = [Picture(Entry(str(i), Shapes().entries()[0].prompt), 0, Path()) for i in range(40)]

    def judge(picture: Picture) -> dict[str, float]:
        time.sleep(0.5 if picture.entry.key == "0" else 0.01)
        return {"score": 1.0}

    began, order = time.perf_counter(), []
    for picture, _ in in_flight(iter(pictures), 4, judge):
        order.append(picture.entry.key)
    assert order[-1] == "0"
    assert sorted(order, key=int) == [str(i) for i in range(40)]
    assert time.perf_counter() - began < 1.0


# T2I-CompBench++.


def test_compbenchs_layout_and_results(tmp_path: Path) -> None:
    """An independent reader: the prompt before the first underscore, a running number after it."""
    data = tmp_path / "dataset"
    data.mkdir()
    prompts = [f"a red cup and {i} blue books." for i in range(5)]
    (data / "color_val.txt").write_text("\n".join(prompts) + "\n")
    benchmark = load_benchmark(
        "t2i_compbench", {"data_file": str(data), "samples": 3, "any_data": True}
    )
    with pytest.raises(BenchError, match=r"none of the published files \(color_val\.txt\)"):
        replace(benchmark, any_data=False).entries()
    names = [benchmark.files(e, s)[0] for e in benchmark.entries() for s in range(3)]
    assert sorted(names, key=lambda n: int(n[:-4].split("_")[-1])) == names
    assert [n.split("_")[0] for n in names] == [p for p in prompts for _ in range(3)]
    assert [int(n[:-4].split("_")[-1]) for n in names] == list(range(15))
    assert benchmark.root("x") == "images/color/samples"
    for refused in (benchmark.judge, benchmark.check_judge):
        with pytest.raises(BenchError, match="judged by the official scorer"):
            refused()
    (tmp_path / "clip").mkdir()
    clip = {"model": f"local-dir:{zoo.save_open_clip(tmp_path / 'clip')}"}
    assert replace(benchmark, category="non_spatial", clip=clip).judge().title == "CLIP ViT-B/32"
    file = tmp_path / "vqa_result.json"
    scores = [i / 20 for i in range(15)]
    rows = [{"question_id": i, "answer": str(v)} for i, v in enumerate(scores)]
    file.write_text(json.dumps(rows[::-1]))
    result = import_results(tmp_path / "out", benchmark, file, "mine")
    assert value(result, "mean over images") == pytest.approx(sum(scores) / 15)
    assert result["counts"]["judged"] == 15
    assert result["metrics"][0]["low"] < result["metrics"][0]["value"]
    file.write_text(json.dumps([{"question_id": 15, "answer": "1"}]))
    with pytest.raises(BenchError, match="image 15 is beyond the 5 prompts x 3 images"):
        import_results(tmp_path / "x", benchmark, file, "mine")
