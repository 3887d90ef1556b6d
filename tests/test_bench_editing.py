"""GEdit-Bench and ImgEdit-Bench: source images, generation, layouts, rules by hand, official files."""

import csv
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowgrpo.bench.base import BenchError, load_benchmark
from flowgrpo.bench.benchmarks._viescore import PERCEPTION, SEMANTICS, parse_pair
from flowgrpo.bench.benchmarks.gedit_bench import TASKS, GEditBench, _load
from flowgrpo.bench.benchmarks.imgedit_bench import OVERALL, TYPES, ImgEditBench, parse_scores
from flowgrpo.bench.generation import Plan, in_ratio
from flowgrpo.bench.models import Subject
from flowgrpo.bench.run import Part, generate_folder, import_results, score_folder
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Sampling
from tests.conftest import MakePolicy, sampling_of
from tests.stub_vlm import Question, Reply, Stub, said

OFFICIAL_COLUMNS = ["source_image", "edited_image", "instruction", "sementics_score", "quality_score",
                    "intersection_exist", "instruction_language"]  # fmt: skip


def values(result: Mapping[str, Any]) -> dict[str, float]:
    return {m["name"]: m["value"] for m in result["metrics"]}


def plain(shade: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (shade,) * 3)


# GEdit-Bench. The dataset has the columns of stepfun-ai/GEdit-Bench.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two edits in each task and language; the first of each task is in the intersection."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    folder = tmp_path_factory.mktemp("gedit") / "data"
    rows = [
        {
            "task_type": task,
            "key": f"{hashlib.md5(f'{task}{i}'.encode()).hexdigest()}",
            "instruction": f"{language} {task} {i}",
            "instruction_language": language,
            "input_image": plain(10 * i + t, (16, 24)),
            "input_image_raw": plain(10 * i + t + 100, (32, 48)),
            "Intersection_exist": i == 0,
        }
        for language in ("en", "cn")
        for t, task in enumerate(TASKS)
        for i in range(2)
    ]
    kinds = Features(
        {
            **{k: Value("string") for k in ("task_type", "key", "instruction", "instruction_language")},
            "input_image": Picture(),
            "input_image_raw": Picture(),
            "Intersection_exist": Value("bool"),
        }
    )  # fmt: skip
    Dataset.from_list(rows, features=kinds).save_to_disk(folder)
    return folder


