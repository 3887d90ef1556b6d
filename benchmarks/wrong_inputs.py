"""Gives generated wrong configurations, prompt files and model folders to flowgrpo, and counts the answers.

    python -m benchmarks.wrong_inputs --configurations 1000 --prompts 1000 --models 100

An input is held if the command ends within the time with status 0, or with status 1 or 2 and one
sentence per mistake: no traceback, no silence, no control characters. The estimate of the memory is
left out of the dry runs, because it takes seconds and loads nothing of the user's. The inputs that
were not held are printed, and kept in the folder of ``--keep``.
"""

import argparse
import collections
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from flowgrpo.config import find
from flowgrpo.memory import printing
from tests import wrong_inputs as wrong
from tests.tiny import save

BASES = (
    "quickstart_flow_grpo", "sd15_dance", "flux_mix", "flux_pref", "sd35_medium_nft", "sd35_medium_tempflow", "flux_g2rpo",
    "sd35_medium_tp", "sd35_medium_vgpo", "flux_branch", "sd15_find", "sd35_medium_guard",
)  # fmt: skip
"""Configurations of all algorithms."""


class Count:
    """Counts answers, and prints and keeps the inputs that were not held."""

    def __init__(self, kind: str, keep: Path, seconds: float):
        self.kind, self.keep, self.seconds = kind, keep, seconds
        self.by_status: collections.Counter[Any] = collections.Counter()
        self.messages: set[str] = set()
        self.slowest = 0.0
        self.broken = 0

    def add(self, given_answer: wrong.Answer, source: Callable[[Path], None]) -> None:
        """Judge one answer; ``source`` writes its input into a folder."""
        problem = wrong.complaint(given_answer, self.seconds)
        self.by_status[given_answer.status] += 1
        self.slowest = max(self.slowest, given_answer.seconds)
        if given_answer.status != 0:
            self.messages.add(given_answer.text)
        if problem:
            self.broken += 1
            folder = self.keep / f"{self.kind}-{self.broken}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            source(folder)
            print(f"{folder}: {problem}", flush=True)

    def line(self) -> str:
        """The result."""
        number = sum(self.by_status.values())
        return (
            f"{self.kind}: {number - self.broken} of {number} held; by exit status {dict(self.by_status)}; "
            f"the slowest took {self.slowest:.1f} s"
        )


def generated(number: int, start: int) -> Callable[[Any], Any]:
    """Hypothesis' settings: this many examples, nothing stored, no shrinking."""
    quiet = settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(start)(quiet(test))


def watch(seconds: float) -> Callable[[], None]:
    """End this process if one input takes ever so long; returns the function that says it does not."""
    last = [time.monotonic()]

    def look() -> None:
        while True:
            time.sleep(1)
            if time.monotonic() - last[0] > seconds:
                import faulthandler

                print(f"an input took more than {seconds} s", flush=True)
                faulthandler.dump_traceback()
                os._exit(1)

    threading.Thread(target=look, daemon=True).start()
    return lambda: last.__setitem__(0, time.monotonic())


def run_configurations(number: int, start: int, folder: Path, count: Count, alive: Any) -> None:
    """Dry runs of wrong configurations."""
    tables = [wrong.valid_table(name, folder / "run") for name in BASES]
    file = folder / "wrong.toml"
    for name, table in zip(BASES, tables, strict=True):
        file.write_bytes(wrong.toml(table))
        found = wrong.answer(["train", str(file), "--dry-run"])
        if found.status != 0:  # every mistake would be answered with this one
            raise SystemExit(f"{name} is not valid: {found.text}")

    @generated(number, start)
    @given(wrong.configurations(tables))
    def test(given_input: tuple[bytes, list[str]]) -> None:
        data, changes = given_input
        file.write_bytes(data)
        alive()
        options = [f"--set={c}" for c in changes]
        count.add(
            wrong.answer(["train", str(file), "--dry-run", *options]),
            lambda to: (shutil.copy(file, to), (to / "set").write_text("\n".join(changes))),
        )

    test()


def run_prompts(number: int, start: int, folder: Path, count: Count, alive: Any) -> None:
    """Dry runs with wrong prompt files."""
    table = wrong.valid_table("quickstart_flow_grpo", folder / "run")
    config = folder / "prompts.toml"

    @generated(number, start)
    @given(wrong.prompt_files())
    def test(given_input: tuple[str, bytes]) -> None:
        suffix, data = given_input
        file = folder / f"prompts{suffix}"
        file.write_bytes(data)
        table["prompts"] |= {"train": str(file), "balance": ""}
        config.write_bytes(wrong.toml(table))
        alive()
        count.add(
            wrong.answer(["train", str(config), "--dry-run"]), lambda to: shutil.copy(file, to)
        )

    test()


def run_models(number: int, start: int, folder: Path, count: Count, alive: Any) -> None:
    """Images of wrong model folders."""
    source = save("sd15", folder / "sd15")
    place = folder / "model"

    @generated(number, start)
    @given(wrong.model_folders(source))
    def test(changes: list[tuple[str, bytes | None]]) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        for name, data in changes:
            (place / name).unlink()
            if data is not None:
                (place / name).write_bytes(data)
        alive()
        count.add(
            wrong.answer(wrong.sample_command(place, folder)),
            lambda to: [
                (to / name.replace("/", "_")).write_bytes(data or b"deleted")
                for name, data in changes
            ],
        )

    test()


def main() -> None:
    """Generate, run, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0, help="time for one answer")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "wrong-inputs")
    parser.add_argument("--messages", type=Path, help="write all different messages to this file")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    printing.print_estimate = lambda *_: None
    find("quickstart")
    alive = watch(60.0)
    messages: set[str] = set()
    for kind, number, work in (
        ("configurations", options.configurations, run_configurations),
        ("prompts", options.prompts, run_prompts),
        ("models", options.models, run_models),
    ):
        if number:
            count = Count(kind, options.keep, options.seconds)
            with tempfile.TemporaryDirectory() as folder:
                work(number, options.seed, Path(folder), count, alive)
            print(count.line(), flush=True)
            messages |= count.messages
    if options.messages:
        options.messages.write_text("\n".join(sorted(messages)))


if __name__ == "__main__":
    main()
