"""Distribution matching: the loss and the fake score against a naive reference, settings, and a run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

import flowgrpo
from flowgrpo.algorithms import DMD, RTDMD
from flowgrpo.config import ConfigError, Train
from flowgrpo.config.few_steps import few_step_notes
from flowgrpo.core.matching import matching_direction
from flowgrpo.core.random import Random
from flowgrpo.core.steps import Window
from flowgrpo.core.transitions import CPS, ODE, Step
from flowgrpo.data.experience import Actions
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.dmd import DMDLoss
from flowgrpo.losses.fake_score import FakeScore
from flowgrpo.losses.teachers import PIPELINE, Teacher
from flowgrpo.policy import LoRA, PipelinePolicy, Sampling
from flowgrpo.policy.adapters import read_layers
from flowgrpo.policy.weights import Trainable, swapped
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from flowgrpo.training.learner import Learner
from flowgrpo.training.loop import train
from tests.conftest import MakePolicy, noise_of, sampling_of

PROMPTS = ["a cube", "a red cat"]


def test_the_direction_is_that_of_the_released_code() -> None:
    """RTDMD's ``dmd_loss``: ``grad = (p_real - p_fake) / mean |p_real|`` with ``p = latents - prediction``."""
    data, fake, teacher = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))  # fmt: skip
    p_real, p_fake = data - teacher, data - fake
    wanted = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True)
    assert torch.allclose(matching_direction(data, fake, teacher), wanted, atol=1e-6)
    # Its nan_to_num: no direction where all three agree.
    assert matching_direction(data, data, data).abs().max() == 0


def size(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).std(1)


def grid_of(policy: PipelinePolicy, prompt: Prompt, sampling: Sampling) -> list[Step]:
    """The steps of a grid, which a call that takes none sets."""
    list(policy.run([prompt], noise_of(0), nodes=[0], decode=False, sampling=sampling))
    return [policy.scheduler.interval(i, i + 1) for i in range(sampling.num_steps)]


def perturb(parameters: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))


def naively_noised(
    a: Actions, generated: Sequence[int], grid: Sequence[Step], random: Random
) -> list[tuple[int, Tensor, Tensor]]:
    """Node, noise and noised sample of each generated one, by itself."""
    draws = torch.rand(2, generator=random.generator("times"))
    turn, found = torch.randperm(2, generator=random.generator("turns")), []
    places = [s.noise if s.path == "flow" else 1 - i / 20 for i, s in enumerate(grid)]
    for row in generated:
        key = int(a.group[row]), int(a.sample[row]), int(a.step[row])
        part = int(turn[(key[0] + key[1]) % 2])
        level = 0.02 + 0.48 * (part + float(draws[part]))
        node = int(torch.tensor([abs(p - level) for p in places]).argmin())
        data = a.x_next[row]
        e = torch.randn(data.shape, generator=random.generator("noise", *key))
        found.append((node, e, grid[node].signal * data + grid[node].noise * e))
    return found


def naive_fake(
    parameters: list[nn.Parameter],
    start: Sequence[Tensor],
    noised: Callable[..., Any],
    predict: Callable[..., Any],
    data: Tensor,
    grid: Sequence[Step],
) -> tuple[list[nn.Parameter], float]:
    """The fake score after two steps of AdamW from the start, and their mean loss."""
    values, losses = [nn.Parameter(s.clone()) for s in start], []
    adam = torch.optim.AdamW(values, lr=1e-2, weight_decay=0.0)
    for update in range(2):
        with swapped(parameters, values):
            total = torch.zeros(())
            for i, (node, e, x) in enumerate(noised("update", update)):
                target = e - data[i] if grid[node].path == "flow" else e
                error = (predict(i, node, x).output[0] - target).square().mean()
                total = total + min(1.0, 4 * grid[node].noise ** 2) * error / len(data)
            for value, g in zip(values, torch.autograd.grad(total, parameters), strict=True):
                value.grad = g
        losses.append(float(total.detach()))
        adam.step()
    return values, sum(losses) / 2


