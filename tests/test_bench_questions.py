"""DPG-Bench, WISE and TIIF-Bench: layouts read back by the protocols, rules by hand, official files and judges."""

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowgrpo.bench.base import BenchError, load_benchmark
from flowgrpo.bench.benchmarks.dpg_bench import DPGBench, parse_yes_no, score
from flowgrpo.bench.benchmarks.tiif_bench import WORDINGS, TIIFBench, parse_answers
from flowgrpo.bench.benchmarks.wise import WISE, parse_marks, parse_score
from flowgrpo.bench.run import Part, import_results, score_folder
from flowgrpo.cli import main
from tests.stub_vlm import Question, Reply, Stub, said


def values(result: Mapping[str, Any]) -> dict[str, float]:
    return {m["name"]: m["value"] for m in result["metrics"]}


def grey(path: Path, shade: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (shade,) * 3).save(path)


# DPG-Bench. The file's columns and values are those of ELLA's dpg_bench.csv.

COLUMNS = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad",
           "category_detailed", "tuple", "question_natural_language"]  # fmt: skip
ROWS = {
    "COCOval1": [
        ("1", "0", "entity - whole (dog)", "Is there a dog?"),
        ("2", "1", "attribute - color (dog, red)", "Is the dog red?"),
        ("3", "1,2", "relation - spatial (dog, mat, on)", "Is the dog, red, on a mat?"),
        ("4", "0", "entity - whole (cat)", "Is there a cat?"),
    ],
    "whoops2": [("1", "0", "global - style (oil)", "Is this an oil painting?")],
}


