"""A denoiser that is divided among two processes trains as one process does, and saves what one reads."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowgrpo.algorithms import FlowGRPO
from flowgrpo.algorithms.guard import Guard
from flowgrpo.config import Train
from flowgrpo.core.random import Random
from flowgrpo.core.steps import Window
from flowgrpo.core.transitions import CPS
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.nft import NFTLoss
from flowgrpo.policy import Full, LoRA, PipelinePolicy
from flowgrpo.policy.export import export
from flowgrpo.policy.settings import Memory, Noise, Parallel
from flowgrpo.policy.sharding import gathered_bytes, whole
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Reward
from flowgrpo.training import checkpoints, sharded_checkpoints
from flowgrpo.training.learner import Learner
from tests.conftest import sampling_of
from tests.processes import ranks

GROUPS = [Group(i, Prompt(text)) for i, text in enumerate(("a red cube", "two dogs"))]
ALGORITHM = FlowGRPO(group_size=2, transition=CPS(), steps=Window(start=0, size=2))
# With an old policy, a reference policy that is replaced, a moving average, and several micro-batches.
LOSS, GUARD = NFTLoss(kl_coef=0.1), Guard(reset_every=1)
TRAIN = Train(iterations=9, groups=2, lr=1e-3, ema_decay=0.9, monitor_states=2, train_batch=2, max_grad_norm=0.05)  # fmt: skip
WEIGHTS = {"lora": LoRA(rank=3, alpha=6), "full": Full()}


def brightness(media: Tensor, prompts: Any) -> Tensor:
    return media.flatten(1).mean(1)


def make_learner(model: Path, kind: str, accelerator: Accelerator, **options: Any) -> Learner:
    policy = PipelinePolicy.from_pretrained(
        model,
        sampling=sampling_of("sd3", num_steps=3),
        weights=WEIGHTS[kind],
        with_reference=True,
        memory=Memory(gradient_checkpointing=True),
        **options,
    )
    return Learner(policy, TRAIN, LOSS, accelerator, guard=GUARD)


def iterate(learner: Learner, iteration: int) -> dict[str, float]:
    """Sample this process's groups and update; the advantages are arbitrary."""
    accelerator, random = learner.accelerator, Random(3).at("train", iteration)
    size = len(GROUPS) // accelerator.num_processes
    own = GROUPS[accelerator.process_index * size :][:size]
    scorer = RewardScorer([Reward(model="tests.test_sharding:brightness")])
    with learner.behaviour_policy():
        experience = ALGORITHM.collect(learner.policy, own, scorer, random, 2)
    scorer.close()
    a = experience.actions
    return learner.update(experience, torch.sin(5.0 * a.group + 3.0 * a.sample + a.step), random)


def count_messages(policy: PipelinePolicy) -> Counter[str]:
    """Count passes of the denoiser, and the bytes of its gathered weights and scattered gradients."""
    found: Counter[str] = Counter()
    # Their names differ between versions of torch.
    names = ("all_gather_single", "reduce_scatter_single")
    if not hasattr(dist, names[0]):
        names = ("all_gather_into_tensor", "reduce_scatter_tensor")
    gather, scatter = (getattr(dist, name) for name in names)
    (model,) = policy.denoisers.values()
    model.register_forward_pre_hook(
        lambda *_: found.update(gradient=1) if torch.is_grad_enabled() else found.update(plain=1)
    )

    def gathering(output_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["weights"] += output_tensor.nbytes
        return gather(output_tensor, *args, **kwargs)

    def scattering(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        found["gradients"] += input.nbytes
        return scatter(output, input, *args, **kwargs)

    for name, counting in zip(names, (gathering, scattering), strict=True):
        setattr(dist, name, counting)
    return found


def check_messages(found: Counter[str], learner: Learner) -> None:
    """Compare with the formula of the plan: a gather per pass, and another one in each backward pass."""
    (model,) = learner.policy.denoisers.values()
    trained = sum(p.numel() for p in learner.parameters)
    assert found["gradient"] > 0
    assert found["plain"] > 0
    gathers = found["plain"] + 2 * found["gradient"]
    # Odd numbers of rows are padded.
    assert found["weights"] == pytest.approx(gathers * gathered_bytes(model, None), rel=0.02)
    assert found["gradients"] == pytest.approx(found["gradient"] * 4 * trained, rel=0.02)


def work(model: Path, folder: Path, rank: int) -> int:
    """One of two processes: an iteration, a checkpoint, a second iteration from the other's checkpoint."""
    accelerator = Accelerator(cpu=True)
    for kind, shard in (("lora", "all"), ("full", "denoiser")):
        learner = make_learner(model, kind, accelerator, parallel=Parallel(shard=shard))
        place, policy = folder / kind, learner.policy
        assert policy.in_lockstep
        assert bool(policy.encoding.models) == (kind == "lora")
        sent = count_messages(learner.policy) if kind == "full" else Counter()
        metrics = [iterate(learner, 0)]
        if kind == "full":
            check_messages(sent, learner)
        parts, state = learner.state()
        options = {"is_main": rank == 0, "gather": gather_object}
        sharded_checkpoints.save(place / "two", parts, state, **options)
        learner.restore(*sharded_checkpoints.load(place / "one", learner.division))
        metrics.append(iterate(learner, 1))
        weights = {k: whole(p.detach()) for k, p in learner.named.items()}
        held = sum(p.to_local().numel() for m in policy.denoisers.values() for p in m.parameters())
        counts = gather_object([held])
        pipeline = policy.stock_pipeline()
        if rank == 0:
            save_file(weights, place / "weights.safetensors")
            assert policy.trainable is not None
            export(pipeline, policy.trainable, place / "export")
            (place / "found.json").write_text(json.dumps({"metrics": metrics, "held": counts}))
    return 0


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request: pytest.FixtureRequest) -> Any:
    return request.param, request.getfixturevalue("both")[request.param]


@pytest.fixture(scope="module")
def both(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, accelerator: Accelerator
) -> dict[str, tuple[Path, Learner, list[dict[str, float]]]]:
    """By kind of weights: the folder of two processes, and the learner and the metrics of one."""
    folder, found = tmp_path_factory.mktemp("sharded"), {}
    for kind in WEIGHTS:
        learner = make_learner(tiny("sd3"), kind, accelerator)
        metrics = [iterate(learner, 0)]
        checkpoints.save(folder / kind / "one", *learner.state())
        metrics.append(iterate(learner, 1))
        found[kind] = (folder / kind, learner, metrics)
    processes = ranks(lambda rank: work(tiny("sd3"), folder, rank))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:]
    assert "view tensor" not in outputs[0]  # FSDP's warning about outputs that are views
    return found


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


