"""Computes the memory footprint of a configured run: weights exactly, activations by tracing."""

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from flowgrpo.config import Config
from flowgrpo.core.errors import ConfigError
from flowgrpo.data.prompts import Prompt
from flowgrpo.memory.budget import Footprint, MemoryOptions
from flowgrpo.memory.media_tracer import MediaTracer
from flowgrpo.memory.meta_pipeline import EstimateError, build, config_folder
from flowgrpo.memory.other_weights import evaluates_within, kept_weights, other_policies
from flowgrpo.memory.rewards import TracedRewards, reward_sizes, traced_rewards
from flowgrpo.memory.tracer import Activations, Tracer, bytes_of
from flowgrpo.policy.arguments import Calling, own_arguments
from flowgrpo.policy.compilation import repeated_blocks
from flowgrpo.policy.context import AttentionCount, check_denoisers
from flowgrpo.policy.encoder_lockstep import text_encoders
from flowgrpo.policy.loading import DTYPES, denoisers
from flowgrpo.policy.settings import Full, Noise, Parallel, Sampling, Weights
from flowgrpo.policy.sharding import gathered_bytes, gathered_dtype
from flowgrpo.policy.weights import Trainable


def divides(config: Config, num_processes: int) -> bool:
    """Whether the denoiser can be divided among this number of processes."""
    needs = config.loss.needs
    if needs.reward_gradient or needs.fake_score or (needs.teachers and needs.teachers.models):
        # The configuration refuses to divide their models.
        return False
    try:
        Parallel(shard="denoiser").check(
            num_processes,
            config.model.weights,
            config.memory,
            config.model.dtype,
            config.train.optimizer,
        )
    except ValueError:
        return False
    return True


def memory_options(config: Config, num_processes: int = 1) -> MemoryOptions:
    """The settings of a configuration that change how much memory it takes on these processes."""
    memory, parallel = config.memory, config.parallel
    most = num_processes if divides(config, num_processes) else 1
    needs = config.loss.needs
    names = (
        "decode_batch", "gradient_checkpointing", "offload_text_encoders", "offload_vae", "quantize",
    )  # fmt: skip
    fitting: dict[str, Any] = {n: getattr(memory, n) for n in names}
    parts = (parallel.shard_group or num_processes) if parallel.is_sharded else 1
    return MemoryOptions(
        rollout_batch=config.train.rollout_batch,
        train_batch=config.train.train_batch,
        optimizer=config.train.optimizer,
        parts=parts,
        most_parts=most,
        encoder_parts=parts if parallel.divides_encoders else 1,
        context=parallel.context,
        vae_stays=needs.reward_gradient,
        **fitting,
    )


def estimate_footprint(
    config: Config, prompts: Sequence[Prompt], num_processes: int = 1, device: str = "cuda"
) -> Footprint:
    """Build the configured pipeline without weights, and run it once on fake tensors.

    Args:
        config: Configuration of the run.
        prompts: Its training prompts, of which the longest text and the largest size are traced.
        num_processes: Number of processes that share the groups of an iteration.
        device: Device type to estimate for; no such device has to be present.

    Raises:
        EstimateError: If the config files are not available, or the pipeline cannot be traced.
    """
    dtype, weights = DTYPES[config.model.dtype], config.model.weights
    pipeline = build(config_folder(config.model.source), dtype)
    full = isinstance(weights, Full)
    models = {k: m for k, m in pipeline.components.items() if isinstance(m, nn.Module)}
    ours, native = denoisers(pipeline), config.memory.arithmetic == "native"
    teachers = config.loss.needs.teachers
    # With a whole model as teacher, the configuration refuses quantised weights.
    fixed = full or bool(teachers and teachers.models)
    linear = [] if fixed else _linear_weights(ours.values())
    before = {k: bytes_of(m) for k, m in models.items()}
    trained = make_trainable(ours, weights, native)
    after = {k: bytes_of(m) for k, m in models.items()}
    own = {k: after[k] if full else before[k] for k in ours}
    _fit_decoder(config, models)
    whole, gathered, gradients = _gathered(config, ours.values())
    counts = _attentions(config, ours)
    tracer = MediaTracer(pipeline, dtype, full=full, native=native, device=device)
    batches = config.train.rollout_batch, config.train.train_batch
    with _estimate_error(type(pipeline).__name__):
        latent, traced = _traced(tracer, config, prompts, 4 * trained, sum(own.values()))
    # Until a batch of the rollout is decoded, the model's outputs are kept.
    outputs = latent * batches[0] * config.sampling.num_steps * (4 if full else dtype.itemsize)
    return Footprint(
        denoisers=own,
        linear=sum(w.numel() for w in linear),
        linear_bytes=sum(w.numel() * w.element_size() for w in linear),
        encoders={k: v for k, v in before.items() if k not in ours and k != "vae"},
        vae=before.get("vae", 0),
        trained=trained,
        adapter=0 if full else 4 * trained,
        **kept_weights(config),
        experience=4 * latent * _kept(config, num_processes),
        outputs=outputs,
        within=evaluates_within(config),
        batches=batches,
        gathered=gathered,
        gathered_gradients=gradients,
        whole=whole,
        attention=max((c.most for c in counts), default=0),
        **_divided_encoders(pipeline),
        **traced,
    )