def write_csv(path: Path, rows: Mapping[str, Any] = ROWS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for item, questions in rows.items():
            for number, parents, tuple_, text in questions:
                writer.writerow([item, f"prompt of {item}", "", number, parents, "", "", tuple_, text])  # fmt: skip
    return path


@pytest.fixture
def dpg(tmp_path: Path) -> DPGBench:
    made = load_benchmark("dpg_bench", {"data_file": str(write_csv(tmp_path / "dpg_bench.csv"))})
    assert isinstance(made, DPGBench)
    return made


@pytest.mark.parametrize(
    ("answers", "expected"),
    [("yyyy", 1.0), ("nyyy", 0.25), ("ynyy", 0.5), ("yyny", 0.75), ("nnnn", 0.0), ("ynnn", 0.25)],
)
def test_a_question_counts_only_below_a_yes(answers: str, expected: float) -> None:
    """By hand: 2 hangs on 1, and 3 on 1 and 2, so a no to 1 leaves 4 alone."""
    questions = [{"id": 1, "parents": []}, {"id": 2, "parents": [1]},
                 {"id": 3, "parents": [1, 2]}, {"id": 4, "parents": []}]  # fmt: skip
    given = {i: a == "y" for i, a in enumerate(answers, start=1)}
    assert score(questions, given) == expected
    # A child that stands before its parents sees them as they were answered.
    first = [questions[2], questions[0], questions[1], questions[3]]
    assert score(first, {1: False, 2: True, 3: True, 4: True}) == 0.25


def test_grids_are_what_the_official_scorer_crops(dpg: DPGBench, tmp_path: Path) -> None:
    """Its four boxes: top left, top right, bottom left, bottom right; the stem names the item."""
    images = tmp_path / "images"
    for number, entry in enumerate(dpg.entries()):
        for sample in range(4):
            grey(images / f"{entry.key}_{sample}.png", 40 * number + 10 * sample)
    dpg.assemble(images, dpg.entries())
    files = sorted((images / "grids").iterdir())
    assert [f.name.split(".")[0] for f in files] == ["COCOval1", "whoops2"]
    boxes = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    for number, file in enumerate(files):
        with Image.open(file) as grid:
            assert grid.size == (16, 16)
            crops = [np.asarray(grid.crop(box)) for box in boxes]
        assert [int(c.mean()) for c in crops] == [40 * number + 10 * s for s in range(4)]
        assert all(c.std() == 0 for c in crops)
    before = files[0].stat().st_mtime_ns
    dpg.assemble(images, dpg.entries())
    assert files[0].stat().st_mtime_ns == before
    grey(images / "whoops2_3.png", 0, size=4)
    with pytest.raises(BenchError, match=r"whoops2_3\.png has another size"):
        dpg.assemble(images, dpg.entries())


def shade(question: Question) -> int:
    return round(255 * question.light)


def test_dpgs_grids_are_judged_by_a_model_and_labelled(dpg: DPGBench, tmp_path: Path) -> None:
    """The last sample is no dog, so its other answers about the dog do not count."""
    images = tmp_path / "grids"
    for number, item in enumerate(ROWS):
        grid = Image.new("RGB", (16, 16))
        for sample in range(4):
            tile = Image.new("RGB", (8, 8), (40 * number + 10 * sample,) * 3)
            grid.paste(tile, (8 * (sample % 2), 8 * (sample // 2)))
        images.mkdir(exist_ok=True)
        grid.save(images / f"{item}.png")

    def answer(question: Question) -> Reply:
        if "cat" in question.text or (shade(question) == 30 and "Is there a dog" in question.text):
            return said("No.")
        return said("Yes, it is." if "oil" not in question.text else "no")

    with Stub(answer) as stub:
        judged = replace(dpg, judge_model="tiny", judge_url=stub.url)
        result = score_folder(tmp_path / "out", judged, Part(), "mine", images)
        assert len(stub.questions) == 4 * 5
        assert all(q.parts == ["image_url", "text"] for q in stub.questions)
    per_prompt = [(3 * 0.75 + 0) / 4, 0.0]
    assert values(result) == {
        "DPG-Bench score": pytest.approx(100 * sum(per_prompt) / 2),
        "attribute (all images)": 100.0,
        "entity (all images)": pytest.approx(100 * 3 / 8),
        "global (all images)": 0.0,
        "relation (all images)": 100.0,
        "attribute - color": 100.0,
        "entity - whole": pytest.approx(100 * 3 / 8),
        "global - style": 0.0,
        "relation - spatial": 100.0,
    }
    assert sum(dpg.num_calls(e) for e in dpg.entries()) == 5
    assert result["title"] == "DPG-Bench (tiny)"
    assert any("published judge is mPLUG" in w for w in result["warnings"])
    assert any("2 prompts instead of the published 1065" in w for w in result["warnings"])


def test_dpgs_official_results_are_read(dpg: DPGBench, tmp_path: Path) -> None:
    """Lines as compute_dpg_bench.py writes them, with the file of answers beside."""
    results, details = tmp_path / "dpg-bench_results.txt", tmp_path / "dpg-bench_results_detail.txt"
    results.write_text(
        "/a, b/COCOval1.png, 0.75, 0.75, 0.75, 0.0, 0.5625\n/a, b/whoops2.png, 0.0, 0.0, 0.0, 1.0, 0.25\n"
        "Model: b\nL1 category scores:\n\tentity: 25.0\nDPG-Bench score: 40.625\n"
    )
    scores = import_results(tmp_path / "out", dpg, results, "mine")
    assert values(scores) == {"DPG-Bench score": pytest.approx(40.625)}
    lines = []
    for item, questions in ROWS.items():
        for sample, box in enumerate([(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]):
            for _, _, _, text in questions:
                no = "cat" in text or ("oil" in text and sample < 3) or (sample == 3 and "there a dog" in text)  # fmt: skip
                lines.append(f"/a, b/{item}.png, {box}, {text}, {'no' if no else 'yes'}\n")
    details.write_text("".join(lines))
    full = values(import_results(tmp_path / "out", dpg, details, "mine"))
    assert full["DPG-Bench score"] == pytest.approx(40.625)
    assert full["global - style"] == 25.0
    for text, problem in [
        ("/a/COCOval1.png, 0.5, 0.5, 0.5, 0.5, 0.9\n", "the last number is no mean"),
        ("/a/other.png, 0.5, 0.5, 0.5, 0.5, 0.5\n", "'other' is no item"),
        ("nothing\n", "no results of the official scorer"),
        ("/a/COCOval1.png, (0, 0, 8, 8), Is it?, yes\n", "no question about COCOval1"),
    ]:
        results.write_text(text)
        with pytest.raises(BenchError, match=problem):
            import_results(tmp_path / "x", dpg, results, "mine")
    results.write_text("/a/COCOval1.png, 0.5, 0.5, 0.5, 0.5, 0.5\n")
    with pytest.raises(BenchError, match="more than 1 image of COCOval1"):
        import_results(tmp_path / "x", replace(dpg, samples=1), results, "mine")


def test_dpgs_data_and_judge_are_checked(dpg: DPGBench, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"published judge is no part of flowgrpo.*--judge MODEL"):
        dpg.check_judge()
    with pytest.raises(BenchError, match="1 or 4 images"):
        replace(dpg, samples=2).entries()
    with pytest.raises(BenchError, match="has no folder 'prompts'"):
        replace(dpg, data_file=str(tmp_path)).entries()
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "COCOval1.txt").write_text("a longer prompt\n")
    with pytest.raises(BenchError, match="prompt of whoops2"):
        replace(dpg, data_file=str(tmp_path)).entries()
    (tmp_path / "prompts" / "whoops2.txt").write_text("another")
    texts = [e.prompt.text for e in replace(dpg, data_file=str(tmp_path)).entries()]
    assert texts == ["a longer prompt", "another"]
    for rows, problem in [
        ({"a": [("1", "7", "entity - whole (x)", "Is it?")]}, "question 7 is a parent"),
        ({"a": [("x", "0", "entity - whole (x)", "Is it?")]}, "item a: invalid literal"),
        ({"a": [("1", "", "entity - whole (x)", "Is it?")]}, "line 2: an empty cell"),
    ]:
        write_csv(tmp_path / "dpg_bench.csv", rows)
        with pytest.raises(BenchError, match=problem):
            dpg.entries()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes", True), (" **no**, it is not", False), ("'yes'.", True), ("not sure", None), ("yesterday", None), ("", None)],
)  # fmt: skip
def test_yes_and_no(text: str, expected: bool | None) -> None:
    assert parse_yes_no(text) is expected


# WISE. Categories and identifiers are those of the published files.

KINDS = {"Cultural knowledge": 400, "time": 120, "Space": 120, "Biology": 120,
         "Physical Knowledge": 120, "Chemistry": 120}  # fmt: skip


def wise_folder(folder: Path, legacy: bool = False) -> Path:
    """All 1,000 identifiers; the explanation names the answer, the prompt does not."""
    folder.mkdir()
    kinds = {**KINDS, **({"time": 167, "Space": 133} if legacy else {})}
    kinds = {k: (100 if legacy and i > 2 else v) for i, (k, v) in enumerate(kinds.items())}
    owners = ["cultural_common_sense", *["spatio-temporal_reasoning"] * 2, *["natural_science"] * 3]
    files: dict[str, list[dict[str, Any]]] = {}
    number = 0
    for (kind, count), owner in zip(kinds.items(), owners, strict=True):
        for _ in range(count):
            number += 1
            record = {"Prompt": f"riddle {number}", "Explanation": f"answer {number}", "Category": kind,
                      "Subcategory": "Festival", "prompt_id": number}  # fmt: skip
            files.setdefault(owner + ("" if legacy else "_verified"), []).append(record)
    assert number == 1000
    for name, records in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def wise(tmp_path: Path) -> WISE:
    settings = {"data_file": str(wise_folder(tmp_path / "data")), "any_data": True, "patience": 5.0}
    made = load_benchmark("wise", settings)
    assert isinstance(made, WISE)
    return made


def test_wises_overall_is_weighted_by_category(wise: WISE, tmp_path: Path) -> None:
    """The ranges of identifiers and the weights of calculate_verified.py, by hand."""
    right = {"culture": 200, "time": 30, "space": 60, "biology": 0, "physics": 120, "chemistry": 90}
    starts = {"culture": 1, "time": 401, "space": 521, "biology": 641, "physics": 761, "chemistry": 881}  # fmt: skip
    file = tmp_path / "scores.jsonl"
    good = {start + i for k, start in starts.items() for i in range(right[k])}
    lines = [json.dumps({"prompt_id": i, "Subcategory": "x", "score": float(i in good)}) for i in range(1, 1001)]  # fmt: skip
    file.write_text("\n".join(reversed(lines)))
    result = import_results(tmp_path / "out", wise, file, "mine")
    means = {"culture": 0.5, "time": 0.25, "space": 0.5, "biology": 0.0, "physics": 1.0, "chemistry": 0.75}  # fmt: skip
    overall = 0.4 * 0.5 + 0.12 * (0.25 + 0.5 + 0.0 + 1.0 + 0.75)
    expected = {"overall WiScore": overall, **means}
    assert values(result) == {k: pytest.approx(100 * v) for k, v in expected.items()}
    back = tmp_path / "out" / "official" / "scores.jsonl"
    assert values(import_results(tmp_path / "back", wise, back, "mine")) == values(result)
    # Without a category there is no overall score.
    file.write_text("\n".join(lines[:880]))
    part = import_results(tmp_path / "part", wise, file, "mine")
    assert values(part)["overall WiScore"] is None
    assert values(part)["physics"] == 100
    file.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(BenchError, match=r"line 1001: prompt_id 1 .* twice"):
        import_results(tmp_path / "x", wise, file, "mine")
    file.write_text('{"prompt_id": 1, "consistency": 2, "realism": 1, "aesthetic_quality": 0}')
    with pytest.raises(BenchError, match="of the other protocol"):
        import_results(tmp_path / "x", wise, file, "mine")


def test_wises_legacy_score_is_the_wiscore(tmp_path: Path) -> None:
    settings = {"data_file": str(wise_folder(tmp_path / "data", legacy=True)), "any_data": True}
    legacy = load_benchmark("wise", {**settings, "protocol": "legacy"})
    file = tmp_path / "scores.jsonl"
    marks = {"consistency": 2, "realism": 1, "aesthetic_quality": 0}
    zero = dict.fromkeys(marks, 0)
    lines = [json.dumps({"prompt_id": i, **(marks if i > 700 else zero)}) for i in range(1, 1001)]
    file.write_text("\n".join(lines))
    found = values(import_results(tmp_path / "out", legacy, file, "mine"))
    each = (0.7 * 2 + 0.2 * 1) / 2
    assert found["biology"] == found["chemistry"] == pytest.approx(100 * each)
    assert found["time"] == 0
    assert found["overall WiScore"] == pytest.approx(100 * 0.3 * each)
    assert found["consistency"] == pytest.approx(30)


SCRIPT = '''
import os
os.abort()  # the script is never run

def build_evaluation_messages(prompt_data, image_base64):
    return [
        {"role": "system", "content": [{"type": "text", "text": "You audit pictures."}]},
        {"role": "user", "content": [
            {"type": "text", "text": f"""Return one binary score {{as below}}.
PROMPT: "{prompt_data['Prompt']}"
EXPLANATION: "{prompt_data['Explanation']}"
"""},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}},
        ]},
    ]
'''


def test_wise_asks_as_the_official_script_does(wise: WISE, tmp_path: Path) -> None:
    """System message, text before the PNG, thinking off; nonsense is asked again, then counted."""
    (tmp_path / "vllm_eval.py").write_text(SCRIPT)
    part = Part(limit=10)
    images = tmp_path / "images"
    for entry in part.of(wise):
        grey(images / f"{entry.key}.png", int(entry.key) % 200)
    seen: dict[str, int] = {}

    def answer(question: Question) -> Reply:
        number = re.search(r'EXPLANATION: "answer (\d+)"', question.text)
        assert number is not None
        seen[number[1]] = seen.get(number[1], 0) + 1
        if number[1] == "1":
            return said("I cannot judge this.")
        if number[1] == "101" and seen["101"] == 1:
            return said("Score: 7")
        return said("<think>score: 0?</think>**Score**: 1" if number[1] != "201" else "Score: 0")

    with Stub(answer) as stub:
        judged = replace(
            wise,
            judge_model="tiny",
            judge_url=stub.url,
            judge_prompt=str(tmp_path / "vllm_eval.py"),
        )
        result = score_folder(tmp_path / "out", judged, part, "mine", images)
    question = stub.questions[0]
    assert question.parts == ["text", "image_url"]
    assert question.request["messages"][0] == {"role": "system", "content": "You audit pictures."}
    assert question.text.startswith('Return one binary score {as below}.\nPROMPT: "riddle ')
    assert question.request["max_completion_tokens"] == 500
    assert question.request["temperature"] == 0
    assert seen["1"] == 3
    assert seen["101"] == 2
    assert result["counts"] | {"judged": 9, "failed": 1} == result["counts"]
    assert values(result)["culture"] == pytest.approx(100 * 2 / 3)
    assert any("tiny is not the published judge (Qwen3.5-35B-A3B)" in w for w in result["warnings"])
    qwen = replace(judged, judge_model="Qwen/Qwen3.5-35B-A3B", judge_url="http://127.0.0.1:9/v1")
    loaded = qwen.judge()
    assert loaded.identity()["request"]["chat_template_kwargs"] == {"enable_thinking": False}
    assert not loaded.notes
    with pytest.raises(BenchError, match="script of the other protocol"):
        replace(judged, protocol="legacy").judge()
    with pytest.raises(BenchError, match="no function build_evaluation_messages"):
        replace(judged, judge_prompt=__file__).judge()
    with pytest.raises(BenchError, match=r"no judge is named: --judge MODEL, such as Qwen3\.5"):
        wise.judge()
    own = replace(judged, judge_prompt="", judge_url="http://127.0.0.1:9/v1").judge()
    assert own.title == "tiny, own wording"


def test_wises_data_are_the_published_files(wise: WISE, tmp_path: Path) -> None:
    with pytest.raises(
        BenchError, match=r"none of the published files.*cultural_common_sense_verified"
    ):
        replace(wise, any_data=False).entries()
    with pytest.raises(BenchError, match="data_verified"):
        WISE().entries()
    path = tmp_path / "data" / "natural_science_verified.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps([*records, {"Prompt": "x"}]))
    with pytest.raises(BenchError, match="record 360: no record of WISE"):
        wise.entries()
    path.write_text(json.dumps([*records, records[0]]))
    with pytest.raises(BenchError, match="a prompt_id stands there twice"):
        wise.entries()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Score: 1", 1), ("**Score**: 0", 0), ("score：1", 1), ("\n 0 \n", 0), ("Score: 10", None),
        ("Score: 0.5", None), ("Score: 1/2", None), ("0\n1", None), ("a score of one", None), ("", None),
    ],
)  # fmt: skip
def test_binary_answers(text: str, expected: int | None) -> None:
    assert parse_score(text) == (None if expected is None else {"score": expected})


def test_marks_need_all_three() -> None:
    wanted = {"consistency": 2, "realism": 1, "aesthetic_quality": 0}
    assert parse_marks("**Consistency:** 2\nRealism: 1\nAesthetic Quality: 0") == wanted
    assert parse_marks("2\n1\n0") == wanted
    assert parse_marks("Consistency: 2\nRealism: 1") is None
    assert parse_marks("Consistency: 3\nRealism: 1\nAesthetic Quality: 0") is None
    assert parse_marks("2\n1\n0\n1") is None


# TIIF-Bench. Files, keys and layout are those of the official repository.


@pytest.fixture
def tiif(tmp_path: Path) -> TIIFBench:
    """Two types of one group and one of another, two instructions each; 'Yes' as in the data."""
    for kind in ("shape+color", "shape+texture", "text"):
        prompts, questions = [], []
        for i in range(2):
            both = {f"{n}_description": f"{n} {kind} {i}" for n in ("short", "long")}
            prompts.append({"type": kind, **both})
            asked = [f"Is it {kind} {i} {q}?  " for q in range(1 + i)]
            questions.append({"type": kind, "yn_question_list": asked, "yn_answer_list": ["Yes", "no"][: 1 + i]})  # fmt: skip
        for folder, end, rows in (("testmini_prompts", "_prompts", prompts), ("testmini_eval_prompts", "_eval_prompts", questions)):  # fmt: skip
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(r) + "\n" for r in rows)
            (tmp_path / "data" / folder / f"{kind}{end}.jsonl").write_text(text)
    names = "\n".join(f"{n} = '''\nQuestions:\n##YNQuestions##\n{n}'''" for n in WORDINGS)
    (tmp_path / "eval_with_vlm.py").write_text(f"import openai\nos.abort()\n{names}\n")
    settings = {"data_file": str(tmp_path / "data"), "any_data": True,
                "judge_prompt": str(tmp_path / "eval_with_vlm.py"), "judge_model": "tiny", "patience": 5.0}  # fmt: skip
    made = load_benchmark("tiif_bench", settings)
    assert isinstance(made, TIIFBench)
    return made


