"""Replays recorded actions in batches with gradients, and supplies a loss with its inputs.

A replay runs the pipeline from a recorded state ``x`` for one step, and returns the distribution of
``x_next`` under the present weights. Several actions can share a state, so a batch of ``A`` actions is
replayed with ``S <= A`` states, in one forward pass.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowgrpo.core.transitions import Gaussian, Prediction
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.losses.base import Loss, LossInputs, PolicyOutputs
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.arguments import call_key
from flowgrpo.policy.step_plan import StepRecord

Weights = Callable[[], AbstractContextManager[None]]
"""Enters a context inside which the policy has other weights."""


class Replay:
    """Divides recorded actions into batches and makes the inputs of a loss from each.

    Args:
        policy: The policy that is trained.
        loss: Declares the inputs that it needs.
        train_batch: Largest number of states in one forward pass.
        has_one_update: Whether an iteration has a single optimizer step. The old means are then the
            policy's own.
        behaviour: Weights of the behaviour policy.
        average: Moving average of the weights, if there is one.
    """

    def __init__(
        self,
        policy: PipelinePolicy,
        loss: Loss,
        *,
        train_batch: int,
        has_one_update: bool,
        behaviour: Weights,
        average: Weights | None,
    ):
        self.policy, self.loss, self.train_batch = policy, loss, train_batch
        self.has_one_update = has_one_update
        policy.lockstep.weights["behaviour"] = behaviour
        if average is not None:
            policy.lockstep.weights["average"] = average

    def batches(
        self, experience: Experience, advantages: Tensor, trained: Tensor
    ) -> Iterator[tuple[Actions, Tensor]]:
        """Batches of actions that one forward pass can serve, with their advantages.

        The actions of a batch share the denoising step and the guidance scale, and their prompts can
        share a call of the pipeline (same size, same condition image). They start from at most
        ``train_batch`` states.
        """
        actions = experience.actions
        # Groups by the key that decides whether prompts can share a call.
        keys: dict[Hashable, list[int]] = {}
        for group in experience.groups:
            keys.setdefault(call_key(group.prompt), []).append(group.index)
        for step in actions.step[trained].unique().tolist():
            for groups in keys.values():
                alike = torch.isin(actions.group, torch.tensor(groups))
                found = (trained & (actions.step == step) & alike).nonzero().squeeze(1)
                for rows in _by_guidance(actions, found):
                    for part in self._split(actions, rows):
                        yield actions.select(part), advantages[part]

    def _split(self, actions: Actions, rows: Int[Tensor, " rows"]) -> Iterator[Int[Tensor, " _"]]:
        """Split the rows of actions so that each part has at most ``train_batch`` states.

        Raises:
            ValueError: If the loss needs whole groups and a group has more states than that.
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
            if number > limit:
                raise ValueError(
                    f"the loss {type(self.loss).__name__} needs whole groups in a batch, but a group has "
                    f"{number} states and train.train_batch is {limit}; set it to at least {number}"
                )
            if filled + number > limit:
                yield torch.cat(part)
                part, filled = [], 0
            part, filled = [*part, own], filled + number
        if part:
            yield torch.cat(part)

    def references(
        self, experience: Experience, batches: Sequence[Actions], guidance: float | None = None
    ) -> list["StoredOutputs"]:
        """The reference's outputs for all batches, on the CPU.

        Full fine-tuning keeps the reference weights in main memory. Evaluating all batches of an
        update at once moves them to the accelerator once per update.

        Args:
            experience: The iteration's experience.
            batches: Parts of its actions.
            guidance: The guidance scale of the reference; None for that of each action.
        """
        # In lockstep, a process without batches joins the calls of the others.
        if not batches and not self.policy.in_lockstep:
            return []
        with torch.no_grad(), self.policy.reference(), self.policy.together():
            records = (self.record(experience, actions, guidance) for actions in batches)
            return [StoredOutputs.of(record) for record in records]

    def inputs(
        self,
        experience: Experience,
        actions: Actions,
        advantage: Float[Tensor, " actions"],
        reference: "StoredOutputs | None",
        first_update: bool,
    ) -> LossInputs:
        """Replay a batch with gradients and add the inputs that the loss declares."""
        needs, device = self.loss.needs, self.policy.device
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
            advantage=advantage.to(device),
            group=actions.group.to(device),
            sample=actions.sample.to(device),
            step=record.step,
            interval=record.interval,
            transition=experience.transition,
            first_update=first_update,
            old_mean=old_mean,
            old_policy=old_policy,
            average=average,
            reference=None if reference is None else reference.restored(record),
            has_reward=experience.has_reward(actions).to(device),
            kl_weight=None if actions.kl_weight is None else actions.kl_weight.to(device),
        )

    def _old_mean(self, actions: Actions, mean: Tensor) -> Tensor:
        """The recorded means of the steps, or with one update per iteration the policy's own.

        Raises:
            ValueError: If there are several updates and the algorithm has recorded no means.
        """
        if actions.old_mean is not None:
            return actions.old_mean.to(mean.device)
        if not self.has_one_update:
            raise ValueError(
                f"the loss {type(self.loss).__name__} needs the old means of the steps when an iteration "
                "has several optimizer steps, but the algorithm has not recorded them: set Actions.old_mean where "
                "policy.keeps_means is true, or set train.updates = 1 and train.epochs = 1"
            )
        return mean.detach()

    def record(
        self, experience: Experience, actions: Actions, guidance: float | None = None
    ) -> StepRecord:
        """One forward pass of the policy, with its present weights, on the states of a batch.

        The output has a row per state, not per action. ``guidance`` is the guidance scale, if not that of
        the actions.
        """
        prompts = {g.index: g.prompt for g in experience.groups}
        x, rows = actions.starts()
        group_of_state = torch.zeros(len(x), dtype=torch.long)
        group_of_state[rows] = actions.group  # (S,)
        owners = [prompts[int(g)] for g in group_of_state]
        step = int(actions.step[0])
        sampling = self.policy.sampling
        if guidance is None and actions.guidance is not None:
            guidance = float(actions.guidance[0])
        if guidance is not None:
            sampling = replace(sampling, guidance_scale=guidance)
        return self.policy.replay(owners, x, step, experience.transition, sampling)


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


