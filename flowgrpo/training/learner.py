"""From experience and advantages to new weights: loss, gradients, moving average.

With ``A`` actions in the groups of an optimizer step, over all processes, the gradient is that of::

    (1 / A) * sum over actions of (loss + kl_coef * kl)

Each process replays its own actions in batches, backpropagates the part of the sum that belongs to each
batch, and the gradients of all processes are added.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from flowgrpo.algorithms.guard import Guard
from flowgrpo.config import Train
from flowgrpo.core.errors import ConfigError, DivergenceError
from flowgrpo.core.random import Random
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.losses.base import Loss, LossInputs, WholeGroups, check_outputs
from flowgrpo.policy import EMA, PipelinePolicy
from flowgrpo.policy.sharding import divided_like, local
from flowgrpo.policy.weights import Trainable, swapped
from flowgrpo.training.baseline import ValueBaseline
from flowgrpo.training.distribution_matching import DistributionMatching
from flowgrpo.training.divergence import MAX_SKIPPED, are_finite, check_drift
from flowgrpo.training.group_terms import whole_groups
from flowgrpo.training.guard import Guarding
from flowgrpo.training.metrics import UpdateStatistics
from flowgrpo.training.monitored import monitored
from flowgrpo.training.optimizer import PolicyOptimizer
from flowgrpo.training.replay import Batch, Replay
from flowgrpo.training.replay_buffer import ReplayBuffer
from flowgrpo.training.reward_replay import RewardReplay
from flowgrpo.training.shares import Shares
from flowgrpo.training.split import (
    has_advantage,
    split_actions,
    split_groups,
    split_samples,
    split_steps,
)
from flowgrpo.training.stored_outputs import StoredOutputs
from flowgrpo.training.weighting import action_weights, chunk_log_ratios


class Learner:
    """Updates the weights, and owns everything that an update changes.

    It supplies a loss with the inputs that the loss declares (:class:`flowgrpo.losses.base.LossNeeds`)
    and handles all losses alike.

    Attributes:
        optimizer: Takes the optimizer steps.
        ema: The moving average of the weights, if ``train.ema_decay`` is above 0.
        behaviour: The weights of the behaviour policy, one tensor per trained parameter, if the loss
            needs an old policy whose weights differ from the trained ones.
        earlier: With ``train.staleness``, the trained weights before the last update; None before the first.
        baseline: The learned baseline, if the algorithm needs one.
        guarding: The guards against reward hacking, if any is on.
        matching: The fake score, if the loss matches distributions.
        buffer: Earlier groups that are trained on again, if there are any; set by the setup.
    """

    def __init__(
        self,
        policy: PipelinePolicy,
        train: Train,
        loss: Loss,
        accelerator: Accelerator,
        with_baseline: bool = False,
        guard: Guard | None = None,
        rewarded: RewardReplay | None = None,
    ):
        """Create the optimizer and the additional weights that the loss and the algorithm need."""
        assert policy.trainable is not None
        self.policy, self.train, self.loss, self.accelerator = policy, train, loss, accelerator
        self.shares = Shares(accelerator, policy.context)
        self.named = policy.trainable.parameters
        self.parameters = list(self.named.values())
        self.is_sharded = isinstance(policy.trainable, Trainable) and policy.trainable.is_sharded
        self.optimizer = PolicyOptimizer(self.named, train, accelerator, self.is_sharded)
        self.ema = (
            EMA(self.parameters, train.ema_decay, train.ema_every) if train.ema_decay > 0 else None
        )
        self.baseline = ValueBaseline(self.parameters) if with_baseline else None
        self.guarding = Guarding(guard) if guard is not None and guard.is_active else None
        self.buffer: ReplayBuffer | None = None
        self._reference: dict[str, Tensor] | None = None
        needs = loss.needs
        assert self.ema is not None or not needs.average, "refused by the configuration"
        has_old = needs.old_policy is not None
        self.behaviour = [p.detach().clone() for p in self.parameters] if has_old else None
        self.earlier: list[Tensor] | None = None
        # In the first update of an iteration the old means are the policy's own, so that recorded
        # means are needed from the second update on only, or if the policy that sampled is an older one.
        has_own_means = train.optimizer_steps == 1 and train.staleness == 0
        policy.keeps_means = needs.old_mean and not has_own_means
        policy.replay_batch = train.train_batch
        self.replay = Replay(
            policy,
            loss,
            train_batch=train.train_batch,
            has_own_means=has_own_means,
            behaviour=self._old_policy,
            average=None if self.ema is None else self.ema.applied,
            rewarded=rewarded,
        )
        self.matching: DistributionMatching | None = None
        if needs.fake_score is not None:
            self.matching = DistributionMatching(
                policy, self.replay, self.shares, train.train_batch
            )
        self._lost_iterations = 0

    def behaviour_policy(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights that sample.

        These are the behaviour weights if the loss has an old policy, after
        ``LossNeeds.old_policy_samples_from`` optimizer steps; otherwise the trained weights.
        """
        waits = self.optimizer.num_updates < self.loss.needs.old_policy_samples_from
        return nullcontext() if waits else self._old_policy()

    def weights_before(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights before the last update, if there was one."""
        return nullcontext() if self.earlier is None else swapped(self.parameters, self.earlier)

    def _old_policy(self) -> AbstractContextManager[None]:
        return nullcontext() if self.behaviour is None else swapped(self.parameters, self.behaviour)

    def with_expected(
        self, experience: Experience, gather: Callable[[list[Any]], list[Any]]
    ) -> Experience:
        """The experience with the rewards that the learned baseline expects, after training it."""
        return experience if self.baseline is None else self.baseline.applied(experience, gather)

    def update(
        self,
        experience: Experience,
        advantages: Float[Tensor, "actions *rewards"],
        random: Random,
        stale: bool = False,
    ) -> dict[str, float]:
        """Take all optimizer steps of one iteration. Returns the metrics of the iteration.

        Each optimizer step trains on a part of the actions (``train.split``), and each epoch on all of
        them, divided anew. The loss of a step is the mean over its actions on all processes. Actions with
        advantage 0 count in this mean, unless ``train.without_advantage`` drops their samples, but are
        computed only if the loss needs them (``all_actions``): without a KL they would not change the
        gradient.

        Args:
            experience: The actions of this process, and the states before them.
            advantages: One per action of ``experience.actions``, on the CPU. With a second axis, an
                action's loss is the sum of the losses for each of its advantages.
            random: Keyed by the iteration; draws the parts of the optimizer steps, equal in all processes.
            stale: Whether the weights have changed since the actions were sampled.
        """
        if self.train.staleness:
            self.earlier = [p.detach().clone() for p in self.parameters]
        statistics, needs = UpdateStatistics(self.loss.metrics), self.loss.needs
        noted: dict[str, float] = {}
        if self.guarding is not None:
            experience, advantages, noted = self.guarding.applied(experience, advantages)
        if self.matching is not None:
            noted |= self.matching.prepare(experience, random)
        actions = experience.actions
        kept = torch.ones(len(actions), dtype=torch.bool)
        differs = advantages != 0 if advantages.ndim == 1 else (advantages != 0).any(1)
        if self.train.without_advantage == "drop":
            kept = has_advantage(actions, advantages)
        for number_before, chosen in enumerate(self._parts(actions, random)):
            # The actions of this optimizer step, and their number on all processes.
            chosen = kept & chosen
            number = self.shares.sum(chosen.sum().to(self.policy.device)).item()
            computes_all = needs.all_actions or needs.whole_groups
            trained = chosen if computes_all else chosen & differs
            weighted = self._weighted(experience, advantages, chosen)
            parts = list(self.replay.batches(experience, weighted, trained))
            is_first = number_before == 0 and not stale
            batches = self._supplied(experience, parts, is_first)
            with self.policy.together():
                for batch in batches:
                    inputs = self.replay.inputs(experience, batch, is_first)
                    loss = self._loss(inputs, batch.columns[1:], statistics)
                    # Wan 2.2 has two denoisers. If only one is trained, the steps of the other carry
                    # no gradient, and nothing is backpropagated.
                    self.policy.lockstep.backward(loss / number, self.accelerator.backward)
            self._step(statistics)
        self._check_finite(statistics.norms)
        self._follow()
        metrics = statistics.summary(self.shares) | noted | self._drift(experience)
        return metrics | self._reset_reference(metrics["loss/kl"])

    def _supplied(
        self,
        experience: Experience,
        parts: Sequence[tuple[Actions, Tensor]],
        is_first: bool,
    ) -> Iterator[Batch]:
        """Parts of the actions, with their advantages, as batches with what the loss needs.

        What has to be evaluated for all batches at once, in sections of its own, is evaluated by this
        call; the rest when a batch is asked for.
        """
        needs, batches = self.loss.needs, [actions for actions, _ in parts]
        nothing = [None] * len(parts)
        references: Iterable[StoredOutputs | None] = nothing
        if needs.reference:
            references = self.replay.references(experience, batches, needs.reference_guidance)
        teachers: Sequence[StoredOutputs | None] = nothing
        if needs.teachers and not needs.fake_score:
            teachers = self.replay.taught(experience, batches)
        wholes: Sequence[WholeGroups | None] = nothing
        if needs.group_term:
            # They are used twice: for the whole groups, and for the batches.
            references = list(references)
            known = [Batch(*part, r) for part, r in zip(parts, references, strict=True)]
            wholes = whole_groups(self.replay, experience, known, is_first)
        ratios = self._chunk_log_ratios(experience, batches, is_first)
        columns = zip(parts, references, teachers, ratios, wholes, strict=True)
        matching = self.matching
        return (
            Batch(
                actions,
                advantages,
                reference,
                teacher,
                ratio,
                whole,
                direction=None if matching is None else matching.direction(actions),
            )
            for (actions, advantages), reference, teacher, ratio, whole in columns
        )

    def _weighted(
        self,
        experience: Experience,
        advantages: Float[Tensor, "actions *rewards"],
        chosen: Bool[Tensor, " actions"],
    ) -> Float[Tensor, "actions *rewards"]:
        """The advantages times the weights that the loss asks for."""
        weights = action_weights(
            experience.actions,
            chosen,
            self.loss.needs,
            experience.transition,
            self.policy.scheduler.interval,
            lambda sums: self.shares.sum(sums.to(self.policy.device)).cpu(),
        )
        if weights is None:
            return advantages
        return advantages * (weights if advantages.ndim == 1 else weights[:, None])

    def _chunk_log_ratios(
        self, experience: Experience, batches: Sequence[Actions], is_first: bool
    ) -> Sequence[Float[Tensor, " actions"] | None]:
        """The mean log-ratios of the chunks of each batch's actions; None if the loss has no chunks.

        Before the first update all are 0. Later they take a pass without gradients of their own, as the
        actions of a chunk are in different batches.
        """
        chunks = self.loss.needs.chunks
        if not chunks:
            return [None] * len(batches)
        if is_first:
            return [torch.zeros(len(batch)) for batch in batches]
        return chunk_log_ratios(batches, self.replay.log_ratios(experience, batches), chunks)

    def _reset_reference(self, kl: float) -> dict[str, float]:
        """Make the trained weights the reference policy, if the guards say so; what to log about it."""
        if self.guarding is None or not self.guarding.settings.resets:
            return {}
        if self.guarding.is_reset_due(kl):
            self._refer_to(self.named)
        return {"guard/resets": float(self.guarding.resets)}

    def _refer_to(self, weights: Mapping[str, Tensor]) -> None:
        assert isinstance(self.policy.trainable, Trainable), "refused by the configuration"
        self.policy.trainable.replace_reference(weights)
        # In main memory; of divided weights, this process's parts.
        self._reference = {name: local(w).cpu().clone() for name, w in weights.items()}

    def _check_finite(self, norms: Sequence[float]) -> None:
        """Check the weights and the gradients of an iteration.

        Raises:
            DivergenceError: If weights are not finite, or gradients were not for several iterations. The
                gradient scaler of fp16 finds its scale by such gradients, so with it they do not count.
        """
        if not self._is_everywhere(are_finite(self.named)):
            raise DivergenceError("the policy diverged: its weights contain NaN or infinity")
        is_lost = self.accelerator.scaler is None and not any(map(isfinite, norms))
        self._lost_iterations = self._lost_iterations + 1 if is_lost else 0
        if self._lost_iterations >= MAX_SKIPPED:
            raise DivergenceError(
                f"the policy diverged: the loss or its gradient was NaN or infinite in all updates of "
                f"{MAX_SKIPPED} iterations in a row"
            )

    def _is_everywhere(self, own: bool) -> bool:
        """Whether something holds in all processes. Without sharding they all have the same weights."""
        if not self.is_sharded:
            return own
        return bool(self.accelerator.gather(torch.tensor([own], device=self.policy.device)).all())

    def _parts(self, actions: Actions, random: Random) -> Iterator[Bool[Tensor, " actions"]]:
        """The actions of each optimizer step of the iteration, epoch after epoch."""
        for epoch in range(self.train.epochs):
            # The first epoch's stream has no key of its own.
            update_of = self._update_of(
                actions, random if epoch == 0 else random.at("epoch", epoch)
            )
            for update in range(self.train.updates):
                yield update_of == update

    def _update_of(self, actions: Actions, random: Random) -> Int[Tensor, " actions"]:
        """The optimizer step of an epoch, from 0, that trains on each action."""
        train = self.train
        if train.split == "groups":
            number = train.groups + train.replay.groups
            return split_groups(actions, train.updates, number, random)
        if train.split == "samples":
            return split_samples(actions, train.updates, random)
        if train.split == "actions":
            return split_actions(actions, train.updates, random)
        # Processes can have trained different steps, and all must divide them alike.
        counts = torch.bincount(actions.step, minlength=self.policy.num_steps())
        everywhere = self.shares.sum(counts.to(self.policy.device))
        return split_steps(actions, train.updates, everywhere.cpu().nonzero().squeeze(1))

    def _loss(
        self, inputs: LossInputs, others: Sequence[Tensor], statistics: UpdateStatistics
    ) -> Float[Tensor, ""]:
        """The summed loss of a batch, with the KL term.

        Args:
            inputs: With the first advantage of each action.
            others: The actions' further advantages, whose losses are added.
            statistics: Notes loss, KL and metrics.

        Raises:
            ValueError: If the loss does not return one value per action with a gradient, or has a
                ``kl_coef`` and returns no KL.
        """
        more = [replace(inputs, advantage=a.to(inputs.advantage.device)) for a in others]
        each = [self.loss(one) for one in (inputs, *more)]
        for outputs in each:
            check_outputs(self.loss, outputs, inputs)
        loss = each[0].loss if len(each) == 1 else torch.stack([o.loss for o in each]).sum(0)
        total = loss.sum()
        # The KL and the metrics do not depend on the advantage.
        kl = torch.zeros_like(loss)
        if each[0].kl is not None:
            kl = each[0].kl
            weighted = kl if inputs.kl_weight is None else kl * inputs.kl_weight
            total = total + self.loss.kl_coef * weighted.sum()
        statistics.add(inputs.step, loss, kl, each[0].metrics)
        return total

    def _drift(self, experience: Experience) -> dict[str, float]:
        """The distance of the policy from the reference, on a few of the iteration's states.

        It is the metric ``kl/velocity``: the mean squared difference of the models' outputs.

        Raises:
            DivergenceError: If it is above MAX_DRIFT.
        """
        if self.train.monitor_states == 0:
            return {}
        limit = min(self.train.monitor_states, self.train.train_batch)
        batches = monitored(experience, limit, self.shares.gather_objects)
        references = self.replay.references(experience, batches)
        with torch.no_grad(), self.policy.together():
            records = [self.replay.record(experience, batch) for batch in batches]
        found = []
        for record, reference in zip(records, references, strict=True):
            output = record.prediction.output.cpu()
            initial = reference.output.cpu()
            moved, size = _mean_square(output - initial), _mean_square(initial)
            found.append((len(output), moved, size))
        every = self.shares.gather_objects(found)
        number = sum(n for n, _, _ in every)
        drift = sum(n * moved for n, moved, _ in every) / number
        check_drift(drift, sum(n * size for n, _, size in every) / number)
        return {"kl/velocity": drift}

    def _follow(self) -> None:
        """After an iteration, move the behaviour weights towards the trained weights.

        ``behaviour <- d * behaviour + (1 - d) * trained``, with ``d`` by the number of optimizer steps.
        """
        remaining = self.loss.needs.old_policy
        if self.behaviour is not None and remaining is not None:
            behaviour, trained = map(local, self.behaviour), map(local, self.parameters)
            weight = 1 - remaining(self.optimizer.num_updates)
            torch._foreach_lerp_(list(behaviour), list(trained), weight)

    def _step(self, statistics: UpdateStatistics) -> None:
        """Take an optimizer step, and move the average if the weights have changed."""
        taken = self.optimizer.step()
        if self.ema is not None and not taken.skipped:
            self.ema.update()
        statistics.stepped(taken.norm, taken.learning_rate, taken.skipped)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The contents of a checkpoint: tensors by part and name, and values for JSON."""
        moments, of_optimizer = self.optimizer.state()
        parts: dict[str, dict[str, Tensor]] = {"weights": dict(self.named), "optimizer": moments}
        if self.ema is not None:
            parts["ema"] = dict(zip(self.named, self.ema.average, strict=True))
        if self.behaviour is not None:
            parts["behaviour"] = dict(zip(self.named, self.behaviour, strict=True))
        if self.earlier is not None:
            parts["earlier"] = dict(zip(self.named, self.earlier, strict=True))
        if self.baseline is not None:
            parts["baseline"] = self.baseline.state()
        if self.matching is not None:
            parts |= self.matching.state()
        if self.buffer is not None and self.buffer.groups:
            parts["replay"] = self.buffer.state()
        if self._reference is not None:
            parts["reference"] = {
                name: divided_like(part, self.named[name]) for name, part in self._reference.items()
            }
        state = {
            **of_optimizer,
            "ema_updates": self.ema.updates if self.ema else 0,
            "guard": self.guarding.state() if self.guarding else None,
            "teachers": self._teacher_digests(),
        }
        return parts, state

    def _teacher_digests(self) -> dict[str, str]:
        trainable = self.policy.trainable
        return trainable.teacher_digests if isinstance(trainable, Trainable) else {}

    def division(self, part: str, name: str, shape: torch.Size) -> Tensor | None:
        """The divided parameter as which a tensor of a checkpoint is divided; None if it is whole."""
        own = name.rsplit("/", 1)[0] if part == "optimizer" else name
        parameter = self.named.get(own)
        is_alike = isinstance(parameter, DTensor) and parameter.shape == shape
        return parameter if is_alike and part != "baseline" else None

    def restore(self, parts: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Load the contents of a checkpoint, as :meth:`state` returned them.

        Raises:
            ConfigError: If the weights of a teacher have changed.
        """
        assert self.policy.trainable is not None
        require_same_teachers(state.get("teachers", {}), self._teacher_digests())
        self.policy.trainable.load(parts["weights"])
        self.optimizer.restore(parts["optimizer"], state)
        if self.ema is not None:
            self.ema.updates = state["ema_updates"]
            for average, name in zip(self.ema.average, self.named, strict=True):
                average.copy_(parts["ema"][name])
        if self.behaviour is not None:
            for weight, name in zip(self.behaviour, self.named, strict=True):
                weight.copy_(parts["behaviour"][name])
        if "earlier" in parts:
            names = zip(self.named, self.parameters, strict=True)
            self.earlier = [parts["earlier"][name].to(p.device) for name, p in names]
        if self.baseline is not None:
            self.baseline.restore(parts["baseline"])
        if self.matching is not None:
            self.matching.restore(parts)
        if self.buffer is not None:
            self.buffer.restore(parts.get("replay", {}))
        if self.guarding is not None:
            self.guarding.restore(state["guard"])
        if "reference" in parts:
            self._refer_to(parts["reference"])


def require_same_teachers(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that the teachers of a run that is resumed are those with which it began.

    Raises:
        ConfigError: If the weights of one have changed.
    """
    for path, digest in now.items():
        if before.get(path, digest) != digest:
            raise ConfigError(
                f"loss.teachers: the weights of {path} have changed since the run was started; restore them, or "
                "choose another --set run.folder=..."
            )


def _mean_square(values: Tensor) -> float:
    """The mean over samples of their mean squares."""
    return float(values.float().square().flatten(1).mean(1).mean())
