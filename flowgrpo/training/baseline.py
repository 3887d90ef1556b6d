"""A learned baseline: the reward that the present distribution of the initial noise is expected to earn.

FIND (arXiv:2407.19453) compares the reward of a sample with this value in place of a group's mean
(dynamic reward calibration). The network has the layers and the cadence of the released code, in which
it takes five steps on an iteration's rewards before the policy does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flowgrpo.core.random import Random
from flowgrpo.data.experience import Experience

HIDDEN, TEXT, STEPS, RATE = 256, 768, 5, 1e-4
"""Width of the hidden layers, size of a prompt's vector, optimizer steps per iteration, learning rate."""


class ValueBaseline:
    """A network from the distribution's mean and deviation, and the prompt, to the expected reward.

    Differs from the released code in the prompt's vector: there CLIP's text features, here a fixed
    random vector for each text, which tells prompts apart but does not know which are alike. It trains on
    the rewards of all samples of an iteration; the code on that of its one sample.

    Args:
        parameters: The parameters of the distribution, one sample's shape each.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        inputs = sum(p.numel() for p in self.parameters) + TEXT
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            last = nn.Linear(HIDDEN, 1)
            nn.init.xavier_normal_(last.weight)
            hidden = [nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)]  # fmt: skip
            layers = [layer for one in hidden for layer in (one, nn.ReLU())]
            self.network = nn.Sequential(*layers, last)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE)

    def applied(
        self, experience: Experience, gather: Callable[[list[Any]], list[Any]]
    ) -> Experience:
        """Train on the rewards of all processes, and return the experience with the expected rewards.

        Args:
            experience: This process's groups and candidates.
            gather: Joins the lists of all processes, so that all make the same update.
        """
        c, texts = experience.candidates, {g.index: g.prompt.text for g in experience.groups}
        own = [texts[int(g)] for g in c.group]
        pairs = [(t, r) for t, r in zip(own, c.reward.tolist(), strict=True) if r == r]
        everyone = gather(pairs)
        if everyone:
            inputs = self._inputs([text for text, _ in everyone])
            rewards = torch.tensor([reward for _, reward in everyone])
            for _ in range(STEPS):
                self.optimizer.zero_grad()
                F.mse_loss(self.network(inputs).squeeze(1), rewards).backward()
                self.optimizer.step()
        with torch.no_grad():
            expected = self.network(self._inputs(own)).squeeze(1)
        return replace(experience, expected=expected)

    def _inputs(self, texts: Sequence[str]) -> Float[Tensor, "samples inputs"]:
        """The network's inputs, on the CPU."""
        state = torch.cat([p.detach().flatten().cpu() for p in self.parameters])
        vectors = {t: torch.randn(TEXT, generator=Random(0).generator("prompt", t)) / TEXT**0.5 for t in set(texts)}  # fmt: skip
        return torch.stack([torch.cat([state, vectors[t]]) for t in texts])

    def state(self) -> dict[str, Tensor]:
        """The weights and moments, for a checkpoint."""
        weights = {f"weights/{k}": v for k, v in self.network.state_dict().items()}
        moments = {
            f"moments/{i}/{k}": torch.as_tensor(v)
            for i, values in self.optimizer.state_dict()["state"].items()
            for k, v in values.items()
        }
        return weights | moments

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from the result of :meth:`state`."""
        weights = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith("weights/")}
        self.network.load_state_dict(weights)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("moments/"):
                _, index, name = key.split("/")
                moments.setdefault(int(index), {})[name] = value.clone()
        table = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**table, "state": moments})
