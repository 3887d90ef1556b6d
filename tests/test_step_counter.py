"""A loop that is entered in the middle counts its steps from there, as what it does by count needs."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinKVPipeline
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.doctor import Settings, examine
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.step_counter import _Count, counted
from flowgrpo.policy.step_plan import StepPlan
from tests.conftest import MakePolicy, noise_of, sampling_of
from tests.tiny.image import sd15_controlnet
from tests.tiny.parts import GRADIENT

Tiny = Callable[[str], Path]
BY_COUNT: dict[str, dict[str, Any]] = {
    # Guidance ends after half of the steps.
    "lumina2": {"cfg_trunc_ratio": 0.5},
    # The model runs once more without a layer, in the steps between.
    "sd3": {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_start": 0.3,
        "skip_layer_guidance_stop": 0.8,
    },
}


@pytest.mark.parametrize("name", BY_COUNT)
def test_what_a_loop_does_by_count_is_replayed(name: str, tiny: Tiny) -> None:
    sampling = sampling_of(name, call=sampling_of(name).call | BY_COUNT[name])
    diagnosis = examine(tiny(name), Settings(sampling=sampling))
    assert {c.name: c.value for c in diagnosis.checks if not c.passed} == {}


def test_a_controlnet_that_ends_early_is_replayed(tmp_path: Path) -> None:
    sd15_controlnet().save_pretrained(tmp_path)
    sampling = sampling_of("sd15", call={"image": GRADIENT, "control_guidance_end": 0.5})
    diagnosis = examine(tmp_path, Settings(sampling=sampling))
    assert {c.name: c.value for c in diagnosis.checks if not c.passed} == {}


def test_a_part_of_the_grid_keeps_its_counts(make_policy: MakePolicy) -> None:
    policy = make_policy("lumina2")
    seen: list[Any] = []
    step = policy.scheduler.step

    def noting(output: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(float(timestep))
        return step(output, timestep, *args, **kwargs)

    policy.scheduler.step = noting
    prompts, noise = [Prompt("a cat")], noise_of(0)
    (whole,) = policy.run(prompts, noise, record=range(4), decode=False)
    grid = list(seen)
    assert len(grid) == 4
    assert policy.scheduler.counted
    for nodes in ([2, 3], [1, 2, 3, 4], [0, 2, 4], [4]):
        seen.clear()
        x = whole.records[nodes[0]].x if nodes[0] < 4 else whole.records[-1].x_next
        (part,) = policy.run(prompts, noise, nodes=nodes, x=x, record=range(4), decode=False)
        assert seen == [grid[n] for n in nodes[:-1]]
        assert [v.step for v in part.records] == nodes[:-1]
        # The whole grid's length, so that shares of it are the same.
        assert len(policy.scheduler.timesteps) == 4


def test_the_first_step_of_a_loop_also_counts_as_0() -> None:
    """It is where loops set up what they need, wherever on the grid they begin."""
    first = _Count(5)
    assert first == 0
    assert first == 5
    assert (first != 0) is False
    assert first != 4
    assert first > 0
    assert first + 1 == 6
    assert [*"abcdef"][first] == "f"
    assert {5: "x"}[first] == "x"


def test_keys_kept_from_the_first_step_are_there_in_a_replay(tiny: Tiny, tmp_path: Path) -> None:
    parts = DiffusionPipeline.from_pretrained(tiny("flux2_klein")).components
    Flux2KleinKVPipeline(**parts).save_pretrained(tmp_path)
    call = sampling_of("flux2_klein").call | {"image": GRADIENT.resize((64, 64))}
    accepted = inspect.signature(Flux2KleinKVPipeline.__call__).parameters
    sampling = replace(
        sampling_of("flux2_klein"),
        guidance_scale=None,
        call={k: v for k, v in call.items() if k in accepted},
    )
    diagnosis = examine(tmp_path, Settings(sampling=sampling))
    assert {c.name: c.value for c in diagnosis.checks if not c.passed} == {}


def test_only_the_steps_are_counted_anew(make_policy: MakePolicy) -> None:
    def call(steps: Any, *, more: Any = "ab") -> list[list[tuple[int, Any]]]:
        return [list(enumerate(steps)), list(enumerate(more)), list(enumerate(more, 1))]

    policy: PipelinePolicy = make_policy("sd15")
    assert policy.scheduler.counted is False
    copy = counted(call, policy.scheduler)
    plain = [[(0, "c")], [(0, "a"), (1, "b")], [(1, "a"), (2, "b")]]
    assert copy("c") == plain
    assert call("c") == plain
    assert copy(torch.arange(2)) == [[(0, 0), (1, 1)], *plain[1:]]
    assert call.__globals__.get("enumerate") is None
    # Looking at the timesteps beforehand is not walking them.
    policy.scheduler.begin(StepPlan())
    policy.scheduler.set_timesteps(3)
    first = next(iter(copy(policy.scheduler.timesteps)[0]))
    assert first == (0, policy.scheduler.timesteps[0])
    assert [i for i, _ in copy(policy.scheduler.timesteps)[0]] == [0, 1, 2]
    assert policy.scheduler.counted is False
    policy.images([Prompt("a cat")], noise_of(0))
    assert policy.scheduler.counted is True
