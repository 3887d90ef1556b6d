"""From experience and advantages to new weights: loss, gradients, optimizer, moving average."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from flowgrpo.config import Train
from flowgrpo.core.random import Random
from flowgrpo.core.transitions import Gaussian, Prediction
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.losses.base import Loss, LossInputs, LossOutputs, PolicyOutputs
from flowgrpo.policy import EMA, PipelinePolicy
from flowgrpo.policy.calls import call_key
from flowgrpo.policy.step_plan import StepRecord
from flowgrpo.policy.weights import swapped
from flowgrpo.training.metrics import UpdateStatistics

GRADIENT_NORMS_KEPT = 50
"""Gradient norms of past optimizer steps whose median defines a spike."""
MIN_NORMS_FOR_SPIKE = 10
"""Below this many past norms, no step counts as a spike."""


class Learner:
    """Owns the optimizer and everything else that an update changes.

    It supplies a loss with the inputs that the loss declares (:class:`flowgrpo.losses.base.LossNeeds`)
    and handles all losses alike.

    Attributes:
        num_updates: Optimizer steps taken or skipped so far.
        ema: The moving average of the weights, if ``train.ema_decay`` is above 0.
        behaviour: The weights of the behaviour policy, one tensor per trained parameter, if the loss
            needs an old policy whose weights differ from the trained ones.
    """

    def __init__(self, policy: PipelinePolicy, train: Train, loss: Loss, accelerator: Accelerator):
        """Create the optimizer and the additional weights that the loss needs."""
        assert policy.trainable is not None
        self.policy, self.train, self.loss, self.accelerator = policy, train, loss, accelerator
        self.named = policy.trainable.parameters
        self.parameters = list(self.named.values())
        self.adam = _adamw(self.parameters, train)
        self.optimizer = accelerator.prepare(self.adam)
        self.ema = EMA(self.parameters, train.ema_decay) if train.ema_decay > 0 else None
        needs = loss.needs
        assert self.ema is not None or not needs.average, "refused by the configuration"
        has_old = needs.old_policy is not None
        self.behaviour = [p.detach().clone() for p in self.parameters] if has_old else None
        # In the first update of an iteration the old means are the policy's own, so that recorded
        # means are needed from the second update on only.
        policy.keeps_means = needs.old_mean and train.updates > 1
        self.num_updates = 0
        self.gradient_norms: list[float] = []

    def behaviour_policy(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights that sample: the behaviour weights, if there are any."""
        return nullcontext() if self.behaviour is None else swapped(self.parameters, self.behaviour)

    def update(
        self, experience: Experience, advantages: Float[Tensor, " actions"], random: Random
    ) -> dict[str, float]:
        """Take all optimizer steps of one iteration. Returns the metrics of the iteration.

        Each optimizer step trains on a part of the groups. Its loss is the mean over all their
        actions on all processes. Actions with advantage 0 count in this mean, but are computed only
        if the loss needs them (``all_actions``): without a KL they would not change the gradient.
        """
        statistics, needs = UpdateStatistics(self.loss.metrics), self.loss.needs
        updates = self.train.updates
        order = torch.randperm(self.train.groups, generator=random.generator("updates"))
        for update in range(updates):
            chosen = torch.isin(experience.actions.group, order[update::updates])
            number = self.accelerator.reduce(chosen.sum().to(self.policy.device), "sum").item()
            computes_all = needs.all_actions or needs.whole_groups
            trained = chosen if computes_all else chosen & (advantages != 0)
            batches = list(self._batches(experience, advantages, trained))
            referred = [actions for actions, _ in batches] if needs.reference else []
            references = self._references(experience, referred)
            for (actions, advantage), reference in zip_longest(batches, references):
                inputs = self._inputs(experience, actions, advantage, reference, update == 0)
                loss = self._loss(inputs, statistics)
                # Wan 2.2 has two denoisers. If only one is trained, the steps of the other carry no
                # gradient.
                if loss.requires_grad:
                    self.accelerator.backward(loss / number)
            self._step(statistics)
        self._follow()
        return statistics.summary(self.accelerator) | self._drift(experience)

    def _batches(
        self, experience: Experience, advantages: Tensor, trained: Tensor
    ) -> Iterator[tuple[Actions, Tensor]]:
        """Batches of actions that one forward pass can serve, with their advantages.

        The actions of a batch share the denoising step, and their prompts can share a call of the
        pipeline (same size, same condition image). They start from at most ``train_batch`` states.
        """
        actions = experience.actions
        keys: dict[Hashable, list[int]] = {}
        for group in experience.groups:
            keys.setdefault(call_key(group.prompt), []).append(group.index)
        for step in actions.step[trained].unique().tolist():
            for groups in keys.values():
                alike = torch.isin(actions.group, torch.tensor(groups))
                rows = (trained & (actions.step == step) & alike).nonzero().squeeze(1)
                for part in self._split(actions, rows):
                    yield actions.select(part), advantages[part]

    def _split(self, actions: Actions, rows: Int[Tensor, " rows"]) -> Iterator[Int[Tensor, " _"]]:
        """Split the rows of actions so that each part has at most ``train_batch`` states.

        Raises:
            ValueError: If the loss needs whole groups and a group has more states than that.
        """
        limit = self.train.train_batch
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

    def _inputs(
        self,
        experience: Experience,
        actions: Actions,
        advantage: Float[Tensor, " actions"],
        reference: "_StoredOutputs | None",
        first_update: bool,
    ) -> LossInputs:
        """Replay a batch with gradients and add the inputs that the loss declares."""
        needs, device = self.loss.needs, self.policy.device
        record = self._replay(experience, actions)
        old_policy = average = old_mean = None
        if needs.old_policy is not None:
            with torch.no_grad(), self.behaviour_policy():
                old_policy = _outputs(self._replay(experience, actions))
        if needs.average:
            assert self.ema is not None
            with torch.no_grad(), self.ema.applied():
                average = _outputs(self._replay(experience, actions))
        state = actions.state.to(device)
        if needs.old_mean:
            old_mean = self._old_mean(actions, record.gaussian.mean[state])
        return LossInputs(
            policy=_outputs(record),
            x=actions.states.to(device),
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
        )

    def _old_mean(self, actions: Actions, mean: Tensor) -> Tensor:
        """The recorded means of the steps, or with one update per iteration the policy's own.

        Raises:
            ValueError: If there are several updates and the algorithm has recorded no means.
        """
        if actions.old_mean is not None:
            return actions.old_mean.to(mean.device)
        if self.train.updates > 1:
            raise ValueError(
                f"the loss {type(self.loss).__name__} needs the old means of the steps when train.updates "
                "is above 1, but the algorithm has not recorded them: set Actions.old_mean where "
                "policy.keeps_means is true, or set train.updates = 1"
            )
        return mean.detach()

    def _loss(self, inputs: LossInputs, statistics: UpdateStatistics) -> Float[Tensor, ""]:
        """The summed loss of a batch, with the KL term.

        Raises:
            ValueError: If the loss does not return one value per action.
        """
        outputs = self.loss(inputs)
        _require_per_action(self.loss, outputs, inputs)
        total = outputs.loss.sum()
        kl = torch.zeros_like(outputs.loss)
        if outputs.kl is not None:
            kl = outputs.kl
            total = total + self.loss.kl_coef * kl.sum()
        statistics.add(inputs.step, outputs.loss, kl, outputs.metrics)
        return total

    def _replay(self, experience: Experience, actions: Actions) -> StepRecord:
        """One forward pass on the states of actions that share a step."""
        prompts = {g.index: g.prompt for g in experience.groups}
        group_of_state = torch.zeros(len(actions.states), dtype=torch.long)
        group_of_state[actions.state] = actions.group
        owners = [prompts[int(g)] for g in group_of_state]
        step = int(actions.step[0])
        return self.policy.replay(owners, actions.states, step, experience.transition)

    def _references(
        self, experience: Experience, batches: Sequence[Actions]
    ) -> list["_StoredOutputs"]:
        """The reference's outputs for all batches, on the CPU.

        Full fine-tuning keeps the reference weights in main memory. Evaluating all batches of an
        update at once moves them to the accelerator once per update.
        """
        if not batches:
            return []
        with torch.no_grad(), self.policy.reference():
            records = (self._replay(experience, actions) for actions in batches)
            return [_StoredOutputs.of(record) for record in records]

    def _drift(self, experience: Experience) -> dict[str, float]:
        """The distance of the policy from the reference, on a few of the iteration's states."""
        train, actions = self.train, experience.actions
        if train.monitor_states == 0:
            return {}
        key = {g.index: call_key(g.prompt) for g in experience.groups}
        alike = [i for i, k in key.items() if k == key[int(actions.group[0])]]
        same = (actions.step == actions.step[0]) & torch.isin(actions.group, torch.tensor(alike))
        first = actions.state[same].unique()
        chosen = torch.isin(actions.state, first[: min(train.monitor_states, train.train_batch)])
        few = actions.select(chosen.nonzero().squeeze(1))
        (reference,) = self._references(experience, [few])
        with torch.no_grad():
            output = self._replay(experience, few).prediction.output.cpu()
        squares = (output - reference.output).float().square().flatten(1).mean(1)
        mean = self.accelerator.gather(squares.mean().reshape(1).to(self.policy.device)).mean()
        return {"kl/velocity": float(mean)}

    def _follow(self) -> None:
        """After an iteration, move the behaviour weights towards the trained weights."""
        remaining = self.loss.needs.old_policy
        if self.behaviour is not None and remaining is not None:
            trained = [p.detach() for p in self.parameters]
            torch._foreach_lerp_(self.behaviour, trained, 1 - remaining(self.num_updates))

    def _step(self, statistics: UpdateStatistics) -> None:
        """Clip the gradient and take an optimizer step, unless the gradient is a spike or not finite."""
        sum_gradients(self.parameters, self.accelerator)
        train = self.train
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.num_updates)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, train.max_grad_norm))
        known = self.gradient_norms
        usual = median(known) if len(known) >= MIN_NORMS_FOR_SPIKE else float("inf")
        is_spike = train.spike_factor > 0 and norm > train.spike_factor * usual
        # "not <" is true for NaN as well.
        skipped = is_spike or not norm < float("inf")
        if not skipped:
            self.optimizer.step()
            self.gradient_norms = [*known, norm][-GRADIENT_NORMS_KEPT:] if norm > 0 else known
            if self.ema is not None:
                self.ema.update()
        elif self.accelerator.scaler is not None:
            # The scaler has unscaled these gradients; without this call it refuses the next step.
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()
        self.num_updates += 1
        statistics.stepped(norm, self.learning_rate(self.num_updates - 1), skipped)

    def learning_rate(self, update: int) -> float:
        """The learning rate of an optimizer step, counted from 0 over the whole run."""
        train = self.train
        warm = min(1.0, (update + 1) / (train.warmup + 1))
        done = update / max(1, train.iterations * train.updates)
        fall = {
            "constant": 1.0,
            "linear": 1 - 0.9 * done,
            "cosine": 0.55 + 0.45 * float(torch.cos(torch.tensor(torch.pi * done))),
        }[train.schedule]
        return train.lr * warm * fall

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The contents of a checkpoint: tensors by part and name, and values for JSON."""
        names: dict[Any, str] = dict(zip(self.parameters, self.named, strict=True))
        moments = {
            f"{names[p]}/{k}": torch.as_tensor(v)
            for p, state in self.adam.state.items()
            for k, v in state.items()
        }
        parts: dict[str, dict[str, Tensor]] = {"weights": dict(self.named), "optimizer": moments}
        if self.ema is not None:
            parts["ema"] = dict(zip(self.named, self.ema.average, strict=True))
        if self.behaviour is not None:
            parts["behaviour"] = dict(zip(self.named, self.behaviour, strict=True))
        state = {
            "num_updates": self.num_updates,
            "gradient_norms": self.gradient_norms,
            "ema_updates": self.ema.updates if self.ema else 0,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        return parts, state

    def restore(self, parts: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Load the contents of a checkpoint, as :meth:`state` returned them."""
        assert self.policy.trainable is not None
        self.policy.trainable.load(parts["weights"])
        self._restore_moments(parts["optimizer"])
        self.num_updates = state["num_updates"]
        self.gradient_norms = state["gradient_norms"]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.updates = state["ema_updates"]
            for average, name in zip(self.ema.average, self.named, strict=True):
                average.copy_(parts["ema"][name])
        if self.behaviour is not None:
            for weight, name in zip(self.behaviour, self.named, strict=True):
                weight.copy_(parts["behaviour"][name])

    def _restore_moments(self, moments: dict[str, Tensor]) -> None:
        """Load the optimizer's state, which is saved as ``<parameter>/<moment>``."""
        for name, parameter in self.named.items():
            own = {
                k.rsplit("/", 1)[1]: v for k, v in moments.items() if k.rsplit("/", 1)[0] == name
            }
            if own:
                # AdamW holds its step count as a tensor on the CPU (the 8-bit AdamW as a number) and
                # its moments on the parameter's device.
                is_plain = isinstance(self.adam, torch.optim.AdamW)
                self.adam.state[parameter] = {
                    k: (v if is_plain else int(v)) if k == "step" else v.to(parameter.device)
                    for k, v in own.items()
                }


