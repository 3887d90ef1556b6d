"""Builds a run from a configuration: checks it, loads its parts, and resumes from a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

from flowgrpo.algorithms import AlgorithmBase
from flowgrpo.algorithms.previews import Previews
from flowgrpo.config import Config, ConfigError
from flowgrpo.config.distillation import assigns_credit
from flowgrpo.config.few_steps import few_step_notes
from flowgrpo.config.steps import stochastic_steps
from flowgrpo.config.without_effect import idle_notes
from flowgrpo.core.transitions import require_path
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.probe import (
    check_defined,
    check_scales,
    check_sizes,
    edited_as_squares,
    fit_noise,
    ignores_negatives,
)
from flowgrpo.policy.text_length import cut_prompts, tokenizers_of
from flowgrpo.rewards.differentiable import DifferentiableRewards
from flowgrpo.rewards.elsewhere import load_once
from flowgrpo.rewards.features import Features
from flowgrpo.rewards.named import load_all
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.training.benchmarks import Benchmarks
from flowgrpo.training.evaluator import Evaluator
from flowgrpo.training.given_pictures import (
    check_pictures,
    description,
    picture_notes,
    quality_of,
)
from flowgrpo.training.inputs import absent_weights, shared_note
from flowgrpo.training.learner import Learner
from flowgrpo.training.replay_buffer import ReplayBuffer
from flowgrpo.training.reward_replay import RewardReplay
from flowgrpo.training.session import Session


@dataclass(frozen=True)
class TrainingRun:
    """The parts of a run, ready for the iteration ``session.iteration``.

    Attributes:
        config: The configuration.
        prompts: The training prompts.
        session: Processes, logs and checkpoints.
        scorer: The rewards.
        policy: The pipeline.
        learner: The optimizer and the weights.
        evaluator: Held-out evaluation.
    """

    config: Config
    prompts: PromptSet
    session: Session
    scorer: RewardScorer
    policy: PipelinePolicy
    learner: Learner
    evaluator: Evaluator


def build(config: Config, session: Session, prompts: PromptSet, held_out: PromptSet) -> TrainingRun:
    """Load the parts of a run, and restore the newest checkpoint.

    A run fails as early as possible. In this order:

    1. Nothing is loaded: the configuration, the device, optional packages, prompt files and the import
       paths of rewards and metrics (:func:`flowgrpo.training.inputs.check_inputs`); then the run
       directory (:class:`Session`), and whether models and adapters that are not here are on the hub.
    2. The rewards are loaded: whether they can use the prompts, and let the policy train.
    3. The pipeline is loaded: sizes, initial noise and transition (:func:`_check_policy`).
    4. The judges of benchmarks are asked about one image.
    5. The base model has drawn the grid's images: whether the rewards are finite, vary and read prompts.

    Raises:
        ConfigError: If the configuration cannot be run.
        RewardError: If a reward cannot be trained on.
        CheckpointError: If the newest checkpoint is damaged.
    """
    if absent := absent_weights(config):
        raise ConfigError(absent[0])
    scorer = _load_rewards(config, session, [*prompts.prompts, *held_out.prompts])
    policy = _load_policy(config, session)
    scorer.check_audio(policy.makes_audio, f"{type(policy.pipeline).__name__} makes none")
    _check_policy(policy, config, prompts, held_out)
    _say_compiled(policy, session)
    session.note_prompts(_notes(config, session, policy, prompts, held_out))
    learner = Learner(
        policy,
        config.train,
        config.loss,
        session.accelerator,
        with_baseline=getattr(config.algorithm, "needs_baseline", False),
        guard=config.guard,
        rewarded=_rewarded(config, policy, scorer, prompts),
    )
    if config.train.replay.groups:
        learner.buffer = ReplayBuffer(config.train.replay, prompts.prompts)
    session.announce_network(learner)
    evaluator = Evaluator(
        config.evaluation,
        session,
        scorer,
        policy,
        learner,
        held_out,
        sampling=config.evaluation_sampling(),
        seed=config.run.seed,
        model_name=config.model.path,
        benchmarks=_load_benchmarks(config, session, policy, learner),
        needs_rewards=config.algorithm.needs_rewards,
    )
    # Before a checkpoint is restored, because they show the model that training started from.
    evaluator.keep_base_images()
    session.restore(learner)
    evaluator.resume()
    session.start_trackers()
    return TrainingRun(config, prompts, session, scorer, policy, learner, evaluator)


def _notes(
    config: Config,
    session: Session,
    policy: PipelinePolicy,
    prompts: PromptSet,
    held_out: PromptSet,
) -> list[str]:
    """Warnings about the model, the prompts and given pictures; also describes the pictures."""
    notes = [
        *idle_notes(config),
        *few_step_notes(config, _parts(policy)),
        *_prompt_notes(policy, config, prompts, held_out),
    ]
    if config.algorithm.num_targets:
        check_pictures(policy, prompts)
        quality = quality_of(policy, prompts)
        session.console.say(description(policy, config, prompts, quality))
        notes += picture_notes(policy, config, prompts, quality)
    return notes


def _parts(policy: PipelinePolicy) -> dict[str, Any]:
    """The configurations of the loaded pipeline's parts, by their paths in its folder; of hub models, too."""
    pipeline = policy.pipeline
    denoiser = policy.denoisers.get("transformer")
    return {
        "model_index.json": {**pipeline.config, "_class_name": type(pipeline).__name__},
        "transformer/config.json": {} if denoiser is None else dict(denoiser.config),
        "scheduler/scheduler_config.json": {"_class_name": type(policy.shipped_scheduler).__name__},
    }


