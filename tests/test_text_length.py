"""Prompts that text encoders do not read in full, and negative prompts that nothing reads."""

from dataclasses import replace

import pytest

from flowgrpo.config import ConfigError
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy import Sampling
from flowgrpo.policy.probe import ignores_negatives
from flowgrpo.policy.text_length import cut_prompts, tokenizers_of
from tests.conftest import MakePolicy, sampling_of


class Words:
    """A tokenizer with one token per word, and two special ones, as CLIP has."""

    def __init__(self, limit: int):
        self.model_max_length = limit

    def __call__(self, text: str, truncation: bool) -> dict[str, list[int]]:
        assert not truncation
        return {"input_ids": [0] * (len(text.split()) + 2)}


class CLIPWords(Words):
    """The same, with the name of CLIP's tokenizers."""


def call(prompt: str, max_sequence_length: int = 12) -> None:
    """A pipeline's call."""


def test_the_count_the_limit_and_the_longest_are_named():
    prompts = [Prompt("a b"), Prompt("a " * 9), Prompt("long " * 20), Prompt("a " * 10)]
    tokenizers = {"tokenizer": CLIPWords(10), "tokenizer_2": Words(10**30)}
    clip, t5 = cut_prompts(tokenizers, call, Sampling(), prompts)
    assert clip.startswith(
        "3 of 4 are longer than the 10 tokens that the encoder of tokenizer reads"
    )
    assert "The longest has 22: 'long long" in clip
    assert "read them whole" not in clip
    assert t5.startswith("1 of 4 is longer than the 12 tokens that the encoder of tokenizer_2")
    longer = Sampling(call={"max_sequence_length": 30})
    (only,) = cut_prompts(tokenizers, call, longer, prompts)
    assert only.endswith("; tokenizer_2 read them whole")
    assert cut_prompts(tokenizers, call, longer, prompts[:1]) == []


def test_a_pipeline_s_own_tokenizers_count(make_policy: MakePolicy):
    policy = make_policy("sd15", weights=None)
    pipeline = policy.pipeline
    tokenizers = tokenizers_of(pipeline.components)
    assert [*tokenizers] == ["tokenizer"]
    limit = pipeline.tokenizer.model_max_length
    text = "a red cube " * limit
    (found,) = cut_prompts(tokenizers, type(pipeline).__call__, policy.sampling, [Prompt(text)])
    number = len(pipeline.tokenizer(text)["input_ids"])
    assert f"the {limit} tokens" in found
    assert f"The longest has {number}: " in found


@pytest.mark.parametrize(("scale", "ignored"), [(4.0, False), (1.0, True)])
def test_negative_prompts_without_guidance_are_found(make_policy, scale, ignored):
    sampling = sampling_of("sd15", guidance_scale=scale)
    policy = make_policy("sd15", sampling=sampling, weights=None)
    prompts = [Prompt("a"), Prompt("b", negative="blurry")]
    assert ignores_negatives(policy, prompts, sampling) is ignored
    common = replace(sampling, call={**sampling.call, "negative_prompt": "blurry"})
    assert ignores_negatives(policy, prompts[:1], common) is ignored
    assert not ignores_negatives(policy, prompts[:1], sampling)


def test_values_with_a_key_of_their_own_are_refused_in_call():
    import flowgrpo

    with pytest.raises(ConfigError, match=r"sampling.call.guidance_scale: set sampling.guidance_s"):
        flowgrpo.load("quickstart_flow_grpo", ["sampling.call.guidance_scale=3.0"]).check()
    with pytest.raises(ConfigError, match=r"sampling.call.num_inference_steps: set sampling.num_s"):
        flowgrpo.load("quickstart_flow_grpo", ["sampling.call.num_inference_steps=3"]).check()
    with pytest.raises(ConfigError, match=r"sampling.call.latents: the policy sets this argument"):
        flowgrpo.load("quickstart_flow_grpo", ["sampling.call.latents=3"]).check()