@pytest.fixture
def gedit(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> GEditBench:
    sources = dataset.parent / "sources"
    made = load_benchmark("gedit_bench", {"data_file": str(dataset), "sources": str(sources)})
    assert isinstance(made, GEditBench)
    return made


def test_source_images_are_taken_out_once(gedit: GEditBench, dataset: Path) -> None:
    entries = gedit.entries()
    assert len(entries) == 22
    (raw,) = entries[1].prompt.images
    with Image.open(raw) as image:
        assert (image.size, image.getpixel((0, 0))) == ((32, 48), (110,) * 3)
    with Image.open(entries[1].prompt.metadata["judged_source"]) as image:
        assert (image.size, image.getpixel((0, 0))) == ((16, 24), (10,) * 3)
    (small,) = replace(gedit, source="input_image").entries()[1].prompt.images
    assert small == entries[1].prompt.metadata["judged_source"]
    first, before = gedit.data(), raw.stat().st_mtime_ns
    _load.cache_clear()
    assert gedit.data() == first
    raw.unlink()
    _load.cache_clear()
    assert gedit.data() == first
    assert raw.is_file()
    assert raw.stat().st_mtime_ns != before
    assert "22 instructions instead of the published 606" in first.notes
    with pytest.raises(BenchError, match="hf:stepfun-ai/GEdit-Bench"):
        GEditBench().entries()
    with pytest.raises(BenchError, match="cannot be loaded as a dataset: no such folder"):
        replace(gedit, data_file=str(dataset / "absent")).entries()
    with pytest.raises(ValueError, match="language must be one of en, cn, got 'zh'"):
        load_benchmark("gedit_bench", {"language": "zh"})


def edit_subject(make_policy: MakePolicy) -> Subject:
    sampling = sampling_of("flux_kontext")
    call = {k: v for k, v in sampling.call.items() if k != "image"}
    sampling = Sampling(**{**vars(sampling), "call": call})
    return Subject(
        "tiny", lambda: {"model": "tiny"}, lambda: make_policy("flux_kontext", sampling=sampling),
        sampling, "float32",
    )  # fmt: skip


def test_a_model_edits_the_sources_in_the_official_layout(
    gedit: GEditBench, make_policy: MakePolicy, tmp_path: Path
) -> None:
    """An independent reader: each result has its source beside it, of the dataset's small image."""
    entries = Part(limit=3).of(gedit)
    generate_folder(Plan(tmp_path, gedit, entries, edit_subject(make_policy)))
    root = tmp_path / "images" / "tiny" / "fullset"
    found = sorted(p for p in root.rglob("*.png") if not p.stem.endswith("_SRCIMG"))
    assert len(found) == len(list(root.rglob("*_SRCIMG.png"))) == 3
    for path in found:
        task, language, name = path.relative_to(root).parts
        assert task in TASKS
        assert language == "en"
        assert len(name) == 36
        with Image.open(path.with_name(f"{path.stem}_SRCIMG.png")) as source:
            assert source.size == (16, 24)
    pixels = [np.asarray(Image.open(p)) for p in found]
    assert not np.array_equal(pixels[0], pixels[1])
    text = Subject("t", lambda: {}, lambda: make_policy("flux"), sampling_of("flux"), "float32")
    with pytest.raises(Exception, match="image"):
        generate_folder(Plan(tmp_path / "text", gedit, entries, text))


def test_an_edit_has_the_ratio_of_its_source(
    gedit: GEditBench, make_policy: MakePolicy, tmp_path: Path
) -> None:
    """Where no size is given; and a folder of several sizes resumes."""
    subject = edit_subject(make_policy)
    free = replace(
        subject.sampling, height=None, width=None, call={**subject.sampling.call, "max_area": 384}
    )
    subject = replace(subject, sampling=free)
    policy = subject.load()
    tall, wide = (Prompt("paint it", images=[plain(90, size)]) for size in ((32, 48), (48, 32)))
    assert [in_ratio(policy, p, free).size[:2] for p in (tall, wide)] == [(48, 32), (32, 48)]
    fixed = replace(free, height=16, width=16)
    assert in_ratio(policy, tall, fixed) is tall
    entries = [
        replace(e, prompt=replace(e.prompt, images=p.images))
        for e, p in zip(gedit.entries()[:2], (tall, wide), strict=True)
    ]
    plan = Plan(tmp_path, gedit, entries, subject)
    generate_folder(plan)
    paths = [i.path for b in plan.items() for i in b]
    sizes = {Image.open(p).size for p in paths}
    assert sizes == {(16, 24), (24, 16)}
    paths[0].unlink()
    generate_folder(plan)
    assert paths[0].is_file()


def scores_of(entry: Any) -> tuple[list[int], list[int]]:
    """The judge's scores: semantics by the task, quality by the instruction."""
    task = TASKS.index(entry.prompt.metadata["task"])
    last = int(entry.prompt.text[-1])
    return [10 - task, 10], [10, 9 - 5 * last]


def test_edits_are_judged_as_officially(gedit: GEditBench, tmp_path: Path) -> None:
    """Per image the lower score of each pair and their geometric mean; then the mean over tasks."""
    root = tmp_path / "results" / "fullset"
    by_text = {e.prompt.text: e for e in gedit.entries()}
    shades = {}
    for number, entry in enumerate(by_text.values()):
        path = root / gedit.files(entry, 0)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        plain(8 * number, (40, 40)).save(path)
        shades[8 * number] = entry

    def answer(question: Question) -> Reply:
        if "Editing instruction:" in question.text:
            text = question.text.split("Editing instruction: ")[1].strip()
            semantics, _ = scores_of(by_text[text])
            assert [tuple(p.shape[1:]) for p in question.pictures] == [(24, 16)] * 2
            return said(json.dumps({"score": semantics, "reasoning": "short"}))
        (picture,) = question.pictures
        nearest = min(shades, key=lambda s: abs(s - round(255 * float(picture.mean()))))
        _, quality = scores_of(shades[nearest])
        return said(f'||V^=^V||\n{{"score" : {quality},\n"reasoning" : "a\nb"}}\n||V^=^V||')

    with Stub(answer) as stub:
        judged = replace(gedit, judge_model="tiny", judge_url=stub.url)
        result = score_folder(tmp_path / "out", judged, Part(), "mine", root)
        assert len(stub.questions) == 44
        assert all(q.parts[0] == "text" for q in stub.questions)
        assert all(q.request["max_completion_tokens"] == 1400 for q in stub.questions)
        urls = [
            p["image_url"]["url"] for p in stub.questions[0].request["messages"][0]["content"][1:]
        ]
        assert all(u.startswith("data:image/jpeg") for u in urls)
    semantics = [10 - t for t in range(11)]
    expected = {
        "G_SC": sum(semantics) / 11,
        "G_PQ": (9 + 4) / 2,
        "G_O": sum((math.sqrt(s * 9) + math.sqrt(s * 4)) / 2 for s in semantics) / 11,
        "G_SC (intersection)": sum(semantics) / 11,
        "G_PQ (intersection)": 9.0,
        "G_O (intersection)": sum(math.sqrt(s * 9) for s in semantics) / 11,
    }
    found = values(result)
    assert {k: found[k] for k in expected} == {
        k: pytest.approx(v, abs=1e-5) for k, v in expected.items()
    }
    assert found["tone_transfer: G_SC"] == 0
    assert result["title"] == "GEdit-Bench en (tiny)"
    assert result["model_index"][0]["results"][0]["task"] == {"type": "image-to-image"}
    assert 22 * gedit.num_calls(gedit.entries()[0]) == 44
    assert any("not the published judge (gpt-4.1, Qwen2.5" in w for w in result["warnings"])

    # The official files: calculate_statistics.py reads one per task, with these columns.
    official = tmp_path / "out" / "official"
    rows = {t: list(csv.DictReader((official / f"mine_{t}_gpt_score.csv").open())) for t in TASKS}
    assert all(list(r[0]) == OFFICIAL_COLUMNS and len(r) == 2 for r in rows.values())
    means = [
        sum(math.sqrt(float(r["sementics_score"]) * float(r["quality_score"])) for r in own)
        / len(own)
        for own in rows.values()
    ]
    assert sum(means) / 11 == pytest.approx(expected["G_O"])
    assert {r["intersection_exist"] for own in rows.values() for r in own} == {"True", "False"}
    combined = official / "mine_combined_gpt_score.csv"
    assert values(import_results(tmp_path / "back", gedit, combined, "mine")) == found
    text = combined.read_text()
    for change, problem in [
        (text.replace("/en/", "/en/x", 2), "is unknown or stands there twice"),
        (text.replace("instruction_language", "language"), "no row of"),
        (text.replace("10.0", "11.0", 1), "outside of 0 to 10"),
    ]:
        (tmp_path / "changed.csv").write_text(change)
        with pytest.raises(BenchError, match=problem):
            import_results(tmp_path / "x", gedit, tmp_path / "changed.csv", "mine")


def test_qwen_gets_png_before_the_text(gedit: GEditBench) -> None:
    judge = replace(gedit, judge_model="Qwen/Qwen2.5-VL-72B-Instruct-AWQ", judge_url="http://127.0.0.1:9/v1", timeout=1.0).judge()  # fmt: skip
    assert judge.identity()["order"] == "image, text"
    assert judge.identity()["image"] == "png"
    assert not judge.notes
    with pytest.raises(BenchError, match=r"--judge MODEL, such as gpt-4\.1"):
        gedit.judge()


def test_the_questions_are_viescores() -> None:
    """SHA-256 of SC_prompt and PQ_prompt that VIEScore(task="tie") of Step1X-Edit builds."""
    found = [hashlib.sha256(t.encode()).hexdigest()[:16] for t in (SEMANTICS, PERCEPTION)]
    assert found == ["8f529562c2f89f8d", "2473ff2c7406e065"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"score" : [7, 8], "reasoning" : "x"}', [7, 8]),
        ('Sure!\n```json\n{"score": [7.5, 0]}\n```', [7.5, 0]),
        ('{"score": [7, 8], "reasoning": "a "quoted" word"}', [7, 8]),
        ("[6, 0]", [6, 0]),
        ("score = [1, 2], because", [1, 2]),
        ('{"score": [7]}', None),
        ('{"score": [7, 11]}', None),
        ('{"score": [7, true]}', None),
        ('{"score": ["7", "8"]}', None),
        ("7", None),
        ("I cannot help with that.", None),
        ("", None),
    ],
)
def test_pairs_are_read_and_never_guessed(text: str, expected: list[float] | None) -> None:
    assert parse_pair(text) == expected


