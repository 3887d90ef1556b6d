"""The file of results, the loop that fills it, and the tables that are made from it."""

import json
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.device.models import Maker
from benchmarks.device.parts import Item, Part
from flowgrpo.data import strict_json

START, END = "<!-- device:start -->", "<!-- device:end -->"
NOTHING = "Nothing has been measured on a GPU yet."


class Results:
    """Lines of a file, one JSON object each: ``part``, ``key``, the environment, and what was measured."""

    def __init__(self, file: Path):
        self.file = file
        text = file.read_text() if file.exists() else ""
        # A process that was killed may have left half a line.
        self.lines: list[dict[str, Any]] = [json.loads(t) for t in text.splitlines() if _is_json(t)]
        if text and not text.endswith("\n"):
            file.write_text("".join(strict_json.dumps(line) + "\n" for line in self.lines))

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, and write it at once."""
        self.lines.append(line)
        with self.file.open("a") as file:
            file.write(strict_json.dumps(line) + "\n")
            file.flush()

    def has(self, part: Part, item: Item, environment: dict[str, Any]) -> bool:
        """Whether an item was measured, or has failed, in this environment."""
        return any(
            (line["part"], line["key"], line["environment"]) == (part.number, item.key, environment)
            for line in self.lines
        )


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def environment(device: str, tiny: bool) -> dict[str, Any]:
    """Where it is measured: device, versions, commit."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "tiny": tiny,
        "commit": commit,
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }


@contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Raise TimeoutError after some seconds.

    Raises:
        TimeoutError: When the time is over.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(
    parts: Sequence[Part],
    maker: Maker,
    results: Results,
    time_left: float,
    environment: dict[str, Any],
) -> None:
    """Measure what is not in the results yet, as long as there is time."""
    end = time.monotonic() + time_left
    for part in parts:
        for item in part.items:
            left = end - time.monotonic()
            if results.has(part, item, environment):
                continue
            if left < item.least:
                print(f"{part.number} {item.key}: not started, {max(0.0, left):.0f} s are left")
                continue
            began, found = time.monotonic(), dict[str, Any]()
            try:
                with time_limit(min(item.limit, left)):
                    found = {"result": item.run(maker)}
            # Whatever fails must not end the rest.
            except Exception as error:
                words = (str(error).strip() or type(error).__name__).splitlines()[0]
                found = {"failed": f"{type(error).__name__}: {words[:300]}"}
            taken = round(time.monotonic() - began, 1)
            line = {"part": part.number, "key": item.key, "seconds": taken, **found}
            results.add({**line, "environment": environment})
            print(strict_json.dumps(line))
            maker.free()


def tables(results: Results, parts: Sequence[Part]) -> str:
    """The results as tables, one per part and environment. Rehearsals at tiny sizes are left out."""
    text = []
    lines = [line for line in results.lines if not line["environment"]["tiny"]]
    for place in {json.dumps(line["environment"]): None for line in lines}:
        where = json.loads(place)
        versions = ", ".join(f"{n} {where[n]}" for n in ("torch", "diffusers", "transformers", "peft"))  # fmt: skip
        text.append(
            f"Measured on {where['device']} at commit `{where['commit']}`, with {versions}."
        )
        for part in parts:
            own = [x for x in lines if x["environment"] == where and x["part"] == part.number]
            if own:
                rows = [f"| {x['key']} | {_cell(x)} | {x['seconds']:.0f} |" for x in own]
                head = ["| measurement | result | s |", "|---|---|---|"]
                text.append("\n".join([f"### {part.title}\n", *head, *rows]))
    return "\n\n".join(text) or NOTHING


def _cell(line: dict[str, Any]) -> str:
    if "failed" in line:
        return f"failed: {line['failed']}".replace("|", "\\|")
    return "; ".join(_shown(k, v) for k, v in line["result"].items() if v is not None)


def _shown(name: str, value: Any) -> str:
    words = name.replace("_", " ")
    if isinstance(value, dict):
        return f"{words}: {', '.join(f'{k} {v}' for k, v in value.items())}"
    if isinstance(value, list):
        return f"{words}: {'; '.join(', '.join(f'{k} {v}' for k, v in g.items()) if isinstance(g, dict) else str(g) for g in value)}"  # fmt: skip
    return f"{words} {value}"


def written(page: str, results: Results, parts: Sequence[Part]) -> str:
    """A page with the tables between its markers.

    Raises:
        ValueError: If the page has no markers.
    """
    if START not in page or END not in page:
        raise ValueError(f"the page has no {START} and {END}")
    before, after = page.split(START)[0], page.split(END)[1]
    return f"{before}{START}\n\n{tables(results, parts)}\n\n{END}{after}"
