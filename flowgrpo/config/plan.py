"""The work of one process in an iteration, and what it sends to the others, before a run starts."""

from dataclasses import dataclass
from math import ceil

from flowgrpo.config.schema import Config
from flowgrpo.core.random import Random
from flowgrpo.core.text import counted
from flowgrpo.losses.base import ActionKind

GRADIENT_BYTES = 4
"""Gradients are summed in fp32."""
SCORE_BYTES = 4 * 8 + 2 * 4
"""Group, sample, step, granularity; reward and first score of a candidate."""


@dataclass(frozen=True)
class Plan:
    """The work of one process in the first iteration.

    Attributes:
        num_ranks: Processes of the run.
        groups: Groups of one process.
        samples: Samples of one process.
        rollout_batch: Most samples in one call of the pipeline.
        train_batch: Most states in one forward pass with gradients.
        states: Most states of one denoising step in one optimizer step of a process; 0 if the algorithm
            trains no denoising steps.
        forwards: Forward passes with gradients in one optimizer step of a process, on average if groups are
            divided among optimizer steps (``train.split``), which is done over all processes. Groups of equal
            rewards need none. 0 as above.
        updates: Optimizer steps.
        candidates: Scored candidates of all processes.
        rewards: Number of rewards.
        parts: Processes among which a copy of the denoiser is divided; 1 if each has a whole one.
        sampling_passes: Passes of the denoiser in the rollout of a process, if its calls are full.
        extra_passes: Further passes without gradients for each one with gradients: of the reference policy,
            an old policy or the moving average, if the loss needs them.
        context: Processes that compute each sample together; ``groups``, ``samples`` and the like are then
            those of all of them.
        workers: Those that work on different groups, in words.
        sampled: Evaluations of the denoiser for one sample in the rollout of a process.
        trained_states: States that a process replays with gradients in an iteration; 0 if unknown.
        recomputes: Whether the backward pass computes the forward pass again.
    """

    num_ranks: int
    groups: int
    samples: int
    rollout_batch: int
    train_batch: int
    states: int
    forwards: int
    updates: int
    candidates: int
    rewards: int
    parts: int = 1
    sampling_passes: int = 0
    extra_passes: int = 0
    context: int = 1
    workers: str = "process"
    sampled: int = 0
    trained_states: int = 0
    recomputes: bool = False

    def rows(self) -> dict[str, str]:
        """The forward passes of an optimizer step, in words."""
        if not self.forwards:
            return {}
        size = min(self.train_batch, self.states)
        return {
            "micro-batches": f"about {self.forwards} of {counted(size, 'state')} on each process in an optimizer step"
        }

    def notes(self) -> list[str]:
        """What is wasteful, and the nearest better settings."""
        notes = []
        if self.num_ranks > 1 and self.samples < self.rollout_batch:
            notes.append(
                f"train.rollout_batch = {self.rollout_batch} is never filled: each of the {self.workers} "
                f"draws {counted(self.samples, 'sample')} per iteration; use fewer processes or more train.groups"
            )
        if self.num_ranks > 1 and 0 < self.states < self.train_batch:
            notes.append(
                f"train.train_batch = {self.train_batch} is never filled: an optimizer step has {counted(self.states, 'state')} "
                f"of a denoising step on each of the {self.workers}; use fewer processes, fewer "
                "train.updates or more train.groups"
            )
        return notes

    def gradient_bytes(self, trained: int) -> int:
        """Bytes that a process sends in an iteration to sum its gradients with those of the others.

        A ring sends each value 2 (N - 1) / N times (reduce-scatter, all-gather), and receives as much. If the
        denoiser is divided among ``n`` processes, each backward pass scatters the sums among them, which
        sends a value (n - 1) / n times, and c copies of the denoiser sum their parts in a ring.

        Args:
            trained: Number of trained parameters.
        """
        if self.parts > 1:
            copies, n = self.num_ranks // self.parts, self.parts
            each = GRADIENT_BYTES * trained * ((n - 1) / n + 2 * (copies - 1) / copies / n)
            return round(each * self.backward_passes)
        each = GRADIENT_BYTES * trained * 2 * (self.num_ranks - 1) / self.num_ranks
        return round(each * self.updates)

    @property
    def backward_passes(self) -> int:
        """Passes of the denoiser with gradients in an iteration of a process, at least."""
        return max(1, self.forwards) * self.updates

    @property
    def gathers(self) -> int:
        """How often an iteration gathers a divided denoiser, at least: once in a forward pass, and again in
        its backward pass."""
        return self.sampling_passes + self.backward_passes * (2 + self.extra_passes)

    def weight_bytes(self, gathered: int) -> int:
        """Bytes that a process sends in an iteration to gather the weights of a divided denoiser.

        A ring sends each value (n - 1) / n times among the n processes that share the denoiser.

        Args:
            gathered: Bytes of the denoiser in the precision in which it is gathered.
        """
        return round(gathered * self.gathers * (self.parts - 1) / self.parts)

    def _encoder_words(self, encoders: int) -> str:
        """What encoding a prompt that is not in the cache sends, in words."""
        sent = round(encoders * (self.parts - 1) / self.parts)
        return f", {size(sent)} of text encoders' weights for each new prompt" if sent else ""

    def score_bytes(self) -> int:
        """Bytes that a process receives in an iteration to know the rewards of all candidates."""
        each = SCORE_BYTES + 4 * (self.rewards - 1)
        total = each * self.candidates * self.context
        return round(total * (self.num_ranks - 1) / self.num_ranks)

    @property
    def exchanges(self) -> int:
        """How often an iteration exchanges the tokens of a sample's pass for heads, at least.

        Once in a forward pass and once in its backward pass, and once more if that computes the forward
        pass again.
        """
        replayed = self.trained_states * (2 + self.recomputes + self.extra_passes)
        return self.sampled + replayed

    def token_bytes(self, attention: int) -> int:
        """Bytes that a process sends in an iteration to exchange tokens for heads in attentions.

        An exchange sends queries, keys, values and outputs, or their gradients. A process has 1 / N of the
        tokens, and keeps 1 / N of the heads of these.

        Args:
            attention: Bytes of all queries of a pass of the denoiser for one sample.
        """
        n = self.context
        return round(self.exchanges * 4 * attention / n * (n - 1) / n)

    def network(self, trained: int, gathered: int, encoders: int = 0, attention: int = 0) -> str:
        """The bytes of an iteration on the network, in words; empty with one process.

        Args:
            trained: Number of trained parameters.
            gathered: Bytes of the denoiser in the precision in which it is gathered, if it is divided.
            encoders: Bytes of the text encoders, if they are divided.
            attention: As in :meth:`token_bytes`, if processes compute samples together.
        """
        if self.num_ranks == 1:
            return ""
        words = self._parameter_words(trained, gathered, encoders)
        if self.context > 1:
            words += (
                f", and at least {size(self.token_bytes(attention))} of tokens ({self.exchanges} x exchanging the "
                f"tokens of a sample, {size(4 * attention)} in all)"
            )
        return words

    def _parameter_words(self, trained: int, gathered: int, encoders: int) -> str:
        """What is sent of weights, gradients and scores, in words."""
        gradients, scores = self.gradient_bytes(trained), self.score_bytes()
        if self.parts > 1:
            return (
                f"at least {size(self.weight_bytes(gathered))} of weights sent by each process per iteration "
                f"({self.gathers} x gathering {size(gathered)}, of which {self.sampling_passes} to sample), "
                f"{size(gradients)} of gradients ({self.backward_passes} x the sum of {trained:,} "
                f"gradients), {size(scores)} of scores"
            ) + self._encoder_words(encoders)
        return (
            f"{size(gradients)} of gradients sent by each process per iteration ({self.updates} x the sum of "
            f"{counted(trained, 'gradient', ',')}), {size(scores)} of scores"
        )


