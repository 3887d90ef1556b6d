"""Names and prompts of users on a terminal."""

import io

import pytest
from rich.console import Console as RichConsole

from flowgrpo.core.text import plain, shorten
from flowgrpo.training.console import Console


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a photo of 3 猫 – ✓ e\u0301 👩\u200d🎨", "a photo of 3 猫 – ✓ e\u0301 👩\u200d🎨"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[2Jgone\x07\r", r"\x1b[2Jgone\x07\r"),
        ("left \u202eright", r"left \u202eright"),
        ("half \ud83d", r"half \ud83d"),
        ("c1 \x9b2J", r"c1 \x9b2J"),
    ],
)
def test_what_could_disturb_a_terminal_is_escaped(text, shown):
    assert plain(text) == shown


def test_what_a_terminal_cannot_encode_is_escaped():
    assert plain("✓ ok", "ascii") == r"\u2713 ok"


def test_long_lines_lose_their_middle():
    text = "abcdefgh\n\nabcdefghij\nabcdefghijk"
    assert shorten(text, 10) == "abcdefgh\n\nabcdefghij\nabcde ... ghijk"


def test_lines_and_tables_show_markup_and_control_characters_as_text():
    console, stream = Console(), io.StringIO()
    console.rich = RichConsole(file=stream, width=120, force_terminal=True, color_system=None)
    names = ["[bold]red[/bold]", "[/oops]", "\x1b[31mred", "[link=http://x]y[/link]"]
    console.table("[/title]", ["", *names], [["[/row]", *names]])
    for name in names:
        console.say(name)
    shown = stream.getvalue()
    for name in names:
        assert shown.count(plain(name)) == 3, name
    assert "[/title]" in shown
    assert "[/row]" in shown
    assert "\x1b[31m" not in shown
