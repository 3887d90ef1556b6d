"""The page of families has a row for each tiny family of the tests."""

from pathlib import Path

import pytest

from benchmarks.doctor_families import FINITE, MARKER, PAGES, row, write
from scripts.page_tables import marked_text
from tests.tiny import FAMILIES


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_family_has_a_row(page: Path) -> None:
    table = marked_text(page.read_text(), MARKER)
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `")]
    assert rows == [f"`{name}`" for name in FAMILIES]


def test_the_table_is_put_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- families: begin -->\nold\n<!-- families: end -->\nafter\n")
    names = ("replay equals rollout (same batch)", "replay equals rollout (batch of 1)")
    checks = [{"name": n, "measured": m, "passed": True} for n, m in zip(names, (1e-7, 2e-6), strict=True)]  # fmt: skip
    ratio = {"name": "ratio is 1 before an update (batch of 1)", "measured": 3e-8, "passed": False}
    result = {"pipeline": "Pipe", "path": "flow", "media": "image", "weights": "lora"}
    result["checks"] = [*checks, ratio]
    finite = {"name": FINITE, "measured": 0.4, "passed": False}
    broken = {**result, "checks": [{**c, "measured": None} for c in result["checks"]] + [finite]}
    results = {"float32": result, "bfloat16": result, "float16": broken}
    assert row("x", results) == (
        "`x`", "Pipe", "flow", "image", "LoRA", "2e-06", "3e-08", "3e-08", "overflows",
        "not: ratio is 1 before an update (batch of 1)",
    )  # fmt: skip
    assert row("x", results | {"bfloat16": {**broken, "checks": broken["checks"][:-1]}})[7] == "inf"
    write(page, {"x": results})
    text = page.read_text()
    assert text.startswith("before\n<!-- families: begin -->\n| family |")
    assert text.endswith(" |\n<!-- families: end -->\nafter\n")
    assert "old" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="needs one line"):
        write(page, {"x": results})