# ImgEdit-Bench. Records and questions have the form of the published files.


@pytest.fixture
def imgedit(tmp_path: Path) -> ImgEditBench:
    records = {}
    for number, kind in enumerate(TYPES):
        for i in range(2):
            image = tmp_path / "sources" / kind / f"{i}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            plain(20 * number).save(image)
            records[str(10 * number + i)] = {"id": f"{kind}/{i}.jpg", "prompt": f"do {kind} {i}", "edit_type": kind}  # fmt: skip
    (tmp_path / "basic_edit.json").write_text(json.dumps(records))
    questions = {k: f"Rate {k}.\nediting instruction is : <edit_prompt>.\n" for k in TYPES}
    (tmp_path / "prompts.json").write_text(json.dumps(questions))
    settings = {"data_file": str(tmp_path / "basic_edit.json"), "sources": str(tmp_path / "sources"),
                "judge_prompt": str(tmp_path / "prompts.json"), "any_data": True, "judge_model": "tiny"}  # fmt: skip
    made = load_benchmark("imgedit_bench", settings)
    assert isinstance(made, ImgEditBench)
    return made


def test_imgedit_is_the_mean_over_types(imgedit: ImgEditBench, tmp_path: Path) -> None:
    """Three scores an image, their rounded mean, means by type; the answers are the official file."""
    images = tmp_path / "images"
    images.mkdir()
    for entry in imgedit.entries():
        plain(0).save(images / f"{entry.key}.png")

    def answer(question: Question) -> Reply:
        kind, number = question.text.split("is : do ")[1].split(".")[0].split()
        assert question.text.startswith(f"Rate {kind}.")
        first = 5 if number == "0" else 1 + TYPES.index(kind) % 5
        return said(f"Brief reasoning: fine.\nPrompt Compliance: {first}\nSeamlessness: {first}\n**Physical: 1**")  # fmt: skip

    with Stub(answer) as stub:
        judged = replace(imgedit, judge_url=stub.url)
        result = score_folder(tmp_path / "out", judged, Part(), "mine", images)
        question = stub.questions[0]
        assert question.parts == ["text", "image_url", "image_url"]
        urls = [p["image_url"]["url"][:15] for p in question.request["messages"][0]["content"][1:]]
        assert urls == ["data:image/jpeg", "data:image/png;"]
    found = values(result)
    by_type = {k: (3.67 + round((2 * (1 + i % 5) + 1) / 3, 2)) / 2 for i, k in enumerate(TYPES)}
    assert {k: found[k] for k in TYPES} == {k: pytest.approx(v) for k, v in by_type.items()}
    assert found[OVERALL] == pytest.approx(sum(by_type.values()) / 9, abs=1e-5)
    assert result["title"] == "ImgEdit-Bench (tiny)"
    assert any("not those of the published prompts.json" in w for w in result["warnings"])
    # step1_get_avgscore.py averages the lines whose right side is a number.
    answers = json.loads((tmp_path / "out" / "official" / "result.json").read_text())
    lines = answers["0"].splitlines()
    assert [int(v) for line in lines[1:3] for v in line.split(": ")[1:] if v.isdigit()] == [5, 5]
    answers["1"] = {"error": "timeout"}
    (tmp_path / "result.json").write_text(json.dumps(answers))
    back = import_results(tmp_path / "back", imgedit, tmp_path / "result.json", "mine")
    assert back["counts"] | {"judged": 17, "missing": 1} == back["counts"]
    (tmp_path / "result.json").write_text('{"unknown": "x"}')
    with pytest.raises(BenchError, match=r"no result\.json about"):
        import_results(tmp_path / "x", imgedit, tmp_path / "result.json", "mine")


