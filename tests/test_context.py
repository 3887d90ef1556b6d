"""Context parallelism: several processes compute each sample together."""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor
from torch import Tensor

from flowgrpo import cli, training
from flowgrpo.config import ConfigError, load
from flowgrpo.config.geometry import geometry
from flowgrpo.config.plan import Plan, plan
from flowgrpo.core.random import Random, SampleNoise
from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Prompt
from flowgrpo.memory.footprint import memory_options
from flowgrpo.policy import LoRA, Memory, PipelinePolicy
from flowgrpo.policy.context import _with_even_text, check_denoisers, explained
from flowgrpo.policy.settings import Noise, Parallel
from flowgrpo.training import checkpoints
from flowgrpo.training.shares import Shares
from tests.conftest import MakePolicy, sampling_of
from tests.processes import Forked, ranks

HERE = "tests.test_context"
SETTINGS = [
    "model.weights={kind='lora', rank=2, alpha=4}",
    "sampling={num_steps=2, height=32, width=32, num_frames=5, guidance_scale=5.0, call={max_sequence_length=16}}",
    f"rewards=[{{model='{HERE}:Brightness'}}]", "algorithm={kind='flow_grpo', group_size=2}",
    "loss={kind='clipped', clip_range=1e-3, kl_coef=0.05}", "prompts.balance=''", "train.iterations=1",
    "train.groups=2", "train.updates=2", "train.split='samples'", "train.rollout_batch=4", "train.train_batch=4",
    "train.lr=1e-3", "evaluation.images=2", "evaluation.every=0", "evaluation.metrics=[]",
    "evaluation.grid_prompts=1", "evaluation.grid_samples=1", "evaluation.inspected_prompts=1", "run.threads=1",
    "run.device=cpu", "run.trackers=[]", "run.checkpoint_every=1", "memory.gradient_checkpointing=true",
]  # fmt: skip


class Brightness:
    """The mean of all pixels, in the first process only: the others are told."""

    def __init__(self) -> None:
        if os.environ.get("RANK", "0") != "0":
            raise RuntimeError("loaded by another process than the first")

    def __call__(self, media: Tensor, prompts: Any) -> Tensor:
        return media.flatten(1).mean(1)


def command(model: Path, folder: Path, *settings: str) -> int:
    every = [*SETTINGS, f"model.path='{model}'", f"run.folder='{folder}'", *settings]
    return cli.main(["train", "quickstart_flow_grpo", *(f"--set={s}" for s in every)])