TIIF_OVERALL = {  # The judge says yes to all: one of three questions is wrong, but not in short text.
    "overall (short)": ((2 / 3 + 2 / 3) / 2 + 1) / 2,
    "overall (long)": 2 / 3,
    "basic attribute (short)": 2 / 3,
    "advanced text (short)": 1.0,
    "shape+color (long)": 2 / 3,
}


def test_tiif_asks_all_questions_of_an_image_at_once(tiif: TIIFBench, tmp_path: Path) -> None:
    """The official layout; nine groups are means of types, the overall score is the mean of groups."""
    root = tmp_path / "output"
    for kind in ("shape+color", "shape+texture", "text"):
        for length in ("short", "long"):
            for i in range(2):
                light = 200 if (kind, length) == ("text", "short") else 100
                grey(root / kind / "flux" / f"{length}_description" / f"{i}.png", light)

    def answer(question: Question) -> Reply:
        asked = re.findall(r"Is it [\w+]+ \d (\d)\?\n", question.text)
        told = ["no" if q == "1" and shade(question) == 200 else "Yes" for q in asked]
        return said("\n\n".join(f"{t}, since it is so" for t in told) + "\nI hope this helps.")

    with Stub(answer) as stub:
        judged = replace(tiif, judge_url=stub.url, folder="flux")
        result = score_folder(tmp_path / "out", judged, Part(), "mine", root)
        assert len(stub.questions) == 12
        asked = stub.questions[0].request["messages"]
        assert asked[0] == {"role": "system", "content": "You are a professional image critic."}
        assert {q.text.split("\n")[-1] for q in stub.questions} <= set(WORDINGS)
        assert len({q.text.split("\n")[-1] for q in stub.questions}) > 1
    found = values(result)
    assert {k: found[k] for k in TIIF_OVERALL} == {k: pytest.approx(100 * v, abs=1e-4) for k, v in TIIF_OVERALL.items()}  # fmt: skip
    assert any("temperature is 0, and 1 officially" in w for w in result["warnings"])


