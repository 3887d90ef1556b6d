"""The loop of a pipeline has its steps' indices on the whole grid, also if it begins in the middle."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    Flux2KleinKVPipeline,
    FluxPipeline,
    LTX2Pipeline,
    Lumina2Pipeline,
    QwenImage21Pipeline,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.doctor import Settings, examine
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.step_counter import compares_index_with_0, counted
from flowgrpo.policy.step_plan import StepPlan
from tests.conftest import MakePolicy, noise_of, sampling_of
from tests.tiny.image import sd15_controlnet
from tests.tiny.parts import GRADIENT

Tiny = Callable[[str], Path]
BY_INDEX: dict[str, dict[str, Any]] = {
    # Guidance ends after half of the steps.
    "lumina2": {"cfg_trunc_ratio": 0.5},
    # The model runs once more without a layer, in the steps between.
    "sd3": {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_start": 0.3,
        "skip_layer_guidance_stop": 0.8,
    },
}


@pytest.mark.parametrize("name", BY_INDEX)
def test_a_loop_that_uses_its_index_is_replayed(name: str, tiny: Tiny) -> None:
    sampling = sampling_of(name, call=sampling_of(name).call | BY_INDEX[name])
    diagnosis = examine(tiny(name), Settings(sampling=sampling))
    assert {c.name: c.value for c in diagnosis.checks if not c.passed} == {}


def test_a_controlnet_that_ends_early_is_replayed(tmp_path: Path) -> None:
    sd15_controlnet().save_pretrained(tmp_path)
    sampling = sampling_of("sd15", call={"image": GRADIENT, "control_guidance_end": 0.5})
    diagnosis = examine(tmp_path, Settings(sampling=sampling))
    assert {c.name: c.value for c in diagnosis.checks if not c.passed} == {}


def test_a_part_of_the_grid_keeps_its_indices(make_policy: MakePolicy) -> None:
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
    assert policy._learned.enumerates
    for nodes in ([2, 3], [1, 2, 3, 4], [0, 2, 4], [4]):
        seen.clear()
        x = whole.records[nodes[0]].x if nodes[0] < 4 else whole.records[-1].x_next
        (part,) = policy.run(prompts, noise, nodes=nodes, x=x, record=range(4), decode=False)
        assert seen == [grid[n] for n in nodes[:-1]]
        assert [v.step for v in part.records] == nodes[:-1]
        # The length of the whole grid, so that shares of it are right.
        assert len(policy.scheduler.timesteps) == 4


def test_loops_that_set_up_at_index_0_are_found() -> None:
    for kind in (Flux2KleinKVPipeline, LTX2Pipeline, QwenImage21Pipeline):
        assert compares_index_with_0(inspect.unwrap(kind.__call__)), kind
    for kind in (FluxPipeline, Lumina2Pipeline, StableDiffusion3Pipeline):
        assert not compares_index_with_0(inspect.unwrap(kind.__call__)), kind

    def other_loops(timesteps: Any, images: Any) -> int:
        total = 0
        for i, _image in enumerate(images):
            total += i == 0
        for i, _t in enumerate(timesteps):
            total += i < 1
        return total + (total == 0)

    assert not compares_index_with_0(other_loops)
    assert not compares_index_with_0(len)


def test_keys_cached_by_the_first_iteration_are_there_in_a_replay(
    tiny: Tiny, tmp_path: Path
) -> None:
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


def test_only_timesteps_have_indices_of_the_grid(make_policy: MakePolicy) -> None:
    def call(steps: Any, *, more: Any = "ab") -> list[list[tuple[int, Any]]]:
        return [list(enumerate(steps)), list(enumerate(more)), list(enumerate(more, 1))]

    policy: PipelinePolicy = make_policy("sd15")
    scheduler = policy.scheduler
    assert policy._learned.enumerates is False
    copy = counted(call, scheduler)
    plain = [[(0, "c")], [(0, "a"), (1, "b")], [(1, "a"), (2, "b")]]
    assert copy("c") == plain
    assert call("c") == plain
    assert copy(torch.arange(2)) == [[(0, 0), (1, 1)], *plain[1:]]
    assert call.__globals__.get("enumerate") is None
    # A loop that only reads the timesteps takes no steps.
    begun = scheduler.begin(StepPlan(nodes=[1, 2, 3]))
    scheduler.set_timesteps(3)
    assert [i for i, _ in copy(scheduler.timesteps)[0]] == [1, 2]
    assert begun.enumerates is False
    whole = scheduler.begin(StepPlan(nodes=[1, 2, 3]), whole_grid=True)
    scheduler.set_timesteps(3)
    assert len(scheduler.timesteps) == 3
    expected = [(1, int(scheduler.timesteps[1])), (2, int(scheduler.timesteps[2]))]
    assert [(i, int(t)) for i, t in copy(scheduler.timesteps)[0]] == expected
    assert whole.enumerates is False
    policy.images([Prompt("a cat")], noise_of(0))
    assert policy._learned.enumerates is True


def test_a_loop_that_sets_up_at_index_0_counts_the_steps_of_the_plan(
    make_policy: MakePolicy,
) -> None:
    policy = make_policy("ltx2")
    (whole,) = policy.run([Prompt("a cat")], noise_of(0), record=range(3), decode=False)
    assert policy._learned.enumerates is False
    x = whole.records[2].x
    (part,) = policy.run([Prompt("a cat")], noise_of(0), nodes=[2, 3], x=x, record=[2])
    assert len(policy.scheduler.timesteps) == 1
    (record,) = part.records
    assert torch.equal(record.prediction.output, whole.records[2].prediction.output)
