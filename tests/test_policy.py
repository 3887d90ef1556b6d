"""A pipeline as a policy: sampling, recording, replaying, branching, decoding."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import CPS, ODE
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Full, PipelinePolicy, Sampling
from flowgrpo.policy.rollout import Rollout
from tests.conftest import MakePolicy, noise_of, sampling_of, transition_of

NAMES = ["sd15", "sdxl", "sd3", "flux", "wan_t2v"]
PROMPTS = [
    Prompt(text)
    for text in ("a red cube", "two dogs", "a cat on a tree at night", "a boat", "the moon")
]
T = 4
STOCHASTIC = range(T - 1)


@pytest.fixture(scope="module")
def policies(make_policy: MakePolicy) -> Callable[[str], PipelinePolicy]:
    """One policy per family; tests leave its weights alone."""
    made: dict[str, PipelinePolicy] = {}

    def policy(name: str) -> PipelinePolicy:
        if name not in made:
            made[name] = make_policy(name)
        made[name].batch_size = 64
        return made[name]

    return policy


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy(policies: Callable[[str], PipelinePolicy], name: str) -> PipelinePolicy:
    return policies(name)


def roll(policy: PipelinePolicy, name: str, noise: SampleNoise, **options: Any) -> Rollout:
    """One batch with every step but the last stochastic and recorded."""
    settings: dict[str, Any] = {
        "stochastic": STOCHASTIC,
        "transition": transition_of(name),
        "record": STOCHASTIC,
    }
    (rollout,) = policy.run(PROMPTS[: len(noise)], noise, **settings | options)
    return rollout


def media(policy: PipelinePolicy, name: str, noise: SampleNoise, **options: Any) -> Tensor:
    """Decoded media of all batches of a stochastic rollout."""
    rollouts = policy.run(
        PROMPTS, noise, stochastic=STOCHASTIC, transition=transition_of(name), **options
    )
    return torch.cat([r.media for r in rollouts if r.media is not None])


def test_batch_size_changes_nothing(policy: PipelinePolicy, name: str) -> None:
    images = {}
    for policy.batch_size in (1, 2, 5):
        images[policy.batch_size] = media(policy, name, noise_of(*range(5)))
        assert torch.equal(images[policy.batch_size], media(policy, name, noise_of(*range(5))))
    assert images[5].dtype == torch.float32
    assert 0 <= images[5].min() < images[5].max() <= 1
    torch.testing.assert_close(images[1], images[5], atol=1e-5, rtol=0)
    torch.testing.assert_close(images[2], images[5], atol=1e-5, rtol=0)


def test_noise_follows_the_stream(policy: PipelinePolicy, name: str) -> None:
    prompts = [PROMPTS[0]] * 3
    noise = noise_of(3, 4, 3)
    (rollout,) = policy.run(
        prompts, noise, stochastic=STOCHASTIC, transition=transition_of(name), record=[0]
    )
    assert rollout.media is not None
    torch.testing.assert_close(rollout.media[0], rollout.media[2], atol=1e-5, rtol=0)
    assert (rollout.media[0] - rollout.media[1]).abs().max() > 0.05
    # Another draw of the initial latents than of the first step, and of each step than the next.
    (record,) = rollout.records
    assert not torch.equal(record.x, noise.at_step(0, record.x.shape[1:]))
    assert not torch.equal(
        noise.at_step(0, record.x.shape[1:]), noise.at_step(1, record.x.shape[1:])
    )


def test_initial_streams_are_shared_starts(policy: PipelinePolicy, name: str) -> None:
    noise = noise_of(0, 1, 2, start=(5, 5, 6))
    prompts = [PROMPTS[0]] * 3
    (rollout,) = policy.run(
        prompts, noise, stochastic=STOCHASTIC, transition=transition_of(name), record=STOCHASTIC
    )
    first, x = rollout.records[0], rollout.records[0].x
    assert torch.equal(x[0], x[1])
    assert not torch.equal(x[0], x[2])
    assert not torch.equal(first.x_next[0], first.x_next[1])
    assert torch.equal(x, roll(policy, name, noise_of(5, 5, 6)).records[0].x)


def test_stochastic_steps_add_the_streams_noise(policy: PipelinePolicy, name: str) -> None:
    noise = noise_of(0, 1)
    rollout = roll(policy, name, noise, stochastic=[1], record=range(T))
    assert [v.step for v in rollout.records] == list(range(T))
    for record in rollout.records:
        if record.step == 1:
            fresh = noise.at_step(1, record.x.shape[1:])
            assert torch.equal(record.x_next, record.gaussian.mean + record.gaussian.std * fresh)
            assert record.gaussian.std > 0.05
        else:
            ode = ODE()(record.x, record.prediction, record.interval)
            assert record.gaussian.std == 0
            assert torch.equal(record.x_next, ode.mean)


def test_replay_is_the_rollout(policy: PipelinePolicy, name: str) -> None:
    rollout = roll(policy, name, noise_of(0, 1, 2))
    for record in rollout.records:
        again = policy.replay(PROMPTS[:3], record.x, record.step, transition_of(name))
        old = record.gaussian.log_prob(record.x_next)
        assert old.dtype == torch.float32
        assert torch.equal(again.prediction.output, record.prediction.output)
        log_prob = again.gaussian.log_prob(record.x_next)
        assert torch.equal(log_prob, old)
        assert log_prob.requires_grad
        # A replay takes no notice of other samples, and others have another likelihood.
        alone = policy.replay(PROMPTS[1:2], record.x[1:2], record.step, transition_of(name))
        torch.testing.assert_close(
            alone.gaussian.log_prob(record.x_next[1:2]), log_prob[1:2], atol=2e-5, rtol=0
        )
        assert (again.gaussian.log_prob(record.x_next.roll(1, 0)) < log_prob - 0.1).all()


def test_states_follow_one_another(policy: PipelinePolicy, name: str) -> None:
    rollout = roll(policy, name, noise_of(0, 1), record=range(T))
    for before, after in zip(rollout.records, rollout.records[1:], strict=False):
        assert torch.equal(before.x_next, after.x)
        assert before.interval.noise_next == after.interval.noise
        assert before.interval.noise_next < before.interval.noise
    assert rollout.records[-1].interval.noise_next < 0.1


def test_a_sub_grid_takes_larger_steps(policy: PipelinePolicy, name: str) -> None:
    full = {v.step: v.interval for v in roll(policy, name, noise_of(0), record=range(T)).records}
    before = policy.num_evaluations
    coarse = roll(policy, name, noise_of(0, 1), nodes=[0, 2, 4], stochastic=[0], record=[0, 2])
    assert policy.num_evaluations - before == 4
    assert [v.step for v in coarse.records] == [0, 2]
    assert coarse.media is not None
    for record in coarse.records:
        assert record.interval.noise == full[record.step].noise
        assert record.interval.noise_next == full[record.step + 1].noise_next
        assert record.interval.signal_next == full[record.step + 1].signal_next
    assert torch.equal(coarse.records[0].x_next, coarse.records[1].x)
    # The model sees the same times on every grid.
    x = coarse.records[1].x
    fine = policy.replay(PROMPTS[:2], x, 2, CPS())
    assert torch.equal(fine.prediction.output, coarse.records[1].prediction.output)


def test_a_part_of_the_grid_ends_in_a_state(policy: PipelinePolicy, name: str) -> None:
    whole = roll(policy, name, noise_of(0, 1))
    part = roll(policy, name, noise_of(0, 1), nodes=[0, 1, 2], decode=False)
    assert part.media is None
    assert part.x is not None
    assert torch.equal(part.x, whole.records[1].x_next)
    nothing = roll(policy, name, noise_of(0, 1), nodes=[0], decode=False)
    assert nothing.x is not None
    assert torch.equal(nothing.x, whole.records[0].x)
    assert nothing.records == []


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_branch_completes_the_same_image(policy: PipelinePolicy, name: str, start: int) -> None:
    noise = noise_of(0, 1, 2)
    whole = roll(policy, name, noise, record=range(T))
    nodes, x = range(start, T + 1), whole.records[start].x
    branch = roll(policy, name, noise, nodes=nodes, x=x)
    assert whole.media is not None
    assert branch.media is not None
    assert torch.equal(branch.media, whole.media)
    # Given states are split among batches as the samples are.
    policy.batch_size = 2
    options: dict[str, Any] = {"stochastic": STOCHASTIC, "transition": transition_of(name)}
    batches = list(policy.run(PROMPTS[:3], noise, nodes=nodes, x=x, **options))
    assert [list(b.rows) for b in batches] == [[0, 1], [2]]
    split = torch.cat([b.media for b in batches if b.media is not None])
    torch.testing.assert_close(split, whole.media, atol=1e-5, rtol=0)


def test_decoding_a_last_state(policy: PipelinePolicy, name: str) -> None:
    rollout = roll(policy, name, noise_of(0, 1, 2), record=[T - 1])
    (last,) = rollout.records
    assert rollout.media is not None
    assert torch.equal(policy.decode(PROMPTS[:3], last.x_next), rollout.media)
    policy.batch_size = 2
    decoded = policy.decode(PROMPTS[:3], last.x_next)
    torch.testing.assert_close(decoded, rollout.media, atol=1e-5, rtol=0)


def test_media_have_their_layout(policy: PipelinePolicy, name: str) -> None:
    images = policy.images(PROMPTS[:2], noise_of(0, 1))
    assert images.shape == ((2, 5, 3, 16, 16) if name == "wan_t2v" else (2, 3, 16, 16))


def test_work_is_counted(policy: PipelinePolicy, name: str) -> None:
    policy.batch_size = 2
    evaluations, decodes = policy.num_evaluations, policy.num_decodes

    def spent() -> tuple[int, int]:
        return policy.num_evaluations - evaluations, policy.num_decodes - decodes

    images = policy.images(PROMPTS[:3], noise_of(0, 1, 2))
    assert spent() == (3 * T, 3)
    (first, second) = policy.run(PROMPTS[:3], noise_of(0, 1, 2), nodes=[0, 1, 2], decode=False)
    assert spent() == (3 * T + 3 * 2, 3)
    assert first.x is not None
    assert second.x is not None
    policy.decode(PROMPTS[:3], torch.cat([first.x, second.x]))
    assert spent() == (3 * T + 3 * 2, 6)
    assert len(images) == 3


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "wan_t2v"])
def test_negative_prompts_belong_to_their_sample(policy: PipelinePolicy) -> None:
    def images(*negatives: str | None) -> Tensor:
        prompts = [Prompt(p.text, negative=n) for p, n in zip(PROMPTS, negatives, strict=False)]
        return policy.images(prompts, noise_of(*range(len(prompts))))

    dark, ugly, plain = images("dark", "dark"), images("ugly dog", "ugly dog"), images(None, None)
    assert (dark - ugly).flatten(1).abs().amax(1).min() > 1e-3
    assert (dark - plain).flatten(1).abs().amax(1).min() > 1e-3
    mixed = images("dark", "ugly dog")
    torch.testing.assert_close(mixed[0], dark[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[1], ugly[1], atol=1e-5, rtol=0)
    # Those without one go in a call of their own.
    mixed = images("dark", None)
    torch.testing.assert_close(mixed[0], dark[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-5, rtol=0)


def test_bfloat16_rounds_nothing_but_the_model(make_policy: MakePolicy, name: str) -> None:
    policy = make_policy(name, dtype="bfloat16")
    assert policy.trainable is not None
    trained = set(policy.trainable.parameters.values())
    for model in policy.denoisers.values():
        assert all(p.dtype == torch.float32 for p in model.parameters() if p in trained)
        assert any(p.dtype == torch.bfloat16 for p in model.parameters())
    assert policy.models["vae"].dtype == torch.float32

    rollout = roll(policy, name, noise_of(0, 1, 2), record=range(T))
    assert rollout.media is not None
    assert rollout.media.isfinite().all()
    for record, after in zip(rollout.records, rollout.records[1:], strict=False):
        assert record.x.dtype == record.x_next.dtype == torch.float32
        assert not torch.equal(record.x_next, record.x_next.bfloat16().float())
        assert torch.equal(record.x_next, after.x)
        again = policy.replay(PROMPTS[:3], record.x, record.step, transition_of(name))
        log_prob = again.gaussian.log_prob(record.x_next)
        assert log_prob.dtype == torch.float32
        ratio = torch.exp(log_prob - record.gaussian.log_prob(record.x_next))
        torch.testing.assert_close(ratio, torch.ones(3), atol=1e-3, rtol=0)
        log_prob.sum().backward()
    gradients = [p.grad for p in trained if p.grad is not None]
    assert len(gradients) > len(trained) / 2
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_bfloat16_keeps_times_exact(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3", dtype="bfloat16")
    seen: list[Tensor] = []
    policy.denoisers["transformer"].time_text_embed.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0])
    )
    rollout = roll(policy, "sd3", noise_of(0), record=range(T))
    expected = [1000 * v.interval.noise for v in rollout.records]
    assert any(float(torch.tensor(t).bfloat16()) != t for t in expected)
    torch.testing.assert_close(torch.stack([t[0] for t in seen]), torch.tensor(expected))


def test_rounding_pipelines_keep_their_state(make_policy: MakePolicy) -> None:
    """CogVideoX casts its latents to the precision of the prompt after every step."""
    policy = make_policy("cogvideox", dtype="bfloat16")
    rollout = roll(policy, "cogvideox", noise_of(0, 1), record=range(T))
    for before, after in zip(rollout.records, rollout.records[1:], strict=False):
        assert torch.equal(before.x_next, after.x)


def test_full_weights_stay_fp32(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3", dtype="bfloat16", weights=Full())
    assert all(p.dtype == torch.float32 for p in policy.denoisers["transformer"].parameters())
    exact = make_policy("sd3", weights=Full())
    (a,) = roll(policy, "sd3", noise_of(0), record=[0]).records
    (b,) = roll(exact, "sd3", noise_of(0), record=[0]).records
    assert not torch.equal(a.prediction.output, b.prediction.output)
    torch.testing.assert_close(a.prediction.output, b.prediction.output, atol=0.1, rtol=0)


def test_models_are_frozen_and_in_eval_mode(policy: PipelinePolicy) -> None:
    assert policy.trainable is not None
    trained = {id(p) for p in policy.trainable.parameters.values()}
    for model in policy.models.values():
        assert not model.training
        assert {id(p) for p in model.parameters() if p.requires_grad} <= trained


def test_states_that_do_not_fit_are_refused(policies: Callable[[str], PipelinePolicy]) -> None:
    policy = policies("sd3")
    with pytest.raises(
        ValueError, match=r"cannot begin with this state.*\(1, 16, 8, 8\).*\(1, 16, 9, 9\)"
    ):
        list(policy.run(PROMPTS[:1], noise_of(0), nodes=[2, 3], x=torch.zeros(1, 16, 9, 9)))
    with pytest.raises(ValueError, match="not an ascending part of 0 to 4"):
        list(policy.run(PROMPTS[:1], noise_of(0), nodes=[2, 1]))
    with pytest.raises(ValueError, match="not an ascending part of 0 to 4"):
        list(policy.run(PROMPTS[:1], noise_of(0), nodes=[3, 5]))
    # An error leaves nothing behind.
    assert policy.images(PROMPTS[:1], noise_of(0)).isfinite().all()


def test_pipelines_that_cannot_be_entered_are_refused(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3", weights=None)
    del policy.pipeline.prepare_latents
    with pytest.raises(ValueError, match="prepares no latents"):
        policy.replay(PROMPTS[:1], torch.zeros(1, 16, 8, 8), 1, CPS())


def test_sampling_can_differ_from_call_to_call(policies: Callable[[str], PipelinePolicy]) -> None:
    policy = policies("sd3")
    usual = policy.images(PROMPTS[:2], noise_of(0, 1))
    before = policy.num_evaluations
    more = policy.images(PROMPTS[:2], noise_of(0, 1), sampling_of("sd3", num_steps=6))
    assert policy.num_evaluations - before == 12
    weaker = policy.images(PROMPTS[:2], noise_of(0, 1), sampling_of("sd3", guidance_scale=1.5))
    assert (more - usual).abs().max() > 1e-3
    assert (weaker - usual).abs().max() > 1e-3
    assert torch.equal(policy.images(PROMPTS[:2], noise_of(0, 1)), usual)


@pytest.mark.parametrize("name", ["sd3", "ltx2"])
def test_nothing_of_a_call_outlives_it(make_policy: MakePolicy, name: str) -> None:
    """A replay's record has the graph of its activations: it must go with the last reference."""
    policy, transition = make_policy(name), transition_of(name)
    (rollout,) = policy.run(PROMPTS[:1], noise_of(0), record=[1], decode=False)
    gc.collect()
    gc.disable()
    try:
        record = policy.replay(PROMPTS[:1], rollout.records[0].x, 1, transition)
        assert policy.scheduler.call.prepared == policy.scheduler.loop.records == []
        graph = weakref.ref(record.prediction.output)
        del record
        assert graph() is None
    finally:
        gc.enable()