def _attentions(config: Config, models: Mapping[str, ModelMixin]) -> list[AttentionCount]:
    """Counts of the divided attentions of each denoiser; none if no samples are computed together.

    Raises:
        ConfigError: If the tokens of a denoiser cannot be divided.
    """
    number = config.parallel.context
    if number == 1:
        return []
    try:
        check_denoisers(models, number)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return [AttentionCount(m) for m in models.values()]


def _gathered(config: Config, models: Collection[nn.Module]) -> tuple[int, int, int]:
    """Bytes of a whole denoiser as it is gathered, and most bytes of parameters and of gradients that are
    whole at a time.

    If they are divided, full fine-tuning gathers the weights in the precision of the arithmetic. The
    models get this precision, so that their trace has no copies by autocast.
    """
    dtype = gathered_dtype(config.model.weights, DTYPES[config.model.dtype])
    found = [(0, 0, 0)]
    for model in models:
        blocks, whole = repeated_blocks(model), gathered_bytes(model, dtype)
        trained = [sum(p.numel() for p in b.parameters() if p.requires_grad) for b in blocks]
        # Autograd's gradients, and the fp32 message.
        per_weight = (dtype or torch.float32).itemsize + 4
        found.append((whole, _at_once(model, dtype), per_weight * max(trained, default=0)))
        if config.parallel.is_sharded and dtype is not None:
            model.to(dtype)
    whole, gathered, gradients = (max(column) for column in zip(*found, strict=True))
    return whole, gathered, gradients


