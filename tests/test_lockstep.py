"""All processes make equal passes of the denoiser, whatever work each of them has."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from flowgrpo.algorithms import FIND, FlowGRPO, Matching
from flowgrpo.config import Train
from flowgrpo.core.random import Random
from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.evaluation import held_out
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.losses.matching import MatchingLoss
from flowgrpo.losses.nft import NFTLoss
from flowgrpo.policy import Full, PipelinePolicy
from flowgrpo.policy.probe import fit_noise
from flowgrpo.policy.settings import Noise
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training.learner import Learner
from flowgrpo.training.ranks import process_group
from flowgrpo.training.refill import refilled
from tests.conftest import MakePolicy, sampling_of
from tests.processes import ranks
from tests.test_combinations import ALGORITHMS, HERE, G
from tests.test_objectives import Distances

PROMPTS = [Prompt("a red cube"), Prompt("two dogs", negative="a cat"), Prompt("a green disc")]
GROUPS = [Group(i, p) for i, p in enumerate(PROMPTS)]
RANDOM = Random(2).at("train", 0)
LOSS = ClippedLoss(clip_range=0.1, kl_coef=0.1, kl="velocity")
CASES: dict[str, tuple[Any, Any]] = {
    **{name: (made, LOSS) for name, made in ALGORITHMS.items() if name != "diffusion_nft"},
    "diffusion_nft": (ALGORITHMS["diffusion_nft"], NFTLoss(kl_coef=0.1)),
    "matching": (Matching(group_size=G, num_times=2), MatchingLoss(kl_coef=0.1)),
    "every input": (FlowGRPO(group_size=G), Distances()),
    "find": (FIND(group_size=G), ClippedLoss(clip_range=0.1)),
}
"""Every algorithm, every kind of loss input."""


def scorer_of() -> RewardScorer:
    both = (Reward(model=f"{HERE}:brightness"), Reward(model=f"{HERE}:odd", weight=0.0))
    return RewardScorer(both, Failures(retries=0))


def iterate(
    policy: PipelinePolicy, case: str, accelerator: Accelerator, groups: Sequence[Group]
) -> tuple[list[Tensor], dict[str, float]]:
    """One iteration of a process in which only group 0 is trained on.

    Returns:
        The gradient of the first optimizer step, and the metrics. The weights are given back.
    """
    algorithm, loss = CASES[case]
    train = Train(
        iterations=1, groups=3, updates=2, split="samples", lr=1e-3, ema_decay=0.5, train_batch=4,
        weight_decay=0.0, monitor_states=1,
    )  # fmt: skip
    learner, scorer = Learner(policy, train, loss, accelerator), scorer_of()
    before, gradients = [p.detach().clone() for p in learner.parameters], list[list[Tensor]]()

    def note(*_: object) -> None:
        gradients.append([p.grad.clone() for p in learner.parameters if p.grad is not None])

    learner.optimizer.adam.register_step_pre_hook(note)
    with learner.behaviour_policy(), policy.together():
        experience = algorithm.collect(policy, groups, scorer, RANDOM, 0)
    scorer.close()
    if accelerator.num_processes > 1:
        experience = replace(experience, gathered=experience.candidates.map(gather_rows))
    advantages = algorithm.advantages(experience) * (experience.actions.group == 0)
    metrics = learner.update(experience, advantages, RANDOM)
    with torch.no_grad():
        for parameter, value in zip(learner.parameters, before, strict=True):
            parameter.copy_(value)
    return gradients[0], metrics


def meet(kind: int, weights: float = 0.0) -> int:
    """A collective operation, which a pass of a sharded model has; fails unless both passes are alike."""
    mine = torch.tensor([kind, weights], dtype=torch.float64)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    assert all(torch.equal(one, mine) for one in every), every
    return kind


def watch(policy: PipelinePolicy) -> list[int]:
    """Let every pass of the denoiser meet the other process's, as in a sharded model.

    Returns:
        The kinds of the passes so far: 0 without gradients, 1 with gradients, 2 backward.
    """
    passes: list[int] = []
    (denoiser,) = policy.denoisers.values()
    *_, parameter = denoiser.parameters()

    def note(kind: int) -> None:
        passes.append(meet(kind, float(parameter.detach().double().sum())))

    def after(module: nn.Module, inputs: object, output: tuple[Tensor, ...]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: note(2))

    denoiser.register_forward_pre_hook(lambda *_: note(int(torch.is_grad_enabled())))
    denoiser.register_forward_hook(after)
    return passes


def evaluate(policy: PipelinePolicy, rank: int) -> None:
    """What else processes do unequally: evaluations, grids of the first process, refilled groups."""
    scorer = scorer_of()
    items = [held_out.Item(i, p, 0) for i, p in enumerate(PROMPTS)]
    result = held_out.evaluate(
        policy, scorer, items, seed=0, sampling=policy.sampling, rank=rank, num_ranks=2,
        gather=gather_lists,
    )  # fmt: skip
    assert result["images"] == len(PROMPTS)
    with policy.together():
        if rank == 0:
            policy.images(PROMPTS, held_out.noise_for(items, 0))
    algorithm = FlowGRPO(group_size=2)
    first = GROUPS[rank : rank + 1]
    with policy.together():
        experience = algorithm.collect(policy, first, scorer, RANDOM, 0)
    if rank == 1:  # Its group is flat, and is sampled again.
        experience.candidates.scores.reward[:] = 1.0
    # A loss without a gradient: its process takes part in the backward pass of the other.
    one = experience.actions.select(torch.tensor([0]))
    with policy.together():
        record = policy.replay([first[0].prompt], one.starts()[0], int(one.step[0]), CPS())
        loss = record.prediction.output.sum() if rank == 0 else torch.zeros(())
        policy.lockstep.backward(loss, Tensor.backward)
    before = policy.num_evaluations
    _, replaced = refilled(
        experience, 1, lambda _: first, lambda g: algorithm.collect(policy, g, scorer, RANDOM, 0),
        gather_rows, 2, policy.together,
    )  # fmt: skip
    assert replaced == 1
    # The calls that a process joins are no work of its own.
    assert (policy.num_evaluations == before) is (rank == 0)
    scorer.close()


def gather_lists(values: list[Any]) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, values)
    return [v for part in every for v in part]


def gather_rows(tensor: Tensor) -> Tensor:
    return torch.cat(gather_lists([tensor]))


def test_processes_without_work_take_part_in_every_pass(
    make_policy: MakePolicy, accelerator: Accelerator
) -> None:
    """One of two processes has fewer prompts, needs other calls, and has nothing to train on."""
    sampling = sampling_of("sd3", num_steps=3)
    policy = make_policy("sd3", sampling=sampling, weights=Full(), with_reference=True)
    noise = make_policy("sd3", sampling=sampling, weights=Noise())
    fit_noise(noise, PROMPTS)
    policies = {case: noise if case == "find" else policy for case in CASES}
    alone = {case: iterate(one, case, accelerator, GROUPS) for case, one in policies.items()}

    def work(rank: int) -> int:
        own = GROUPS[:2] if rank == 0 else GROUPS[2:]
        passes = {id(p): watch(p) for p in (policy, noise)}
        connected = Accelerator(cpu=True, kwargs_handlers=[process_group(0.5)])
        for one in (policy, noise):
            one.in_lockstep, one.lockstep.timeout = True, timedelta(seconds=30)
        for case, (gradient, metrics) in alone.items():
            one = policies[case]
            number, before = len(passes[id(one)]), one.num_evaluations
            summed, found = iterate(one, case, connected, own)
            kinds = set(passes[id(one)][number:])
            assert kinds == ({0} if case == "find" else {0, 1, 2}), (case, kinds)
            assert one.num_evaluations > before
            scale = max(float(g.abs().max()) for g in gradient)
            for got, want in zip(summed, gradient, strict=True):
                assert float((got - want).abs().max()) <= 1e-3 * scale, case
            assert found.keys() == metrics.keys()
            for name in ("loss/policy", "loss/kl", "kl/velocity", "grad_norm"):
                assert found[name] == pytest.approx(metrics[name], rel=1e-2, abs=1e-6), (case, name)
        evaluate(policy, rank)
        return 0

    for process in ranks(work):
        output, _ = process.communicate()
        assert process.returncode == 0, output[-4000:]


def test_nothing_waits_where_the_model_is_whole(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3")
    with policy.together():
        assert not policy.lockstep.in_section
