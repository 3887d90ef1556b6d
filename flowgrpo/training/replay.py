"""Replays recorded actions in batches with gradients, and supplies a loss with its inputs.

A replay runs the pipeline from a recorded state ``x`` for one step, and returns the distribution of
``x_next`` under the present weights. Several actions can share a state, so a batch of ``A`` actions is
replayed with ``S <= A`` states, in one forward pass. Training again on the groups of earlier iterations
(``train.replay``) is another thing: :mod:`flowgrpo.training.replay_buffer`.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from flowgrpo.config.distillation import teacher_sampling
from flowgrpo.core.text import counted
from flowgrpo.core.transitions import Gaussian, Prediction
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.data.prompts import Prompt
from flowgrpo.losses.base import Loss, LossInputs, PolicyOutputs, WholeGroups
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.policy.arguments import call_key
from flowgrpo.policy.step_plan import StepRecord
from flowgrpo.policy.weights import Trainable
from flowgrpo.training.reward_replay import RewardReplay
from flowgrpo.training.stored_outputs import StoredOutputs

Weights = Callable[[], AbstractContextManager[None]]
"""Enters a context inside which the policy has other weights."""


@dataclass(frozen=True)
class Batch:
    """Actions that one forward pass serves, and what their loss needs besides their replay.

    The fields from ``reference`` on are None unless the loss declares that it needs them.

    Attributes:
        actions: The actions.
        advantages: One or several of each action, weighted as the loss asks for.
        reference: Outputs of the reference policy.
        teacher: Outputs of the teacher of the actions' prompts.
        chunk_log_ratio: As in :class:`flowgrpo.losses.base.LossInputs`.
        whole: As in :class:`flowgrpo.losses.base.LossInputs`.
        direction: As in :class:`flowgrpo.losses.base.LossInputs`.
    """

    actions: Actions
    advantages: Float[Tensor, "actions *rewards"]
    reference: StoredOutputs | None = None
    teacher: StoredOutputs | None = None
    chunk_log_ratio: Float[Tensor, " actions"] | None = None
    whole: WholeGroups | None = None
    direction: Float[Tensor, "actions *latent"] | None = None

    @property
    def columns(self) -> list[Float[Tensor, " actions"]]:
        """The advantages of every action: one tensor, or one for each reward."""
        several = self.advantages.ndim > 1
        return list(self.advantages.unbind(1)) if several else [self.advantages]


class Replay:
    """Divides recorded actions into batches and makes the inputs of a loss from each.

    Args:
        policy: The policy that is trained.
        loss: Declares the inputs that it needs.
        train_batch: Largest number of states in one forward pass.
        has_own_means: Whether the weights that are trained have sampled the actions in every optimizer
            step. The old means are then the policy's own, and none are recorded.
        behaviour: Weights of the behaviour policy.
        average: Moving average of the weights, if there is one.
        rewarded: Replays actions to their rewards, if the loss differentiates these.
    """

    def __init__(
        self,
        policy: PipelinePolicy,
        loss: Loss,
        *,
        train_batch: int,
        has_own_means: bool,
        behaviour: Weights,
        average: Weights | None,
        rewarded: RewardReplay | None = None,
    ):
        self.policy, self.loss, self.train_batch = policy, loss, train_batch
        self.has_own_means, self.rewarded = has_own_means, rewarded
        policy.lockstep.weights["behaviour"] = behaviour
        if average is not None:
            policy.lockstep.weights["average"] = average

    def batches(
        self,
        experience: Experience,
        values: Shaped[Tensor, "actions *rest"],
        trained: Bool[Tensor, " actions"],
    ) -> Iterator[tuple[Actions, Shaped[Tensor, "batch *rest"]]]:
        """Batches of the trained actions that one forward pass can serve, with their values.

        The actions of a batch share the denoising step and the guidance scale, and their prompts can
        share a call of the pipeline (same size, same condition image) and have one teacher. They start
        from at most ``train_batch`` states.

        Args:
            experience: The iteration's experience.
            values: A row for each action, such as its advantages.
            trained: The actions to put into batches.
        """
        actions, teachers = experience.actions, self.loss.needs.teachers
        # Groups by the key that decides whether prompts can share a call.
        keys: dict[Hashable, list[int]] = {}
        for group in experience.groups:
            own = 0 if teachers is None else teachers.of(group.prompt.metadata, group.index)
            keys.setdefault((call_key(group.prompt), own), []).append(group.index)
        for step in actions.step[trained].unique().tolist():
            for groups in keys.values():
                alike = torch.isin(actions.group, torch.tensor(groups))
                found = (trained & (actions.step == step) & alike).nonzero().squeeze(1)
                for rows in _by_guidance(actions, found):
                    for part in self._split(actions, rows):
                        yield actions.select(part), values[part]

    def _split(self, actions: Actions, rows: Int[Tensor, " rows"]) -> Iterator[Int[Tensor, " _"]]:
        """Split the rows of actions so that each part has at most ``train_batch`` states.

        Raises:
            ValueError: If the loss needs whole groups in a batch and a group has more states than that.
        """
        limit = self.train_batch
        # Actions that share a state are never divided: one row of the model serves them all.
        if not self.loss.needs.whole_groups:
            for states in actions.state[rows].unique().split(limit):
                yield rows[torch.isin(actions.state[rows], states)]
            return
        part: list[Tensor] = []
        filled = 0
        for group in actions.group[rows].unique():
            own = rows[actions.group[rows] == group]
            number = len(actions.state[own].unique())
            if number > limit and self.loss.needs.group_term:
                for states in actions.state[own].unique().split(limit):
                    yield own[torch.isin(actions.state[own], states)]
                continue
            if number > limit:
                raise ValueError(
                    f"the loss {type(self.loss).__name__} needs whole groups in a batch, but a group has "
                    f"{counted(number, 'state')} and train.train_batch is {limit}; set it to at least {number}"
                )
            if filled + number > limit:
                yield torch.cat(part)
                part, filled = [], 0
            part, filled = [*part, own], filled + number
        if part:
            yield torch.cat(part)

    def references(
        self, experience: Experience, batches: Sequence[Actions], guidance: float | None = None
    ) -> Iterable[StoredOutputs]:
        """The reference's outputs for all batches.

        Where disabling adapters gives the reference, each batch is evaluated when it is asked for, and
        its outputs stay on the device. Full fine-tuning keeps the reference weights in main memory:
        all batches of an update are evaluated at once, so that the weights move to the accelerator
        once per update, and the outputs are kept in main memory. Sharded policies do the same, because
        the evaluations are a section of their own.

        Args:
            experience: The iteration's experience.
            batches: Parts of its actions.
            guidance: The guidance scale of the reference; None for that of each action.
        """
        own = self.policy.sampling
        sampling = None if guidance is None else replace(own, guidance_scale=guidance)
        trained = self.policy.trainable
        is_at_hand = trained is None or trained.reference_is_at_hand
        if is_at_hand and not self.policy.in_lockstep:
            return self._references_in_turn(experience, batches, sampling)
        return self.outputs_of(self.policy.reference, experience, batches, sampling)

    def taught(
        self, experience: Experience, batches: Sequence[Actions], sampling: Sampling | None = None
    ) -> list[StoredOutputs]:
        """The outputs of the teachers for all batches, each of its prompts' teacher, in main memory.

        Args:
            experience: The iteration's experience.
            batches: Parts of its actions, or others of its prompts.
            sampling: Arguments of the pipeline's call that the teachers' own come on top of; by default the
                policy's.
        """
        teachers, found = self.loss.needs.teachers, dict[int, StoredOutputs]()
        assert teachers is not None
        metadata = {g.index: g.prompt.metadata for g in experience.groups}
        groups = [int(b.group[0]) for b in batches]
        owners = [teachers.of(metadata[g], g) for g in groups]
        # In all processes in this order, also for a teacher without batches here.
        for number, teacher in enumerate(teachers.all):
            own = [i for i, owner in enumerate(owners) if owner == number]
            call = teacher_sampling(teacher, sampling or self.policy.sampling)
            outputs = self.outputs_of(
                self.teacher_weights(number), experience, [batches[i] for i in own], call
            )
            found.update(zip(own, outputs, strict=True))
        return [found[i] for i in range(len(batches))]

    def teacher_weights(self, number: int) -> Weights:
        """Enters a context inside which the policy has the weights of one of the loss's teachers."""
        assert self.loss.needs.teachers is not None
        teacher = self.loss.needs.teachers.all[number]
        if teacher.is_base:
            return self.policy.reference
        assert isinstance(self.policy.trainable, Trainable), "refused by the configuration"
        return partial(self.policy.trainable.teacher, teacher.path)

    def outputs_of(
        self,
        weights: Weights,
        experience: Experience,
        batches: Sequence[Actions],
        sampling: Sampling | None = None,
    ) -> list[StoredOutputs]:
        """The outputs of the policy with other weights for all batches, in main memory."""
        # In lockstep, a process without batches joins the calls of the others.
        if not batches and not self.policy.in_lockstep:
            return []
        with torch.no_grad(), weights(), self.policy.together():
            records = (self.record(experience, actions, sampling) for actions in batches)
            return [StoredOutputs.of(record).in_main_memory() for record in records]

    def _references_in_turn(
        self, experience: Experience, batches: Sequence[Actions], sampling: Sampling | None
    ) -> Iterator[StoredOutputs]:
        for actions in batches:
            with torch.no_grad(), self.policy.reference():
                outputs = StoredOutputs.of(self.record(experience, actions, sampling))
            # Outside the contexts, which would otherwise hold for the caller.
            yield outputs

    def inputs(self, experience: Experience, batch: Batch, first_update: bool) -> LossInputs:
        """Replay a batch with gradients and add the inputs that the loss declares.

        Args:
            experience: The iteration's experience.
            batch: A part of its actions. The inputs have the first of their advantages.
            first_update: Whether no optimizer step has been taken since the actions were sampled.
        """
        needs, device, actions = self.loss.needs, self.policy.device, batch.actions
        reward = None
        if needs.reward_gradient:
            assert self.rewarded is not None
            record, reward = self.rewarded(experience, actions, self._owners(experience, actions))
        else:
            record = self.record(experience, actions)
        old_policy = average = old_mean = None
        if needs.old_policy is not None and needs.old_policy_is_copied and first_update:
            old_policy = _detached(record)
        elif needs.old_policy is not None:
            with torch.no_grad(), self.policy.lockstep.using("behaviour"):
                old_policy = _outputs(self.record(experience, actions))
        if needs.average:
            with torch.no_grad(), self.policy.lockstep.using("average"):
                average = _outputs(self.record(experience, actions))
        x, rows = actions.starts()
        state = rows.to(device)
        if needs.old_mean:
            old_mean = self._old_mean(actions, record.gaussian.mean[state])
        return LossInputs(
            policy=_outputs(record),
            x=x.to(device),
            state=state,
            x_next=actions.x_next.to(device),
            old_log_prob=actions.old_log_prob.to(device),
            advantage=batch.columns[0].to(device),
            group=actions.group.to(device),
            sample=actions.sample.to(device),
            step=record.step,
            interval=record.interval,
            transition=experience.transition,
            first_update=first_update,
            old_mean=old_mean,
            old_policy=old_policy,
            average=average,
            reference=None if batch.reference is None else batch.reference.restored(record),
            teacher=None if batch.teacher is None else batch.teacher.restored(record),
            has_reward=experience.has_reward(actions).to(device),
            kl_weight=None if actions.kl_weight is None else actions.kl_weight.to(device),
            chunk_log_ratio=batch.chunk_log_ratio,
            whole=batch.whole,
            reward=None if reward is None else reward[state],
            direction=batch.direction,
        )

    def log_ratios(
        self, experience: Experience, batches: Sequence[Actions]
    ) -> list[Float[Tensor, " actions"]]:
        """The present log-ratio of each action of each batch, without gradients, on the CPU."""
        found = []
        with torch.no_grad(), self.policy.together():
            for actions in batches:
                gaussian = self.record(experience, actions).gaussian
                device = gaussian.mean.device
                mean = gaussian.mean[actions.starts()[1].to(device)]
                new = Gaussian(mean, gaussian.std, gaussian.normalised)
                found.append(new.log_prob(actions.x_next.to(device)).cpu() - actions.old_log_prob)
        return found

    def _old_mean(self, actions: Actions, mean: Tensor) -> Tensor:
        """The recorded means of the steps, or the policy's own where these are the same.

        Raises:
            ValueError: If there are several updates and the algorithm has recorded no means.
        """
        if actions.old_mean is not None:
            return actions.old_mean.to(mean.device)
        if not self.has_own_means:
            raise ValueError(
                f"the loss {type(self.loss).__name__} needs the old means of the steps when an iteration "
                "has several optimizer steps, but the algorithm has not recorded them: set Actions.old_mean where "
                "policy.keeps_means is true, or set train.updates = 1 and train.epochs = 1"
            )
        return mean.detach()

    def record(
        self, experience: Experience, actions: Actions, sampling: Sampling | None = None
    ) -> StepRecord:
        """One forward pass of the policy, with its present weights, on the states of a batch.

        The output has a row per state, not per action.

        Args:
            experience: Has the prompts.
            actions: The batch.
            sampling: Arguments of the pipeline's call, if not the policy's own
                with the guidance scale of the actions.
        """
        x, _ = actions.starts()
        owners, step = self._owners(experience, actions), int(actions.step[0])
        if sampling is None and actions.guidance is not None:
            scale = float(actions.guidance[0])
            sampling = replace(self.policy.sampling, guidance_scale=scale)
        return self.policy.replay(owners, x, step, experience.transition, sampling)

    def _owners(self, experience: Experience, actions: Actions) -> list[Prompt]:
        """The prompt of each distinct state of a batch."""
        prompts = {g.index: g.prompt for g in experience.groups}
        _, rows = torch.unique(actions.state, return_inverse=True)
        group_of_state = torch.zeros(int(rows.max()) + 1, dtype=torch.long)
        group_of_state[rows] = actions.group  # (S,)
        return [prompts[int(g)] for g in group_of_state]


def _by_guidance(actions: Actions, rows: Int[Tensor, " rows"]) -> list[Int[Tensor, " _"]]:
    """The rows by the guidance scale of their actions; none if there are no rows.

    All actions may be without advantage, so that there may be no rows.
    """
    if len(rows) == 0:
        return []
    if actions.guidance is None:
        return [rows]
    scales = actions.guidance[rows]
    return [rows[scales == scale] for scale in scales.unique()]


def _detached(record: StepRecord) -> PolicyOutputs:
    p, g = record.prediction, record.gaussian
    std = g.std.detach() if isinstance(g.std, Tensor) else g.std
    return PolicyOutputs(
        Prediction(p.x0.detach(), p.x1.detach(), p.output.detach()),
        Gaussian(g.mean.detach(), std, g.normalised),
    )


def _outputs(record: StepRecord) -> PolicyOutputs:
    return PolicyOutputs(record.prediction, record.gaussian)
