"""EditReward on a tiny Qwen2.5-VL, against the plain model and preprocessing by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from flowgrpo.data.prompts import Prompt
from reward_models.edit_reward import EditReward
from reward_models.shared.templates import template
from tests import zoo
from tests.zoo import noise

SOURCE, RESULT = noise(1, 40, 40, seed=3), noise(2, 64, 48)
EDITS = [Prompt(t, images=zoo.pil(SOURCE)) for t in ("add a {hat}", "a red cube")]
Make = Callable[..., EditReward]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_qwen25_vl(tmp_path_factory.mktemp("qwen25"), [])


@pytest.fixture(scope="module")
def state(base: Path) -> dict[str, Tensor]:
    return zoo.edit_reward_state(base)


@pytest.fixture(scope="module")
def make(base: Path, state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("edit_reward")
    save_file(state, folder / "model.safetensors")

    def made(model: Path = folder, **options: Any) -> EditReward:
        return EditReward(str(model), base=str(base), dtype="float32", device="cpu", **options)

    return made


def by_hand(base: Path, state: dict[str, Tensor], question: str, head: str) -> float:
    """The first output of a head for one edit: the source at 448x448, the result at 532x392."""
    processor = Qwen2_5_VLProcessor.from_pretrained(base)
    processor.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base).eval()
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("rm_heads")})
    images = [
        pil_to_tensor(zoo.pil(m[:1])[0].resize(size))
        for m, size in ((SOURCE, (448, 448)), (RESULT, (392, 532)))
    ]
    seen = processor.image_processor(images, do_resize=False, return_tensors="pt")
    spans = [
        f"<|vision_start|>{'<|image_pad|>' * (int(g.prod()) // 4)}<|vision_end|>"
        for g in seen["image_grid_thw"]
    ]
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{''.join(spans)}{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
            output_hidden_states=True,
            **seen,
        ).hidden_states[-1][0]
    (place,) = (ids[0] == processor.tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero()
    x = hidden[int(place)]
    for n in (0, 3, 5):
        x = state[f"{head}.{n}.weight"] @ x + state[f"{head}.{n}.bias"]
        x = x.relu() if n < 5 else x
    return float(x[0])


def test_it_is_the_mean_of_both_heads_on_their_questions(
    base: Path, state: dict[str, Tensor], make: Make
) -> None:
    reward = make()
    expected = [
        by_hand(
            base,
            state,
            template(f"edit_reward_{name}").replace("{text_prompt}", EDITS[0].text),
            f"rm_heads.head_{n}",
        )
        for n, name in enumerate(("following", "quality"))
    ]
    assert abs(expected[0] - expected[1]) > 0.05
    found = reward.dimensions(RESULT, EDITS)
    assert found[0].tolist() == pytest.approx(expected, abs=3e-3)
    scores = reward(RESULT, EDITS)
    assert scores[0].item() == pytest.approx(sum(expected) / 2, abs=3e-3)
    alone = torch.cat(
        [make(batch_size=1)(r[None], [e]) for r, e in zip(RESULT, EDITS, strict=True)]
    )
    torch.testing.assert_close(alone, scores, rtol=0, atol=2e-3)
    broken = RESULT.clone()
    broken[0, 0, 0, 0] = math.nan
    assert reward(broken, EDITS).isnan().tolist() == [True, False]


def test_it_needs_the_picture_before_the_edit_and_all_weights(
    make: Make, state: dict[str, Tensor], tmp_path: Path
) -> None:
    make().check(EDITS)
    with pytest.raises(ValueError, match="no condition image"):
        make().check([Prompt("a")])
    with pytest.raises(ValueError, match="special token"):
        make()(RESULT[:1], [Prompt("<|Reward|>", images=EDITS[0].images)])
    for drop in ("rm_heads.head_1.3.weight", "model.visual.merger.mlp.0.bias"):
        save_file({k: v for k, v in state.items() if k != drop}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="1 weights are missing"):
            make(tmp_path)