@dataclass(frozen=True)
class StoredOutputs:
    """The outputs of a policy for a batch of states, on the CPU.

    Attributes:
        output: The model's output.
        mean: Mean of ``x_next``.
        std: Standard deviation of ``x_next``.
        prediction: The whole prediction, only where it does not follow from state and output (a
            scheduler that clamps the predicted data): it would double the memory.
    """

    output: Float[Tensor, "states *latent"]
    mean: Float[Tensor, "states *latent"]
    std: float | Float[Tensor, "#states *latent"]
    prediction: Prediction | None

    @classmethod
    def of(cls, record: StepRecord) -> "StoredOutputs":
        p, std = record.prediction, record.gaussian.std
        implied = Prediction.from_output(record.x, p.output, record.interval)
        follows = torch.equal(implied.x0, p.x0) and torch.equal(implied.x1, p.x1)
        return cls(
            p.output.cpu(),
            record.gaussian.mean.cpu(),
            std.cpu() if isinstance(std, Tensor) else std,
            None if follows else Prediction(p.x0.cpu(), p.x1.cpu(), p.output.cpu()),
        )

    def restored(self, record: StepRecord) -> PolicyOutputs:
        """The outputs on the device of another policy's record of the same states."""
        device, p = record.x.device, self.prediction
        if p is None:
            output = self.output.to(device)
            prediction = Prediction.from_output(record.x, output, record.interval)
        else:
            prediction = Prediction(p.x0.to(device), p.x1.to(device), p.output.to(device))
        std = self.std.to(device) if isinstance(self.std, Tensor) else self.std
        gaussian = Gaussian(self.mean.to(device), std, record.gaussian.normalised)
        return PolicyOutputs(prediction, gaussian)
