"""UniGenBench: its data, its judge behind a real server, its official files and its arithmetic."""

import ast
import csv
import json
import multiprocessing
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowgrpo.bench.base import BenchError, load_benchmark
from flowgrpo.bench.benchmarks import unigenbench
from flowgrpo.bench.benchmarks._unigenbench_files import DIMENSIONS, OfficialPrompt
from flowgrpo.bench.benchmarks._unigenbench_leaderboard import OVERALL, ROWS, SETS
from flowgrpo.bench.benchmarks.unigenbench import UniGenBench, parse_scores
from flowgrpo.bench.run import Part, import_results, score_folder
from tests.stub_points import STEP, Judge, scores_for, shade_of
from tests.stub_vlm import Stub

ROOT = Path(__file__).parents[1]
SHARED = ROOT.resolve() / ".." / "shared" / "data" / "unigenbench"
POINTS = ["Style", "World Knowledge", "Attribute - Color", "Attribute - Size", "Relationship - Comparison",
          "Logical Reasoning", "Grammar - Negation", "Compound - Imagination", "Text Generation",
          "Entity Layout - Two-Dimensional Space", "Action - State"]  # fmt: skip


def row(points: list[str], theme: str = "Art", broken: bool = False) -> str:
    table = {
        "Primary Categories": theme,
        "Testpoints": points,
        "Testpoint Description": [f"about {p}" for p in points],
    }
    text = json.dumps(table)
    return text.replace('", "', '" "', 1) if broken else text


def write_csv(path: Path, number: int = 24, broken: int | None = None) -> Path:
    """A small set: 1 to 4 points a prompt, one of them twice in prompt 2."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "prompt_en", "sub_dims_en"])
        for i in range(number):
            points = [POINTS[(i + j) % len(POINTS)] for j in range(1 + i % 4)]
            points = [points[0], *points] if i == 2 else points
            theme = "Art" if i % 2 else "Design"
            writer.writerow([i, f'a "thing" {{number}} {i}, 好', row(points, theme, i == broken)])
    return path


def draw(folder: Path, benchmark: UniGenBench) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in benchmark.entries():
        for sample in range(benchmark.samples):
            grey = STEP * shade_of(int(entry.key), sample)
            Image.new("RGB", (16, 16), (grey,) * 3).save(folder / f"{entry.key}_{sample}.png")


@pytest.fixture
def small(tmp_path: Path) -> UniGenBench:
    made = load_benchmark(
        "unigenbench",
        {
            "data_file": str(write_csv(tmp_path / "set.csv")),
            "any_data": True,
            "samples": 2,
            "judge_model": "tiny",
            "concurrency": 8,
            "patience": 20.0,
        },
    )
    assert isinstance(made, UniGenBench)
    draw(tmp_path / "images", made)
    return made


def serve(mode: str, port: int, seconds: float, said: Connection) -> None:
    with Stub(Judge(mode), port=port, seconds=seconds) as stub:
        said.send(stub.url)
        threading.Event().wait()


@contextmanager
def server(mode: str, port: int = 0, seconds: float = 0.0) -> Iterator[tuple[str, BaseProcess]]:
    """The judge in a process of its own."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=serve, args=(mode, port, seconds, there), daemon=True)
    process.start()
    try:
        yield here.recv(), process
    finally:
        process.kill()
        process.join()


def expected(benchmark: UniGenBench, without: int | None = None) -> dict[str, float]:
    """Accuracies from the protocol: over all pairs, then the plain mean of the dimensions."""
    right: dict[str, list[int]] = defaultdict(list)
    for entry in benchmark.entries():
        for sample in range(benchmark.samples):
            shade = shade_of(int(entry.key), sample)
            if shade == without:
                continue
            scores = scores_for(shade, len(entry.dimensions))
            for point, score in zip(entry.dimensions, scores, strict=True):
                right[point.split("-")[0].strip()].append(score)
                if "-" in point:
                    right[point].append(score)
                right[f"theme: {entry.prompt.metadata['theme']}"].append(score)
    means = {k: 100 * sum(v) / len(v) for k, v in right.items()}
    present = [d for d in DIMENSIONS if d in means]
    return means | {unigenbench.OVERALL: sum(means[d] for d in present) / len(present)}


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {m["name"]: m["value"] for m in result["metrics"]}


def close(values: Mapping[str, float]) -> dict[str, Any]:
    return {k: pytest.approx(v, abs=1e-4) for k, v in values.items()}


