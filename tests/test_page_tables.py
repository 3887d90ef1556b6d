"""Tables are written between the markers of a page, and nowhere else."""

from pathlib import Path

import pytest

from scripts.page_tables import markdown_table, marked_text, with_marked_text, write_marked_text

BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"


def test_a_table_replaces_the_text_between_the_markers(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    table = markdown_table(["a", "b"], [["1", "2"], ["3", "4"]])
    assert table == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"
    write_marked_text(file, "numbers", table)
    assert file.read_text() == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"
    assert marked_text(file.read_text(), "numbers") == table


@pytest.mark.parametrize("page", ["", f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}"])
def test_a_page_without_one_pair_of_markers_is_refused(page: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the page needs one line"):
        with_marked_text(page, "numbers", "new")
    file = tmp_path / "page.md"
    file.write_text(page)
    with pytest.raises(ValueError, match=r"page\.md: the page needs one line"):
        write_marked_text(file, "numbers", "new")
    assert file.read_text() == page
