"""What the tests of policies share: tiny pipeline folders by family, each saved once."""

import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from accelerate import Accelerator

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import CPS, DDIM, Transition
from flowgrpo.policy import LoRA, PipelinePolicy, Sampling
from tests.tiny import FAMILIES, save

NAMED = ("guidance_scale", "height", "width", "num_frames")
LORA = LoRA(rank=4, alpha=8)

MakePolicy = Callable[..., PipelinePolicy]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, None]:
    """What a test printed can be sent to another process, also if it is no text: xdist sends UTF-8."""
    report = (yield).get_result()
    sections = [(name, text.encode("utf-8", "replace").decode()) for name, text in report.sections]
    report.sections = sections


@pytest.fixture(scope="session", autouse=True)
def _signals() -> None:
    """Signals have their usual effect, in the tests and in the processes that they start.

    A shell starts jobs in the background with SIGINT ignored, and nohup does so with SIGHUP; processes
    inherit that, and a run leaves ignored signals alone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_IGN:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)


@pytest.fixture(autouse=True)
def _signals_given_back() -> Iterator[None]:
    """No test leaves a run's signal handlers behind, which the tests after it would trip over."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    """One thread, no progress bars, no chatter about truncated prompts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny family, made when it is first asked for. Not to be written to."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = save(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


@pytest.fixture(scope="session")
def make_policy(tiny: Callable[[str], Path]) -> MakePolicy:
    """A new policy on a tiny family."""

    def make(name: str, **options: Any) -> PipelinePolicy:
        options = {"sampling": sampling_of(name), "weights": LORA} | options
        return PipelinePolicy.from_pretrained(tiny(name), **options)

    return make


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def sampling_of(name: str, **changes: Any) -> Sampling:
    """The smallest call of a family."""
    call = dict(FAMILIES[name].call)
    named = {key: call.pop(key) for key in NAMED if key in call}
    if name in ("prx", "prx_pixel"):
        # Diffusers' own pipeline cannot guide more than one prompt at a time.
        named["guidance_scale"] = 1.0
    return replace(Sampling(num_steps=FAMILIES[name].num_steps, call=call, **named), **changes)


def transition_of(name: str) -> Transition:
    """A stochastic step that suits the family's path."""
    return CPS() if FAMILIES[name].prediction == "flow" else DDIM()


def noise_of(*samples: int, start: tuple[int, ...] | None = None) -> SampleNoise:
    """Streams by number; ``start`` numbers those of the initial latents."""
    streams = [Random(7).at(i) for i in samples]
    return SampleNoise(streams, None if start is None else [Random(7).at(i) for i in start])
