"""A stochastic step of your own: a reverse SDE whose noise falls linearly to zero."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

import flowgrpo
from flowgrpo.core.transitions import Gaussian, Prediction, Step


@dataclass(frozen=True, kw_only=True)
class LinearSDE:
    """``g = noise_level * sigma``: singular neither at pure noise nor at the data."""

    kind: Literal["linear_sde"] = "linear_sde"
    noise_level: float = 0.7

    def __call__(self, x: Tensor, prediction: Prediction, step: Step) -> Gaussian:
        g = self.noise_level * step.noise  # step.noise is sigma on a flow path
        drift = prediction.output + 0.5 * g**2 * prediction.x1 / step.noise
        return Gaussian(x - step.dt * drift, g * math.sqrt(step.dt))


if __name__ == "__main__":
    few = ["train.iterations=1", "train.groups=6", "algorithm.group_size=4"]
    config = flowgrpo.load(
        "quickstart_flow_grpo", [*few, "evaluation.images=6", "run.folder=linear_sde"]
    )
    algorithm = replace(config.algorithm, transition=LinearSDE(noise_level=0.5))
    print(flowgrpo.train(replace(config, algorithm=algorithm)).evaluations[-1]["scores"])
