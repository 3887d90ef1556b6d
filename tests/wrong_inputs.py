"""Generators of wrong configurations, prompt files and model folders, for Hypothesis.

Each starts from something valid and makes one to three mistakes in it. The mistakes follow from the
schema: every key gets values of other types and sizes, misspelt and missing keys, other kinds. A mistake
may leave the input valid; what is asked of an answer holds in either case (:func:`complaint`).
"""

import contextlib
import copy
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import strategies as st

from flowgrpo.cli.main import main
from flowgrpo.config import load
from flowgrpo.config.reference import to_table
from flowgrpo.core.text import plain
from flowgrpo.data.prompt_files import OWN_KEYS

WHOLE = (0, -1, 1, 2, 3, 7, 1000, 10**6, 10**9, 2**31, 2**63 - 1, -(2**63), 2**63, 10**30)
REAL = (
    0.0,
    -0.0,
    -1.0,
    0.5,
    1.0,
    1.5,
    1e-320,
    1e-9,
    1e9,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
)
TEXT = (
    "", " ", "x", "cpu", "cuda:99", "../..", "/", "a b", "a:b", "os:getcwd", ":", "a.b:", "no.such:Name",
    "\x1b[2J", "a\x00b", "[red]x[/]", "\u202ex", "ü", "x" * 5000, "hf:", "hf:no/such:split", "re:(", "*", "none",
)  # fmt: skip
OTHER: tuple[Any, ...] = (
    True,
    False,
    [],
    {},
    [[]],
    [0],
    ["x"],
    {"kind": "x"},
    {"a": {"b": 1}},
    [{}],
)
SCALARS = st.sampled_from([*WHOLE, *REAL, *TEXT, *OTHER])
SMALL_RUN = {
    "train": {"iterations": 2, "optimizer": "adamw", "rollout_batch": 8, "train_batch": 8},
    "evaluation": {"images": 4, "grid_prompts": 1, "grid_samples": 1},
    "memory": {"quantize": "none", "attention": ""},
}


@dataclass(frozen=True)
class Answer:
    """What a command did.

    Attributes:
        status: Its exit status; None if it raised an error.
        text: What it wrote to the standard error, or the error.
        seconds: The processor's time that it took.
    """

    status: int | None
    text: str
    seconds: float


def answer(arguments: Sequence[str]) -> Answer:
    """Run a command in this process."""
    error, began = io.StringIO(), time.process_time()
    status: int | None
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            status = main(arguments)
        text = error.getvalue()
    except BaseException as failure:
        status, text = None, f"{type(failure).__name__}: {failure}"
    return Answer(status, text, time.process_time() - began)


def complaint(given: Answer, seconds: float) -> str:
    """What is wrong with an answer: a traceback, silence, a flood of text, slowness; or nothing."""
    lines = given.text.strip().splitlines()
    if given.status is None or "Traceback" in given.text:
        return f"a traceback: {given.text[-300:]}"
    if given.seconds > seconds:
        return f"it took {given.seconds:.1f} s: {given.text[-200:]}"
    if given.status == 0:
        return ""
    if given.status not in (1, 2):
        return f"exit status {given.status}"
    if not lines or not lines[0].startswith("flowgrpo: ") or len(lines[0]) < 20:
        return f"no sentence: {given.text!r}"
    if any(len(line) > 1500 for line in lines):
        return f"a line of {max(map(len, lines))} characters: {lines[0][:200]}"
    if len(lines) > 12:
        return f"{len(lines)} lines: {lines[0]}"
    if plain(given.text) != given.text:
        return f"control characters: {given.text!r}"
    return ""


def valid_table(name: str, folder: Path) -> dict[str, Any]:
    """A shipped configuration as a small run of the embedded model, with all keys written out."""
    table = to_table(load(name))
    table["model"]["path"] = "shapes"
    table["run"]["folder"] = str(folder)
    table["run"]["device"] = "cpu"
    for section, changes in SMALL_RUN.items():
        table[section] |= changes
    return dict(table)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all keys and entries of nested tables and lists."""
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return []
    return [p for key, inner in items for p in ((*path, key), *_places(inner, (*path, key)))]


def _misspelt(draw: st.DrawFn, word: str) -> str:
    """A word with one letter left out, doubled or exchanged."""
    at = draw(st.integers(0, max(0, len(word) - 1)))
    return draw(
        st.sampled_from(
            [word[:at] + word[at + 1 :], word[:at] + word[at : at + 1] * 2 + word[at + 1 :], word + "_", word.upper()]
        )
    )  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, table: Any) -> Any:
    """Nested tables with one to three mistakes."""
    table = copy.deepcopy(table)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(table)
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        here = table
        for part in way:
            here = here[part]
        what = draw(st.sampled_from(["value"] * 6 + ["delete", "misspell", "copy", "nest"]))
        if what == "value":
            here[last] = draw(_wrong_value(here[last]))
        elif what == "delete":
            del here[last]
        elif what == "misspell" and isinstance(here, dict):
            here[_misspelt(draw, str(last))] = here.pop(last)
        elif what == "copy" and isinstance(here, dict):
            *_, other = draw(st.sampled_from(places))
            here[str(other)] = copy.deepcopy(here[last])
        elif what == "nest":
            here[last] = {"x": here[last]} if draw(st.booleans()) else [here[last]] * 3
    return table


def _wrong_value(value: Any) -> st.SearchStrategy[Any]:
    """Mostly values of the type of another one."""
    if isinstance(value, bool):
        return SCALARS
    if isinstance(value, int):
        return st.sampled_from(WHOLE) | SCALARS
    if isinstance(value, float):
        return st.sampled_from(REAL) | SCALARS
    if isinstance(value, str):
        kinds = st.sampled_from(
            ["flow_grpo", "g2rpo", "cps", "ddim", "nft", "full", "noise", "group", "gdpo"]
        )
        return st.sampled_from(TEXT) | kinds | SCALARS
    if isinstance(value, list):
        lists = st.sampled_from(
            [[], [0], [-1], [1, 0], [0, 0], ["x"], [1e308], [10**9], list(range(2000))]
        )
        return lists | SCALARS
    return SCALARS


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with a mistake in its bytes: cut off, changed, doubled, another encoding."""
    how = draw(
        st.sampled_from(
            ["cut", "flip", "insert", "double", "latin-1", "utf-16", "bom", "crlf", "zeros"]
        )
    )
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if how == "cut":
        return data[:at]
    if how == "flip":
        return (
            data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
            if data
            else b"\xff"
        )
    if how == "insert":
        piece = draw(
            st.sampled_from(
                [b"\xff\xfe", b"\x00", b"\x1b[2J", b"'", b'"', b"[[", b"}", b"\r", b"=", b"\n"]
            )
        )
        return data[:at] + piece + data[at:]
    if how == "double":
        return data + data
    if how == "bom":
        return b"\xef\xbb\xbf" + data
    if how == "crlf":
        return data.replace(b"\n", b"\r\n")
    if how == "zeros":
        return data[:at] + b"\x00" * 100
    return (data.decode("utf-8", "replace") + "ü").encode(how, "replace")


