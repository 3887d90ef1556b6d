"""A diffusers pipeline as a policy.

Nothing here knows a model. The pipeline's own ``__call__`` runs for everything: to sample, to
replay a step with gradients, to complete a state from the middle of the grid, to decode. Only its
scheduler is ours, and three of its doors are watched: prompts are encoded once, latents can be put
in where the pipeline prepares its own, and what enters the denoiser has the denoiser's precision.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.random import SampleNoise
from flowgrpo.core.solvers import Solver
from flowgrpo.core.transitions import ODE, Transition
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy.calling import (
    Calling,
    UnsupportedPipelineError,
    check_signature,
    check_strength,
    generators_for,
)
from flowgrpo.policy.calls import Sampling, batches, own_arguments
from flowgrpo.policy.initial_noise import INITIAL, InitialNoise, Noise
from flowgrpo.policy.latent_injection import LatentInjection
from flowgrpo.policy.loading import DTYPES, denoisers, load_pipeline, without_safety_checker
from flowgrpo.policy.memory import Memory
from flowgrpo.policy.precision import as_batch, as_media
from flowgrpo.policy.preparing import models_of, prepare
from flowgrpo.policy.prompt_rewriting import REWRITING_METHODS
from flowgrpo.policy.prompts_cache import ENCODING_METHODS
from flowgrpo.policy.scheduler import policy_scheduler
from flowgrpo.policy.step_counter import counted
from flowgrpo.policy.step_plan import StepPlan, StepRecord, held
from flowgrpo.policy.weights import Full, Trainable, Weights


@dataclass(frozen=True)
class Rollout:
    """One batch that was run through the pipeline.

    Attributes:
        rows: Which of the requested samples these are.
        x: The last states, in the layout of the denoising loop.
        media: Decoded images ``(B, C, H, W)`` or videos ``(B, F, C, H, W)`` in [0, 1]; None if
            only states were asked for.
        visits: The recorded steps, in order.
    """

    rows: range
    x: Float[Tensor, "batch *latent"] | None
    media: Float[Tensor, "batch *frames channels height width"] | None
    records: Sequence[StepRecord]


class PipelinePolicy:
    """Samples, replays, branches and decodes with a pipeline, and owns what is trained.

    Example:
        >>> policy = PipelinePolicy.from_pretrained("stabilityai/stable-diffusion-3.5-medium",
        ...                                         weights=LoRA(rank=32), sampling=Sampling())
        >>> noise = SampleNoise([Random(0).at(i) for i in range(4)])
        >>> images = policy.images([Prompt("a red circle")] * 4, noise)
    """

    keeps_means = False
    """Whether actions should keep the means of their steps; the learner asks for it."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        sampling: Sampling,
        weights: Weights | Noise | None = None,
        batch_size: int = 64,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        seed: int = 0,
        with_reference: bool = False,
        memory: Memory | None = None,
    ):
        """Turn a loaded pipeline into a policy; its scheduler is replaced.

        Args:
            pipeline: Any text-to-image or text-to-video pipeline of diffusers.
            sampling: How it is called unless a call says otherwise.
            weights: What is trained; None freezes everything.
            batch_size: Samples in one call of the pipeline.
            dtype: Precision of the denoiser's arithmetic.
            device: Where the models live.
            seed: For the initial weights of adapters.
            with_reference: Whether the reference model will be asked for.
            memory: What trades memory for time.

        Raises:
            ValueError: If the pipeline cannot be a policy, or a sampling argument is not its own.
        """
        self.pipeline, self.sampling, self.batch_size = pipeline, sampling, batch_size
        self.dtype, self.device = DTYPES[dtype], torch.device(device)
        call = inspect.unwrap(type(pipeline).__call__)
        self._parameters = inspect.signature(call).parameters
        check_signature(pipeline, self._parameters)
        self.shipped_scheduler = pipeline.scheduler
        self.scheduler = policy_scheduler(pipeline.scheduler)
        self._call = counted(call, self.scheduler)
        self.check_sampling(sampling)
        self.scheduler.noise_scale = float(pipeline.config.get("noise_scale") or 1.0)
        pipeline.scheduler = self.scheduler
        pipeline.set_progress_bar_config(disable=True)
        without_safety_checker(pipeline)
        self.models = models_of(pipeline)
        self.denoisers = denoisers(pipeline)
        prepare(pipeline, memory or Memory(), self.device, self.dtype, self._precision)
        self.trainable: Trainable | InitialNoise | None = None
        if isinstance(weights, Noise):
            self.trainable = InitialNoise(weights)
        elif weights is not None:
            self.trainable = Trainable(
                self.denoisers, weights, seed=seed, with_reference=with_reference
            )
        self.num_evaluations = self.num_decodes = 0
        self._calling, self._empty_loop = Calling(), True
        self._injection = LatentInjection(pipeline, self.scheduler, self.device)
        if isinstance(self.trainable, InitialNoise):
            self._injection.initial = self.trainable

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> "PipelinePolicy":
        """Load a hub id or a folder with ``DiffusionPipeline.from_pretrained`` and make it a policy.

        Args:
            model: Hub id, pipeline folder, or ``"shapes"`` for the embedded model.
            options: As for the constructor.

        Raises:
            FileNotFoundError: If a folder is named that is no pipeline.
        """
        memory: Memory = options.get("memory") or Memory()
        dtype = DTYPES[options.get("dtype", "float32")]
        return cls(load_pipeline(model, dtype, memory.quantize), **options)

    def check_sampling(self, sampling: Sampling, prompts: Sequence[Prompt] = ()) -> None:
        """Raise ValueError if the pipeline's call does not take one of the arguments."""
        own = [
            p for p in self._parameters if p not in ("self", "prompt", "generator", "output_type")
        ]
        for name in [*sampling.arguments(), *(a for p in prompts for a in own_arguments([p]))]:
            if name not in (*own, "prompt"):
                raise ValueError(
                    f"{'sampling' if name in sampling.arguments() else 'prompts'}: {type(self.pipeline).__name__} takes no argument {name!r}; it takes {', '.join(own)}"
                )
        check_strength(type(self.pipeline).__name__, self._parameters, sampling.call)

    @property
    def displaces(self) -> bool:
        """Whether the loop was seen to step more or other than one prepared tensor as it is."""
        return self._injection.displaces

    def num_steps(self, sampling: Sampling | None = None) -> int:
        """Number of denoising steps of a call."""
        return (sampling or self.sampling).num_steps

    def run(
        self,
        prompts: Sequence[Prompt],
        noise: SampleNoise,
        *,
        nodes: Sequence[int] | None = None,
        x: Float[Tensor, "batch *latent"] | None = None,
        stochastic: Collection[int] = (),
        transition: Transition | None = None,
        record: Collection[int] = (),
        decode: bool = True,
        sampling: Sampling | None = None,
        solver: Solver = "euler",
    ) -> Iterator[Rollout]:
        """Sample without gradients, one batch at a time, so that scoring can go on meanwhile.

        Args:
            prompts: One per sample.
            noise: One random stream per sample, for the initial latents and the stochastic steps.
            nodes: Grid nodes to visit, ascending from 0 (noise) to ``num_steps`` (data); all by
                default. A sub-grid makes larger steps.
            x: States to enter at ``nodes[0]`` with; by default the pipeline's initial latents.
            stochastic: Steps that follow ``transition``; the others follow the ODE.
            transition: The stochastic step.
            record: Steps to record in ``records``.
            decode: Whether to decode media.
            sampling: How to call the pipeline, if not as usual.
            solver: How the deterministic steps after the last stochastic one are taken.
        """
        for rows in batches(prompts, self.batch_size):
            plan = StepPlan(
                nodes=nodes,
                stochastic=stochastic,
                transition=transition or ODE(),
                noise=noise[rows.start : rows.stop],
                record=record,
                solver=solver,
            )
            entering = None if x is None else x[rows.start : rows.stop]
            with torch.no_grad():
                output = self._run(
                    [prompts[i] for i in rows],
                    plan,
                    entering,
                    decode,
                    sampling or self.sampling,
                )
            self.num_decodes += len(rows) * decode
            media = output.float().cpu() if decode else None
            yield Rollout(rows, None if decode else output, media, plan.records)

    def images(
        self, prompts: Sequence[Prompt], noise: SampleNoise, sampling: Sampling | None = None
    ) -> Float[Tensor, "batch *frames channels height width"]:
        """Media of the deterministic sampler, in [0, 1] on the CPU."""
        return torch.cat(
            [r.media for r in self.run(prompts, noise, sampling=sampling) if r.media is not None]
        )

    def decode(
        self,
        prompts: Sequence[Prompt],
        x: Float[Tensor, "batch *latent"],
        sampling: Sampling | None = None,
    ) -> Float[Tensor, "batch *frames channels height width"]:
        """Media of final states ``x``, in [0, 1] on the CPU."""
        sampling = sampling or self.sampling
        end, noise = self.num_steps(sampling), SampleNoise([])
        parts = []
        for rows in batches(prompts, self.batch_size):
            plan = StepPlan(nodes=[end], noise=noise)
            part = slice(rows.start, rows.stop)
            with torch.no_grad():
                parts.append(self._run(prompts[part], plan, x[part], True, sampling))
        self.num_decodes += len(prompts)
        return torch.cat(parts).float().cpu()

    def replay(
        self,
        prompts: Sequence[Prompt],
        x: Float[Tensor, "batch *latent"],
        step: int,
        transition: Transition,
    ) -> StepRecord:
        """Run one recorded step again, with gradients: the distribution that ``x_next`` came from.

        The model sees exactly what it saw in the rollout, so that before an update the
        log-probability is the recorded one.

        Args:
            prompts: One per state; all can share a call (:func:`flowgrpo.policy.calls.call_key`).
            x: States before the step.
            step: Index of the step in the grid; -1 is the draw of the initial noise, which needs no
                states.
            transition: The stochastic step.
        """
        if step == INITIAL:
            assert isinstance(self.trainable, InitialNoise)
            return self.trainable.record(len(x), self.scheduler.initial_std)
        plan = StepPlan(
            nodes=[step, step + 1], stochastic={step}, transition=transition, record={step}
        )
        self._run(prompts, plan, x, False, self.sampling)
        (record,) = plan.records
        return record

    def stock_pipeline(self) -> DiffusionPipeline:
        """The pipeline with the scheduler that it was shipped with, for export.

        The policy cannot be used any more after this.
        """
        self.pipeline.scheduler = self.shipped_scheduler
        self._injection.leave()
        for name in (*ENCODING_METHODS, *REWRITING_METHODS):
            self.pipeline.__dict__.pop(name, None)
        return self.pipeline

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the policy is the model that training began from."""
        return self.trainable.reference() if self.trainable is not None else nullcontext()

    def _run(
        self,
        prompts: Sequence[Prompt],
        plan: StepPlan,
        entering: Tensor | None,
        decode: bool,
        sampling: Sampling,
    ) -> Tensor:
        """One call of the pipeline."""
        arguments = sampling.arguments() | own_arguments(prompts)
        if not arguments.keys() <= self._parameters.keys():
            self.check_sampling(sampling, prompts[:1])
        nodes = plan.nodes if plan.nodes is not None else range(sampling.num_steps + 1)
        if len(nodes) == 1 and not self._empty_loop:
            plan = held(plan, sampling.num_steps)

        def call(formed: dict[str, Any]) -> Tensor:
            return self._once(formed, plan, entering, decode)

        try:
            output = self._calling(call, arguments, len(prompts))
        except Exception as error:
            if len(nodes) > 1 or plan.hold or isinstance(error, UnsupportedPipelineError):
                raise
            # Its loop cannot be empty, or something else is wrong, which the next call will raise.
            self._empty_loop = False
            return self._run(prompts, plan, entering, decode, sampling)
        self.num_evaluations += len(prompts) * (len(nodes) - 1 + plan.hold)
        return output

    def _once(
        self,
        arguments: dict[str, Any],
        plan: StepPlan,
        entering: Tensor | None,
        decode: bool,
    ) -> Tensor:
        """Call the pipeline in one form, and check that it walked where it was sent."""
        # Where a state is put in, the pipeline's own draw is thrown away; one generator is cheaper.
        generators = plan.noise.initial() if plan.noise and entering is None else torch.Generator()
        plan.records.clear()
        self.scheduler.begin(plan)
        arguments = self._injection.expect(entering, arguments)
        arguments |= {"generator": generators_for(arguments, generators)}

        def again(another: StepPlan) -> None:
            self.scheduler.begin(another)
            with torch.no_grad():
                self._output(arguments, False)

        try:
            output = self._output(arguments, decode)
            self._injection.check()
            self._injection.learn(plan, again)
        finally:
            self.scheduler.begin(StepPlan())
            self._injection.expect(None, arguments)
        return output

    def _output(self, arguments: dict[str, Any], decode: bool) -> Tensor:
        """What the pipeline returns: media, or the last state of its loop."""
        kind = "pt" if decode else "latent"
        try:
            output = self._call(self.pipeline, **arguments, output_type=kind, return_dict=False)
        except Exception:
            # What goes wrong after the loop does not matter where only its states are wanted
            # (QwenImageLayered cannot return latents).
            arrived = self._injection.arrived()
            if decode or arrived is None:
                raise
            return arrived
        if decode:
            return as_media(output, self.pipeline)
        arrived = self._injection.arrived()
        return as_batch(output) if arrived is None else arrived

    def _precision(self) -> torch.dtype:
        """Of what enters a denoiser: its weights' own."""
        weights = self.trainable.weights if self.trainable is not None else None
        trains_all = isinstance(weights, Full) and not weights.parameters and not weights.models
        return torch.float32 if trains_all else self.dtype
