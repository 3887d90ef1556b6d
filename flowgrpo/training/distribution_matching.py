"""The fake score of distribution matching: a second model beside the policy, and what it says of samples.

The fake score has values of its own for the trained parameters, with which the policy's pipeline predicts
noised versions of the policy's own samples. The values are exchanged with the policy's for a call, as
those of a teacher are, so that there is no second denoiser.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flowgrpo.core.errors import DivergenceError
from flowgrpo.core.matching import matching_direction, squared_error
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import ODE, Prediction, Step
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import PipelinePolicy
from flowgrpo.policy.arguments import call_key
from flowgrpo.policy.weights import Trainable, swapped
from flowgrpo.training.optimizer import moments, restore_moments, sum_gradients
from flowgrpo.training.replay import Replay
from flowgrpo.training.shares import Shares


@dataclass(frozen=True)
class Noised:
    """Generated samples with noise at one node of the fine grid, which one forward pass can serve.

    Attributes:
        rows: The samples, as rows of the iteration's generated data.
        actions: Their noised versions as states, and the samples as the states after them.
        interval: The signal and noise weights at the node.
    """

    rows: Int[Tensor, " batch"]
    actions: Actions
    interval: Step


class DistributionMatching:
    """Trains the fake score on an iteration's samples, and gives the direction of each sample.

    Attributes:
        values: The fake score's values of the trained parameters.
        adam: Its optimizer.
    """

    def __init__(
        self,
        policy: PipelinePolicy,
        replay: Replay,
        shares: Shares,
        train_batch: int,
    ):
        """Begin as the first teacher."""
        assert isinstance(policy.trainable, Trainable), "refused by the configuration"
        settings, teachers = replay.loss.needs.fake_score, replay.loss.needs.teachers
        assert settings is not None
        assert teachers is not None
        self.policy, self.replay, self.settings, self.teachers = policy, replay, settings, teachers
        self.shares, self.train_batch = shares, train_batch
        self.named = policy.trainable.parameters
        self.parameters = list(self.named.values())
        with replay.teacher_weights(0)():
            self.values = [nn.Parameter(p.detach().clone()) for p in self.parameters]
        self._values_by_name = dict(zip(self.named, self.values, strict=True))
        self.adam = torch.optim.AdamW(self.values, lr=settings.lr, weight_decay=0.0)
        # RTDMD's grids have 1,000 nodes; the prediction between two nodes changes little.
        own = policy.sampling
        self.sampling = replace(own, num_steps=settings.grid, sigmas=(), timesteps=())
        self._grids: dict[Hashable, list[Step]] = {}
        self._directions: Tensor = torch.zeros(0)
        self._row_of: dict[tuple[int, int, int], int] = {}

    def applied(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights of the fake score."""
        return swapped(self.parameters, self.values)

    def prepare(self, experience: Experience, random: Random) -> dict[str, float]:
        """Train the fake score on the iteration's generated data, then find the direction of each.

        Args:
            experience: Its generated actions hold the data.
            random: Keyed by the iteration.

        Returns:
            The metrics ``fake_score/loss`` and ``fake_score/grad_norm``, means over the optimizer steps.

        Raises:
            DivergenceError: If a gradient is not finite.
        """
        random = random.at("distribution_matching")
        actions = experience.actions
        actions = actions.select(actions.is_generated.nonzero().squeeze(1))
        experience = replace(experience, transition=ODE())
        steps = [
            self._step(experience, self._noised(experience, actions, random.at("update", number)))
            for number in range(self.settings.updates)
        ]
        noised = list(self._noised(experience, actions, random.at("direction")))
        self._find_directions(experience, actions, noised)
        losses, norms = zip(*steps, strict=True)
        number = len(steps)
        return {
            "fake_score/loss": sum(losses) / number,
            "fake_score/grad_norm": sum(norms) / number,
        }

    def direction(self, batch: Actions) -> Float[Tensor, "actions *latent"] | None:
        """The directions of a batch of generated actions; None for a batch of steps."""
        if not bool(batch.is_generated.all()):
            return None
        rows = [self._row_of[key] for key in _keys(batch)]
        return self._directions[torch.tensor(rows)].to(self.policy.device)

    def _step(self, experience: Experience, noised: Iterator[Noised]) -> tuple[float, float]:
        """One optimizer step of the fake score: its mean loss over all processes, and the gradient's norm."""
        some = list(noised)
        count = torch.tensor(sum(len(n.rows) for n in some), device=self.policy.device)
        number = float(self.shares.sum(count))
        total = torch.zeros((), dtype=torch.float64)
        cap = self.settings.weight_cap
        with self.applied():
            for n in some:
                record = self.replay.record(experience, n.actions, self.sampling)
                error = squared_error(
                    record.prediction, n.actions.x_next.to(self.policy.device), n.interval
                )
                weight = min(1.0, cap * n.interval.noise**2) if cap else 1.0
                loss = weight * error.sum() / number
                # The graph holds the parameters by reference: before they are exchanged again.
                loss.backward()
                total += loss.detach().double().cpu()
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.grad, parameter.grad = parameter.grad, None
        sum_gradients(self.values, self.shares.accelerator)
        norm = float(torch.nn.utils.clip_grad_norm_(self.values, self.settings.max_grad_norm))
        if not isfinite(norm):
            raise DivergenceError(
                f"the gradient of the fake score is {norm}; lower loss.fake.lr = {self.settings.lr:g}"
            )
        self.adam.step()
        self.adam.zero_grad()
        everywhere = self.shares.sum(total.float().to(self.policy.device))
        return float(everywhere), norm

    def _find_directions(
        self, experience: Experience, actions: Actions, noised: Sequence[Noised]
    ) -> None:
        batches = [n.actions for n in noised]
        fakes = self.replay.outputs_of(self.applied, experience, batches, self.sampling)
        taught = self.replay.taught(experience, batches, self.sampling)
        data = actions.x_next.cpu()
        found = torch.zeros_like(data)
        for n, fake, teacher in zip(noised, fakes, taught, strict=True):
            x = n.actions.starts()[0].cpu()
            own, other = (
                (o.prediction or Prediction.from_output(x, o.output.cpu(), n.interval)).x0.cpu()
                for o in (fake, teacher)
            )
            found[n.rows] = matching_direction(data[n.rows], own.float(), other.float())
        self._directions = found
        self._row_of = {key: row for row, key in enumerate(_keys(actions))}

    def _noised(self, experience: Experience, actions: Actions, random: Random) -> Iterator[Noised]:
        """Noised versions of generated data, in batches that one forward pass can serve.

        The noise levels are those of all processes; which one a sample has depends on its group and its
        number alone, and its noise on these as well.
        """
        settings = self.settings
        number, (low, high) = settings.num_times, settings.range
        draws = torch.rand(number, generator=random.generator("times"))
        levels = [low + (high - low) * (i + float(u)) / number for i, u in enumerate(draws)]
        turn = torch.randperm(number, generator=random.generator("turns")).tolist()
        prompts = {g.index: g.prompt for g in experience.groups}
        together: dict[tuple[Hashable, int, int], list[int]] = {}
        for row, (group, sample, _) in enumerate(_keys(actions)):
            taught_by = self.teachers.of(prompts[group].metadata, group)
            key = (call_key(prompts[group]), taught_by, turn[(group + sample) % number])
            together.setdefault(key, []).append(row)
        for (_, _, level), rows in together.items():
            for part in torch.tensor(rows).split(self.train_batch):
                some = actions.select(part)
                grid = self._grid(prompts[int(some.group[0])])
                node = _nearest(grid, levels[level])
                yield Noised(part, _with_noise(some, node, grid[node], random), grid[node])

    def _grid(self, prompt: Prompt) -> list[Step]:
        """The steps of the fine grid of a prompt; the size of its images may shift it."""
        key = call_key(prompt)
        if key not in self._grids:
            # A call that takes no step sets the grid.
            noise = SampleNoise([Random(0)])
            for _ in self.policy.run(
                [prompt], noise, nodes=[0], decode=False, sampling=self.sampling
            ):
                pass
            interval = self.policy.scheduler.interval
            self._grids[key] = [interval(i, i + 1) for i in range(self.settings.grid)]
        return self._grids[key]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The parts of a checkpoint: values and moments by name."""
        values = {n: v.detach() for n, v in self._values_by_name.items()}
        return {"fake_score": values, "fake_optimizer": moments(self.adam, self._values_by_name)}

    def restore(self, parts: dict[str, dict[str, Tensor]]) -> None:
        """Load the parts of a checkpoint, as :meth:`state` returned them."""
        for name, value in self._values_by_name.items():
            value.data.copy_(parts["fake_score"][name])
        restore_moments(self.adam, self._values_by_name, parts.get("fake_optimizer", {}))


def _keys(actions: Actions) -> list[tuple[int, int, int]]:
    """Group, sample and step of each action."""
    columns = actions.group.tolist(), actions.sample.tolist(), actions.step.tolist()
    return list(zip(*columns, strict=True))


def _nearest(grid: Sequence[Step], level: float) -> int:
    """The node whose noise level is nearest: sigma of a flow, otherwise the share of the timesteps."""
    number = len(grid)
    places = [s.noise if s.path == "flow" else 1 - i / number for i, s in enumerate(grid)]
    return min(range(number), key=lambda i: abs(places[i] - level))


def _with_noise(actions: Actions, node: int, interval: Step, random: Random) -> Actions:
    """Generated data with noise as at a node, each with noise of its own, as actions at that node."""
    data = actions.x_next
    noise = torch.stack(
        [
            torch.randn(*data.shape[1:], generator=random.generator("noise", *k))
            for k in _keys(actions)
        ]
    )
    scale = interval.noise * interval.noise_scale
    x = interval.signal * data + scale * noise.to(data)
    number = len(actions)
    return Actions.between(
        x,
        torch.arange(number),
        data,
        torch.full((number,), node),
        torch.zeros(number),
        actions.group,
        actions.sample,
    )