def sum_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace each gradient by its sum over all processes, in one message.

    The sum is not divided by the number of processes: each process has already divided its loss by
    the number of actions on all of them. Parameters without a gradient contribute zeros, because the
    processes may have trained different denoisers.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        flat = accelerator.reduce(flat, "sum")
        sizes = [p.numel() for p in parameters]
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)


def _adamw(parameters: list[nn.Parameter], train: Train) -> torch.optim.Optimizer:
    """AdamW, with moments in fp32 or in 8 bits."""
    betas = (train.betas[0], train.betas[1])
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=train.lr, betas=betas, weight_decay=train.weight_decay
        )
    if parameters[0].device.type == "cpu":
        raise ValueError(
            "train.optimizer = 'adamw8bit' runs on an accelerator only; use 'adamw' on the CPU"
        )
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=train.lr, betas=betas, weight_decay=train.weight_decay)


def _outputs(record: StepRecord) -> PolicyOutputs:
    return PolicyOutputs(record.prediction, record.gaussian)


@dataclass(frozen=True)
class _StoredOutputs:
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
    def of(cls, record: StepRecord) -> "_StoredOutputs":
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


def _require_per_action(loss: Loss, outputs: LossOutputs, inputs: LossInputs) -> None:
    for name, values in (("loss", outputs.loss), ("kl", outputs.kl)):
        if values is not None and values.shape != inputs.advantage.shape:
            raise ValueError(
                f"{type(loss).__name__} returned {name} of shape {tuple(values.shape)}; it must return one "
                f"value per action, shape {tuple(inputs.advantage.shape)}"
            )