def test_imgedits_data_are_checked(imgedit: ImgEditBench, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"none of the published files \(basic_edit\.json\)"):
        replace(imgedit, any_data=False).entries()
    with pytest.raises(BenchError, match=r"source image .* is missing.*Benchmark\.tar"):
        replace(imgedit, sources=str(tmp_path / "absent")).entries()
    own = replace(imgedit, judge_prompt="", judge_url="http://127.0.0.1:9/v1").judge()
    assert own.title == "tiny, own wording"
    assert any("questions are ours" in n for n in own.notes)
    (tmp_path / "prompts.json").write_text('{"add": "Rate."}')
    with pytest.raises(BenchError, match=r"no prompts\.json of ImgEdit"):
        imgedit.judge()
    (tmp_path / "basic_edit.json").write_text('{"1": {"id": "a", "prompt": "b", "edit_type": "c"}}')
    with pytest.raises(BenchError, match="unknown edit_type 'c'"):
        imgedit.entries()


@pytest.mark.parametrize(
    "text", ["", "A: 1\nB: 2", "A: 1\nB: 2\nC: 6", "A: 1\nB: 2\nC: 3\nD: 4", "A: one\nB: 2\nC: 3"]
)
def test_imgedits_answers_have_three_scores(text: str) -> None:
    assert parse_scores(text) is None
    good = parse_scores("Brief reasoning: none.\n**A**: 1\nB: 2\nC: 3")
    assert good is not None
    assert good["scores"] == [1, 2, 3]