def plan(config: Config, num_ranks: int = 1) -> Plan:
    """The plan of a configuration that has been checked for this number of processes."""
    t, size_, random = config.train, config.algorithm.group_size, Random(config.run.seed)
    random = random.at("train", 0)
    groups = t.groups // config.parallel.shares(num_ranks)
    steps = 0
    kind: ActionKind = config.algorithm.action_kind
    if kind in ("step", "visited_state", "neighbor", "step_and_generated"):
        steps = len(config.algorithm.trained_steps(config.sampling.num_steps, 0, random))
    if kind in ("generated", "step_and_generated"):
        steps += 1
    samples = groups * size_
    # The states of one denoising step, and the denoising steps, in one optimizer step.
    # Of neighbours, the states of anchors only.
    starts = groups * getattr(config.algorithm, "anchors", size_) if kind == "neighbor" else samples
    states, trained = starts, steps
    if t.split == "steps":
        trained = ceil(steps / t.updates)
    else:
        states = ceil(starts / t.updates)
    cost = config.algorithm.cost(config.sampling.num_steps, 0, random)
    needs, shard = config.loss.needs, config.parallel
    return Plan(
        num_ranks=num_ranks,
        groups=groups,
        samples=samples,
        rollout_batch=t.rollout_batch,
        train_batch=t.train_batch,
        states=states if steps else 0,
        forwards=trained * ceil(states / t.train_batch),
        updates=t.optimizer_steps,
        candidates=round(cost.rewards * t.groups),
        rewards=len(config.rewards),
        parts=(shard.shard_group or num_ranks) if shard.is_sharded else 1,
        sampling_passes=ceil(cost.nfe * groups / min(samples, t.rollout_batch)),
        extra_passes=sum(
            (
                needs.reference,
                needs.average,
                needs.old_policy is not None,
                needs.teachers is not None,
            )
        ),
        context=config.parallel.context,
        workers=config.parallel.workers(config.parallel.shares(num_ranks)),
        sampled=round(cost.nfe * groups),
        trained_states=starts * steps * t.epochs,
        recomputes=config.memory.gradient_checkpointing,
    )


def size(number: int | float) -> str:
    """Format bytes with the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
