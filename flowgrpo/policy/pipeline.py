"""A diffusers pipeline as a policy.

No code here depends on a particular model. The pipeline's own ``__call__`` runs for everything:
sampling, replaying a step with gradients, completing a state from the middle of the grid, decoding. The
pipeline's scheduler is replaced, and these methods of the pipeline and its models are wrapped:
``encode_prompt`` (each prompt is encoded once), ``prepare_latents`` (states are injected) and the
denoiser's ``forward`` (inputs get the denoiser's precision).
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.random import SampleNoise
from flowgrpo.core.solvers import Solver
from flowgrpo.core.transitions import ODE, Transition
from flowgrpo.data.audio import Audio
from flowgrpo.data.experience import INITIAL
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy.adapters import read_start
from flowgrpo.policy.arguments import (
    batches,
    check_signature,
    check_strength,
    generators_for,
    is_unrelated,
    keep_size,
    own_arguments,
)
from flowgrpo.policy.call import PipelineCall, UnsupportedPipelineError
from flowgrpo.policy.context import share_samples
from flowgrpo.policy.encoder_lockstep import EncoderLockstep
from flowgrpo.policy.fixed_device import fix_precision, restore_class
from flowgrpo.policy.latent_injection import LatentInjection
from flowgrpo.policy.loading import DTYPES, denoisers, load_pipeline, without_safety_checker
from flowgrpo.policy.lockstep import Call, Lockstep
from flowgrpo.policy.picture_encoder import PictureEncoder
from flowgrpo.policy.placement import as_batch, as_media, models_of, prepare
from flowgrpo.policy.prompt_cache import ENCODING_METHODS, REWRITING_METHODS, PromptCache
from flowgrpo.policy.rollout import CallResult, Learned, Rollout, padded
from flowgrpo.policy.scheduler import FlowPolicyScheduler, policy_scheduler
from flowgrpo.policy.settings import (
    Full,
    LoRA,
    Memory,
    ModelSource,
    Noise,
    Parallel,
    Sampling,
    Weights,
)
from flowgrpo.policy.sharding import Sharder, gather, shard
from flowgrpo.policy.sound import as_audio, audio_rate
from flowgrpo.policy.step_counter import counted
from flowgrpo.policy.step_plan import StepPlan, StepRecord
from flowgrpo.policy.teachers import read_teachers, require_found
from flowgrpo.policy.weights import InitialNoise, Trainable
from flowgrpo.policy.whole_teachers import read_whole_teachers

FRAMES = ("num_frames", "video_length", "frames")
"""Names that video pipelines give to the number of frames (Latte, Sana-Video)."""


class PipelinePolicy:
    """Samples, replays, branches and decodes with a pipeline, and owns the trained parameters.

    Example:
        >>> policy = PipelinePolicy.from_pretrained("stabilityai/stable-diffusion-3.5-medium",
        ...                                         weights=LoRA(rank=32), sampling=Sampling())
        >>> noise = SampleNoise([Random(0).at(i) for i in range(4)])
        >>> images = policy.images([Prompt("a red circle")] * 4, noise)

    Attributes:
        pipeline: The pipeline, with a policy scheduler.
        scheduler: The policy scheduler.
        trainable: The trained parameters; None if everything is frozen.
        compiled: The compiled blocks of each denoiser, by its name; none if nothing is compiled.
        attentions: Counts of the attentions of each denoiser, if processes compute samples together.
        num_evaluations: Denoiser evaluations so far, counted per sample.
        num_decodes: Decoded samples so far.
        lockstep: Makes the calls of all processes equal where ``in_lockstep`` is true.
        pictures: Encodes pictures to states.
        encoding: Makes their passes of divided text encoders equal.
    """

    replay_batch = 0
    """Number of states to which :meth:`replay` pads smaller batches if the denoisers are compiled; 0 pads
    none. Set by the learner to the size of its batches."""
    keeps_means = False
    """Whether actions store the means of their steps. Set by the learner if the loss needs them."""
    trainable: Trainable | InitialNoise | None = None
    _call_pipeline: Callable[..., Any]
    last_grid: tuple[Sampling, Any] | None = None
    """The sampling and the size of the prompts of the last call, which decide the scheduler's grid."""
    in_lockstep = False
    """Whether all processes must make equal passes of the denoiser, because its parameters are sharded."""

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
        parallel: Parallel | None = None,
        teachers: Sequence[str] = (),
        whole_teachers: Sequence[str] = (),
    ):
        """Turn a loaded pipeline into a policy. The pipeline is changed.

        Args:
            pipeline: A text-to-image or text-to-video pipeline of diffusers, or one with conditions.
            sampling: Default arguments of its call.
            weights: What to train; None freezes everything.
            batch_size: Largest number of samples in one call of the pipeline.
            dtype: Precision of the denoiser's arithmetic.
            device: Device of the models.
            seed: Seed of the adapters' initial weights.
            with_reference: Whether :meth:`reference` will be used.
            memory: Settings that trade memory for time.
            parallel: Whether trained denoisers are divided among the processes.
            teachers, whole_teachers: Adapters and pipelines whose weights ``trainable.teacher`` will apply.

        Raises:
            ValueError: If the pipeline cannot be a policy, does not take a sampling argument, or settings
                exclude each other.
        """
        memory = memory or Memory()
        memory.check_arithmetic(isinstance(weights, Full), dtype)
        self.pipeline, self.sampling, self.batch_size = pipeline, sampling, batch_size
        self.dtype, self.device = DTYPES[dtype], torch.device(device)
        call = inspect.unwrap(type(pipeline).__call__)  # which disables gradients
        self._parameters = inspect.signature(call).parameters
        check_signature(pipeline, self._parameters)
        self._take_over(call)
        self.models, self.denoisers = models_of(pipeline), denoisers(pipeline)
        create = self._creator(weights, teachers, whole_teachers, seed, with_reference)
        self._learned, self.lockstep = Learned(), Lockstep(self._join)
        self.encoding = EncoderLockstep(self.lockstep.messages, self.device)
        sharder = self._prepare(memory, parallel, weights)
        self.in_lockstep, self.num_evaluations, self.num_decodes = sharder is not None, 0, 0
        self.pictures = PictureEncoder(self)
        self._injection = LatentInjection(pipeline, self.scheduler, self._learned.latents, self.device)  # fmt: skip
        if isinstance(weights, Noise):
            self.trainable = self._injection.initial = InitialNoise(weights)
        elif weights is not None:
            self.trainable = create(self.denoisers, weights, shard=sharder, native=memory.arithmetic == "native")  # fmt: skip
        self.encoding.end_before(self.denoisers)
        self.attentions, self._call_pipeline = share_samples(self.denoisers, parallel, self.device, self._call_pipeline)  # fmt: skip
        if not self.in_lockstep:
            fix_precision(pipeline, self.denoisers.values())

    @classmethod
    def from_pretrained(cls, model: str | Path | ModelSource, **options: Any) -> "PipelinePolicy":
        """Load a pipeline and turn it into a policy.

        Args:
            model: Hub id, pipeline folder, checkpoint in one file, or ``"shapes"`` for the embedded
                model; or one of these with its base, revision, variant and adapters.
            options: Arguments of the constructor.

        Raises:
            FileNotFoundError: If the folder is not a pipeline, or an adapter does not exist.
            ValueError: If weights or adapters do not fit the pipeline.
        """
        require_found(options.get("weights"), options.get("teachers", ()))
        memory: Memory = options.get("memory") or Memory()
        dtype = DTYPES[options.get("dtype", "float32")]
        return cls(load_pipeline(model, dtype, memory.quantize), **options)

    def check_sampling(self, sampling: Sampling, prompts: Sequence[Prompt] = ()) -> None:
        """Check that the pipeline's call takes the arguments of the sampling and of the prompts.

        Raises:
            ValueError: If it does not take one of them.
        """
        scheduler = self.scheduler
        if sampling.shift is not None and (
            not isinstance(scheduler, FlowPolicyScheduler) or scheduler.config.invert_sigmas
        ):
            raise ValueError(
                f"sampling.shift = {sampling.shift:g} is for rectified-flow pipelines whose sigmas fall from "
                f"1 to 0, and {type(self.pipeline).__name__} is none; remove it"
            )
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
    def context(self) -> int:
        """Number of consecutive processes that compute each sample together (``parallel.context``)."""
        return self.attentions[0].number if self.attentions else 1

    @property
    def displaces(self) -> bool:
        """Whether the pipeline's states were seen to be anything but a part of one prepared tensor."""
        return self._learned.latents.displaced

    @property
    def makes_videos(self) -> bool:
        """Whether the pipeline's call takes a number of frames."""
        return any(name in self._parameters for name in FRAMES)

    @property
    def makes_audio(self) -> bool:
        """Whether the pipeline returns sound along with its videos."""
        return audio_rate(self.pipeline) is not None

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
        """Sample without gradients, one batch at a time, so that scoring can overlap with sampling.

        Args:
            prompts: One prompt per sample.
            noise: One random stream per sample, for the initial latents and the stochastic steps.
            nodes: Grid nodes to pass through, ascending, from 0 (noise) to ``num_steps`` (data); all by
                default. A sub-grid takes larger steps.
            x: States to begin with at ``nodes[0]``; by default the pipeline's initial latents.
            stochastic: Steps that follow ``transition``; the others follow the ODE.
            transition: The stochastic step.
            record: Steps to record in ``records``.
            decode: Whether to decode media.
            sampling: Arguments of the pipeline's call, if not the policy's own. Its ``base_after`` applies
                to whole deterministic calls.
            solver: Solver of the deterministic steps after the last stochastic step.
        """
        sampling = sampling or self.sampling
        for rows in batches(prompts, self.batch_size):
            part, size = slice(rows.start, rows.stop), self.batch_size
            decodes_only = nodes is not None and len(nodes) == 1
            extra = 0 if decodes_only else self._extra(len(rows), size)
            whole = [*prompts[part], *[prompts[rows.stop - 1]] * extra]
            plan = StepPlan(
                nodes=nodes,
                stochastic=stochastic,
                transition=transition or ODE(),
                noise=noise[part].padded(extra),
                record=record,
                solver=solver,
            )
            start = None if x is None else padded(x[part], extra)
            if isinstance(cache := self.pipeline.__dict__.get("encode_prompt"), PromptCache):
                cache.announce(whole, prompts[rows.stop :])
            is_plain = nodes is None and x is None and not stochastic and not record
            tuned = sampling.tuned_steps() if is_plain else None
            with torch.no_grad():
                if tuned is None:
                    called = self._run(whole, plan, start, decode, sampling)
                else:
                    called = self._mixed(whole, plan, tuned, decode, sampling)
            output, records, audio = called.first(len(rows)) if extra else called
            self.num_decodes += len(rows) * decode
            media = output.float().cpu() if decode else None
            yield Rollout(rows, None if decode else output, media, records, audio)

    def _mixed(
        self,
        prompts: Sequence[Prompt],
        plan: StepPlan,
        tuned: int,
        decode: bool,
        sampling: Sampling,
    ) -> CallResult:
        """Take the first ``tuned`` steps with the trained model, and the others with the reference policy."""
        first = replace(plan, nodes=range(tuned + 1))
        x = self._run(prompts, first, None, False, sampling).output
        rest = replace(plan, nodes=range(tuned, self.num_steps(sampling) + 1))
        with self.reference():
            return self._run(prompts, rest, x, decode, sampling)

    def images(
        self, prompts: Sequence[Prompt], noise: SampleNoise, sampling: Sampling | None = None
    ) -> Float[Tensor, "batch *frames channels height width"]:
        """Media of the deterministic sampler, in [0, 1] on the CPU."""
        return self.media_with_audio(prompts, noise, sampling)[0]

    def media_with_audio(
        self, prompts: Sequence[Prompt], noise: SampleNoise, sampling: Sampling | None = None
    ) -> tuple[Float[Tensor, "batch *frames channels height width"], Audio | None]:
        """Media of the deterministic sampler as in :meth:`images`, and their sound if there is any."""
        done = list(self.run(prompts, noise, sampling=sampling))
        media = torch.cat([r.media for r in done if r.media is not None])
        return media, Audio.concatenate([r.audio for r in done])

    def decode(
        self,
        prompts: Sequence[Prompt],
        x: Float[Tensor, "batch *latent"],
        sampling: Sampling | None = None,
    ) -> Float[Tensor, "batch *frames channels height width"]:
        """Media of final states ``x``, in [0, 1] on the CPU."""
        sampling = sampling or self.sampling
        end, noise = self.num_steps(sampling), SampleNoise([])
        decoded = []
        for rows in batches(prompts, self.batch_size):
            plan = StepPlan(nodes=[end], noise=noise)
            part = slice(rows.start, rows.stop)
            with torch.no_grad():
                called = self._run(prompts[part], plan, x[part], True, sampling)
            decoded.append(called.output)
        self.num_decodes += len(prompts)
        return torch.cat(decoded).float().cpu()

    def replay(
        self,
        prompts: Sequence[Prompt],
        x: Float[Tensor, "batch *latent"],
        step: int,
        transition: Transition,
        sampling: Sampling | None = None,
    ) -> StepRecord:
        """Take one step of a rollout again, with gradients.

        The denoiser gets the inputs that it got in the rollout, so before an update the distribution of
        ``x_next`` and its log-probability are those of the rollout.

        Args:
            prompts: One per state; all can share a call (:func:`flowgrpo.policy.arguments.call_key`).
            x: States before the step.
            step: Index of the step on the grid, or ``INITIAL`` for the draw of the initial noise, which
                needs no states.
            transition: The stochastic step.
            sampling: Arguments of the pipeline's call, if not the policy's own; the grid must be equal.
        """
        if step == INITIAL:
            assert isinstance(self.trainable, InitialNoise)
            return self.trainable.record(len(x), self.scheduler.initial_std)
        plan = StepPlan(
            nodes=[step, step + 1], stochastic={step}, transition=transition, record={step}
        )
        number, extra = len(prompts), self._extra(len(prompts), self.replay_batch)
        whole = [*prompts, *[prompts[-1]] * extra]
        sampling = sampling or self.sampling
        (record,) = self._run(whole, plan, padded(x, extra), False, sampling).records
        return record.first(number, {}) if extra else record

    def _extra(self, number: int, size: int) -> int:
        """The number of samples that complete a batch: compiled code is made for one size."""
        return max(0, size - number) if self.compiled and number else 0

    def stock_pipeline(self) -> DiffusionPipeline:
        """The pipeline with its shipped scheduler and its own methods, for export.

        The policy must not be used after this. If the denoisers are divided among processes, all of them
        must call this; the main process then has the weights that are exported, the others none.
        """
        if self.in_lockstep:
            assert isinstance(self.trainable, Trainable)
            is_main = torch.distributed.get_rank() == 0
            adapts = isinstance(self.trainable.weights, LoRA)
            gather(self.models, is_main, trained_only=adapts)
        self.pipeline.scheduler = self.shipped_scheduler
        self._injection.remove()
        restore_class(self.pipeline)
        for name in (*ENCODING_METHODS, *REWRITING_METHODS):
            self.pipeline.__dict__.pop(name, None)
        return self.pipeline

    def reference(self) -> AbstractContextManager[None]:
        """Use the reference policy, the model before training, inside the context."""
        return self.trainable.reference() if self.trainable is not None else nullcontext()

    def together(self) -> AbstractContextManager[None]:
        """A section that all processes enter and leave, and in which their calls may differ.

        If the parameters are sharded, processes whose work has ended take part in the calls of the
        others until all have finished (:mod:`flowgrpo.policy.lockstep`); otherwise this does nothing.
        No collective operation may run inside.
        """
        return self.lockstep.together() if self.in_lockstep else nullcontext()

    def _run(
        self,
        prompts: Sequence[Prompt],
        plan: StepPlan,
        x: Tensor | None,
        decode: bool,
        sampling: Sampling,
    ) -> CallResult:
        """Call the pipeline, in a section when it is this process's turn."""
        if not self.lockstep.in_section:
            return self._run_now(prompts, plan, x, decode, sampling)
        call = self.lockstep.describe(prompts, plan, x, sampling)
        self.lockstep.wait(call)
        called = self._run_now(prompts, plan, x, decode, sampling)
        self.lockstep.made(call, called.records)
        return called

    def _join(self, call: Call) -> Sequence[StepRecord]:
        """Make a call of another process; it does not count as work of this one."""
        before = self.num_evaluations
        called = self._run_now(call.prompts, call.plan, call.x, False, call.sampling)
        self.num_evaluations = before
        return called.records

    def _run_now(
        self,
        prompts: Sequence[Prompt],
        plan: StepPlan,
        x: Tensor | None,
        decode: bool,
        sampling: Sampling,
    ) -> CallResult:
        """Call the pipeline in the form that it takes.

        A plan with a single node leaves the loop empty. Some pipelines fail then; they take one step
        that keeps its state (:meth:`StepPlan.held`).

        Returns:
            Media if ``decode``, otherwise the last states; the recorded steps; and sound.
        """
        if isinstance(self.scheduler, FlowPolicyScheduler):
            self.scheduler.fixed_shift = sampling.shift
        self.last_grid = (sampling, prompts[0].size)
        arguments = keep_size(sampling.arguments() | own_arguments(prompts), self._parameters)
        if not arguments.keys() <= self._parameters.keys():
            self.check_sampling(sampling, prompts[:1])
        nodes = plan.nodes if plan.nodes is not None else range(sampling.num_steps + 1)
        empty = len(nodes) == 1

        def attempt(plan: StepPlan) -> CallResult:
            call = partial(self._call, plan=plan, x=x, decode=decode)
            with self.encoding.together():
                return self._learned.calling(call, arguments, len(prompts))

        if empty and not self._learned.empty_loop:
            plan = plan.held(sampling.num_steps)
        try:
            result = attempt(plan)
        except Exception as error:
            unrelated = isinstance(error, UnsupportedPipelineError) or is_unrelated(error)
            if not empty or plan.hold or unrelated:
                raise
            # The loop cannot be empty, or there is another cause, which the second attempt raises.
            plan = plan.held(sampling.num_steps)
            result = attempt(plan)
            self._learned.empty_loop = False
        self.num_evaluations += len(prompts) * (len(nodes) - 1 + plan.hold)
        return result

    def _call(
        self, arguments: dict[str, Any], plan: StepPlan, x: Tensor | None, decode: bool
    ) -> CallResult:
        """Call the pipeline with one form of its arguments, and check that it followed the plan."""
        call = self.scheduler.begin(plan, self._learned.enumerates)
        # With a given state the pipeline's initial noise is discarded.
        discarded = torch.Generator()
        generators = plan.noise.initial() if plan.noise and x is None else discarded
        arguments = self._injection.begin(call, x, arguments)
        call.discarded = None if x is None else discarded
        arguments |= {"generator": generators_for(arguments, generators)}

        def numbered(index: int) -> Tensor:
            """The first state of a call in which the elements of a prepared tensor are numbered."""
            other = self.scheduler.begin(
                StepPlan(nodes=[0, 1], hold=True, record=[0]), self._learned.enumerates
            )
            other.number = index
            with torch.no_grad():
                self._output(other, arguments, False)
            return other.main.records[0].x

        try:
            output, audio = self._output(call, arguments, decode)
            self._injection.end(call, numbered)
        finally:
            # Drops the tensors of the call.
            self.scheduler.begin(StepPlan())
        self._learned.enumerates |= call.enumerates
        return CallResult(output, call.main.records, audio)

    def _output(
        self, call: PipelineCall, arguments: dict[str, Any], decode: bool
    ) -> tuple[Tensor, Audio | None]:
        """The output of the pipeline: media and their sound, or the last state of its loop."""
        kind = "pt" if decode else "latent"
        try:
            output = self._call_pipeline(
                self.pipeline, **arguments, output_type=kind, return_dict=False
            )
        except Exception as error:
            # If only states are requested, a failure after the loop is of no consequence
            # (QwenImageLayered cannot return latents).
            last = self._injection.last_state(call)
            if decode or last is None or is_unrelated(error):
                raise
            return last, None
        if decode:
            return as_media(output, self.pipeline), as_audio(output, self.pipeline)
        last = self._injection.last_state(call)
        return (as_batch(output) if last is None else last), None

    def _take_over(self, call: Callable[..., Any]) -> None:
        """Replace the scheduler of the pipeline, whose call is ``call``, by that of the policy."""
        pipeline = self.pipeline
        self.shipped_scheduler = pipeline.scheduler
        self.scheduler = policy_scheduler(pipeline.scheduler)
        self._call_pipeline = counted(call, self.scheduler)
        self.check_sampling(self.sampling)
        self.scheduler.noise_scale = float(pipeline.config.get("noise_scale") or 1.0)
        pipeline.scheduler = self.scheduler
        pipeline.set_progress_bar_config(disable=True)
        without_safety_checker(pipeline)

    def _creator(
        self,
        weights: Weights | Noise | None,
        teachers: Sequence[str],
        whole_teachers: Sequence[str],
        seed: int,
        with_reference: bool,
    ) -> Callable[..., Trainable]:
        """Makes the trained parameters once the models are placed; files are read now."""
        return partial(
            Trainable,
            start=read_start(self.pipeline, weights, self.denoisers) if weights else None,
            teachers=read_teachers(self.pipeline, teachers),
            whole_teachers=read_whole_teachers(whole_teachers, self.denoisers, self.dtype),
            seed=seed,
            with_reference=with_reference,
        )

    def _prepare(
        self, memory: Memory, parallel: Parallel | None, weights: Weights | Noise | None
    ) -> Sharder | None:
        """Prepare the models of the pipeline, and set ``compiled``.

        Returns:
            Divides the denoisers, once they have their adapters; None if each process has whole ones.
        """
        sharder, device, dtype, options = None, self.device, self.dtype, dict[str, Any]()
        if parallel is not None and parallel.is_sharded and isinstance(weights, LoRA | Full):
            sharder = partial(shard, parallel=parallel, weights=weights, device=device, dtype=dtype)
            options = {"parallel": parallel, "encoding": self.encoding}
        self.compiled = prepare(self.pipeline, memory, device, dtype, self._precision, **options)
        return sharder

    def _precision(self) -> torch.dtype:
        """Precision of the denoiser's inputs: that of its weights."""
        weights = self.trainable.weights if self.trainable is not None else None
        trains_all = isinstance(weights, Full) and not weights.parameters and not weights.models
        return torch.float32 if trains_all else self.dtype