def _rewarded(
    config: Config, policy: PipelinePolicy, scorer: RewardScorer, prompts: PromptSet
) -> RewardReplay | None:
    """Replays actions to differentiable rewards, if the loss needs them, after one was differentiated."""
    if not config.loss.needs.reward_gradient:
        return None
    rewards = DifferentiableRewards(scorer.rewards, scorer.models, lambda: scorer.iteration)
    rewarded = RewardReplay(policy, rewards)
    rewarded.probe(prompts.prompts[0])
    return rewarded


def _load_policy(config: Config, session: Session) -> PipelinePolicy:
    """The pipeline as a policy on this process's device."""
    # It can take minutes, in which a log file would otherwise say nothing.
    session.console.say(f"loading {config.model.path} ...")
    policy = PipelinePolicy.from_pretrained(
        config.model.source,
        sampling=config.sampling,
        weights=config.model.weights,
        batch_size=config.train.rollout_batch,
        dtype=config.model.dtype,
        device=session.accelerator.device,
        seed=config.run.seed,
        with_reference=_needs_reference(config),
        memory=config.memory,
        parallel=config.parallel,
        teachers=_teacher_paths(config),
        whole_teachers=teachers.models if (teachers := config.loss.needs.teachers) else (),
    )
    policy.lockstep.timeout = timedelta(minutes=config.run.rank_timeout_minutes)
    return policy


def _load_rewards(config: Config, session: Session, prompts: Sequence[Prompt]) -> RewardScorer:
    """The rewards, after checks that they suit the run, and the features of the guards."""
    # A reward that is differentiated is computed in every process.
    in_all = session.shares.context == 1 or config.loss.needs.reward_gradient
    load = load_all if in_all else partial(load_once, once=session.once)
    scorer = RewardScorer(config.rewards, config.failures, config.memory.score_batch, load)
    session.scorer, scorer.safe_point = scorer, session.signals.check
    scorer.once = session.score_once if session.shares.context > 1 else None
    scorer.check_turns(config.train.iterations)
    if config.algorithm.num_targets and scorer.learning_rewards:
        raise ConfigError(
            f"reward {scorer.learning_rewards[0]!r} learns from the samples of an iteration, and training on given "
            "pictures samples none; remove the reward"
        )
    if config.train.staleness and scorer.learning_rewards:
        raise ConfigError(
            f"train.staleness = 1: reward {scorer.learning_rewards[0]!r} learns from the candidates of an iteration "
            "before the next ones are scored, so sampling cannot go ahead; set train.staleness to 0"
        )
    if scorer.learning_rewards and getattr(config.algorithm, "previews", Previews()).number:
        raise ConfigError(
            f"algorithm.previews: reward {scorer.learning_rewards[0]!r} learns from all that it scores, and would "
            "learn to recognise previews; set algorithm.previews.number to 0"
        )
    if config.guard.novelty != "off":

        def load_features() -> None:
            scorer.features = Features(config.guard.features, config.guard.features_options)

        # They are computed where the scores are.
        session.once(load_features)
    if config.loss.needs.reward_gradient:
        rewards = DifferentiableRewards(scorer.rewards, scorer.models)
        if getattr(config.algorithm, "compares_texts", False) and rewards.ignores_prompts:
            raise ConfigError(
                f"rewards: {type(config.algorithm).__name__} compares the scores of an image for several texts, and all "
                "trained rewards ignore their prompts; use a reward that reads them, such as hpsv2"
            )
    session.once(partial(scorer.check_prompts, prompts))
    return scorer


def _teacher_paths(config: Config) -> Sequence[str]:
    """The adapters of a distillation's teachers."""
    teachers = config.loss.needs.teachers
    return () if teachers is None else teachers.paths


