"""The adversarial reward: its score and its updates by hand, learning, and going on from a state."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms import functional as TF
from transformers import Dinov2Model

from flowgrpo.data.prompts import Prompt
from reward_models.adversarial import Adversarial
from reward_models.shared.pictures import IMAGENET_MEAN, IMAGENET_STD
from tests import zoo
from tests.zoo import noise


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv2 and three flat pictures as references."""
    folder = zoo.save_dino(tmp_path_factory.mktemp("dino"))
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), color).save(folder / f"{i}.png")
    return folder


def make(dino: Path, **options: Any) -> Adversarial:
    options = {"root": str(dino), "side": 28, "device": "cpu", "lr": 1e-2} | options
    return Adversarial(str(dino), **options)


PROMPTS = [Prompt(f"picture {i}", metadata={"reference": f"{i}.png"}) for i in range(3)]


def tokens(dino: Path, images: list[Image.Image]) -> Tensor:
    """DINOv2's tokens of length 1, image by image."""
    model, found = Dinov2Model.from_pretrained(dino).eval(), []
    for image in images:
        pixels = TF.to_tensor(image.resize((28, 28), Image.Resampling.BICUBIC))
        pixels = TF.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))
        with torch.no_grad():
            found.append(model(pixel_values=pixels[None]).last_hidden_state[0])
    stacked = torch.stack(found)
    return stacked / stacked.norm(dim=-1, keepdim=True)


def said(head: Any, seen: Tensor) -> Tensor:
    first, _, last = head
    hidden = F.gelu(seen @ first.weight.T + first.bias)
    return (hidden @ last.weight.T + last.bias).squeeze(-1)


