"""The prompt files: what they hold, and that they are what the generators write."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flowgrpo.shapes.captions import TASKS, combination
from scripts.prompt_sets import generated_files, geneval, shapes, text_rendering

PROMPTS = Path(__file__).parents[1] / "prompts"
OFFICIAL = Path(__file__).parents[2] / "shared/data/geneval/evaluation_metadata.jsonl"
OFFICIAL_MD5 = "9a0ed515640279a48ed3380d90aec0ed"


def load(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PROMPTS / name).read_text("utf-8").splitlines()]


def geneval_bytes() -> bytes:
    return "".join(f"{line}\n" for line in geneval.lines()).encode()


def test_geneval_has_the_official_md5():
    assert hashlib.md5(geneval_bytes()).hexdigest() == OFFICIAL_MD5


def test_geneval_equals_the_official_file():
    if not OFFICIAL.exists():
        pytest.skip(f"GenEval's own file is not at {OFFICIAL}")
    assert geneval_bytes() == OFFICIAL.read_bytes()


def test_training_prompts_ask_for_nothing_that_the_benchmark_asks_for():
    train, benchmark = geneval.train_records(), geneval.records()
    assert not {combination(r) for r in train} & {combination(r) for r in benchmark}
    assert len({combination(r) for r in train}) == len(train)
    counts = Counter(r["tag"] for r in train)
    assert counts["position"] == counts["color_attr"] == counts["colors"] == 300
    assert counts["two_object"] == 300
    assert counts["counting"] == 240 - Counter(r["tag"] for r in benchmark)["counting"]
    assert "single_object" not in counts


def test_geneval_counts_per_task():
    counts = Counter(record["tag"] for record in geneval.records())
    assert [counts[task] for task in TASKS] == [80, 99, 80, 94, 100, 100]


@pytest.mark.parametrize("name", generated_files())
def test_file_is_what_the_generator_writes(name):
    expected = "".join(f"{line}\n" for line in generated_files()[name])
    assert (PROMPTS / name).read_bytes() == expected.encode()


def test_every_file_is_documented():
    readme = (PROMPTS / "README.md").read_text("utf-8")
    for path in PROMPTS.iterdir():
        if path.name != "README.md":
            count = len(path.read_text("utf-8").splitlines())
            assert f"| `{path.name}` | {count} |" in readme


def test_text_rendering_prompts_quote_one_text():
    for name, count in [("train", 1000), ("held_out", 200)]:
        records = load(f"text_rendering_{name}.jsonl")
        assert len(records) == len({record["prompt"] for record in records}) == count
        for record in records:
            before, text, after = record["prompt"].split('"')
            assert text == record["metadata"]["text"]
            assert text.strip() == text != ""
            assert (before + after).strip()


def test_text_rendering_quotes_no_text_twice():
    # An OCR reward ignores case and blanks, so texts must differ without them.
    records = load("text_rendering_train.jsonl") + load("text_rendering_held_out.jsonl")
    texts = [record["metadata"]["text"].replace(" ", "").lower() for record in records]
    assert len(set(texts)) == len(texts) == 1200


def test_text_rendering_follows_the_seed():
    assert text_rendering.records(50, seed=1) == text_rendering.records(80, seed=1)[:50]
    assert text_rendering.records(50, seed=1) != text_rendering.records(50, seed=2)


def test_text_rendering_says_when_the_word_lists_are_exhausted():
    with pytest.raises(ValueError, match="word lists"):
        text_rendering.records(100_000, seed=0)


def test_shapes_held_out_combinations_are_not_trained_on():
    train, held_out = shapes.train_records(), shapes.held_out_records()
    assert {combination(r) for r in train}.isdisjoint(combination(r) for r in held_out)
    assert {r["tag"] for r in train} == {r["tag"] for r in held_out} == set(TASKS)


def test_shapes_tasks_take_turns_in_the_held_out_file():
    records = shapes.held_out_records()
    assert [record["tag"] for record in records[:6]] == list(TASKS)
    turns: Counter[str] = Counter()
    for record in records:
        # A task may lag behind another only once its own prompts are used up.
        for task in TASKS:
            left = sum(r["tag"] == task for r in records) - turns[task]
            assert left == 0 or turns[task] >= turns[record["tag"]]
        turns[record["tag"]] += 1
    assert max(turns.values()) == shapes.MAX_HELD_OUT_PER_TASK


@pytest.mark.parametrize(
    ("kind", "num_train", "num_held_out"), [("general", 300, 60), ("video", 200, 40)]
)
def test_own_prompts_are_complete_and_distinct(kind, num_train, num_held_out):
    train, held_out = (
        (PROMPTS / f"{kind}_{part}.txt").read_text("utf-8").splitlines()
        for part in ("train", "held_out")
    )
    assert (len(train), len(held_out)) == (num_train, num_held_out)
    assert all(prompt == prompt.strip() != "" for prompt in train + held_out)
    assert all(5 <= len(prompt.split()) <= 40 for prompt in train + held_out)
    assert len({prompt.lower() for prompt in train + held_out}) == num_train + num_held_out