def test_a_whole_run_against_a_moody_server_that_is_killed(
    small: UniGenBench, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    with server("moody", seconds=0.05) as (url, first):
        port = int(url.split(":")[2].split("/")[0])
        benchmark = replace(small, judge_url=url)
        found: list[dict[str, Any]] = []
        run = threading.Thread(
            target=lambda: found.append(score_folder(out, benchmark, Part(), "mine", images))
        )
        run.start()
        while not list(out.rglob("*.jsonl")) or judged(out) < 10:
            time.sleep(0.01)
        first.kill()
        first.join()
        time.sleep(0.3)
        with server("moody", port):
            run.join(60)
    (result,) = found
    failing = sum(
        shade_of(int(e.key), s) == 3 for e in small.entries() for s in range(small.samples)
    )
    assert failing > 0
    assert result["counts"]["failed"] == failing
    assert result["counts"]["judged"] == 48 - failing
    assert numbers(result) == close(expected(small, without=3))
    before = judged(out)
    with server("good", port):
        result = score_folder(out, benchmark, Part(), "mine", images)
    assert result["counts"]["failed"] == 0
    assert judged(out) == before + failing
    assert numbers(result) == close(expected(small))
    # Nothing is asked any more, so that no server is needed.
    again = score_folder(out, benchmark, Part(), "mine", images)
    assert numbers(again) == numbers(result)


def judged(out: Path) -> int:
    (log,) = out.rglob("scores/*.jsonl")
    return log.read_text().count('"judgement"')


def test_many_requests_are_in_flight(small: UniGenBench, tmp_path: Path) -> None:
    with Stub(Judge("good"), seconds=0.05) as stub:
        benchmark = replace(small, judge_url=stub.url)
        score_folder(tmp_path / "out", benchmark, Part(), "mine", tmp_path / "images")
    assert stub.most_at_once == 8
    assert len(stub.questions) == 48


def test_answers_are_cached_across_folders_and_keys_are_checked(
    small: UniGenBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "right")
    with Stub(Judge("good")) as stub:
        benchmark = replace(
            small, judge_url=stub.url, cache=str(tmp_path / "cache"), judge_key_env="JUDGE_KEY"
        )
        results = [
            score_folder(tmp_path / f"out{i}", benchmark, Part(), "mine", tmp_path / "images")
            for i in range(2)
        ]
        assert numbers(results[0]) == numbers(results[1])
        assert len(stub.questions) == 48
        headers = {k.lower(): v for k, v in stub.questions[0].headers.items()}
        assert headers["authorization"] == "Bearer right"
        content = stub.questions[0].request["messages"][0]["content"]
        assert [c["type"] for c in content] == ["image_url", "text"]
        assert content[0]["image_url"]["url"].startswith("data:image/jpeg;")
        monkeypatch.setenv("JUDGE_KEY", "wrong")
        with pytest.raises(BenchError, match="refuses the key"):
            benchmark.judge()
        monkeypatch.setenv("JUDGE_KEY", "")
        with pytest.raises(BenchError, match="'JUDGE_KEY' has no key"):
            benchmark.judge()


def test_the_official_files_give_the_same_numbers(small: UniGenBench, tmp_path: Path) -> None:
    """A reader written from the protocol, and our importer."""
    with Stub(Judge("moody")) as stub:
        benchmark = replace(small, judge_url=stub.url)
        result = score_folder(tmp_path / "out", benchmark, Part(), "mine", tmp_path / "images")
    official = tmp_path / "out" / "official" / "mine_en.csv"
    right: dict[str, list[int]] = defaultdict(list)
    with official.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "prompt", "testpoint", "output", "result_json", "img_path"]
    assert len(rows) == 48
    for line in rows:
        if not line["result_json"]:
            continue
        score = ast.literal_eval(line["result_json"])["score"]
        for point, value in zip(ast.literal_eval(line["testpoint"]), score, strict=True):
            right[point.split("-", 1)[0]].append(int(value == 1))
    table = json.loads(official.with_suffix(".json").read_text())
    assert "Relationship " in table["primary_dimensions"]
    for name, values in right.items():
        entry = table["primary_dimensions"][name]
        assert entry == {
            "correct": sum(values),
            "total": len(values),
            "accuracy": round(sum(values) / len(values), 4),
        }
        share = 100 * sum(values) / len(values)
        assert numbers(result)[name.strip()] == pytest.approx(share, abs=1e-4)
    imported = import_results(tmp_path / "imported", small, official, "mine")
    assert numbers(imported) == close(numbers(result))
    assert imported["counts"]["missing"] == result["counts"]["failed"] > 0
    text = official.read_text()
    official.write_text(text.replace("thing", "thang", 1))
    with pytest.raises(BenchError, match="line 2: row '0' is of another version"):
        import_results(tmp_path / "x", small, official, "mine")


OFFICIAL = '''
import something_that_is_not_installed
SYSTEM_PROMPT_EN_TEMPLATE = """Judge {prompt} N=%d by {testpoint}. {explanation} {test_explanation} [<score>]"""
EXPLANATION_DICT_EN = {points}
'''


