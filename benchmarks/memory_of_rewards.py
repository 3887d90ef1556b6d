"""Compares the memory estimate for rewards with a gradient with counted bytes, on tiny models on the CPU.

    python -m benchmarks.memory_of_rewards [--case NAME ...]

An update of the loss ``reward_gradient`` is made with real tensors: the last steps, the VAE and a CLIP
model as the reward ``pick_score``, forward and backward. Every storage is counted until it is freed.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import CLIPImageProcessor, CLIPProcessor

from flowgrpo.data.prompts import Prompt
from flowgrpo.memory.dispatch_modes import MemoryCounter
from flowgrpo.memory.media_tracer import MediaTracer
from flowgrpo.memory.meta_pipeline import build
from flowgrpo.memory.rewards import traced_rewards
from flowgrpo.memory.tracer import Activations
from flowgrpo.policy import LoRA, PipelinePolicy
from flowgrpo.policy.loading import DTYPES, denoisers
from flowgrpo.policy.media_replay import replay_to_media
from flowgrpo.policy.settings import Memory
from flowgrpo.policy.weights import Trainable
from flowgrpo.rewards.settings import Reward
from reward_models.pick_score import PickScore
from tests.conftest import noise_of, sampling_of
from tests.tiny import FAMILIES, save
from tests.tiny.parts import clip_tokenizer
from tests.zoo import save_clip

LORA, NUM_STEPS = LoRA(rank=4, alpha=8), 4
PROMPTS = [Prompt("a red cube"), Prompt("two dogs")]


@dataclass(frozen=True)
class Case:
    """One update: a family of tests.tiny, precision, differentiated steps, latents decoded at a time."""

    family: str
    dtype: str = "float32"
    steps: int = 1
    decode_batch: int = 0


CASES: Mapping[str, Case] = {
    "SD3, 1 step": Case("sd3"),
    "SD3, 3 steps, decode_batch 1": Case("sd3", steps=3, decode_batch=1),
    "FLUX, 2 steps, bfloat16": Case("flux", "bfloat16", 2),
    "SD 1.5, 3 steps": Case("sd15", steps=3),
}


def save_reward(folder: Path) -> Path:
    """A CLIP model of some kilobytes with its processor, as a PickScore."""
    save_clip(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, clip_tokenizer()).save_pretrained(folder)
    return folder


def estimate(case: Case, folder: Path, reward: Path) -> Activations:
    """The estimate for an update of two samples."""
    pipeline = build(folder, DTYPES[case.dtype])
    Trainable(denoisers(pipeline), LORA, seed=0, with_reference=False)
    tracer = MediaTracer(pipeline, DTYPES[case.dtype], device="cpu", block=1)
    found = traced_rewards([Reward(model="pick_score", options={"model": str(reward)})], "cpu")
    tracer.score_with(lambda media: found.scores(media, PROMPTS, 1), found.models)
    size = {"height": 64, "width": 64, "num_inference_steps": NUM_STEPS}
    arguments = {"prompt": [p.text for p in PROMPTS], **FAMILIES[case.family].call, **size}
    return tracer.media_training(arguments, case.steps, len(PROMPTS))


def measure(case: Case, folder: Path, reward: Path, checkpointing: bool) -> int:
    """Most bytes alive in a real update of two samples, without the gradients of weights."""
    sampling = replace(sampling_of(case.family, num_steps=NUM_STEPS), height=64, width=64)
    memory = Memory(gradient_checkpointing=checkpointing, decode_batch=case.decode_batch)
    policy = PipelinePolicy.from_pretrained(
        folder, sampling=sampling, weights=LORA, dtype=case.dtype, memory=memory, batch_size=2
    )
    model = PickScore(str(reward), device="cpu")
    first = NUM_STEPS - case.steps
    (rollout,) = policy.run(PROMPTS, noise_of(0, 1), nodes=range(first + 1), decode=False)
    assert rollout.x is not None
    assert policy.trainable is not None
    for parameter in policy.trainable.parameters.values():
        # The estimate counts gradients of weights separately, so they are dropped here.
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    models: list[nn.Module] = [*policy.models.values(), model.model]
    known = [t for m in models for t in [*m.parameters(), *m.buffers()]]
    with MemoryCounter(known) as live:
        _, media = replay_to_media(policy, PROMPTS, rollout.x, range(first, NUM_STEPS + 1))
        model.scores_with_gradient(media, PROMPTS).sum().backward()
    return live.peak


def peak(found: Activations, case: Case, checkpointing: bool) -> int:
    """The estimated peak with the case's ``decode_batch``."""
    return found.peak(checkpointing, (case.decode_batch or len(PROMPTS)) / len(PROMPTS))


def main() -> None:
    """Print the table of the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    print("| update of 2 samples | without checkpointing | with checkpointing |\n|---|---|---|")
    for name in parser.parse_args().case:
        with tempfile.TemporaryDirectory() as temporary:
            folder, reward = Path(temporary) / "model", Path(temporary) / "reward"
            save(CASES[name].family, folder)
            reward.mkdir()
            save_reward(reward)
            found = estimate(CASES[name], folder, reward)
            errors = [
                peak(found, CASES[name], c) / measure(CASES[name], folder, reward, c) - 1
                for c in (False, True)
            ]
        print(f"| {name} | {errors[0]:+.1%} | {errors[1]:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