def test_score_is_the_weighted_mean_of_the_heads(dino: Path) -> None:
    reward, media = make(dino), noise(3, 45, 61)
    values = said(reward.head, tokens(dino, zoo.pil(media)))
    assert values.shape == (3, 1 + 4)
    expected = 0.7 * values[:, 0] + 0.3 * values[:, 1:].mean(1)
    scores = reward(media, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    alone = torch.cat([reward(m[None], [p]) for m, p in zip(media, PROMPTS, strict=True)])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
    media[1, 0, 0, 0] = math.nan
    assert reward(media, PROMPTS).isnan().tolist() == [False, True, False]


def test_update_is_a_step_on_the_hinge_loss(dino: Path) -> None:
    reward, media = make(dino), noise(3, 45, 61)
    head = copy.deepcopy(reward.head)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    references = [Image.open(dino / f"{i}.png") for i in range(3)]
    real, fake = said(head, tokens(dino, references)), said(head, tokens(dino, zoo.pil(media)))

    def hinge(a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * ((1 - a).clamp(min=0).mean() + (1 + b).clamp(min=0).mean())

    loss = hinge(real[:, 0], fake[:, 0]) + 0.3 * hinge(real[:, 1:], fake[:, 1:])
    loss.backward()
    optimizer.step()
    right = [*(real[:, 0] > 0).tolist(), *(fake[:, 0] < 0).tolist()]
    measured = reward.update(media, PROMPTS)  # 64 patches are more than there are: all are drawn
    assert measured == pytest.approx({"loss": loss.item(), "accuracy": np.mean(right)}, abs=1e-5)
    for name, weight in head.state_dict().items():
        torch.testing.assert_close(reward.head.state_dict()[name], weight, rtol=0, atol=1e-5)


def test_it_learns_to_tell_them_apart_and_draws_few_patches(dino: Path) -> None:
    reward = make(dino, patches=2, steps=5)
    before = {k: v.clone() for k, v in reward.model.state_dict().items()}
    losses = [reward.update(noise(3, 32, 32, seed=i), PROMPTS) for i in range(12)]
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"]
    assert losses[-1]["accuracy"] == 1
    flat = torch.stack([torch.eye(3)[i][:, None, None].expand(3, 30, 40) for i in (0, 2)])
    flat = flat.clamp(0, 1)
    assert reward(flat, PROMPTS[:2]).min() > reward(noise(3, 32, 32, seed=50), PROMPTS).max() + 0.5
    for name, tensor in reward.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_goes_on_from_its_state_as_if_never_stopped(dino: Path, tmp_path: Path) -> None:
    straight = make(dino, patches=1)
    for i in range(3):
        straight.update(noise(3, 32, 32, seed=i), PROMPTS)
    save_file(straight.state(), tmp_path / "adversarial.safetensors")
    again = make(dino, patches=1, seed=9)
    again.restore(load_file(tmp_path / "adversarial.safetensors"))
    for reward in (straight, again):
        for i in (3, 4):
            reward.update(noise(3, 32, 32, seed=i), PROMPTS)
    a, b = straight.state(), again.state()
    assert a.keys() == b.keys()
    assert any("exp_avg" in k for k in a)
    assert all(torch.equal(a[k], b[k]) for k in a)
    media = noise(3, 32, 32, seed=7)
    assert torch.equal(straight(media, PROMPTS), again(media, PROMPTS))


def test_a_state_is_a_copy_and_a_fresh_one_can_be_restored(dino: Path) -> None:
    reward, media = make(dino), noise(3, 32, 32)
    fresh, scores = reward.state(), reward(media, PROMPTS)
    reward.update(media, PROMPTS)
    assert not torch.equal(reward(media, PROMPTS), scores)
    reward.restore(fresh)
    assert torch.equal(reward(media, PROMPTS), scores)


def test_refuses_a_state_that_does_not_fit(dino: Path) -> None:
    reward = make(dino)
    reward.update(noise(3, 32, 32), PROMPTS)
    state = reward.state()
    for absent in ("random", "head.0.bias", "optimizer.1.step"):
        cut = {k: v for k, v in state.items() if k != absent}
        if absent.startswith("optimizer"):
            cut = {k: v for k, v in state.items() if not k.startswith("optimizer.1.")}
        with pytest.raises(ValueError, match=r"incomplete|missing"):
            reward.restore(cut)


def test_broken_images_take_no_part_in_updates(dino: Path) -> None:
    whole, broken = make(dino), make(dino)
    media = noise(3, 32, 32)
    expected = whole.update(media[:2], PROMPTS[:2])
    media[2, 0, 0, 0] = math.nan
    assert broken.update(media, PROMPTS) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="without NaN"):
        broken.update(media[2:], PROMPTS[2:])


def test_references_of_a_folder_or_of_the_prompt(dino: Path, tmp_path: Path) -> None:
    reward = make(dino, references=str(dino))
    assert reward.update(noise(3, 32, 32), [Prompt("no metadata")] * 3)["loss"] > 0
    drawn = {reward._reference(PROMPTS[0]).name for _ in range(40)}
    assert drawn == {"0.png", "1.png", "2.png"}
    with pytest.raises(ValueError, match="needs metadata 'reference'"):
        make(dino).update(noise(1, 32, 32), [Prompt("no metadata")])
    reward.check([Prompt("no metadata")])
    make(dino).check(PROMPTS)
    with pytest.raises(ValueError, match="needs metadata 'reference'"):
        make(dino).check([*PROMPTS, Prompt("no metadata")])
    with pytest.raises(ValueError, match="no folder with images"):
        make(dino, references=str(tmp_path))


def test_precision_and_options(dino: Path) -> None:
    half, media = make(dino, dtype="bfloat16"), noise(3, 32, 32)
    assert half.head[0].weight.dtype == torch.float32
    torch.testing.assert_close(half(media, PROMPTS), make(dino)(media, PROMPTS), rtol=0, atol=0.05)
    half.update(media, PROMPTS)
    for options in ({"patches": 0}, {"lr": 0.0}, {"share": 1.5}, {"side": 30}):
        with pytest.raises(ValueError, match="got"):
            make(dino, **options)


def test_layers_have_a_head_each_and_the_highest_patches_may_count(dino: Path) -> None:
    media = noise(3, 45, 61)
    reward = make(dino, layers=[0, 1], top_share=0.5, share=0.25)
    model = Dinov2Model.from_pretrained(dino).eval()
    expected = []
    for image in zoo.pil(media):
        pixels = TF.to_tensor(image.resize((28, 28), Image.Resampling.BICUBIC))
        pixels = TF.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))
        with torch.no_grad():
            states = model(pixel_values=pixels[None], output_hidden_states=True).hidden_states
        layers = []
        for head, state in zip(reward.head, states[1:], strict=True):
            values = said(head, F.normalize(state[0], dim=-1))
            layers.append(0.25 * values[0] + 0.75 * values[1:].sort().values[-2:].mean())
        expected.append(torch.stack(layers).mean())
    torch.testing.assert_close(reward(media, PROMPTS), torch.stack(expected), rtol=0, atol=1e-5)
    losses = [reward.update(noise(3, 32, 32, seed=i), PROMPTS)["loss"] for i in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    again = make(dino, layers=[0, 1], top_share=0.5, share=0.25, seed=3)
    again.restore(reward.state())
    assert torch.equal(again(media, PROMPTS), reward(media, PROMPTS))
    for layers in ([2], [0, 0], [-1]):
        with pytest.raises(ValueError, match=r"different blocks of .*0 to 1"):
            make(dino, layers=layers)


def test_options_of_the_released_code(dino: Path) -> None:
    media = noise(2, 60, 90)
    released = make(dino, betas=[0.5, 0.999], antialias=False)
    assert released.optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    # The released code resizes the batch in memory.
    pixels = F.interpolate((media * 255).round() / 255, (28, 28), mode="bicubic")
    pixels = TF.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))
    with torch.no_grad():
        seen = Dinov2Model.from_pretrained(dino).eval()(pixel_values=pixels).last_hidden_state
    values = said(released.head, F.normalize(seen, dim=-1))
    expected = 0.7 * values[:, 0] + 0.3 * values[:, 1:].mean(1)
    torch.testing.assert_close(released(media, PROMPTS[:2]), expected, rtol=0, atol=1e-5)
    for options in ({"betas": [0.5]}, {"betas": [0.5, 1.0]}, {"top_share": 0.0}):
        with pytest.raises(ValueError, match="got"):
            make(dino, **options)


def test_it_takes_turns_as_the_released_code(dino: Path) -> None:
    """With ``d_times = 10``, epochs 9, 19, ... train the policy alone, and the others the head."""
    assert {make(dino).trains(i) for i in range(20)} == {"both"}
    turns = [make(dino, policy_every=10).trains(i) for i in range(20)]
    assert turns == (["reward"] * 9 + ["policy"]) * 2
    with pytest.raises(ValueError, match="policy_every and batch_size must be at least 1"):
        make(dino, policy_every=0)
