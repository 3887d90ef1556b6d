"""What prompts say about their own call: sizes, condition images, in rollout and in training."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from flowgrpo.algorithms import FlowGRPO
from flowgrpo.config import Config, Model, Prompts, Run, Train
from flowgrpo.core.random import Random
from flowgrpo.core.steps import Window
from flowgrpo.core.transitions import CPS, DDIM, FlowSDE, StepwiseSDE
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.policy.arguments import batches
from flowgrpo.policy.probe import check_defined, check_scales, check_sizes, edited_as_squares
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from flowgrpo.training.learner import Learner
from tests.conftest import MakePolicy, noise_of, sampling_of
from tests.tiny import FAMILIES

RED, BLUE = (Image.new("RGB", (16, 16), c) for c in ("red", "blue"))
EDITS = [Prompt("paint it", images=[RED]), Prompt("paint it", images=[BLUE])]


def kontext(make_policy: MakePolicy) -> PipelinePolicy:
    """Edits whose image comes with the prompt, and whose area is that of the requested size."""
    sampling = sampling_of("flux_kontext")
    call = {k: v for k, v in sampling.call.items() if k not in ("image", "max_area")}
    return make_policy("flux_kontext", sampling=Sampling(**{**vars(sampling), "call": call}))


def brightness(media: Tensor, prompts: list[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


def test_only_what_can_share_a_call_shares_one() -> None:
    wide, plain = Prompt("a", width=32), Prompt("b")
    prompts = [plain, plain, plain, wide, *EDITS, EDITS[1], Prompt("c", negative="d"), plain]
    assert list(batches(prompts, 2)) == [
        range(2), range(2, 3), range(3, 4), range(4, 5), range(5, 7), range(7, 8), range(8, 9),
    ]  # fmt: skip


def test_every_sample_sees_its_own_image(make_policy: MakePolicy) -> None:
    policy = kontext(make_policy)
    same_start = noise_of(0, 1, 2, start=(0, 0, 0))
    red, blue, red_again = policy.images([EDITS[0], EDITS[1], EDITS[0]], same_start)
    assert (red - blue).abs().max() > 1e-3
    torch.testing.assert_close(red_again, red, atol=1e-5, rtol=0)


def test_a_condition_image_is_encoded_once(make_policy: MakePolicy) -> None:
    policy = kontext(make_policy)
    seen = []
    policy.models["vae"].encoder.register_forward_pre_hook(lambda _m, args: seen.append(len(args)))
    for _ in range(2):
        policy.images([EDITS[0]] * 2 + [EDITS[1]] * 2, noise_of(0, 1, 2, 3))
    assert len(seen) == 2


def test_prompts_of_several_sizes(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3")
    prompts = [Prompt("a"), Prompt("a", width=32), Prompt("a", height=32)]
    rollouts = list(policy.run(prompts, noise_of(0, 1, 2)))
    assert [tuple(r.media.shape[2:]) for r in rollouts if r.media is not None] == [
        (16, 16), (16, 32), (32, 16),
    ]  # fmt: skip


def test_edits_are_trained_on_with_their_own_image(
    make_policy: MakePolicy, accelerator: Accelerator
) -> None:
    """Replays see the image of the rollout: the first ratio is 1 for every action."""
    policy = kontext(make_policy)
    algorithm = FlowGRPO(group_size=2, transition=CPS(), steps=Window(start=0, size=2))
    scorer = RewardScorer([Reward(model=f"{__name__}:brightness")])
    groups = [Group(i, p) for i, p in enumerate(EDITS)]
    experience = algorithm.collect(policy, groups, scorer, Random(0).at("train", 0), 0)
    settings = Config(
        model=Model(path=""),
        algorithm=algorithm,
        loss=ClippedLoss(clip_range=0.1),
        rewards=(Reward(model=f"{__name__}:brightness"),),
        prompts=Prompts(train="", held_out=""),
        train=Train(iterations=1, groups=2, monitor_states=0),
        run=Run(folder=""),
    )
    learner = Learner(policy, settings.train, settings.loss, accelerator)
    advantages = algorithm.advantages(experience)
    metrics = learner.update(experience, advantages, Random(0).at("train", 0))
    assert metrics["ratio/deviation"] < 1e-5
    assert metrics["grad_norm"] > 0
    # The two images are replayed in separate batches; one of them may have nothing to learn from.
    flat = torch.where(experience.actions.group == 0, 0.0, advantages)
    assert learner.update(experience, flat, Random(0).at("train", 1))["grad_norm"] > 0
    scorer.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes_the_checks_before_a_run(name: str, make_policy: MakePolicy) -> None:
    """It makes the size that it is asked for, and gradients of its steps can be compared.

    CogVideoX's grid begins with mere noise.
    """
    policy = make_policy(name, weights=None)
    check_sizes(policy, [Prompt("a")], policy.sampling)
    flow = FAMILIES[name].prediction == "flow"
    transition = FlowSDE(noise_level=0.7) if flow else DDIM(eta=1.0)
    check_scales(policy, transition, range(policy.num_steps() - 1))


def test_a_transition_is_checked_at_each_of_its_steps(make_policy: MakePolicy) -> None:
    """Whatever the loss does with steps of little noise, and if there is one step only."""
    policy = make_policy("sd3", weights=None)
    check_sizes(policy, [Prompt("a")], policy.sampling)
    check_defined(policy, StepwiseSDE(), [1, 2])
    with pytest.raises(ValueError, match="step 0 has no density"):
        check_defined(policy, StepwiseSDE(), [0])


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("sd3", Prompt("a", width=21), r"cannot make 16 high, 21 wide: .*nearest .* 16 high, 24 wide"),
        ("flux", Prompt("a", height=21), r"it makes .*the nearest size that it makes is \d+ high"),
        ("wan_t2v", Prompt("a", num_frames=7), r"7 frames.* makes .* (5|9) frames"),
    ],
)  # fmt: skip
def test_a_size_that_is_not_made_is_refused_with_the_nearest(
    name: str, prompt: Prompt, message: str, make_policy: MakePolicy
) -> None:
    policy = make_policy(name)
    with pytest.raises(ValueError, match=message):
        check_sizes(policy, [prompt], policy.sampling)


def test_a_model_that_overflows_is_refused(make_policy: MakePolicy) -> None:
    policy = make_policy("flux", dtype="float16")
    check_sizes(policy, [Prompt("a")], policy.sampling)
    with torch.no_grad():
        policy.denoisers["transformer"].x_embedder.weight.mul_(1e6)
    with pytest.raises(OverflowError, match=r"overflows in torch.float16: set model.dtype"):
        check_sizes(policy, [Prompt("a")], policy.sampling)


def test_kontext_makes_the_size_that_is_asked_for(make_policy: MakePolicy) -> None:
    """It would scale every size to 1024 x 1024 pixels, unless it is told an area."""
    policy = kontext(make_policy)
    wide = replace(EDITS[0], width=32)
    check_sizes(policy, [EDITS[0], wide], policy.sampling)
    free = replace(policy.sampling, height=None, width=None)
    assert edited_as_squares(policy, [*EDITS, Prompt("a")], free) == EDITS
    assert edited_as_squares(policy, [wide, EDITS[0]], policy.sampling) == []
    given = replace(policy.sampling, call={**policy.sampling.call, "max_area": 1024})
    with pytest.raises(ValueError, match="cannot make 16 high, 16 wide: it makes 32 high, 32 wide"):
        check_sizes(policy, EDITS[:1], given)


def test_an_image_for_a_pipeline_that_takes_none(make_policy: MakePolicy) -> None:
    policy = make_policy("sd3")
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline takes no argument 'image'"):
        policy.images([EDITS[0]], noise_of(0))
