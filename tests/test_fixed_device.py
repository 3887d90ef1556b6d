"""A policy's pipeline does not look for its device and for hooks in every call."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline, FluxPipeline
from torch import nn

from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import PipelinePolicy
from tests.conftest import MakePolicy, noise_of, sampling_of

PROMPTS = [Prompt("a"), Prompt("two red dogs")]


class Walks:
    """Counts the walks over the modules of whole models."""

    def __init__(self, models: Collection[nn.Module], monkeypatch: pytest.MonkeyPatch):
        self.number = 0
        own = nn.Module.named_modules

        def named_modules(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.number += any(module is m for m in models)
            return own(module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "named_modules", named_modules)


@pytest.mark.parametrize("name", ["flux", "wan_t2v"])
def test_a_replay_walks_no_model(
    name: str, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(name)
    (rollout,) = policy.run(
        PROMPTS, noise_of(0, 1), record=[1], stochastic=[1], transition=CPS(), decode=False
    )
    walks = Walks(policy.models.values(), monkeypatch)
    policy.replay(PROMPTS, rollout.records[0].x, 1, CPS())
    assert walks.number == 0
    # Diffusers' own pipeline: the device of each model, and the hooks to reset after the call.
    pipeline = policy.stock_pipeline()
    assert pipeline._execution_device == policy.device
    pipeline.maybe_free_model_hooks()
    assert walks.number > 3
    walks.number = 0
    assert pipeline.transformer.dtype == policy.dtype
    assert walks.number > 0


def test_the_pipeline_is_still_of_its_class(make_policy: MakePolicy) -> None:
    policy = make_policy("flux", weights=None)
    pipeline = policy.pipeline
    assert isinstance(pipeline, FluxPipeline)
    assert type(pipeline).__name__ == "FluxPipeline"
    assert type(pipeline).__module__ == FluxPipeline.__module__
    assert type(policy.stock_pipeline()) is FluxPipeline


def test_a_pipeline_with_hooks_is_left_as_it_is(tiny: Callable[[str], Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny("flux"))
    pipeline.transformer.enable_layerwise_casting()
    policy = PipelinePolicy(pipeline, sampling=sampling_of("flux"))
    assert type(policy.pipeline) is FluxPipeline