@pytest.mark.parametrize(
    ("family", "algorithm"),
    [
        ("sd3", RTDMD(group_size=2, transition=CPS(), steps=Window(start=1, size=1))),
        ("sd15", DMD(group_size=2)),
    ],
)
def test_an_update_is_that_of_a_naive_computation(
    family: str, algorithm: Any, make_policy: MakePolicy, accelerator: Accelerator
) -> None:
    guided = sampling_of(family, num_steps=3, guidance_scale=2.5)
    policy = make_policy(
        family, sampling=replace(guided, guidance_scale=1.0), weights=LoRA(rank=2, alpha=2), with_reference=True
    )  # fmt: skip
    parameters = list(policy.trainable.parameters.values())  # type: ignore[union-attr]
    start = [p.detach().clone() for p in parameters]
    fake = FakeScore(lr=1e-2, updates=2, num_times=2, grid=20, max_grad_norm=1e9, weight_cap=4.0)
    loss = DMDLoss(weight=0.5, teachers=(Teacher(guidance_scale=2.5),), fake=fake)
    settings = Train(iterations=1, groups=2, train_batch=3, lr=0.0, max_grad_norm=1e9)
    learner = Learner(policy, settings, loss, accelerator)
    perturb(parameters)
    groups = [Group(i, Prompt(t)) for i, t in enumerate(PROMPTS)]
    scorer = RewardScorer([Reward(model="tests.test_dmd:size")])
    experience = algorithm.collect(policy, groups, scorer, Random(3), 0)
    assert experience.cost == algorithm.cost(3, 0, Random(3))
    a, advantages = experience.actions, algorithm.advantages(experience)
    generated = a.is_generated.nonzero().squeeze(1).tolist()
    assert advantages[generated].tolist() == [1.0] * 4

    grads: list[Tensor] = []
    learner.optimizer.adam.register_step_pre_hook(lambda *_: grads.extend(p.grad.clone() for p in parameters))  # fmt: skip
    metrics = learner.update(experience, advantages, Random(0))

    stream, fine = Random(0).at("distribution_matching"), replace(policy.sampling, num_steps=20)
    grid = grid_of(policy, groups[0].prompt, fine)

    def noised(*key: str | int) -> list[tuple[int, Tensor, Tensor]]:
        return naively_noised(a, generated, grid, stream.at(*key))

    def predict(i: int, node: int, x: Tensor, sampling: Any = fine) -> Any:
        prompt = [groups[int(a.group[generated[i]])].prompt]
        return policy.replay(prompt, x[None], node, ODE(), sampling).prediction

    values, loss_of_fake = naive_fake(parameters, start, noised, predict, a.x_next[generated], grid)
    assert metrics["fake_score/loss"] == pytest.approx(loss_of_fake, rel=1e-4)
    assert learner.matching is not None
    for own, wanted in zip(learner.matching.values, values, strict=True):
        assert torch.allclose(own, wanted, atol=2e-4)
    assert (
        max(float((v - s).detach().abs().max()) for v, s in zip(values, start, strict=True)) > 1e-3
    )

    objective, gaps, noisy = torch.zeros(()), [], noised("direction")
    for row in range(len(a)):
        prompt, x = [groups[int(a.group[row])].prompt], a.states[a.state[row : row + 1]]
        record = policy.replay(prompt, x, int(a.step[row]), experience.transition)
        if row not in generated:
            log_prob = record.gaussian.log_prob(a.x_next[row : row + 1])[0]
            objective = objective - advantages[row] * log_prob
            continue
        i = generated.index(row)
        node, _, x_t = noisy[i]
        with torch.no_grad():
            # The learner's own values, which were compared above: small differences of the fake score
            # would be large ones of the direction.
            with swapped(parameters, [v.detach() for v in learner.matching.values]):
                own = predict(i, node, x_t).x0[0]
            with policy.reference():
                other = predict(i, node, x_t, replace(fine, guidance_scale=2.5)).x0[0]
            d = (own - other) / (a.x_next[row] - other).abs().mean()
        gaps.append(float(d.square().mean().sqrt()))
        objective = objective + 0.5 * (d * record.prediction.x0[0]).mean()
    wanted = torch.autograd.grad(objective / len(a), parameters)
    assert metrics["matching/gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-3)
    whole, own = (torch.cat([g.flatten() for g in some]) for some in (wanted, grads))
    assert (own - whole).norm() < 1e-3 * whole.norm()


def test_the_pipeline_is_a_teacher_without_the_adapter_that_training_starts_from(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    from flowgrpo.policy.export import export

    first = make_policy("sd3", weights=LoRA(rank=2, alpha=2))
    assert isinstance(first.trainable, Trainable)
    perturb(list(first.trainable.parameters.values()))
    export(first.stock_pipeline(), first.trainable, tmp_path)
    assert read_layers(first.pipeline, str(tmp_path), "init", "")
    policy = make_policy(
        "sd3", weights=LoRA(rank=2, alpha=2, init=str(tmp_path)), with_reference=True, teachers=[PIPELINE]
    )  # fmt: skip
    plain = make_policy("sd3", weights=None)
    assert isinstance(policy.trainable, Trainable)
    prompts, noise = [Prompt("a cube")], noise_of(0)
    with policy.trainable.teacher(PIPELINE):
        taught = policy.images(prompts, noise)
    assert torch.equal(taught, plain.images(prompts, noise))
    with policy.reference():
        assert not torch.allclose(policy.images(prompts, noise), taught, atol=1e-3)


def matching(*settings: str) -> flowgrpo.Config:
    return flowgrpo.load("quickstart_flow_grpo", ["sampling.num_steps=4", *settings])


WITH = ["algorithm={kind='rtdmd'}", "loss={kind='dmd'}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([WITH[0]], "do not belong together"),
        (["loss={kind='dmd'}", "algorithm.steps={kind='all'}"], "do not belong together"),
        ([*WITH, "parallel.shard='denoiser'"], "parallel.shard = 'denoiser' is not possible with the loss DMDLoss"),
        ([*WITH, "model.dtype='float16'"], "model.dtype = 'float16' is not possible"),
        ([*WITH, "guard.reset_every=3"], "there is none; set loss.kl_coef"),
        ([*WITH, "train.updates=2", "train.groups=16"], "first update of an iteration only"),
        ([*WITH, "sampling.num_steps=1"], "num_steps must be at least 2, got 1"),
        ([*WITH, "loss.fake.lr=0"], "loss.fake.lr must be at least 1e-12"),
        ([*WITH, "loss.fake.grid=2000"], "at most 1000 steps"),
        ([*WITH, "loss.fake.range=[0.5, 0.1]"], "rise within"),
        ([*WITH, "loss.teachers=[]"], "loss.teachers is empty"),
        ([*WITH, "loss.teachers=[{path='a', weights='model'}]", "model.weights={kind='lora'}"], "whose weights an adapter cannot hold"),
        ([*WITH, "train.replay.groups=2"], "importance weights"),
        (["algorithm={kind='dmd'}", WITH[1], "train.refill=1"], "train.refill works on the rewards"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        matching(*settings).check(2)


def test_a_model_of_few_steps_is_no_teacher() -> None:
    (note,) = few_step_notes(matching(*WITH, "model.path='stabilityai/sdxl-turbo'"))
    assert "its own teacher" in note
    other = "loss.teachers=[{path='stabilityai/stable-diffusion-xl-base-1.0', weights='model'}]"
    assert few_step_notes(matching(*WITH, "model.path='stabilityai/sdxl-turbo'", other)) == []


def numbers(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_resumes_to_the_bit(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    def run(name: str, iterations: int) -> flowgrpo.Config:
        return matching(
            *WITH, f"model.path='{tiny('sd3')}'", "sampling={num_steps=3, guidance_scale=1.0, height=16, width=16}",
            "algorithm.group_size=2", "algorithm.steps={kind='window', start=0, size=1}", "loss.fake.lr=1e-3",
            "rewards=[{model='jpeg_size', ignores_prompt=true}]", "prompts.balance=''", "train.groups=2", f"train.iterations={iterations}",
            "train.warmup=0", "model.weights={kind='lora', rank=2, alpha=2}", "evaluation.metrics=[]",
            "evaluation={every=0, images=2, grid_prompts=1, grid_samples=2}", "run.threads=1", "run.trackers=[]",
            "run.checkpoint_every=1", f"run.folder='{tmp_path / name}'", "evaluation.regimes=[]",
        )  # fmt: skip

    assert train(run("straight", 4)).finished
    train(run("stopped", 2))
    train(run("stopped", 4))
    lines = numbers(tmp_path / "straight")
    assert numbers(tmp_path / "stopped") == lines
    assert lines[0]["fake_score/loss"] > 0
    ends = [sorted((tmp_path / n / "checkpoints").glob("0*"))[-1] for n in ("straight", "stopped")]
    for part in ("fake_score", "fake_optimizer", "weights"):
        one, other = (load_file(e / f"{part}.safetensors") for e in ends)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
    moments = load_file(ends[0] / "fake_optimizer.safetensors")
    assert {float(v) for k, v in moments.items() if k.endswith("/step")} == {4.0}