def test_a_replay_draws_no_initial_latents(policy: PipelinePolicy, name: str) -> None:
    class Draws(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.number += "randn" in str(function)
            return function(*args, **kwargs or {})

    transition = transition_of(name)
    with Draws() as drawn:
        (rollout,) = policy.run(PROMPTS[:2], noise_of(0, 1), record=[1], decode=False)
    with Draws() as replayed, torch.no_grad():
        policy.replay(PROMPTS[:2], rollout.records[0].x, 1, transition)
    assert drawn.number == 2
    assert replayed.number == 0


def test_settings_are_imported_without_torch() -> None:
    code = (
        "import sys, flowgrpo.policy; from flowgrpo.policy import Full, LoRA, Memory, Noise, Sampling;"
        "Memory().check(False); assert not {'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["flux", "wan_t2v"])
def test_a_fixed_shift_replaces_the_grid_of_the_pipeline(
    name: str, make_policy: MakePolicy
) -> None:
    """DanceGRPO's grid for shift 3 and four steps, by hand: u = 1, 3/4, 1/2, 1/4, 0."""
    policy = make_policy(name, sampling=sampling_of(name, num_steps=4))
    noise = SampleNoise([Random(0)])
    prompt = [Prompt("a red cube")]
    plain = policy.images(prompt, noise)
    own = [policy.scheduler.interval(k, k + 1).noise for k in range(4)]
    shifted = replace(policy.sampling, shift=3.0)
    images = policy.images(prompt, noise, shifted)
    grid = [policy.scheduler.interval(k, k + 1).noise for k in range(4)]
    assert grid == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert policy.scheduler.interval(3, 4).noise_next == 0
    assert not torch.equal(images, plain)
    assert torch.equal(policy.images(prompt, noise), plain)
    assert [policy.scheduler.interval(k, k + 1).noise for k in range(4)] == own


def test_a_fixed_shift_is_for_flows(make_policy: MakePolicy) -> None:
    with pytest.raises(ValueError, match=r"sampling\.shift = 3 is for rectified-flow pipelines"):
        make_policy("sd15", sampling=replace(sampling_of("sd15"), shift=3.0))


@pytest.mark.parametrize(
    ("name", "grid"),
    [("flux", {"sigmas": (1.0, 0.4)}), ("sdxl", {"timesteps": (999.0, 499.0)})],
)
def test_two_steps_on_a_grid_of_ones_own(
    name: str, grid: dict[str, tuple[float, ...]], make_policy: MakePolicy
) -> None:
    """One stochastic step is enough: it replays, and gradients reach the weights."""
    sampling = sampling_of(name, num_steps=2, **grid)
    policy = make_policy(name, sampling=sampling)
    prompts, transition = [Prompt("a red cube")] * 2, transition_of(name)
    (rollout,) = policy.run(
        prompts, noise_of(0, 1), stochastic=[0], transition=transition, record=[0]
    )
    assert policy.num_evaluations == 4
    assert policy.scheduler.timesteps.tolist() != make_grid(policy, sampling)
    (record,) = rollout.records
    again = policy.replay(prompts, record.x, 0, transition)
    log_prob = again.gaussian.log_prob(record.x_next)
    torch.testing.assert_close(log_prob, record.gaussian.log_prob(record.x_next), atol=1e-5, rtol=0)
    log_prob.sum().backward()
    assert policy.trainable is not None
    assert any(p.grad is not None and p.grad.any() for p in policy.trainable.parameters.values())


def make_grid(policy: PipelinePolicy, sampling: Sampling) -> list[float]:
    """The timesteps of the pipeline's own grid."""
    plain = replace(sampling, sigmas=(), timesteps=())
    policy.images([Prompt("a red cube")], noise_of(0), plain)
    return [float(t) for t in policy.scheduler.timesteps]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigmas": (1.0, 0.5, 0.2)}, r"sigmas has 3 values and num_steps is 2; set num_steps = 3"),
        ({"sigmas": (0.5, 1.0)}, "must fall from noise to data"),
        ({"sigmas": (1.0, 0.0)}, "the end of the last step, 0, is not given"),
        ({"sigmas": (1.0, 0.5), "timesteps": (999.0, 499.0)}, "both set the grid; remove one"),
        ({"sigmas": (1.0, 0.5), "shift": 3.0}, "both set the grid; remove one"),
        ({"call": {"sigmas": [1.0, 0.5]}}, r"has a key of its own: sampling\.sigmas"),
        ({"timesteps": (999.0, 499.0)}, "takes no argument 'timesteps'"),
    ],
)
def test_grids_that_contradict_each_other_are_refused(
    changes: dict[str, Any], message: str, policies: Callable[[str], PipelinePolicy]
) -> None:
    policy = policies("flux")
    with pytest.raises(ValueError, match=message):
        policy.check_sampling(sampling_of("flux", num_steps=2, **changes))
