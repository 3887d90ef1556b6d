"""Measures papers' claims about credit, ratios and groups without variance on the embedded model.

    python -m benchmarks.study.claims --write docs/study.md

Nothing is trained except for one update before the ratios are measured. The effect of a step is found
by brute force: from the state before the step and from the state after it, many samples are completed
and scored, and the mean rewards are compared.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from scipy import stats
from torch import Tensor

import flowgrpo
from benchmarks.study.entries import ALGORITHMS, CPS, FURTHER
from flowgrpo.algorithms import Algorithm
from flowgrpo.cli.common import quiet
from flowgrpo.config import Config, find
from flowgrpo.core import transitions
from flowgrpo.core.group_statistics import zero_variance_groups
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.data.experience import Actions, Experience
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.training.learner import Learner
from scripts.page_tables import markdown_table, write_marked_text

NOISE = transitions.CPS(noise_level=0.7)
RANDOM = Random(0).at("claims")
CREDITED = [e for e in (*ALGORITHMS, *FURTHER) if e.credited]
"""The methods that give credit to denoising steps, with the last value of their tuned constant."""


class World:
    """The embedded model before training, the reward scorer, and the prompts of one iteration."""

    def __init__(self, settings: Sequence[str], prompts: int) -> None:
        self.config: Config = flowgrpo.load(
            "quickstart_flow_grpo", [*settings, f"train.groups={prompts}"]
        )
        self.algorithm: Algorithm = self.config.algorithm
        self.policy = PipelinePolicy.from_pretrained(
            self.config.model.path,
            sampling=self.config.sampling,
            weights=self.config.model.weights,
            batch_size=self.config.train.rollout_batch,
        )
        self.scorer = RewardScorer(self.config.rewards, self.config.failures)
        known = PromptSet.load(find(self.config.prompts.train), self.config.prompts.balance)
        self.groups: list[Group] = known.groups(0, prompts, Random(0))

    @property
    def end(self) -> int:
        """Number of denoising steps."""
        return self.policy.num_steps()

    def collect(self, iteration: int) -> Experience:
        """The experience that the algorithm collects in an iteration."""
        random = Random(0).at("train", iteration)
        return self.algorithm.collect(self.policy, self.groups, self.scorer, random, iteration)

    def rewards(
        self, prompts: Sequence[Prompt], x: Tensor, node: int, noisy: Sequence[int], *keys: object
    ) -> Tensor:
        """Rewards of samples completed from states ``x`` at a node; the ``noisy`` steps are stochastic."""
        streams = [RANDOM.at(*map(str, keys), i) for i in range(len(prompts))]
        found = []
        for rollout in self.policy.run(
            prompts,
            SampleNoise(streams),
            nodes=range(node, self.end + 1),
            x=x,
            stochastic=noisy,
            transition=NOISE,
        ):
            assert rollout.media is not None
            rows = prompts[rollout.rows.start : rollout.rows.stop]
            found.append(self.scorer.score(rollout.media, rows).reward)
        return torch.cat(found)


def main() -> None:
    """Measure, print the tables, and write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--actions", type=int, default=20, help="measured actions per prompt")
    parser.add_argument("--samples", type=int, default=8, help="samples per state, an even number")
    parser.add_argument("--only", nargs="+", help="only entries whose name contains one of these")
    parser.add_argument("--write", type=Path, help="page that gets the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    size = options.prompts, options.actions, options.samples
    parts = [
        "### Credit against the effect of a step\n\n" + credit(*size, options.only or [""]),
        "### Variance explained by the noise of a step\n\n"
        + explained(options.prompts, options.samples),
        "### Ratios after one update\n\n" + ratios(options.prompts),
        "### Groups without variance\n\n" + flat_groups(3 * options.prompts),
    ]
    text = "\n\n".join(parts)
    if options.write:
        write_marked_text(options.write, "claims", text)
    print(text)


def credit(prompts: int, actions: int, samples: int, only: Sequence[str]) -> str:
    """Rank correlation of each algorithm's advantages with the measured effects of its steps."""
    rows = []
    for entry in CREDITED:
        if not any(part in entry.name for part in only):
            continue
        world = World(entry.with_value(entry.values[-1]), prompts)
        found = [_credited(world, iteration, actions, samples) for iteration in range(4)]
        advantage, sampled, again, ode = (torch.cat(v) for v in zip(*found, strict=True))
        half = float(stats.spearmanr(sampled, again).statistic)
        ceiling = math.sqrt(max(0.0, 2 * half / (1 + half)))
        cells = [_correlation(advantage, (sampled + again) / 2), f"{ceiling:.2f}", _correlation(advantage, ode)]  # fmt: skip
        rows.append([entry.name, str(len(advantage)), *cells])
        print(rows[-1], flush=True)
    heads = ["algorithm", "actions", "with noise after it", "ceiling", "without"]
    return markdown_table(heads, rows)


def _credited(world: World, iteration: int, number: int, samples: int) -> tuple[Tensor, ...]:
    """Advantages of some actions of an iteration, and three estimates of the effect of each.

    A quarter of all actions comes from each of four iterations, since some algorithms train one step
    per iteration.
    """
    experience = world.collect(iteration)
    advantages = world.algorithm.advantages(experience)
    generator = RANDOM.generator("actions", iteration)
    rows = []
    for group in world.groups:
        own = (experience.actions.group == group.index).nonzero().squeeze(1)
        rows.append(own[torch.randperm(len(own), generator=generator)[: max(1, number // 4)]])
    chosen = torch.cat(rows)
    actions = experience.actions.select(chosen)
    prompts = {g.index: g.prompt for g in world.groups}
    sampled, again, ode = (torch.zeros(len(actions)) for _ in range(3))
    for step in actions.step.unique().tolist():
        at = (actions.step == step).nonzero().squeeze(1)
        owners = [prompts[int(g)] for g in actions.group[at]]
        effects = _effects(world, owners, actions, at, step, samples, iteration)
        for into, effect in zip((sampled, again, ode), effects, strict=True):
            into[at] = effect
    return advantages[chosen], sampled, again, ode


def _effects(
    world: World,
    prompts: Sequence[Prompt],
    actions: Actions,
    at: Tensor,
    step: int,
    samples: int,
    iteration: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The effect of a step: mean reward of completions from after it, minus from before it.

    Returns:
        Two independent estimates, each from half of the samples, with all later steps stochastic; and
        one with all later steps deterministic.
    """
    before, after = actions.states[actions.state[at]], actions.x_next[at]
    many = [p for p in prompts for _ in range(samples)]
    later = range(step + 1, world.end - 1)
    keys = iteration, step

    def means(x: Tensor, node: int, noisy: Sequence[int], name: str) -> Tensor:
        rewards = world.rewards(many, x.repeat_interleave(samples, 0), node, noisy, name, *keys)
        return rewards.view(len(prompts), 2, samples // 2).mean(2)

    noisy = means(after, step + 1, later, "after") - means(before, step, [step, *later], "before")
    alone = world.rewards(prompts, after, step + 1, [], "alone", *keys)
    ode = alone - means(before, step, [step], "plain").mean(1)
    return noisy[:, 0], noisy[:, 1], ode


def _correlation(a: Tensor, b: Tensor) -> str:
    """Spearman's correlation with its 95 % confidence interval (Fisher's z)."""
    rho = float(stats.spearmanr(a, b).statistic)
    z, half = math.atanh(min(max(rho, -0.999999), 0.999999)), 1.96 / math.sqrt(len(a) - 3)
    return f"{rho:.2f} ({math.tanh(z - half):.2f} to {math.tanh(z + half):.2f})"


def explained(prompts: int, samples: int) -> str:
    """Share of the reward's variance that is explained by the noise of one step.

    One-way analysis of variance over states after the step, from several draws of its noise, with
    several completions of each. If the step is the only stochastic one, its noise explains everything.
    """
    world = World((), prompts)
    texts = [g.prompt for g in world.groups for _ in range(samples)]
    shares = []
    for step in range(world.end - 1):
        streams = [RANDOM.at("own", step, i) for i in range(len(texts))]
        # The samples of a prompt share the path up to the step.
        roots = [RANDOM.at("root", g.index) for g in world.groups for _ in range(samples)]
        states = torch.cat(
            [
                r.x
                for r in world.policy.run(
                    texts,
                    SampleNoise(streams, roots),
                    nodes=range(step + 2),
                    stochastic=[step],
                    transition=NOISE,
                    decode=False,
                )
                if r.x is not None
            ]
        )
        many = [t for t in texts for _ in range(samples)]
        later = range(step + 1, world.end - 1)
        x = states.repeat_interleave(samples, 0)
        rewards = world.rewards(many, x, step + 1, later, "explained", step)
        by_state = rewards.view(len(world.groups), samples, samples).double()
        within = by_state.var(2).mean()
        between_states = by_state.mean(2).var(1).mean() - within / samples
        shares.append(float((between_states / (between_states + within)).clamp(0, 1)))
    heads = ["noise at step", *map(str, range(len(shares)))]
    rows = [
        ["every later step stochastic", *(f"{100 * s:.0f} %" for s in shares)],
        ["one stochastic step", *("100 %" for _ in shares)],
    ]
    return markdown_table(heads, rows)


def ratios(prompts: int) -> str:
    """Log-ratios of all steps after one update, with the plain and with GRPO-Guard's ratio."""
    everything = f"algorithm={{kind='flow_grpo', group_size=16, {CPS}}}"
    rows = []
    for name, settings in (
        ("plain", ["loss={ratio='plain', clip_range=1.0}"]),
        ("guarded", ["loss={ratio='guard', clip_range=1.0}"]),
    ):
        world = World((everything, *settings, "train.warmup=0", "train.monitor_states=0"), prompts)
        learner = Learner(
            world.policy, world.config.train, world.config.loss, Accelerator(cpu=True)
        )
        world.policy.keeps_means = True
        experience = world.collect(0)
        advantages = world.algorithm.advantages(experience)
        learner.update(experience, advantages, RANDOM)
        changes = _log_ratios(world, experience)
        for step, change in changes.items():
            mean, std = float(change.mean()), float(change.std())
            error = std / math.sqrt(len(change))
            rows.append([name, str(step), f"{mean:+.1e}", f"{error:.0e}", f"{std:.1e}", f"{mean / std:+.2f}"])  # fmt: skip
    return markdown_table(
        ["ratio", "step", "mean", "its error", "deviation", "mean / deviation"], rows
    )


def _log_ratios(world: World, experience: Experience) -> Mapping[int, Tensor]:
    """The log-ratio of each action under the current weights, by step."""
    settings = world.config.loss
    assert isinstance(settings, ClippedLoss)
    prompts = {g.index: g.prompt for g in experience.groups}
    actions, found = experience.actions, {}
    for step in actions.step.unique().tolist():
        part = actions.select((actions.step == step).nonzero().squeeze(1))
        owners = [prompts[int(g)] for g in part.group]
        with torch.no_grad():
            states = part.states[part.state]
            record = world.policy.replay(owners, states, step, experience.transition)
        assert part.old_mean is not None
        found[step] = settings.log_ratio(
            record.gaussian, part.x_next, part.old_log_prob, part.old_mean
        )
    return found


def flat_groups(prompts: int) -> str:
    """Size of the advantages in groups whose final rewards are all equal."""
    # The strict reward is 0 or 1, so many groups have no variance.
    strict = "rewards=[{name='strict', model='flowgrpo.shapes.rewards:Strict'}]"
    rows = []
    for name, kind in (("Flow-GRPO", "flow_grpo"), ("TP-GRPO", "tp_grpo"), ("VGPO", "vgpo")):
        world = World((f"algorithm={{kind='{kind}', group_size=16, {CPS}}}", strict), prompts)
        experience = world.collect(0)
        advantages = world.algorithm.advantages(experience)
        c = experience.candidates
        last = c.step == c.step.max()
        flat = zero_variance_groups(c.reward[last], c.group[last])
        indices = c.group[last].unique()[flat]
        right = [int(i) for i in indices if float(c.reward[last & (c.group == i)].mean()) == 1]
        in_flat = torch.isin(experience.actions.group, indices)
        in_right = torch.isin(experience.actions.group, torch.tensor(right, dtype=torch.long))
        wrong = in_flat & ~in_right

        def size(rows: Tensor, advantages: Tensor = advantages) -> str:
            return f"{float(advantages[rows].abs().mean()):.2f}" if rows.any() else "none"

        rows.append([name, f"{len(indices)} of {prompts}", size(in_right), size(wrong), size(~in_flat)])  # fmt: skip
    heads = [
        "algorithm",
        "flat groups",
        "mean size of advantages: all right",
        "all wrong",
        "other groups",
    ]
    return markdown_table(heads, rows)


if __name__ == "__main__":
    main()