def _at_once(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Most bytes of a divided model that are whole at a time: what is outside of its blocks, and two blocks."""
    sizes = sorted((gathered_bytes(b, dtype) for b in repeated_blocks(model)), reverse=True)
    return gathered_bytes(model, dtype) - sum(sizes) + sum(sizes[:2])


def _divided_encoders(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Sizes of a pipeline's text encoders that count if they are divided."""
    models = text_encoders(pipeline).values()
    return {
        "gathered_encoders": max((_at_once(m, None) for m in models), default=0),
        "whole_encoders": sum(gathered_bytes(m, None) for m in models),
    }


@contextmanager
def _estimate_error(name: str) -> Iterator[None]:
    """Turn any error into an EstimateError.

    Pipelines may do anything that fake tensors do not support, and whatever that raises must not stop a
    run.
    """
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
        raise EstimateError(f"{name} cannot be traced without weights ({reason})") from error


def _kept(config: Config, num_processes: int) -> int:
    """Latents that a process keeps: of each sample those at all nodes, and the means of the steps if later
    updates need them. With ``train.staleness`` an iteration is sampled while the one before it is kept."""
    train, steps = config.train, config.sampling.num_steps
    samples = train.groups * config.algorithm.group_size // config.parallel.shares(num_processes)
    later = train.optimizer_steps > 1 or train.staleness > 0
    nodes = steps + 1 + steps * (config.loss.needs.old_mean and later)
    return samples * nodes * (1 + train.staleness)


def _traced(
    tracer: MediaTracer, config: Config, prompts: Sequence[Prompt], trained: int, whole: int
) -> tuple[int, dict[str, Any]]:
    """The size of one sample's latents, in elements, and the parts of a footprint that are traced.

    Args:
        tracer: The pipeline.
        config: Configuration of the run.
        prompts: Its training prompts.
        trained: Bytes of values of the trained weights.
        whole: Bytes of the denoisers.
    """
    calling, batch = Calling(), config.train.rollout_batch
    calling(tracer.rollout, largest_call(config, prompts, batch), batch)
    latents, peaks = tracer.latents, dict(tracer.peaks)
    ours = tracer.denoisers
    rollout = max(v for k, v in peaks.items() if k in ours)
    if config.loss.needs.reward_gradient:
        rewards = traced_rewards(config.rewards, tracer.device)
        sizes = rewards.sizes
        training = _differentiated(tracer, calling, config, prompts, rewards)
    else:
        sizes = reward_sizes(config.rewards, tracer.device)
        training = _trained_on(tracer, calling, config, prompts)
    evaluated = functools.partial(_evaluated, tracer, calling, config, prompts, rollout)
    parts = {
        "rewards": sizes,
        "encode": max((v for k, v in peaks.items() if k not in ours and k != "vae"), default=0),
        "rollout": rollout,
        "decode": peaks.get("vae", 0),
        "training": training,
        "others": other_policies(config, trained, whole, evaluated),
    }
    return latents.numel() // batch if latents else 0, parts


def _evaluated(
    tracer: Tracer,
    calling: Calling,
    config: Config,
    prompts: Sequence[Prompt],
    usual: int,
    sampling: Sampling,
) -> int:
    """The denoisers' activations in a rollout batch with other arguments of the call than the policy's.

    Args:
        usual: Those with the policy's arguments.
    """
    if replace(sampling, num_steps=config.sampling.num_steps) == config.sampling:
        return usual
    batch = config.train.rollout_batch
    tracer.peaks.clear()
    given = largest_call(replace(config, sampling=sampling), prompts, batch)
    calling(tracer.rollout, given, batch)
    return max(v for k, v in tracer.peaks.items() if k in tracer.denoisers)


def _trained_on(
    tracer: Tracer, calling: Calling, config: Config, prompts: Sequence[Prompt]
) -> Activations:
    """The activations of a training batch."""
    if isinstance(config.model.weights, Noise):
        # The initial noise is trained, so no gradient passes through a model.
        return Activations(0, 0, None)
    batch = config.train.train_batch
    return calling(tracer.training, largest_call(config, prompts, batch), batch)


def _differentiated(
    tracer: MediaTracer,
    calling: Calling,
    config: Config,
    prompts: Sequence[Prompt],
    rewards: TracedRewards,
) -> Activations:
    """The activations of a training batch whose rewards are differentiated.

    Raises:
        EstimateError: If the algorithm does not say how many steps are differentiated.
    """
    algorithm, batch = config.algorithm, config.train.train_batch
    try:
        steps, texts = algorithm.differentiated_steps, algorithm.judged_texts  # type: ignore[union-attr]
    except AttributeError as error:
        raise EstimateError(
            f"{type(algorithm).__name__} has no differentiated_steps and judged_texts, which say how many steps and "
            "scores are differentiated; inherit from flowgrpo.algorithms.differentiated.Differentiated"
        ) from error
    shown = [prompts[0]] * batch
    tracer.score_with(lambda media: rewards.scores(media, shown, texts), rewards.models)
    arguments = largest_call(config, prompts, batch)
    return calling(lambda given: tracer.media_training(given, steps, batch), arguments, batch)


def make_trainable(models: Mapping[str, ModelMixin], weights: Weights | Noise, native: bool) -> int:
    """Make the denoisers trainable as configured. Returns the number of trained parameters."""
    if isinstance(weights, Noise):
        return 0
    trainable = Trainable(models, weights, seed=0, with_reference=False, native=native)
    return sum(p.numel() for p in trainable.parameters.values())


def _linear_weights(models: Iterable[nn.Module]) -> list[Tensor]:
    """Weights of all linear layers, which quantisation would store in fewer bits."""
    return [m.weight for d in models for m in d.modules() if isinstance(m, nn.Linear)]


def largest_call(config: Config, prompts: Sequence[Prompt], batch: int) -> dict[str, Any]:
    """Arguments of one call: the longest text at the largest size, repeated ``batch`` times."""
    sampling = config.sampling
    usual = sampling.height, sampling.width, sampling.num_frames

    def extent(prompt: Prompt) -> tuple[int, int]:
        sides = (own or given or 1 for own, given in zip(prompt.size, usual, strict=True))
        return math.prod(sides), len(prompt.images)

    longest, largest = max(prompts, key=lambda p: len(p.text)), max(prompts, key=extent)
    own = own_arguments([replace(largest, text=longest.text, negative=longest.negative)])
    repeated = {k: v * batch for k, v in own.items() if k in ("prompt", "negative_prompt")}
    return sampling.arguments() | own | repeated


def _fit_decoder(config: Config, models: dict[str, nn.Module]) -> None:
    """Switch on tiled or sliced decoding as configured, since both change the activations."""
    memory, vae = config.memory, models.get("vae")
    for setting, switch in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if getattr(memory, setting) and hasattr(vae, switch):
            getattr(vae, switch)()
