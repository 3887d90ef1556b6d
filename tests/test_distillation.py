"""On-policy distillation: the loss against published numbers, teachers' weights, routing, and a run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import Distillation
from flowgrpo.config import ConfigError, Train
from flowgrpo.config.distillation import check_taught
from flowgrpo.core.random import Random
from flowgrpo.core.transitions import CPS, ODE, FlowSDE, Prediction, Step
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.base import PolicyOutputs
from flowgrpo.losses.distillation import DistillationLoss, distance
from flowgrpo.losses.teachers import PIPELINE, Teacher, Teachers, turn
from flowgrpo.policy import Full, LoRA, PipelinePolicy
from flowgrpo.policy.export import export
from flowgrpo.policy.settings import Adapter, ModelSource
from flowgrpo.policy.teachers import require_found
from flowgrpo.policy.weights import Trainable
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.training.inputs import check_names
from flowgrpo.training.learner import Learner
from flowgrpo.training.loop import train
from tests.conftest import MakePolicy, noise_of, sampling_of

X, STUDENT, TEACHER = (torch.tensor([v]) for v in ([0.5, -1.0], [0.26, 1.99], [0.25, 2.0]))


def outputs(output: Tensor, step: Step, transition: Any) -> PolicyOutputs:
    prediction = Prediction.from_output(X, output, step)
    return PolicyOutputs(prediction, transition(X, prediction, step))


@pytest.mark.parametrize(
    ("transition", "target", "wanted"),
    [
        (ODE(), "mean", 4e-6 / 2),
        (FlowSDE(noise_level=0.7), "mean", 7.9082908e-6),
        (ODE(), "output", 1e-4 / 2),
        (FlowSDE(noise_level=0.7), "output", 1e-4 / 2),
        (ODE(), "data", 6.4e-5 / 2),
    ],
)
def test_the_loss_equals_the_vectors(transition: Any, target: Any, wanted: float) -> None:
    student, teacher = (outputs(v, Step.flow(0.8, 0.6), transition) for v in (STUDENT, TEACHER))
    assert float(distance(student, teacher, target)) == pytest.approx(wanted, rel=1e-3)


def test_flow_opds_released_loss_is_dt_times_the_divergence() -> None:
    """Its script train_sd3_opd_mix.py, mode ``gkd``: the step's mean and ``std_dev_t`` as computed there."""
    sigma, dt, level = 0.8, -0.2, 0.7
    g = (sigma / (1 - sigma)) ** 0.5 * level
    gain = (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    released = float((gain * (STUDENT - TEACHER)).square().mean()) / (2 * g**2)
    student, teacher = (
        outputs(v, Step.flow(sigma, sigma + dt), FlowSDE(noise_level=level))
        for v in (STUDENT, TEACHER)
    )
    assert -dt * float(distance(student, teacher, "mean")) == pytest.approx(released, rel=1e-3)


@pytest.mark.parametrize("predicted", ["noise", "v"])
def test_on_a_diffusion_path_the_steps_are_those_of_ddim(predicted: Any) -> None:
    step = Step.diffusion(0.3, 0.6, predicted)
    student, teacher = (outputs(v, step, ODE()) for v in (STUDENT, TEACHER))
    gap = STUDENT - TEACHER
    if predicted == "noise":  # x0 = (x - noise e) / signal
        gap = step.signal_next * -step.noise / step.signal * gap + step.noise_next * gap
    else:  # x0 = signal x - noise v, x1 = signal v + noise x
        gap = -step.signal_next * step.noise * gap + step.noise_next * step.signal * gap
    wanted = float(gap.square().mean() / 2)
    assert float(distance(student, teacher, "mean")) == pytest.approx(wanted, rel=1e-3)


# Which teacher teaches a prompt.


def test_turns_are_in_proportion_to_shares() -> None:
    assert [turn([1.0, 1.0, 1.0], i) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    taken = [turn([3.0, 1.0], i) for i in range(40)]
    assert all(taken[:n].count(0) == pytest.approx(0.75 * n, abs=1) for n in range(1, 41))
    assert turn([2.0], 7) == 0


def test_tags_come_before_shares() -> None:
    teachers = Teachers([Teacher(path="a", tags=("x", "1")), Teacher(path="b"), Teacher(path="c")])
    assert [teachers.of({"tag": "x"}, g) for g in range(3)] == [0, 0, 0]
    assert teachers.of({"tag": 1}, 0) == 0
    assert [teachers.of({}, g) for g in range(4)] == [1, 2, 1, 2]
    with pytest.raises(ValueError, match="no teacher teaches prompts whose 'tag' is 'y'"):
        Teachers(teachers.all[:1]).of({"tag": "y"}, 0)


BASE = "loss={kind='distillation', teachers=[{guidance_scale=3.0}]}"


def distilling(*settings: str) -> flowgrpo.Config:
    return flowgrpo.load(
        "quickstart_flow_grpo", ["algorithm={kind='distillation'}", BASE, *settings]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss={kind='distillation'}"], "loss.teachers is empty"),
        (["loss.teachers=[{}]"], r"teachers\[0\] is the model before training and samples as the student"),
        (["loss.teachers=[{path='pipeline'}]"], "there is nothing to learn: give it another guidance_scale"),
        (["loss.teachers=[{guidance_scale=1.0}]"], "there is nothing to learn: give it another guidance_scale"),
        (["loss.teachers=[{path=''}]"], r"teachers\[0\].path is empty"),
        (["loss.teachers=[{path='a', share=0}]"], r"share must be above 0, got 0"),
        (["loss.teachers=[{path='a', tags=['x'], share=2}]"], "has tags and a share"),
        (["loss.teachers=[{path='a', tags=['x']}, {path='b', tags=['x']}]"], "both have the tag 'x'"),
        (["loss.teachers=[{call={height=3}}]"], r"loss.teachers\[0\].call.height: set sampling.height"),
        (["loss.teachers=[{weights='model', guidance_scale=3.0}]"], "is the student's own model; with weights"),
        (["loss.teachers=[{path='a', weights='model'}]", "memory.quantize='nf4'"], "not possible with memory.quantize"),
        (["loss={kind='clipped'}"], "do not belong together"),
        (["algorithm={kind='flow_grpo'}"], "do not belong together"),
        (["algorithm.fraction=0"], "fraction must be in"),
        (["algorithm.fraction=0.1"], "leaves no step to train on"),
        (["rewards=[]", "algorithm.score_rollouts=true"], "there are no rewards"),
        (["rewards=[]", "evaluation.keep_best=['reward']"], r"keep_best\[0\] = 'reward': there are no rewards"),
        (["guard.novelty='relative'"], "guard works on the rewards"),
        (["train.refill=1"], "train.refill works on the rewards"),
        (["train.staleness=1"], "train.staleness works on the rewards"),
        (["algorithm={kind='flow_grpo'}", "loss={kind='clipped'}", "rewards=[]"], "rewards: there are none"),
        (["algorithm={kind='pref_grpo', preference={kind='compared', reward='strict'}}", "loss={kind='clipped'}", "rewards=[]"], "rewards: there are none"),
        (["loss.kl_coef=-1"], "kl_coef must be at least 0"),
        (["algorithm.group_size=0"], "group_size must be at least 1"),
        (["model.weights={kind='noise'}"], "'find' and model.weights.kind = 'noise' belong together"),
    ],
)  # fmt: skip
def test_settings_that_cannot_train_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distilling(*settings).check()


def test_prompts_without_teacher_and_teachers_without_prompts_are_refused() -> None:
    prompts = [Prompt("a", metadata={"tag": "x"}), Prompt("b", metadata={"tag": "y"})]
    for teachers, message in (
        ("{path='a', tags=['x']}", "no teacher teaches .* 'y'.*prompt 'b'"),
        ("{path='a', tags=['x']}, {path='b', tags=['y', 'z']}", r"teachers\[1\].tags: no training prompt has 'tag' = 'z'"),
        ("{path='a', tags=['x', 'y']}, {path='b'}", r"teachers\[1\] has no tags and would teach nothing"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_taught(distilling(f"loss.teachers=[{teachers}]"), prompts)
    check_taught(distilling("loss.teachers=[{path='a', tags=['x']}, {path='b'}]"), prompts)


# Teachers' weights.


@pytest.fixture(scope="module")
def adapter(make_policy: MakePolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 2 that changes the model visibly."""
    policy = make_policy("sd3", weights=LoRA(rank=2, alpha=3))
    assert isinstance(policy.trainable, Trainable)
    with torch.no_grad():
        for name, p in policy.trainable.parameters.items():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    folder = tmp_path_factory.mktemp("teacher")
    export(policy.stock_pipeline(), policy.trainable, folder)
    return folder


PROMPTS = ["a cube", "a red cat"]


@pytest.mark.parametrize("weights", [LoRA(rank=4, alpha=2), Full()])
def test_the_model_with_a_teacher_is_diffusers_with_its_adapter(
    weights: Any, adapter: Path, make_policy: MakePolicy, tiny: Callable[[str], Path]
) -> None:
    policy = make_policy("sd3", weights=weights, with_reference=True, teachers=[str(adapter)])
    assert isinstance(policy.trainable, Trainable)
    prompts, noise, pipeline = [Prompt(t) for t in PROMPTS], noise_of(0, 1), DiffusionPipeline.from_pretrained(tiny("sd3"))  # fmt: skip
    own = policy.images(prompts, noise)
    with policy.trainable.teacher(str(adapter)):
        taught = policy.images(prompts, noise)
    assert torch.equal(policy.images(prompts, noise), own)

    pipeline.load_lora_weights(adapter)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(
        PROMPTS, generator=noise.initial(), output_type="pt", **sampling_of("sd3").arguments()
    ).images
    assert (taught - own).abs().max() > 0.05
    torch.testing.assert_close(taught, wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "weights", "message"),
    [
        ("sd3", LoRA(rank=1), "has rank 2; set model.weights.rank to at least 2, not 1"),
        ("sd3", LoRA(rank=4, targets=("to_q",)), "outside of model.weights.targets; the student must train"),
        ("sd3", Full(parameters=(".*to_q.weight",)), "which model.weights.parameters leaves out"),
        ("flux", LoRA(rank=4), "loss.teachers: adapter .* does not fit FluxPipeline"),
    ],
)  # fmt: skip
def test_teachers_that_do_not_fit_are_refused(
    family: str, weights: Any, message: str, adapter: Path, make_policy: MakePolicy
) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(family, weights=weights, teachers=[str(adapter)])


def test_a_missing_adapter_is_named_before_anything_is_loaded(adapter: Path) -> None:
    require_found(LoRA(init=str(adapter)), [str(adapter), PIPELINE])
    for path in ("runs/a/none", "./none", "none.safetensors", "none"):
        with pytest.raises(FileNotFoundError, match=f"loss.teachers: no such file or folder: {path}"):  # fmt: skip
            PipelinePolicy.from_pretrained("not loaded", teachers=[path])
        with pytest.raises(FileNotFoundError, match=f"model.weights.init: no such file or folder: {path}"):  # fmt: skip
            PipelinePolicy.from_pretrained("not loaded", weights=LoRA(init=path))
        source = ModelSource(path="not loaded", adapters=(Adapter(path),))
        with pytest.raises(FileNotFoundError, match=rf"adapter: no such file or folder: {path}"):  # fmt: skip
            PipelinePolicy.from_pretrained(source)


# Training.


@pytest.mark.parametrize(("transition", "steps", "trained"), [(ODE(), 3, 3), (CPS(noise_level=0.5), 4, 2)])  # fmt: skip
def test_the_learner_takes_the_gradient_of_each_prompts_teacher(
    transition: Any,
    steps: int,
    trained: int,
    adapter: Path,
    make_policy: MakePolicy,
    accelerator: Accelerator,
) -> None:
    """Two teachers of other weights and other guidance, in turns, against a direct computation."""
    guided = sampling_of("sd3", num_steps=steps, guidance_scale=2.5)
    policy = make_policy(
        "sd3", sampling=replace(guided, guidance_scale=1.0), weights=LoRA(rank=2, alpha=2),
        with_reference=True, teachers=[str(adapter)],
    )  # fmt: skip
    assert isinstance(policy.trainable, Trainable)
    with torch.no_grad():
        for p in policy.trainable.parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    algorithm = Distillation(group_size=2, transition=transition, fraction=trained / steps)
    groups = [Group(i, Prompt(PROMPTS[i % 2])) for i in range(3)]
    experience = algorithm.collect(policy, groups, RewardScorer([]), Random(3), 0)
    assert experience.cost == algorithm.cost(steps, 0, Random(3))
    assert experience.cost.nfe == 2 * trained
    assert len(experience.candidates) == 0
    assert len(experience.actions) == 3 * 2 * trained

    teachers = (Teacher(guidance_scale=2.5), Teacher(path=str(adapter)))
    loss, a = DistillationLoss(teachers=teachers), experience.actions
    settings = Train(iterations=1, groups=3, train_batch=3, lr=0.0, max_grad_norm=1e9)
    learner = Learner(policy, settings, loss, accelerator)
    taken: list[Tensor] = []
    learner.optimizer.adam.register_step_pre_hook(lambda *_: taken.extend(p.grad.clone() for p in learner.parameters))  # fmt: skip
    metrics = learner.update(experience, algorithm.advantages(experience), Random(0))

    total = torch.zeros(())
    for i in range(len(a)):
        step, group = int(a.step[i]), int(a.group[i])
        state, prompt = a.states[a.state[i : i + 1]], [groups[group].prompt]
        weights = policy.trainable.teacher(str(adapter)) if group == 1 else policy.reference()
        with torch.no_grad(), weights:
            sampling = policy.sampling if group == 1 else guided
            teacher = policy.replay(prompt, state, step, transition, sampling).gaussian
        student = policy.replay(prompt, state, step, transition).gaussian
        gap = (student.mean - teacher.mean).square().mean()
        assert isinstance(student.std, float)
        total = total + gap / (2 * student.std**2 if student.std else 2)
    wanted = torch.autograd.grad(total / len(a), learner.parameters)
    assert metrics["loss/policy"] == pytest.approx(float(total.detach() / len(a)), rel=1e-4)
    apart = [(x - y).norm() for x, y in zip(taken, wanted, strict=True)]
    size = torch.stack([g.norm() for g in wanted]).norm()
    assert float(torch.stack(apart).norm()) < 1e-3 * float(size)


def test_a_whole_model_teaches(
    make_policy: MakePolicy, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its images are those of the stock pipeline, whatever the student's adapter or weights."""
    other = DiffusionPipeline.from_pretrained(tiny("sd3"))
    with torch.no_grad():
        for p in other.transformer.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    other.save_pretrained(tmp_path)
    prompts, noise, path = [Prompt(t) for t in PROMPTS], noise_of(0, 1), str(tmp_path)
    wanted = make_policy("sd3", weights=None).__class__.from_pretrained(tmp_path, sampling=sampling_of("sd3")).images(prompts, noise)  # fmt: skip
    for weights in (LoRA(rank=2, alpha=2), Full()):
        policy = make_policy("sd3", weights=weights, whole_teachers=[path])
        assert isinstance(policy.trainable, Trainable)
        with torch.no_grad():
            for p in policy.trainable.parameters.values():
                p.add_(0.1)
        before = policy.images(prompts, noise)
        with policy.trainable.teacher(path):
            assert torch.allclose(policy.images(prompts, noise), wanted, atol=1e-6)
        assert torch.equal(policy.images(prompts, noise), before)
        assert not torch.allclose(before, wanted, atol=1e-3)
        assert list(policy.trainable.teacher_digests) == [path]


def test_a_model_of_another_architecture_is_no_teacher(make_policy: MakePolicy, tiny: Callable[[str], Path], tmp_path: Path) -> None:  # fmt: skip
    with pytest.raises(ValueError, match="has no transformer, and the student has one"):
        make_policy("sd3", whole_teachers=[str(tiny("sd15"))])
    with pytest.raises(
        ValueError,
        match=r"the transformer of .* is a FluxTransformer2DModel, and the student's a SD3",
    ):
        make_policy("sd3", whole_teachers=[str(tiny("flux"))])
    wider = DiffusionPipeline.from_pretrained(tiny("sd3"))
    config = dict(wider.transformer.config) | {
        "num_layers": wider.transformer.config.num_layers + 1
    }
    wider.transformer = type(wider.transformer).from_config(config)
    wider.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"another architecture than the student: transformer\.transformer_blocks"
    ):
        make_policy("sd3", whole_teachers=[str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"loss\.teachers: no such folder"):
        make_policy("sd3", whole_teachers=["./nowhere"])


def numbers(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., flowgrpo.Config]:  # fmt: skip
    """A configuration that distils the guidance of a tiny model on a diffusion path."""
    place = tmp_path_factory.mktemp("runs")

    def make(name: str, *settings: Any) -> flowgrpo.Config:
        return distilling(
            f"model.path='{tiny('sd15')}'", "rewards=[]", "algorithm.fraction=1.0", "loss.target='output'",
            "sampling={num_steps=3, guidance_scale=1.0, height=16, width=16}", "evaluation.metrics=[]",
            "loss.teachers=[{guidance_scale=5.0}]", "prompts.balance=''", "train.groups=4", "train.lr=3e-4",
            "train.iterations=4", "train.warmup=0", "evaluation={every=0, images=2, grid_prompts=1, grid_samples=1}",
            "run.threads=1", "run.trackers=[]", "run.checkpoint_every=1", f"run.folder='{place / name}'", *settings,
        )  # fmt: skip

    return make


def test_a_run_without_rewards_learns_and_resumes_to_the_bit(run: Callable[..., flowgrpo.Config]) -> None:  # fmt: skip
    straight = run("straight")
    result = train(straight)
    assert result.finished
    folder = Path(straight.run.folder)
    lines = numbers(folder)
    assert lines[-1]["teacher/distance"] < 0.8 * lines[0]["teacher/distance"]
    assert not any(k.startswith(("reward", "score", "group/div")) for k in lines[0])
    assert result.evaluations[-1]["scores"] == {}
    assert "teacher" in (folder / "report.html").read_text("utf-8")
    assert (folder / "export").is_dir()

    first = run("stopped", "train.iterations=2")
    train(first)
    train(replace(first, train=replace(first.train, iterations=4)))
    assert numbers(Path(first.run.folder)) == lines


def test_scored_rollouts_have_rewards_and_cost_more(run: Callable[..., flowgrpo.Config]) -> None:
    config = run("scored", "train.iterations=1", "algorithm.score_rollouts=true", "rewards=[{model='jpeg_size'}]")  # fmt: skip
    train(config)
    (line,) = numbers(Path(config.run.folder))
    assert (line["nfe_per_prompt"], line["decodes_per_prompt"]) == (3, 1)
    assert line["reward"] == line["score/jpeg_size"]


def test_a_changed_teacher_is_refused_at_resume() -> None:
    from flowgrpo.training.learner import require_same_teachers

    require_same_teachers({}, {"a": "1"})
    require_same_teachers({"a": "1"}, {"a": "1"})
    with pytest.raises(ConfigError, match="the weights of a have changed"):
        require_same_teachers({"a": "1"}, {"a": "2"})


def test_equal_outputs_are_named() -> None:
    loss = DistillationLoss(teachers=(Teacher(guidance_scale=2.0),))
    assert "nothing to learn" in loss.warning({"teacher/distance": 0.0})
    assert loss.warning({"teacher/distance": 1e-9}) == ""


def test_teachers_that_are_missing_are_named_before_anything_is_loaded() -> None:
    for weights in ("model", "adapter"):
        config = flowgrpo.load(
            "quickstart_distillation",
            [f"loss.teachers=[{{path='/nope/x', weights='{weights}', guidance_scale=3.0}}]"],
        )
        with pytest.raises(ConfigError, match=r"loss\.teachers\[0\]\.path: no such f.* or f.*: /nope/x"):  # fmt: skip
            check_names(config, 1)