def test_tiifs_official_results_are_matched_by_their_questions(
    tiif: TIIFBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published results of testmini are numbered as the full set: 104.json is no line of 2."""
    root = tmp_path / "eval_results" / "flux"
    for kind in ("shape+color", "shape+texture", "text"):
        for length in ("short", "long"):
            (root / kind / length).mkdir(parents=True)
            for i in range(2):
                table = {
                    "questions": [f"Is it {kind} {i} {q}?  " for q in range(1 + i)],
                    "gt_answers": ["Yes", "no"][: 1 + i],
                    "model_pred": ["yes", "no" if (kind, length) == ("text", "short") else "yes"][: 1 + i],
                }  # fmt: skip
                (root / kind / length / f"{100 + i}.json").write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    words = [
        "--benchmark",
        "tiif_bench",
        "--data",
        str(tmp_path / "data"),
        "--set",
        "any_data=true",
    ]
    assert main(["bench", "score", str(root), *words, "--label", "flux"]) == 0
    found = values(json.loads((tmp_path / "bench/tiif_bench/flux/bench.json").read_text()))
    assert {k: found[k] for k in TIIF_OVERALL} == {k: pytest.approx(100 * v, abs=1e-4) for k, v in TIIF_OVERALL.items()}  # fmt: skip
    (root / "text" / "long" / "102.json").write_text(
        '{"questions": ["Is it?"], "model_pred": ["yes"]}'
    )
    with pytest.raises(
        BenchError, match=r"102\.json: these questions are not in the testmini data"
    ):
        import_results(tmp_path / "x", tiif, root, "mine")
    with pytest.raises(BenchError, match="is no folder eval_results/MODEL"):
        import_results(tmp_path / "x", tiif, tmp_path / "data", "mine")


def test_tiifs_data_and_wording_are_checked(tiif: TIIFBench, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="files of testmini are not the published ones"):
        replace(tiif, any_data=False).entries()
    with pytest.raises(BenchError, match=r"test_prompts holds no \.jsonl files"):
        replace(tiif, subset="full").entries()
    with pytest.raises(BenchError, match="does not define raw_prompt, raw_prompt_1"):
        replace(tiif, judge_prompt=__file__).judge()
    file = tmp_path / "data" / "testmini_eval_prompts" / "text_eval_prompts.jsonl"
    lines = file.read_text().splitlines()
    for text, problem in [
        (lines[0], "has 1 line,"),
        (
            "\n".join([lines[0], lines[1].replace('"no"', '"maybe"')]),
            "line 2: no record of TIIF-Bench",
        ),
        ("\n".join([lines[0], '{"type": "text"}']), "line 2: no record of TIIF-Bench"),
    ]:
        file.write_text(text)
        with pytest.raises(BenchError, match=problem):
            tiif.entries()


def test_tiifs_answers_are_counted() -> None:
    assert parse_answers("Yes, a.\n no\nNote: b", 2) == ["yes", "no"]
    assert parse_answers("Yes, a.\nno\nyes", 2) is None
    assert parse_answers("1. yes", 1) is None
