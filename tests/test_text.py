"""Names and prompts of users on a terminal."""

import ast
import io
import re
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from flowgrpo.config import load
from flowgrpo.config.geometry import geometry
from flowgrpo.config.plan import plan
from flowgrpo.core.text import counted, plain, shorten
from flowgrpo.training.console import Console

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize(
    ("number", "noun", "spec", "expected"),
    [
        (1, "step", "", "1 step"),
        (0, "step", "", "0 steps"),
        (12, "optimizer step", "", "12 optimizer steps"),
        (1200, "sample", ",", "1,200 samples"),
        (1.0, "decode", ",.0f", "1 decode"),
        (1.25, "pass", ".3g", "1.25 passes"),
        (2, "process", "", "2 processes"),
        (2, "entry", "", "2 entries"),
        (2, "day", "", "2 days"),
        (2, "epoch", "", "2 epochs"),
        (2, "branch", "", "2 branches"),
        ("1", "sample", "", "1 sample"),
        ("no", "file", "", "no files"),
    ],
)  # fmt: skip
def test_numbers_with_nouns(number, noun, spec, expected):
    assert counted(number, noun, spec) == expected


COUNTED = re.compile(
    r"^ (?:(?:optimizer|denoiser|denoising|held-out|earlier|more|trained|training) )?"
    r"(?:steps|prompts|images|samples|calls|decodes|groups|iterations|processes|pictures|examples|passes|states"
    r"|pairs|votes|seeds|tasks|columns|rows|files|attempts|rubrics|questions|devices|tokens|layers|frames|cells"
    r"|tensors|nodes|lines|values|evaluations|ties|voters|warnings|epochs|classes|decodes|gradients)\b"
)
NAMES = re.compile(
    r"^[A-Z_]+$|name__|path|root|folder|label|kind|model|selection|novelty|shard|index|key|split|clip_range|skip_last"
    r"|dedup|server|guidance|settings\.groups|^(name|other|stem|module|total|len\(row\)|len\(score\)|trained|number)$"
)
"""Parts of f-strings that are names, or numbers that are not 1: constants and what exceeds a limit."""


def test_printed_numbers_agree_with_their_nouns():
    """No f-string puts a plural after a number that may be 1; :func:`counted` does it."""
    found = []
    for path in sorted((ROOT / "flowgrpo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.JoinedStr) or "serving" in path.parts:
                continue
            for part, text in pairwise(node.values):
                if (
                    isinstance(part, ast.FormattedValue)
                    and isinstance(text, ast.Constant)
                    and COUNTED.match(text.value)
                    and not NAMES.search(ast.unparse(part.value))
                ):
                    found.append(f"{path.name}:{part.lineno}: {ast.unparse(part.value)}{text.value[:30]}")  # fmt: skip
    assert found == []


def test_a_small_plan_has_no_plural_after_one():
    small = ["train.groups=1", "train.iterations=1", "train.warmup=0"]
    for kind in (
        "algorithm={kind='draft', group_size=1}",
        "algorithm={kind='pictures'}",
        "algorithm.group_size=2",
    ):
        config = load("quickstart_flow_grpo", [*small, kind])
        words = " | ".join([*geometry(config).values(), *plan(config).rows().values()])
        assert "1 iteration, " in words
        assert not re.search(r"(?<![\d,.])1 (?:[a-z]+ )?(?:decodes|calls|groups|examples|samples|pictures|prompts|iterations|steps|evaluations)\b", words), words  # fmt: skip