def test_the_official_wording_is_read_and_never_run(small: UniGenBench, tmp_path: Path) -> None:
    file = tmp_path / "eval_common.py"
    file.write_text(OFFICIAL.replace("{points}", repr({p: f"what {p} is" for p in POINTS})))
    official = OfficialPrompt.read(file, "en")
    points = ["Style", "Attribute - Color"]
    assert official.fill("a {cat}", points, ["ink", "red"]) == (
        "Judge a {cat} N=%d by ['Style', 'Attribute - Color']. Checkpoints Defination:「\n"
        "Style: what Style is\nAttribute - Color: what Attribute - Color is\n」 Checkpoints "
        "Description:「\nStyle: ink\nAttribute - Color: red\n」 [<score>]"
    )
    with pytest.raises(BenchError, match="SYSTEM_PROMPT_ZH_TEMPLATE"):
        OfficialPrompt.read(file, "zh")
    with Stub(Judge("good")) as stub:
        benchmark = replace(small, judge_url=stub.url, judge_prompt=str(file))
        judge, other = benchmark.judge(), replace(benchmark, judge_prompt="").judge()
        assert judge.identity() != other.identity()
        assert judge.title == "tiny"
        assert other.title == "tiny, own wording"
        assert any("none of the published judges" in n for n in judge.notes)
        assert any("instructions are ours" in n for n in other.notes)


def test_the_malformed_row_is_repaired_and_said(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "set.csv", broken=3)
    benchmark = UniGenBench(data_file=str(path), any_data=True)
    assert len(benchmark.entries()) == 24
    assert len(benchmark.entries()[3].dimensions) == 4
    assert any("row 3 of set.csv is malformed" in n for n in benchmark.data().notes)
    assert benchmark.entries()[2].dimensions[0] == benchmark.entries()[2].dimensions[1]
    whole = UniGenBench(data_file=str(write_csv(tmp_path / "whole.csv")), any_data=True)
    assert whole.entries() == benchmark.entries()
    assert not any("malformed" in n for n in whole.data().notes)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.replace("sub_dims_en", "sub_dims_zh"), "line 2.*columns"),
        (lambda s: s.replace("Attribute - Size", "Atribute - Size"), "unknown test point 'Atribute"),
        (lambda s: s.replace('""Testpoints"": [', '""Testpoints"": ', 1), "not valid JSON"),
        (lambda s: s.split("\n")[0] + "\n", "no prompts"),
    ],
)  # fmt: skip
def test_broken_data_are_named(tmp_path: Path, change: Any, problem: str) -> None:
    path = write_csv(tmp_path / "set.csv")
    path.write_text(change(path.read_text()))
    with pytest.raises(BenchError, match=problem):
        UniGenBench(data_file=str(path), any_data=True).entries()


def test_the_published_english_set_is_read() -> None:
    path = SHARED / "test_prompts_en.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    benchmark = UniGenBench(data_file=str(path))
    entries = benchmark.entries()
    assert benchmark.data().name == "test_prompts_en.csv"
    assert [e.key for e in entries] == [str(i) for i in range(600)]
    assert sum(len(e.dimensions) for e in entries) == 1813
    counts = defaultdict(int)
    for entry in entries:
        for point in entry.dimensions:
            counts[point.split("-")[0].strip()] += 1
    assert dict(counts) == {
        "Style": 250, "World Knowledge": 158, "Logical Reasoning": 109, "Text Generation": 87, "Action": 263,
        "Attribute": 234, "Compound": 194, "Entity Layout": 134, "Grammar": 187, "Relationship": 197,
    }  # fmt: skip
    names = [m.name for m in benchmark.metrics()]
    assert len([n for n in names if " - " in n]) == 23
    assert len([n for n in names if n.startswith("theme: ")]) == 5
    with pytest.raises(BenchError, match="none of the published files"):
        UniGenBench(data_file=str(path), split="zh").entries()


def test_the_leaderboards_overall_is_the_mean_of_ten() -> None:
    for (model, split), row in ROWS.items():
        assert len(row) == len(DIMENSIONS) == 10
        overall = OVERALL[model][SETS.index(split)]
        assert float(np.mean(row)) == pytest.approx(overall, abs=0.011)


@pytest.mark.parametrize(
    ("text", "number", "scores"),
    [
        ("<score>[1, 0]</score>", 2, [1.0, 0.0]),
        ("<score>[True, 0.5]</score>", 2, [1.0, 0.5]),
        ("draft <score>[0]</score> final <score>\n[1]\n</score>", 1, [1.0]),
        ("<score>[1, 0]</score>", 3, None),
        ("<score>[1, 'no']</score>", 2, None),
        ("<score>1</score>", 1, None),
        ("<score>[1, 0</score>", 2, None),
        ("[1, 0]", 2, None),
        ("", 1, None),
    ],
)
def test_answers_are_parsed_strictly(text: str, number: int, scores: list[float] | None) -> None:
    assert parse_scores(text, number) == scores


def test_a_judge_must_be_named_and_exist(small: UniGenBench) -> None:
    with pytest.raises(BenchError, match="needs a judge"):
        replace(small, judge_model="").judge()
    with Stub(Judge("good")) as stub, pytest.raises(BenchError, match="no model 'huge'"):
        replace(small, judge_model="huge", judge_url=stub.url).judge()
