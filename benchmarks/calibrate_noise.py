"""DenseGRPO's calibration of exploration (arXiv:2601.20218, algorithm 1): a noise level for each denoising step.

    python -m benchmarks.calibrate_noise sd35_medium_tp --rounds 30 --samples 96 [--set KEY=VALUE ...]

Samples trajectories with the present levels, and completes the state before each step by the ODE. The change
of the reward by a step should be positive about as often as negative. A step's level rises by ``--change``
where the two numbers differ by less than ``--tolerance``, and falls by it otherwise. The result is printed
as ``algorithm.transition`` for a configuration; training leaves it as it is.

The levels start from those of ``flow_sde`` with a noise level of 0.7. The paper's constants are the
defaults of both options; how many samples and rounds it takes is not published. A sample costs
``T + T (T - 1) / 2`` evaluations and ``T`` scores.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import TPGRPO
from flowgrpo.algorithms.base import Policy, Scorer
from flowgrpo.algorithms.credit import StepTable
from flowgrpo.algorithms.tp_grpo import differences
from flowgrpo.cli.common import device_of, quiet
from flowgrpo.config import Config, find
from flowgrpo.core.errors import ConfigError
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import CalibratedSDE, FlowSDE, Prediction
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer


def adjusted(
    levels: Sequence[float],
    gains: Float[Tensor, "samples steps"],
    tolerance: float,
    change: float,
) -> list[float]:
    """The levels after one round (algorithm 1, lines 9 to 15); none falls below ``change``.

    Args:
        levels: The level of each step.
        gains: Change of the reward by each step; NaN where a reward failed.
        tolerance: The numbers of positive and negative gains that differ by less are balanced.
        change: How much a level moves.
    """
    result = []
    for level, own in zip(levels, gains.unbind(1), strict=True):
        is_balanced = abs(int((own > 0).sum()) - int((own < 0).sum())) < tolerance
        result.append(level + change if is_balanced else max(change, level - change))
    return result


def first_levels(policy: Policy, prompt: Prompt, noise_level: float = 0.7) -> list[float]:
    """``g`` of ``flow_sde`` at each step but the last, on the grid of a prompt's size.

    Raises:
        ValueError: If the model is not on a rectified-flow path.
    """
    # A call that takes no step sets the grid.
    for _ in policy.run([prompt], SampleNoise([Random(0)]), nodes=[0], decode=False):
        pass
    zero, found = torch.zeros(1, 1), []
    for step in range(policy.num_steps() - 1):
        interval = policy.scheduler.interval(step, step + 1)
        gaussian = FlowSDE(noise_level=noise_level)(
            zero, Prediction.from_output(zero, zero, interval), interval
        )
        found.append(float(gaussian.std) / interval.noise_scale / interval.dt**0.5)
    return found


def gains_of(
    policy: Policy, groups: Sequence[Group], scorer: Scorer, random: Random, levels: Sequence[float]
) -> Float[Tensor, "samples steps"]:
    """The change of the reward by each step of one trajectory per group."""
    algorithm = TPGRPO(
        group_size=1, transition=CalibratedSDE(levels=tuple(levels)), turning_points="none"
    )
    candidates = algorithm.collect(policy, groups, scorer, random, 0).candidates
    # The candidate before a step has the step before it; the last is the image.
    states = [*range(-1, len(levels) - 1), policy.num_steps() - 1]
    return differences(StepTable.of_candidates(candidates, candidates.reward, states).values)[0]


def calibrate(
    config: Config, rounds: int, samples: int, tolerance: float, change: float, device: str
) -> list[float]:
    """The levels of a configuration's model and rewards; prints those of each round."""
    policy = PipelinePolicy.from_pretrained(
        config.model.source, sampling=config.sampling, batch_size=config.train.rollout_batch,
        dtype=config.model.dtype, device=device, memory=config.memory,
    )  # fmt: skip
    prompts = PromptSet.load(find(config.prompts.train), config.prompts.balance)
    scorer, seed = RewardScorer(config.rewards, config.failures), Random(config.run.seed)
    try:
        levels = first_levels(policy, prompts.prompts[0])
        for number in range(rounds):
            groups = prompts.groups(number, samples, seed)
            gains = gains_of(policy, groups, scorer, seed.at("calibration", number), levels)
            levels = adjusted(levels, gains, tolerance, change)
            up, down = ((gains * sign > 0).sum(0).tolist() for sign in (1, -1))
            print(f"round {number + 1}: up {up}, down {down}, levels {_text(levels)}", flush=True)
    finally:
        scorer.close()
    return levels


def _text(levels: Sequence[float]) -> str:
    return "[" + ", ".join(f"{level:.4g}" for level in levels) + "]"


def main() -> int:
    """Calibrate, and print the levels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "config", help="a configuration with the model, the rewards and the prompts"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--samples", type=int, default=96, help="per round")
    parser.add_argument("--tolerance", type=float, default=2, help="the paper's epsilon_1")
    parser.add_argument("--change", type=float, default=0.01, help="the paper's epsilon_2")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    if options.rounds < 1 or options.samples < 1 or not options.change > 0:
        parser.error("--rounds and --samples must be at least 1, and --change above 0")
    quiet()
    try:
        config = flowgrpo.load(options.config, options.set)
        levels = calibrate(
            config, options.rounds, options.samples, options.tolerance, options.change,
            device_of(options.device),
        )  # fmt: skip
    except (ConfigError, ValueError) as error:
        print(f"calibrate_noise: {error}", file=sys.stderr)
        return 2
    print(f'[algorithm.transition]\nkind = "calibrated_sde"\nlevels = {_text(levels)}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
