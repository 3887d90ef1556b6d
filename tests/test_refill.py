"""Groups of equal rewards are replaced by groups of further prompts."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import DanceGRPO
from flowgrpo.core.random import Random
from flowgrpo.core.steps import Window
from flowgrpo.core.transitions import CPS
from flowgrpo.data.experience import Experience, Latents
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.policy import PipelinePolicy
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from flowgrpo.training.refill import flat_groups, refilled
from tests.conftest import MakePolicy, sampling_of
from tests.test_train import small

NUMBER = 4
SEED = Random(1)
RANDOM = SEED.at("train", 0)
ALGORITHM = DanceGRPO(group_size=2, transition=CPS(), steps=Window(start=0, size=2), timestep_fraction=1.0)  # fmt: skip
PROMPTS = PromptSet([Prompt(f"{'flat' if i % 2 else 'rough'} {i}") for i in range(12)])


def only_rough(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    rough = torch.tensor([p.text.startswith("rough") for p in prompts])
    return torch.where(rough, media.flatten(1).mean(1), 0.5)


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> PipelinePolicy:
    return make_policy("sd3", sampling=sampling_of("sd3", num_steps=3))


def run(policy: PipelinePolicy, places: Sequence[int], rounds: int) -> tuple[Experience, int, list[list[int]]]:  # fmt: skip
    """One process's part of an iteration; the others have nothing left to replace."""
    scorer, collected = RewardScorer([Reward(model="tests.test_refill:only_rough")]), []

    def own(groups: Sequence[Group]) -> list[Group]:
        return [g for g in groups if g.index in places]

    def collect(groups: Sequence[Group]) -> Experience:
        collected.append([g.index for g in groups])
        return ALGORITHM.collect(policy, groups, scorer, RANDOM, 0)

    first = collect(own(PROMPTS.groups(0, NUMBER, SEED)))
    found, replaced = refilled(
        first, rounds, lambda r: own(PROMPTS.groups(0, NUMBER, SEED.at("refill", r))), collect,
        lambda tensor: tensor, NUMBER,
    )  # fmt: skip
    scorer.close()
    return found, replaced, collected


def test_flat_groups_are_replaced_in_their_places(policy: PipelinePolicy) -> None:
    plain, _, _ = run(policy, range(NUMBER), 0)
    before = flat_groups(plain)
    assert 0 < len(before) < NUMBER
    found, replaced, collected = run(policy, range(NUMBER), 9)
    assert flat_groups(found) == set()
    assert [g.index for g in found.groups] == list(range(NUMBER))
    assert all(g.prompt.text.startswith("rough") for g in found.groups)
    # Each round samples the places that are still flat, with an index and a noise of their own.
    assert collected[0] == list(range(NUMBER))
    for number, (round_, last) in enumerate(zip(collected[1:], collected, strict=False), start=1):
        assert {i % NUMBER for i in round_} <= (
            {i % NUMBER for i in last} if number > 1 else before
        )
        assert {i // NUMBER for i in round_} == {number}
    assert replaced == sum(len(r) for r in collected[1:])

    # Whatever was there before is as it was, and nothing is left of what was replaced.
    for g in set(range(NUMBER)) - before:
        rows, same = found.actions.group == g, plain.actions.group == g
        assert torch.equal(found.actions.x_next[rows], plain.actions.x_next[same])
    a, c = found.actions, found.candidates
    assert sorted(zip(c.group.tolist(), c.sample.tolist(), strict=True)) == [(g, s) for g in range(NUMBER) for s in range(2)]  # fmt: skip
    assert len(a) == len(plain.actions) == NUMBER * 2 * 2
    assert torch.equal(a.states[a.state].flatten(1).isfinite().all(1), torch.ones(len(a), dtype=torch.bool))  # fmt: skip
    advantages = ALGORITHM.advantages(found)
    assert all(advantages[a.group == g].abs().min() > 0.5 for g in range(NUMBER))
    assert found.cost.nfe == pytest.approx(plain.cost.nfe * (1 + replaced / NUMBER))
    assert found.diversity.shape == found.duplicates.shape == (NUMBER,)


def test_rounds_are_bounded_and_the_number_of_processes_changes_nothing(policy: PipelinePolicy) -> None:  # fmt: skip
    _, replaced, collected = run(policy, range(NUMBER), 1)
    assert len(collected) == 2
    assert replaced == len(collected[1]) == len(flat_groups(run(policy, range(NUMBER), 0)[0]))
    whole, _, _ = run(policy, range(NUMBER), 9)
    for places in (range(2), range(2, 4)):
        part, _, _ = run(policy, places, 9)
        for g in places:
            rows, same = part.actions.group == g, whole.actions.group == g
            torch.testing.assert_close(part.actions.x_next[rows], whole.actions.x_next[same], atol=1e-5, rtol=1e-5)  # fmt: skip
    # A process without a flat group asks the others, and samples nothing.
    asked: list[int] = []

    def gather(tensor: Tensor) -> Tensor:
        asked.append(int(tensor))
        return torch.tensor([int(tensor), 3 if len(asked) < 3 else 0])

    same, others = refilled(
        whole, 5, lambda r: [], lambda g: pytest.fail("sampled"), gather, NUMBER
    )
    assert same is whole
    assert (asked, others) == ([0, 0, 0], 6)


def test_blocks_that_are_kept_whole_are_not_copied() -> None:
    blocks = [torch.randn(n, 2) for n in (2, 3, 1, 2)]
    states = Latents(blocks)
    rows = torch.tensor([0, 1, 3, 6, 7])
    kept = states.keep(rows)
    torch.testing.assert_close(kept.joined(), states.joined()[rows], atol=0, rtol=0)
    copied = [b for b in kept.blocks if all(b is not own for own in blocks)]
    assert [len(b) for b in copied] == [1]
    assert len(states.keep(rows[:0])) == 0


def test_a_run_refills(tmp_path: Path) -> None:
    settings = [
        "train.refill=2", "train.iterations=1", "train.groups=4", "train.updates=1",
        "algorithm.group_size=2", "sampling.num_steps=5", "run.checkpoint_every=1", "evaluation.every=0",
        "evaluation.images=1", "evaluation.grid_prompts=1", "evaluation.grid_samples=1",
        "evaluation.num_steps=2", "evaluation.inspected_prompts=0", "failures.probe=off",
        "rewards=[{model='tests.test_refill:only_red'}]", "prompts.balance=''",
    ]  # fmt: skip
    flowgrpo.train(small(tmp_path / "run", *settings))
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["group/refilled"] > 0
    assert metrics["nfe_per_prompt"] == 6 * (1 + metrics["group/refilled"] / 4)


def only_red(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    red = torch.tensor(["red" in p.text for p in prompts])
    return torch.where(red, media.flatten(1).mean(1), 0.5)