def check_messages(model: Path) -> None:
    """Compare the bytes that attentions exchange with the formula of the plan."""
    policy = PipelinePolicy.from_pretrained(
        model,
        sampling=sampling_of("wan_t2v"),
        weights=LoRA(rank=2, alpha=4),
        memory=Memory(gradient_checkpointing=True),
        parallel=Parallel(context=2),
    )
    sent, exchange = list[int](), attention_dispatch._all_to_all_single

    def counting(x: Tensor, group: Any) -> Tensor:
        sent.append(x.nbytes // 2)  # The other half stays here.
        return exchange(x, group)

    attention_dispatch._all_to_all_single = counting
    noise = SampleNoise([Random(0).at(i) for i in range(2)])
    step = {"stochastic": {1}, "transition": CPS(), "record": {1}}
    (rollout,) = policy.run([Prompt("a red cube")] * 2, noise, decode=False, **step)
    (count,) = policy.attentions
    # Two samples, each with and without guidance, at every step.
    work = replace(PLAN, sampled=4 * policy.num_steps())
    assert sum(sent) == work.token_bytes(4 * count.most)
    sent.clear()
    record = policy.replay([Prompt("a red cube")] * 2, rollout.records[0].x, 1, CPS())
    record.prediction.output.mean().backward()
    # The backward pass of a block computes it again.
    work = replace(PLAN, sampled=0, trained_states=4, recomputes=True)
    assert sum(sent) == work.token_bytes(4 * count.most)
    attention_dispatch._all_to_all_single = exchange


def work(rank: int, model: Path, folder: Path) -> int:
    """One of two processes: a run, after a check of what is sent."""
    Accelerator(cpu=True)
    check_messages(model)
    return command(model, folder, "parallel.context=2")


def finished(processes: Any) -> str:
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(outputs), "\n".join(outputs)
    return outputs[0]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


PLAN = Plan(2, 2, 4, 4, 4, 0, 0, 1, 4, 1, context=2)


def compare(one: Path, other: Path) -> None:
    """The metrics, evaluations and weights of two runs are equal up to rounding."""
    for a, b in zip(lines(one, "metrics"), lines(other, "metrics"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=2e-4)
        assert a["reward"] == pytest.approx(b["reward"], rel=1e-6)
    for a, b in zip(lines(one, "evaluations"), lines(other, "evaluations"), strict=True):
        assert a["scores"] == pytest.approx(b["scores"], rel=1e-6)
    weights = [checkpoints.load(f / "checkpoints/000001")[0]["weights"] for f in (one, other)]
    for name, value in weights[0].items():
        # The learning rate is 1e-3, and there are two optimizer steps.
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-4)


def test_a_run_equals_that_of_one_process(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    """Rollouts, updates, evaluations, grids and inspection of two processes."""
    model, one, two = tiny("wan_t2v"), tmp_path / "one", tmp_path / "two"
    finished([Forked(partial(command, model, one))])
    output = finished(ranks(partial(work, model=model, folder=two)))
    assert "2, as 1 set of 2 that compute each sample together (parallel.context), 2 groups on each" in output  # fmt: skip
    compare(one, two)


def test_the_first_process_of_a_share_counts_for_it() -> None:
    """Of two processes with the same samples, one adds them to a sum."""
    for rank, (index, counts) in enumerate([(0, True), (0, False), (1, True), (1, False)]):
        alone = Mock(Accelerator, process_index=rank, num_processes=4, reduce=lambda own, how: own)
        shares = Shares(alone, 2)
        assert (shares.index, shares.number, shares.leads) == (index, 2, counts)
        assert float(shares.sum(torch.tensor(3.0))) == (3.0 if counts else 0.0)


def test_sums_over_processes_count_each_sample_once() -> None:
    """Processes that compute together have the same samples: what is summed or listed goes through ``Shares``.

    Gradients are summed over all processes, and whether a number is finite is asked of all.
    """
    found = {
        file.name: len(re.findall(r"accelerator\.(?:reduce|gather)\(|[^.]gather_object\(", text))
        for file in Path(training.__file__).parent.glob("*.py")
        if (text := file.read_text("utf-8"))
    }
    assert {k: v for k, v in found.items() if v and k != "shares.py"} == {
        "learner.py": 1,
        "optimizer.py": 1,
    }


@pytest.mark.parametrize(
    ("settings", "processes", "words"),
    [
        ((), 1, "there is one; start the run with --nproc 2 or a multiple of it"),
        ((), 3, "does not divide 3 processes into equal groups; use 1 or 3"),
        (("memory.compile='regional'",), 2, "memory.compile = 'regional' is not supported with parallel.context"),
        (("memory.quantize='nf4'", "model.weights.kind='lora'"), 2, "memory.quantize = 'nf4' is not supported with"),
        (("memory.attention='flash'",), 2, "memory.attention = 'flash' is not supported with"),
        (("train.groups=3", "train.updates=1"), 4, "train.groups = 3 cannot be divided among train.updates = 1 optimizer step and 2 sets of 2 processes (parallel.context) (1 x 2 = 2)"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_together_is_refused(
    settings: Sequence[str], processes: int, words: str
) -> None:
    configuration = load("quickstart_flow_grpo", ["parallel.context=2", *settings])
    with pytest.raises(ConfigError, match=re.escape(words)):
        configuration.check(processes)


def test_a_dry_run_refuses_denoisers_that_were_not_measured(capsys: Any) -> None:
    settings = ["--set=parallel.context=2", "--nproc", "2", "--dry-run"]
    assert cli.main(["train", "quickstart_flow_grpo", *settings]) != 0
    said = capsys.readouterr()
    assert "is not supported for CogView4Transformer2DModel" in " ".join(said.err.split())
    assert "the configuration is valid" not in said.out


def test_denoisers_that_were_not_measured_are_refused(make_policy: MakePolicy) -> None:
    with pytest.raises(ValueError, match="is not supported for SD3Transformer2DModel; the den"):
        check_denoisers(make_policy("sd3").denoisers, 2)
    wan = make_policy("wan_t2v")
    with pytest.raises(
        ValueError, match="does not divide the 2 attention heads of the transformer"
    ):
        check_denoisers(wan.denoisers, 4)
    caching = type("Flux2Transformer2DModel", (ModelMixin,), {})()
    caching.attention = torch.nn.Identity()
    caching.attention.processor = Flux2KVAttnProcessor()
    with pytest.raises(ValueError, match="that caches keys and values"):
        check_denoisers({"transformer": caching}, 2)
    noise = Noise()
    with pytest.raises(ValueError, match="trains the initial noise"):
        Parallel(context=2).check(2, noise, Memory(), "float32", "adamw")

    def undivided(*_: object) -> None:
        raise AssertionError("Tensor size along dimension to be sharded must be divisible by mesh size")  # fmt: skip

    with pytest.raises(
        ValueError, match="does not divide the tokens of this size; choose a height"
    ):
        explained(undivided, 2)()


def test_masked_text_changes_nothing(make_policy: MakePolicy) -> None:
    """Qwen-Image's text has as many tokens as the longest prompt of a batch."""
    policy = make_policy("qwen_image")
    (denoiser,) = policy.denoisers.values()
    forward, lengths, outputs = denoiser.forward, list[int](), list[Tensor]()

    def noting(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["encoder_hidden_states"].shape[1])
        return forward(*args, **kwargs)

    noise = SampleNoise([Random(0).at(i) for i in range(2)])
    for number in (1, 2, 3):
        denoiser.forward = _with_even_text(noting, number)
        prompts = [Prompt("a red cube"), Prompt("two dogs and a cat")]
        (rollout,) = policy.run(prompts, noise, decode=False)
        assert rollout.x is not None
        outputs.append(rollout.x)
    plain, two, three = lengths[0], *(lengths[i * len(lengths) // 3] for i in (1, 2))
    assert (two, three) == (plain + plain % 2, plain + -plain % 3)
    assert len({plain, two, three}) > 1
    for padded in outputs[1:]:
        torch.testing.assert_close(outputs[0], padded)


def test_the_plan_counts_groups_of_processes() -> None:
    one = load("quickstart_flow_grpo", ["parallel.context=2", "train.groups=4", "train.updates=1"])
    alone, together = plan(replace(one, parallel=Parallel()), 2), plan(one, 4)
    assert (together.groups, together.samples, together.forwards) == (alone.groups, alone.samples, alone.forwards)  # fmt: skip
    assert geometry(one, 4)["processes"].startswith("4, as 2 sets of 2 that compute each sample")
    # Of the four quarters of a pass's tokens, each process sends one: half of its own.
    assert replace(together, sampled=3, trained_states=0).token_bytes(1000) == 3 * 4 * 250
    words = together.network(17, 0, attention=1000)
    assert words.endswith(f"of tokens ({together.exchanges} x exchanging the tokens of a sample, 4 kB in all)")  # fmt: skip
    assert memory_options(one, 4).context == 2
