"""Text encoders that are divided among two processes encode as whole ones do, whatever prompts each has."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Full, PipelinePolicy
from flowgrpo.policy.encoder_lockstep import EncoderLockstep, divide_encoders, text_encoders
from flowgrpo.policy.prompt_cache import cache_encodings
from flowgrpo.policy.settings import Memory, Parallel
from tests.conftest import sampling_of
from tests.processes import ranks
from tests.test_lockstep import meet

PROMPTS = [Prompt(t) for t in ("a red cube", "two dogs", "a green disc on a table", "four cats")]
OWN = (PROMPTS[:1], PROMPTS[1:])
"""The prompts of each process. There are more new ones on the second."""
SHARED = ("sd3", "flux")
"""Families with T5: CLIP twice and T5, with and without a batch axis in all that is encoded."""


def make(model: Path, name: str, **options: Any) -> PipelinePolicy:
    sampling = sampling_of(name)
    return PipelinePolicy.from_pretrained(
        model, sampling=sampling, weights=Full(), batch_size=2, **options
    )


def draw(policy: PipelinePolicy, prompts: list[Prompt]) -> Tensor:
    noise = SampleNoise([Random(0).at(PROMPTS.index(p)) for p in prompts])
    with policy.together():
        states = [r.x for r in policy.run(prompts, noise, decode=False)]
    return torch.cat([x for x in states if x is not None])


def encode_alike(rank: int) -> None:
    """Two processes want passes of two encoders in another order, one of them with fewer inputs."""

    class Encoder(nn.Module):
        def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
            return x + 1

    models = {name: Encoder() for name in ("first", "second")}
    passes: list[float] = []
    group = dist.new_group(backend="gloo")
    lockstep = EncoderLockstep(lambda: group, torch.device("cpu"))
    lockstep.watch(models)
    denoiser = nn.Identity()
    lockstep.end_before({"transformer": denoiser})

    def note(index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        images = float(kwargs.get("image") is not None)
        meet(index, images)
        passes.append(index + images / 2)

    for index, model in enumerate(models.values()):
        model.register_forward_pre_hook(partial(note, index), with_kwargs=True)
    first, second = models.values()
    one = torch.full((1 + rank, 2), float(rank))
    with lockstep.together():
        if rank == 0:
            assert torch.equal(second(one), one + 1)
        else:
            assert torch.equal(first(one), one + 1)
            assert torch.equal(second(x=one, image=one), one + 1)
            assert torch.equal(second(x=one, image=None), one + 1)
        denoiser(one)  # ends the section
        meet(0)
        denoiser(one)
    # The first encoder comes first; passes of one encoder with and without images are told apart.
    assert len(passes) == lockstep.passes == 4
    assert sorted(passes) == [0, 1, 1, 1.5]
    assert lockstep.joined == (3 if rank == 0 else 1)
    meet(0)
    assert torch.equal(first(one), one + 1)  # outside of a section processes make equal passes
    assert lockstep.passes == 5


def work(folders: dict[str, Path], folder: Path, rank: int) -> int:
    Accelerator(cpu=True)
    encode_alike(rank)
    for name, model in folders.items():
        policy = make(model, name, parallel=Parallel(shard="all"))
        encoders = text_encoders(policy.pipeline)
        parameters = [p for m in encoders.values() for p in m.parameters()]
        assert all(isinstance(p, DTensor) for p in parameters)
        held = sum(p.to_local().numel() for p in parameters)
        assert held < 0.6 * sum(p.numel() for p in parameters)
        lockstep = policy.encoding
        x = draw(policy, OWN[rank])
        passes = lockstep.passes
        meet(passes)
        assert 0 < lockstep.joined < passes
        assert torch.equal(draw(policy, OWN[rank]), x)
        assert lockstep.passes == passes  # all prompts are in the cache
        save_file({"x": x}, folder / f"{name}-{rank}.safetensors")
        whole = policy.stock_pipeline()
        if rank == 0:
            weights = {k: v.contiguous() for k, v in whole.text_encoder_2.state_dict().items()}
            torch.save(weights, folder / f"{name}.pt")
    return 0


def test_divided_encoders_encode_as_whole_ones(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folders, expected = {name: tiny(name) for name in SHARED}, {}
    for name, model in folders.items():
        policy = make(model, name)
        weights = {k: v.clone() for k, v in policy.pipeline.text_encoder_2.state_dict().items()}
        expected[name] = [draw(policy, own) for own in OWN], weights
    processes = ranks(lambda rank: work(folders, tmp_path, rank))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    for name, (states, weights) in expected.items():
        for rank, x in enumerate(states):
            found = load_file(tmp_path / f"{name}-{rank}.safetensors")["x"]
            assert torch.allclose(found, x, atol=1e-5), name
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[k], weights[k]) for k in found)


def test_what_divided_encoders_cannot_do_is_refused() -> None:
    class Pipeline(DiffusionPipeline):  # type: ignore[misc]
        components: ClassVar[dict[str, nn.Module]] = {}

        def upsample_prompt(self, prompt: str) -> str:
            return prompt

    pipeline = Pipeline()
    cache_encodings(pipeline, torch.no_grad, Memory(), torch.device("cpu"), may_rewrite=False)
    with pytest.raises(ValueError, match=r"'all': Pipeline has no text encoder .* use 'denoiser'"):
        divide_encoders(pipeline, Parallel(shard="all"), torch.device("cpu"), offload=False)
    with pytest.raises(
        ValueError, match=r"Pipeline rewrites prompts \(upsample_prompt\).*'denoiser'"
    ):
        pipeline.upsample_prompt("a cat")