def mean(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The mean difference. AdamW's first step on a weight whose gradient is 0 but for rounding has an
    arbitrary sign, so that the largest difference is not small."""
    assert a.keys() == b.keys()
    apart = torch.cat([(a[k].float() - b[k].float()).abs().flatten() for k in a])
    return float(apart.mean())


def test_two_sharded_processes_train_as_one(trained: Any) -> None:
    _, (folder, learner, metrics) = trained
    found = json.loads((folder / "found.json").read_text())
    for one, two in zip(metrics, found["metrics"], strict=True):
        # Steps are told apart by one process only, and the drift is measured on a few states of each.
        two = {k: v for k, v in two.items() if k in one and k != "kl/velocity"}
        one = {k: v for k, v in one.items() if k in two}
        assert {"grad_norm", "loss/policy", "loss/kl"} <= two.keys()
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert metrics[0]["grad_norm"] > TRAIN.max_grad_norm  # so gradients were clipped
    # An update changes a weight by about the learning rate, 1e-3.
    own = {k: p.detach() for k, p in learner.named.items()}
    assert mean(load_file(folder / "weights.safetensors"), own) < 1e-6
    total = sum(p.numel() for m in learner.policy.denoisers.values() for p in m.parameters())
    assert sum(found["held"]) == total
    assert max(found["held"]) < 0.6 * total


def test_one_process_reads_a_checkpoint_of_two(trained: Any) -> None:
    _, (folder, learner, metrics) = trained
    one, _ = checkpoints.load(folder / "one")
    two, state = checkpoints.load(folder / "two")
    assert one.keys() == two.keys() == {"weights", "optimizer", "ema", "behaviour", "reference"}
    for part in one:
        assert mean(one[part], two[part]) < 1e-6, part
    learner.restore(two, state)
    again = iterate(learner, 1)
    assert again == pytest.approx(metrics[1], rel=1e-2, abs=1e-4)
    own = {k: p.detach() for k, p in learner.named.items()}
    assert mean(load_file(folder / "weights.safetensors"), own) < 1e-6


def test_a_damaged_part_is_found(trained: Any) -> None:
    _, (folder, _, _) = trained
    file = next((folder / "two").glob("shard-00002-*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(checkpoints.CheckpointError, match=r"shard-00002.*is damaged"):
        checkpoints.verify(folder / "two")
    file.write_bytes(content)
    checkpoints.verify(folder / "two")


def test_the_export_of_two_processes_loads_in_diffusers(both: Any, tiny: Any) -> None:
    folder = both["full"][0]
    pipeline = DiffusionPipeline.from_pretrained(folder / "export")
    own = {f"transformer.{k}": p.detach() for k, p in pipeline.transformer.named_parameters()}
    assert type(pipeline.transformer).__name__ == "SD3Transformer2DModel"
    assert largest(own, load_file(folder / "weights.safetensors")) == 0
    folder = both["lora"][0]
    adapter = load_file(folder / "export" / "pytorch_lora_weights.safetensors")
    weights = {
        # alpha / rank = 2 is a part of the exported second matrix.
        k.replace(".default", ""): v * (2 if "lora_B" in k else 1)
        for k, v in load_file(folder / "weights.safetensors").items()
    }
    assert largest(adapter, weights) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_processes": 1}, "there is one; start the run with torchrun"),
        ({"memory": Memory(quantize="nf4")}, r"memory\.quantize = 'nf4' is not supported"),
        ({"memory": Memory(arithmetic="native")}, r"memory\.arithmetic = 'native' is not supported"),
        ({"memory": Memory(compile="regional")}, r"memory\.compile = 'regional' is not supported"),
        ({"optimizer": "adamw8bit"}, r"train\.optimizer = 'adamw8bit' is not supported.*use 'adamw'"),
        ({"dtype": "float16"}, r"model\.dtype = 'float16' is not supported.*use 'bfloat16'"),
        ({"weights": Noise()}, r"model\.weights\.kind = 'noise' trains no weights"),
        ({"parallel": Parallel(shard="denoiser", shard_group=3)}, "does not divide 8 .*use 2 or 4 or 8"),
        ({"parallel": Parallel(shard_group=2)}, "shard_group = 2 is for sharding"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded_is_refused(changed: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {
        "parallel": Parallel(shard="denoiser"), "num_processes": 8, "weights": LoRA(), "memory": Memory(),
        "dtype": "bfloat16", "optimizer": "adamw",
    }  # fmt: skip
    Parallel(shard="denoiser", shard_group=4).check(
        **{k: v for k, v in usual.items() if k != "parallel"}
    )
    given = usual | changed
    with pytest.raises(ValueError, match=message):
        given.pop("parallel").check(**given)
