"""Policies with random weights at published sizes, made on the device, or at tiny sizes for the rehearsal."""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import FlowSDE
from flowgrpo.data.prompts import Prompt
from flowgrpo.memory.meta_pipeline import build
from flowgrpo.policy import LoRA, Memory, PipelinePolicy, Sampling
from flowgrpo.policy.loading import DTYPES, load_pipeline, quantization
from flowgrpo.policy.model_files import published_folder
from flowgrpo.policy.rollout import Rollout
from flowgrpo.policy.settings import Quantization, Weights

TRANSITION = FlowSDE(noise_level=0.7)
WORDS = "a red cube on a wooden table, left of two blue dogs riding a bus at night, number"


@dataclass(frozen=True)
class Model:
    """A published model and the size at which it is measured.

    Attributes:
        hub: Its hub id, whose config files are in the package.
        family: The tiny family of its class in ``tests.tiny``.
        sampling: The arguments of its call.
    """

    hub: str
    family: str
    sampling: Sampling


SD35 = Model(
    "stabilityai/stable-diffusion-3.5-medium",
    "sd3",
    Sampling(num_steps=10, guidance_scale=4.5, height=512, width=512, call={"max_sequence_length": 128}),
)  # fmt: skip
FLUX = Model(
    "black-forest-labs/FLUX.1-dev",
    "flux",
    Sampling(num_steps=10, guidance_scale=3.5, height=1024, width=1024),
)
WAN = Model(
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan_t2v",
    Sampling(num_steps=4, guidance_scale=4.5, height=480, width=832, num_frames=33),
)


@dataclass
class Maker:
    """Makes policies.

    Attributes:
        device: Where they compute.
        tiny: Whether to make tiny ones.
        folder: For files of tiny pipelines and of weights that are quantised.
    """

    device: str
    tiny: bool
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="flowgrpo-device-")))
    _last: tuple[Any, PipelinePolicy] | None = None

    def sampling(self, model: Model) -> Sampling:
        """The arguments of a model's call."""
        if not self.tiny:
            return model.sampling
        from tests.tiny import FAMILIES

        call = dict(FAMILIES[model.family].call)
        names = ("guidance_scale", "height", "width", "num_frames")
        named = {k: call.pop(k) for k in names if k in call}
        return replace(Sampling(num_steps=4, call=call, **named))

    def pipeline(
        self, model: Model, dtype: str = "bfloat16", quantize: Quantization = "none"
    ) -> DiffusionPipeline:
        """A pipeline with random weights."""
        self.free()
        if self.tiny:
            from tests.tiny import save

            folder = self.folder / model.family
            if not folder.exists():
                save(model.family, folder)
            return load_pipeline(folder, DTYPES[dtype], quantize)
        published = published_folder(model.hub)
        assert published is not None
        pipeline = build(published, DTYPES[dtype], self.device)
        if quantize != "none":
            pipeline.transformer = self._quantised(pipeline.transformer, quantize, DTYPES[dtype])
        return pipeline

    def policy(
        self,
        model: Model,
        batch: int,
        *,
        dtype: str = "bfloat16",
        weights: Weights | None = None,
        memory: Memory | None = None,
    ) -> PipelinePolicy:
        """A policy on such a pipeline; by default with a LoRA of rank 32.

        The last policy is kept, and returned if the next one has the same settings: drawing billions of
        weights takes seconds.
        """
        memory, weights = memory or Memory(), weights or LoRA(rank=32, alpha=64)
        key = (model.hub, dtype, weights, memory)
        if self._last is None or self._last[0] != key:
            self._last = None
            policy = PipelinePolicy(
                self.pipeline(model, dtype, memory.quantize),
                sampling=self.sampling(model),
                weights=weights,
                batch_size=batch,
                dtype=dtype,
                device=self.device,
                with_reference=True,
                memory=memory,
            )
            self._last = (key, policy)
        policy = self._last[1]
        policy.batch_size = policy.replay_batch = batch
        return policy

    def free(self) -> None:
        """Give the memory of policies that are no longer used back to the device."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _quantised(self, model: Any, kind: Quantization, dtype: torch.dtype) -> Any:
        """A model with its weights quantised, through a file, as when it is loaded."""
        config = quantization(kind, dtype, ["transformer"])
        assert config is not None
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            model.save_pretrained(folder)
            one = config._resolve_quant_config(is_diffusers=True, module_name="transformer")
            return type(model).from_pretrained(folder, quantization_config=one, torch_dtype=dtype)


def prompts(number: int) -> list[Prompt]:
    """Different prompts of some 20 tokens."""
    return [Prompt(f"{WORDS} {i}") for i in range(number)]


def roll(policy: PipelinePolicy, number: int, decode: bool = True) -> Rollout:
    """One batch whose steps are stochastic and recorded, except the last."""
    steps = range(policy.num_steps() - 1)
    noise = SampleNoise([Random(0).at(i) for i in range(number)])
    options: dict[str, Any] = {"stochastic": steps, "record": steps, "transition": TRANSITION}
    (rollout,) = policy.run(prompts(number), noise, decode=decode, **options)
    return rollout


def train(policy: PipelinePolicy, rollout: Rollout, step: int = 1) -> None:
    """Replay one step of a rollout with gradients, and backpropagate."""
    record = rollout.records[step]
    again = policy.replay(prompts(len(record.x)), record.x, record.step, TRANSITION)
    again.gaussian.log_prob(record.x_next).sum().backward()


def refer(policy: PipelinePolicy, rollout: Rollout, step: int = 1) -> None:
    """Evaluate the reference policy at one step of a rollout."""
    record = rollout.records[step]
    with torch.no_grad(), policy.reference():
        policy.replay(prompts(len(record.x)), record.x, record.step, TRANSITION)


def trained(policy: PipelinePolicy) -> Sequence[torch.nn.Parameter]:
    """The trained parameters."""
    assert policy.trainable is not None
    return list(policy.trainable.parameters.values())