def toml(table: Any) -> bytes:
    """A table as TOML, whatever is in it."""
    return tomli_w.dumps(table).encode("utf-8", "replace")


@st.composite
def configurations(draw: st.DrawFn, tables: Sequence[dict[str, Any]]) -> tuple[bytes, list[str]]:
    """The bytes of a configuration file, and ``--set`` arguments."""
    table = draw(st.sampled_from(tables))
    how = draw(st.sampled_from(["table"] * 6 + ["bytes", "set", "set"]))
    if how == "table":
        return toml(draw(changed(table))), []
    if how == "bytes":
        return draw(damaged(toml(table))), []
    place = draw(st.sampled_from(_places(table)))
    key = ".".join(str(p) for p in place)
    if draw(st.booleans()):
        key = _misspelt(draw, key)
    value = draw(
        st.sampled_from(
            ["", "x", "1e9999", "[", "{", "[[]]", "'", '"', "-1", "0", "nan", "true", "10" * 400]
        )
    )
    return toml(table), [
        draw(st.sampled_from([f"{key}={value}", key, f"={value}", f"{key}.x.y={value}"]))
    ]


RECORD = {
    "prompt": "a red circle", "negative_prompt": "blurry", "height": 32, "width": 32, "tag": "single_object",
    "metadata": {"include": [{"class": "circle", "count": 1, "color": "red"}]}, "call": {"guidance_scale": 2.0},
}  # fmt: skip


@st.composite
def prompt_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The suffix and the bytes of a prompt file."""
    suffix = draw(st.sampled_from([".jsonl"] * 4 + [".csv", ".txt", ".parquet", ".json"]))
    records: list[Any] = [dict(RECORD) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        records[0] |= {draw(st.sampled_from(OWN_KEYS)): draw(SCALARS)}
    records = [draw(changed(records[0])), *records[1:]]
    if suffix == ".csv":
        keys = list(records[0])
        rows = [keys, *([str(r.get(k, "")) for k in keys] for r in records if isinstance(r, dict))]
        data = "\n".join(",".join(map(str, row)) for row in rows).encode("utf-8", "replace")
    elif suffix == ".txt":
        data = "\n".join(str(r) for r in records).encode("utf-8", "replace")
    elif suffix == ".parquet":
        data = b"PAR1" + json.dumps(records).encode() + b"PAR1"
    else:
        lines = [json.dumps(r) for r in records]
        if draw(st.sampled_from([False, False, True])):
            twice = draw(st.sampled_from(['"prompt": "b", ', '"height": 8, ', '"x": 1, "x": 2, ']))
            lines[0] = "{" + twice + lines[0][1:]
        if draw(st.sampled_from([False] * 5 + [True])):
            lines[0] = "[" * 100_000
        data = "\n".join(lines).encode()
    if draw(st.sampled_from([False, False, True])):
        data = draw(damaged(data))
    return suffix, data


def sample_command(model: Path, folder: Path) -> list[str]:
    """The command that samples an image of a model into a folder."""
    options = ["--samples", "1", "--steps", "2", "--size", "32x32", "--device", "cpu"]
    return ["sample", str(model), "a", *options, "--out", str(folder / "images")]


@st.composite
def model_folders(draw: st.DrawFn, source: Path) -> list[tuple[str, bytes | None]]:
    """Changes to a copy of a pipeline's folder: files with new contents, None where one is deleted."""
    files = sorted(str(p.relative_to(source)) for p in source.rglob("*") if p.is_file())
    chosen = draw(
        st.lists(
            st.sampled_from(["model_index.json"] * len(files) + files),
            min_size=1,
            max_size=2,
            unique=True,
        )
    )
    changes: list[tuple[str, bytes | None]] = []
    for name in chosen:
        data = (source / name).read_bytes()
        how = draw(st.sampled_from(["delete", "damage", "change", "change"]))
        if how == "delete":
            changes.append((name, None))
        elif how == "change" and name.endswith(".json") and len(data) < 20_000:
            changes.append((name, json.dumps(draw(changed(json.loads(data)))).encode()))
        else:
            changes.append((name, draw(damaged(data))))
    return changes