def _needs_reference(config: Config) -> bool:
    """Whether anything in a run uses the model before training."""
    in_evaluations = config.evaluation.base_after is not None
    teachers = config.loss.needs.teachers
    teaches = teachers is not None and teachers.use_base
    needed = config.loss.needs.reference or teaches
    return needed or config.train.monitor_states > 0 or in_evaluations


def _load_benchmarks(
    config: Config, session: Session, policy: PipelinePolicy, learner: Learner
) -> Benchmarks | None:
    """The benchmarks, if there are any, after their judges were asked about one image."""
    if not config.evaluation.bench:
        return None
    benchmarks = Benchmarks(config, session, policy, learner, config.evaluation_sampling())
    benchmarks.probe()
    return benchmarks


def _say_compiled(policy: PipelinePolicy, session: Session) -> None:
    """Say how many blocks of the denoisers ran compiled in the checks of the policy."""
    for name, blocks in policy.compiled.items():
        session.console.say(f"memory.compile: {blocks} of the {name} run compiled")


def _check_policy(
    policy: PipelinePolicy, config: Config, prompts: PromptSet, held_out: PromptSet
) -> None:
    """Check that the loaded pipeline makes images as configured and can be trained on them.

    Raises:
        ConfigError: If the transition is not defined on the model's path, or a trained step injects
            next to no noise.
        ValueError: If the pipeline cannot make an image of a requested size.
    """
    check_sizes(policy, held_out.prompts, config.evaluation_sampling())
    for index, regime in enumerate(config.evaluation.regimes):
        try:
            sampling = regime.sampling(config.evaluation_sampling())
            check_sizes(policy, held_out.prompts[:1], sampling)
        except ValueError as error:
            raise ConfigError(f"evaluation.regimes[{index}]: {error}") from error
    _check_guidance(policy, config)
    # Last, because the checks below need the sampling grid of rollouts.
    check_sizes(policy, prompts.prompts, config.sampling)
    fit_noise(policy, [*prompts.prompts, *held_out.prompts])
    if "negative_prompt" in config.sampling.call and ignores_negatives(
        policy, [p for p in prompts.prompts if p.negative is None][:1], config.sampling
    ):
        raise ConfigError(f"sampling.call.negative_prompt: {_unused(policy)}")
    try:
        require_path(config.algorithm.transition, policy.scheduler.interval(0, 1).path)
        check_defined(policy, config.algorithm.transition, stochastic_steps(config))
        remedy = "" if assigns_credit(config.algorithm) else "lower algorithm.fraction, or set loss.target = 'output'"  # fmt: skip
        check_scales(policy, config.algorithm.transition, config.steps_by_density(), remedy)
    except ValueError as error:
        raise ConfigError(f"algorithm.transition: {error}") from error


def _check_guidance(policy: PipelinePolicy, config: Config) -> None:
    """Raise ValueError if the algorithm or the loss sets a guidance scale that the pipeline does not take."""
    scale = config.loss.needs.reference_guidance
    others = [] if scale is None else [replace(config.sampling, guidance_scale=scale)]
    if isinstance(config.algorithm, AlgorithmBase):
        others += config.algorithm.samplings(config.sampling)
    for sampling in others:
        policy.check_sampling(sampling)


def _prompt_notes(
    policy: PipelinePolicy, config: Config, prompts: PromptSet, held_out: PromptSet
) -> list[str]:
    """What a user should know about the prompts, in sentences: texts that the model does not read in full,
    and those of :func:`flowgrpo.training.inputs.shared_note`."""
    tokenizers, call = tokenizers_of(policy.pipeline.components), type(policy.pipeline).__call__
    notes = shared_note(prompts, held_out)
    for label, some in (("training", prompts.prompts), ("held-out", held_out.prompts)):
        cut = cut_prompts(tokenizers, call, config.sampling, some)
        notes += [f"{label} prompts: {text}" for text in cut]
        if squares := edited_as_squares(policy, some, config.sampling):
            notes.append(
                f"{label} prompts: {len(squares)} of {len(some)} have an image and no size, and "
                f"{type(policy.pipeline).__name__} makes squares then, whatever the ratio of the image: give them a "
                "height and a width in the prompt file, or set sampling.height and sampling.width"
            )
        with_negative = sum(p.negative is not None for p in some)
        if with_negative and ignores_negatives(policy, some, config.sampling):
            notes.append(
                f"{label} prompts: {with_negative} of {len(some)} have a negative prompt. {_unused(policy)}"
            )
    return notes


def _unused(policy: PipelinePolicy) -> str:
    return (
        f"{type(policy.pipeline).__name__} ignores negative prompts as it is called here, because guidance is "
        "off: raise sampling.guidance_scale above 1 (FLUX and Qwen-Image: true_cfg_scale in sampling.call), "
        "or remove the negative prompt"
    )
