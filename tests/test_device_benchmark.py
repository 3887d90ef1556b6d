"""The benchmark of devices: each part runs at tiny sizes, and its results survive whatever happens."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.device.measure import gaps
from benchmarks.device.models import Maker
from benchmarks.device.parts import Item, Part, parts
from benchmarks.device.results import NOTHING, Results, environment, measure, written

PAGE = "before\n<!-- device:start -->\nold\n<!-- device:end -->\nafter\n"
PLACE = {"device": "a GPU", "tiny": False, "commit": "abc", "torch": "1", "diffusers": "2", "transformers": "3", "peft": "4"}  # fmt: skip


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker("cpu", True, tmp_path_factory.mktemp("device"))


# The others start processes, or need a GPU or a package.
REHEARSED = [
    (0, "replays"), (1, "flux1_dev bfloat16"), (2, "default attention"), (3, "preset of 48 GB"),
    (4, "full, 8-bit AdamW"), (4, "offloading"), (5, "rollout and replay"), (6, "pre-training"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "key"), REHEARSED)
def test_a_part_runs_at_tiny_sizes(number: int, key: str, maker: Maker) -> None:
    (item,) = [i for p in parts() if p.number == number for i in p.items if i.key == key]
    found = item.run(maker)
    assert json.loads(json.dumps(found)) == found
    assert all(v > 0 for k, v in found.items() if k.startswith(("seconds", "milliseconds")))


def test_parts_are_in_order_and_keys_differ() -> None:
    assert [p.number for p in parts()] == list(range(8))
    for part in parts():
        assert len({i.key for i in part.items}) == len(part.items) > 0


def fails(_: Maker) -> dict[str, int]:
    raise RuntimeError("out of luck\nand more")


def sleeps(_: Maker) -> dict[str, int]:
    time.sleep(5)
    return {}


def test_results_survive(maker: Maker, tmp_path: Path) -> None:
    runs: list[str] = []

    def good(name: str) -> Callable[[Maker], dict[str, int]]:
        return lambda _: (runs.append(name), {"pictures": 3})[1]

    part = Part(0, "A part", [
        Item("fails", fails), Item("sleeps", sleeps, limit=0.1), Item("good", good("good")),
        Item("long", good("long"), least=1000),
    ])  # fmt: skip
    file = tmp_path / "results.jsonl"
    measure([part], maker, Results(file), 60, PLACE)
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert [line["key"] for line in lines] == ["fails", "sleeps", "good"]
    assert lines[0]["failed"] == "RuntimeError: out of luck"
    assert lines[1]["failed"].startswith("TimeoutError: stopped after")
    assert lines[2]["result"] == {"pictures": 3}

    # A process that was killed while it wrote; the next one goes on with what is missing.
    with file.open("a") as half:
        half.write('{"part": 0, "ke')
    measure([part], maker, Results(file), 2000, PLACE)
    assert runs == ["good", "long"]
    assert [json.loads(t)["key"] for t in file.read_text().splitlines()][3:] == ["long"]
    # At another commit everything is measured again.
    assert not Results(file).has(part, part.items[2], PLACE | {"commit": "other"})

    page = written(PAGE, Results(file), [part])
    assert "Measured on a GPU at commit `abc`" in page
    assert "| good | pictures 3 |" in page
    assert "| fails | failed: RuntimeError: out of luck |" in page
    assert "old" not in page
    assert page.endswith("after\n")
    with pytest.raises(ValueError, match="the page has no"):
        written("no markers", Results(file), [part])


def test_rehearsals_are_no_results(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    results.add({"part": 0, "key": "a", "seconds": 1.0, "result": {}, "environment": environment("cpu", True)})  # fmt: skip
    assert NOTHING in written(PAGE, results, parts())


def test_gaps_of_intervals() -> None:
    busy, longest = gaps(
        [(0, 10, "a"), (5, 8, "b"), (20, 30, "c"), (29, 40, "d"), (41, 42, "e")], 1
    )
    assert busy == pytest.approx(0.031)
    assert longest == [{"ms": 0.01, "after": "a", "before": "c"}]
