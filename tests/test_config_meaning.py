"""What a configuration means: its geometry, what excludes what, what may change, and the evidence of recipes."""

import json
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from flowgrpo.algorithms.previews import Previews
from flowgrpo.config import Config, ConfigError, find, load
from flowgrpo.config.bounds import BOUNDS, check_bounds
from flowgrpo.config.changes import CHANGEABLE, differences, flat_table, may_change, why_fixed
from flowgrpo.config.evidence import LEVELS, counts, evidence, fingerprint, next_level
from flowgrpo.config.files import absolute
from flowgrpo.config.geometry import geometry
from flowgrpo.config.reader import dotted, read
from flowgrpo.config.reference import explain, json_schema, to_table
from flowgrpo.config.renamed import old_names
from flowgrpo.config.starter import starter
from flowgrpo.config.without_effect import RULES, idle_notes
from flowgrpo.core.transitions import CPS, FlowSDE


def config(*settings: str) -> Config:
    """The quick start: 18 groups of 16 samples, 8 steps, of which the first 4 can be trained."""
    return load("quickstart_flow_grpo", settings)


# Geometry.


def test_the_geometry_in_words() -> None:
    one = geometry(config("sampling.guidance_scale=4.5", "train.updates=3"))
    assert one == {
        "groups x samples": "18 prompts x 16 samples = 288 per iteration",
        "processes": "1, 18 groups on each",
        "rollout": "1 call of 288 samples on each process",
        # One shared path of up to 3 steps, then 16 samples.
        "per prompt": one["per prompt"],
        "optimizer steps": "3 per iteration, 6 groups in each",
        "in all": "120 iterations, 34,560 samples, 360 optimizer steps",
        "denoising": "8 steps, guidance 4.5",
    }
    assert one["per prompt"].endswith("16 decodes, 16 calls of each reward in the first iteration")
    two = geometry(config("train.epochs=2", "train.rollout_batch=100", "train.refill=2", "train.updates=3"), 2)  # fmt: skip
    assert two["processes"] == "2, 9 groups on each"
    assert two["rollout"] == "2 calls of 100 samples on each process"
    assert two["optimizer steps"] == "6 per iteration in 2 epochs, 6 groups in each"
    assert two["in all"] == "120 iterations, 34,560 samples, 720 optimizer steps"
    assert two["per prompt"].endswith("; at most 3 times as much, as groups of equal rewards are replaced")  # fmt: skip
    replayed = geometry(config("train.replay={groups=6, capacity=30}"))
    assert replayed["replay"] == "6 earlier groups in an iteration, of the newest 30"
    chosen = geometry(load("quickstart", ["algorithm.previews={number=24, num_steps=4}"]))
    assert chosen["previews"] == "24 of 4 steps per prompt choose its 12 samples"
    judged = geometry(load("z_image_pref", ["algorithm.preference.swap=true"]))
    assert "9 calls of each reward and 72 comparisons by the judge" in judged["per prompt"]
    pairs = geometry(load("sd15_dpo"))
    assert pairs["optimizer steps"].endswith(" examples in each")
    assert " pictures, " in pairs["in all"]
    free = geometry(load("sd35_medium_pickscore"))["denoising"]
    assert "guidance" in free
    words = {
        split: geometry(config("train.updates=4", f"train.split={split}"))["optimizer steps"]
        for split in ("samples", "steps", "actions")
    }
    assert words == {
        "samples": "4 per iteration, 4 samples of each of the 18 groups in each",
        "steps": "4 per iteration, an equal part of the denoising steps of all 18 groups in each",
        "actions": "4 per iteration, an equal random part of the actions of all 18 groups in each",
    }


def test_samplings_of_evaluations_and_trained_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = config("evaluation.num_steps=20", "sampling.guidance_scale=3.0")
    assert (changed.evaluation_sampling().num_steps, changed.evaluation_sampling().guidance_scale) == (20, 3.0)  # fmt: skip
    changed = config("evaluation.guidance_scale=2.0")
    assert (changed.evaluation_sampling().num_steps, changed.evaluation_sampling().guidance_scale) == (8, 2.0)  # fmt: skip
    assert config().steps_by_density() == [0, 1, 2, 3]
    # One iteration has one window; the others have theirs.
    assert len(config("train.iterations=1", "train.warmup=0").steps_by_density()) == 1
    unnormalised = config('algorithm.transition={kind = "cps", log_prob = "unnormalised"}')
    assert unnormalised.steps_by_density() == []
    sliding = 'algorithm.steps={kind = "sliding_window", size = 1, every = 1, skip_last = 1}'
    assert config(sliding, "train.iterations=3", "train.warmup=0").steps_by_density() == [0, 1, 2]
    # Of a longer run, some iterations: here every second.
    monkeypatch.setattr("flowgrpo.config.steps.FORESEEN", 2)
    assert config(sliding, "train.iterations=3", "train.warmup=0").steps_by_density() == [0, 2]
    assert config("loss={kind='nft'}").steps_by_density() == []
    assert config("algorithm={kind='tempflow_grpo', group_size=16}").steps_by_density() == []


# What excludes what.


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["train.updates=4"], r"among train.updates = 4 optimizer steps and 1 process \(4 x 1 = 4\); the nearest that can is train.groups = 16"),
        (["train.groups=1", "train.updates=2"], "nearest that can is train.groups = 2"),
        (["train.updates=5", "train.split=samples"], "group_size = 16 cannot be divided among train.updates = 5"),
        (["train.updates=8", "train.split=samples"], ""),
        (["train.updates=2", "train.split=steps"], "cannot divide 1 trained step among train.updates = 2"),
        (["train.updates=2", "train.split=steps", "algorithm.steps.size=2"], ""),
        (["train.split=steps", "algorithm={kind='diffusion_nft'}", "loss={kind='nft'}"], "DiffusionNFT trains none"),
        (["train.betas=[0.9, 1.0]"], "betas must be two numbers"),
        (["train.betas=[0.9, 0.99, 0.999]"], "betas must be two numbers"),
        (["train.betas=[0.0, 0.0]"], ""),
        (["train.ema_decay=1.0"], "ema_decay must be below 1"),
        (["train.ema_decay=0.9999"], ""),
        (["sampling.num_steps=1", "algorithm.steps={kind='all'}"], "must be at least 2, got 1"),
        (["sampling.num_steps=2", "algorithm.steps={kind='all'}"], ""),
        (["algorithm.advantage={kind='best', keep=16}"], "keep must be below algorithm.group_size = 16, got 16"),
        (["algorithm.advantage={kind='best', keep=15}"], ""),
        (["algorithm={kind='find'}"], "belong together"),
        (["model.weights={kind='noise'}"], "belong together"),
        (["algorithm={kind='find'}", "model.weights={kind='noise'}", "loss={clip_range=0.2}", "guard.reset_every=5", "loss.kl_coef=0.1"], "always the standard normal"),
        (["rewards.0.weight=0", "guard.kl=uncertain"], "loss.kl_coef above 0"),
        (["loss={kind='nft'}"], "loss.kind and algorithm.kind do not belong together"),
        (["loss.clip_range=0.0"], "loss.clip_range must be at least"),
        (["algorithm={kind='matching', group_size=16, advantage={kind='per_loss'}}", "loss={kind='dgpo'}"], "DGPOLoss is not proportional to the advantage"),
        (["algorithm.advantage={kind='per_loss'}"], ""),
        (["algorithm={kind='pref_grpo', group_size=16, preference={kind='compared', reward='x'}}"], "algorithm: algorithm.preference.reward = 'x'"),
        (["algorithm.advantage={kind='beta'}"], "needs exactly one reward of 0 and 1"),
        (["loss={kind='tests.test_objectives:Distances'}"], "train.ema_decay above 0"),
        (["sampling.base_after=0.5"], "sampling.base_after: rollouts are sampled by the trained model alone"),
        (["evaluation.base_after=0.5", "guard.reset_every=5", "loss.kl_coef=0.1"], "evaluation.base_after needs the model before training"),
        (["evaluation.base_after=0.5", "algorithm={kind='find'}", "model.weights={kind='noise'}", "loss={clip_range=0.2}"], "does not have; remove it"),
        (["evaluation.base_after=0.5"], ""),
        (["algorithm={kind='find'}", "model.weights={kind='noise'}", "loss={clip_range=0.2}"], ""),
        (["evaluation.regimes=[{num_steps=1}, {num_steps=2, images=0}]"], ""),
        (["evaluation.regimes=[{num_steps=3, images=-1}]"], r"regimes\[0\]: num_steps must be at least 1 and images at least 0"),
        (["evaluation.regimes=[{guidance_scale=2.5}, {num_steps=3}, {num_steps=3}]"], r"regimes\[2\] samples like evaluation.regimes\[1\]"),
        (["evaluation.metrics=[]", "evaluation.keep_best=['reward', 'strictt']"], r"keep_best\[1\] = 'strictt'.*\(known: reward, strict, graded, artefacts/"),
        (["evaluation.metrics=[]", "evaluation.artefacts=false", "evaluation.best=artefacts/grid"], r"\(known: reward, strict, graded\)"),
        (["evaluation.metrics=[]", "evaluation.best=min:artefacts/grid", "evaluation.keep_best=['graded']"], ""),
        (["train.early_stopping.metric=reward", "evaluation.images=24", "evaluation.images_during=24", "evaluation.every=1"], ""),
        (["evaluation.every=0", "evaluation.images_during=7"], ""),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other(settings: list[str], problem: str) -> None:
    found = config(*settings)
    if not problem:
        found.check()
        return
    with pytest.raises(ConfigError, match=problem):
        found.check()


@pytest.mark.parametrize(
    ("settings", "key", "switch"),
    [
        (["train.replay.capacity=32"], "train.replay.capacity = 32", "train.replay.groups = 0"),
        (["train.early_stopping.patience=5"], "train.early_stopping.patience = 5", 'train.early_stopping.metric = ""'),
        (["train.ema_every=8"], "train.ema_every = 8", "train.ema_decay = 0.0"),
        (["train.split=samples", "train.updates=1"], 'train.split = "samples"', "train.updates = 1"),
        (["evaluation.every=0", "evaluation.images_during=48"], "evaluation.images_during = 48", "evaluation.every = 0"),
        (["guard.adapt=false"], "guard.adapt = false", 'guard.kl = "all"'),
        (["failures={retries=0, wait=5.0}"], "failures.wait = 5.0", "failures.retries = 0"),
        (["memory.arithmetic=native"], 'memory.arithmetic = "native"', 'model.dtype = "float32"'),
        (["rewards.1.weight=0.0", "rewards.1.schedule=[[5, 1.0]]"], "rewards[1].schedule = [[5.0, 1.0]]", "rewards[1].weight = 0.0"),
        (["algorithm.previews.num_steps=4"], "algorithm.previews.num_steps = 4", "algorithm.previews.number = 0"),
        (["algorithm.steps={kind='sliding_window', decay_from=3}"], "algorithm.steps.decay_from = 3", "algorithm.steps.decay = 0.0"),
        (["algorithm.advantage={kind='group', std='none', ddof=1}"], "algorithm.advantage.ddof = 1", 'algorithm.advantage.std = "none"'),
        (["algorithm.advantage={kind='log_tamed', above=2.0}"], "algorithm.advantage.above = 2.0", 'algorithm.advantage.threshold = "mean"'),
        (["algorithm={kind='vgpo', anchor=0.0, anchor_steps=3}"], "algorithm.anchor_steps = 3", "algorithm.anchor = 0.0"),
        (["algorithm={kind='tp_grpo', turning_points='none', balance='group'}"], 'algorithm.balance = "group"', 'algorithm.turning_points = "none"'),
        (["algorithm={kind='branch_grpo', pruned_every=3}"], "algorithm.pruned_every = 3", "algorithm.pruned = []"),
        (["algorithm={kind='branch_grpo', pruned=[3], pruned_until=1}"], "algorithm.pruned_until = 1", "algorithm.pruned_every = 0"),
        (["algorithm={kind='srpo', branches='denoise', invert_excess=[0.1, 0.2]}"], "algorithm.invert_excess = [0.1, 0.2]", 'algorithm.branches = "denoise"'),
        (["loss={kind='matching', power=0.5}"], "loss.power = 0.5", 'loss.weight = "adaptive"'),
        (["loss={kind='matching', surrogate='pepg', clip_range=0.5}"], "loss.clip_range = 0.5", 'loss.surrogate = "pepg"'),
        (["loss={kind='matching', proximal='data'}"], 'loss.proximal = "data"', "loss.proximal_coef = 0.0"),
        (["algorithm={kind='dmd'}", "loss={kind='dmd', clip_range=0.1}"], "loss.clip_range = 0.1", 'algorithm.kind = "dmd"'),
        (["algorithm={kind='rtdmd'}", "loss={kind='dmd', clip_range=0.1}"], "loss.clip_range = 0.1", 'algorithm.kind = "rtdmd"'),
        (["algorithm={kind='dmd', matched='last'}", "loss={kind='dmd'}", "sampling.num_steps=1"], 'algorithm.matched = "last"', "sampling.num_steps = 1"),
        (["algorithm={kind='dmd', transition={kind='cps', log_prob='unnormalised'}}", "loss={kind='dmd'}"], 'algorithm.transition.log_prob = "unnormalised"', 'algorithm.kind = "dmd"'),
        (["algorithm={kind='distillation'}", "train.without_advantage=drop"], 'train.without_advantage = "drop"', 'algorithm.kind = "distillation"'),
        (["algorithm={kind='dmd'}", "loss={kind='dmd'}", "rewards.0.schedule=[[5, 1.0]]"], "rewards[0].schedule = [[5.0, 1.0]]", 'algorithm.kind = "dmd"'),
        (["algorithm={kind='distillation'}", "rewards.0.schedule=[[5, 1.0]]"], "rewards[0].schedule = [[5.0, 1.0]]", "algorithm.score_rollouts = false"),
        (["failures.probe=off", "rewards.0.ignores_prompt=true"], "rewards[0].ignores_prompt = true", 'failures.probe = "off"'),
        (["algorithm={kind='g2rpo', granularities=[2], integration='mean'}"], 'algorithm.integration = "mean"', "algorithm.granularities = [2]"),
        (["algorithm={kind='g2rpo', granularities=[1], strides='released'}"], 'algorithm.strides = "released"', "algorithm.granularities = [1]"),
        (["rewards.1.weight=0.0", "rewards.1.threshold=0.5"], "rewards[1].threshold = 0.5", "rewards[1].weight = 0.0"),
        (["evaluation={every=0, regimes=[{num_steps=2, when='every'}]}"], 'evaluation.regimes[0].when = "every"', "evaluation.every = 0"),
        (["run.device=cpu", "memory.offload_vae=true"], "memory.offload_vae = true", 'run.device = "cpu"'),
        (["model.weights={kind='noise'}", "memory.gradient_checkpointing=true"], "memory.gradient_checkpointing = true", 'model.weights.kind = "noise"'),
        (["loss={kind='matching', sampler='trained'}"], 'loss.sampler = "trained"', 'loss.trail = "none"'),
        (["loss={kind='dgpo', trail='none', sample_old_after=9}"], "loss.sample_old_after = 9", 'loss.trail = "none"'),
        (["loss={kind='matching', trail='third', sampler='trained', clip_range=0.1}"], "loss.clip_range = 0.1", 'loss.sampler = "trained", whose ratio is 1'),
        (["loss={kind='distillation', teachers=[{path='a', tags=['x'], share=2.0}]}"], "loss.teachers[0].share = 2.0", 'loss.teachers[0].tags = ["x"]'),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_named_with_its_switch(
    settings: list[str], key: str, switch: str
) -> None:
    (note,) = idle_notes(config(*settings))
    assert note.startswith(f"{key} has no effect while {switch}: change ")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["algorithm={kind='dmd', group_size=2}", "train.groups=2", "loss={kind='dmd', fake={num_times=5}}"], "loss.fake.num_times = 5 has no other effect than 3, which follows from train.groups and algorithm.group_size"),
        (["algorithm={kind='dmd', group_size=2}", "train.groups=2", "loss={kind='dmd', fake={num_times=3}}"], ""),
        (["train.monitor_states=65"], "train.monitor_states = 65 has no other effect than 64, which follows from train.train_batch"),
        (["memory.decode_batch=300"], "memory.decode_batch = 300 has no other effect than 288, which follows from train.rollout_batch and train.train_batch"),
        (["evaluation.regimes=[{num_steps=2, images=481}]"], "evaluation.regimes[0].images = 481 has no other effect than 480"),
        (["algorithm={kind='tp_grpo', completion_steps=9}"], "algorithm.completion_steps = 9 has no other effect than 8"),
        (["algorithm={kind='vgpo', anchor_steps=8}"], "algorithm.anchor_steps = 8 has no other effect than 7"),
        (["algorithm={kind='pref_grpo', group_size=8, preference={kind='judged', model='a', opponents=5}}"], "algorithm.preference.opponents = 5 has no other effect than 4"),
        (["loss={kind='distillation', task_key='task', teachers=[{path='a'}]}"], 'loss.task_key = "task" has no effect while no teacher has tags'),
        (["loss={kind='distillation', task_key='task', teachers=[{path='a', tags=['x']}, {path='b'}]}"], ""),
        (["loss={kind='distillation', teachers=[{path='a', share=2.0}]}"], "loss.teachers[0].share = 2 has no effect"),
        (["loss.step_weight=rectified"], 'loss.step_weight = "rectified" has no effect while an iteration trains one denoising step'),
        (["loss.step_weight=rectified", "algorithm.steps.size=2"], ""),
        (["loss.step_weight=rectified", "train.replay={groups=18, capacity=36}"], ""),
        (["loss={kind='matching', clip_range=0.1}"], "loss.clip_range = 0.1 has no effect while an iteration has one optimizer step"),
        (["loss={kind='matching', clip_range=0.1}", "train.epochs=2"], ""),
        (["loss={kind='matching', clip_range=0.1, trail='third'}"], ""),
        (["evaluation.every=120", "evaluation.images_during=24"], "evaluation.images_during = 24 has no effect while evaluation.every = 120 is not below train.iterations = 120"),
        (["evaluation.every=120", "evaluation.bench=[{name='shapes', when='every'}]"], 'evaluation.bench[0].when = "every" is the same as "ends" here'),
        (["algorithm={kind='distillation'}", "evaluation.inspected_prompts=2"], 'evaluation.inspected_prompts = 2 has no effect while algorithm.kind = "distillation"'),
        (["algorithm={kind='distillation'}", "evaluation.inspected_prompts=0"], ""),
    ],
)  # fmt: skip
def test_numbers_beyond_their_limits_and_choices_of_one_are_named(
    settings: list[str], sentence: str
) -> None:
    notes = idle_notes(config("evaluation.images_during=0", *settings))
    assert [n[: len(sentence)] for n in notes] == [sentence] * bool(sentence)


ALWAYS_ON = {"memory", "evaluation", "sampling", "failures", "parallel", "guard", "model.weights"}
"""Tables in which no single key switches off all others; single keys have rules, or are refused."""


def test_every_table_that_can_be_off_names_its_keys() -> None:
    """A table whose default switches it off is covered key by key, also one that is added later."""
    base, found = config(), set[str]()
    for path, table in (*default_tables(base, ""), *default_tables(base.train, "train.")):
        if path in ALWAYS_ON:
            continue
        found.add(path)
        off = dict.fromkeys(f.name for f in fields(table))
        switches = {rule.switch for rule in RULES if rule.table == path and not rule.keys}
        assert len(switches) == 1, f"{path} needs a rule in flowgrpo.config.without_effect"
        for name in off.keys() - switches:
            changed = replace(table, **{name: other_value(table, name)})
            notes = idle_notes(set_table(base, path.split("."), changed))
            assert any(n.startswith(f"{path}.{name} = ") for n in notes), (path, name)
    assert found == {"train.replay", "train.early_stopping"}
    for name in (f.name for f in fields(Previews) if f.name != "number"):
        changed = replace(Previews(), **{name: other_value(Previews(), name)})
        previews = set_table(base, ["algorithm", "previews"], changed)
        assert any(n.startswith(f"algorithm.previews.{name} = ") for n in idle_notes(previews))


def default_tables(table: Any, above: str) -> list[tuple[str, Any]]:
    """The tables below one that are made of defaults alone and have no kinds."""
    found = []
    for field in fields(table):
        made = field.default_factory
        if made is not MISSING and is_dataclass(made) and not hasattr(made, "kind"):
            found.append((f"{above}{field.name}", made()))
    return found


def other_value(table: Any, name: str) -> Any:
    """A value of a key that is not its default."""
    value, hint = getattr(table, name), get_type_hints(type(table))[name]
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    return not value if isinstance(value, bool) else value + 1


def set_table(here: Any, path: list[str], table: Any) -> Any:
    """A copy of settings with another table at a path."""
    below = table if len(path) == 1 else set_table(getattr(here, path[0]), path[1:], table)
    return replace(here, **{path[0]: below})


def test_no_recipe_has_a_key_without_effect() -> None:
    recipes = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
    assert len(recipes) > 40
    assert {r.stem: notes for r in recipes if (notes := idle_notes(load(str(r))))} == {}


NFT = ["algorithm={kind='matching', group_size=16}", "train.train_batch=16"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["loss={kind='tests.test_matching:Coupled'}", "train.train_batch=15"], "set train.train_batch to at least algorithm.group_size = 16, got 15"),
        (["loss={kind='dgpo'}", "train.train_batch=15"], ""),
        (["loss={kind='dgpo'}", "train.split=samples", "train.updates=2"], "'samples' divides among optimizer steps"),
        (["loss={kind='dgpo'}", "train.split=actions"], "'actions' divides among optimizer steps"),
        (["loss={kind='dgpo'}"], ""),
        (["loss={kind='nft'}", "train.train_batch=1"], ""),
    ],
)  # fmt: skip
def test_losses_on_whole_groups_need_whole_groups(settings: list[str], problem: str) -> None:
    found = config(*NFT, *settings)
    if not problem:
        found.check()
        return
    with pytest.raises(ConfigError, match=problem):
        found.check()


@pytest.mark.parametrize(
    ("bench", "best", "problem"),
    [
        ("{name='shapes', label='a b'}", "reward", r"bench\[0\].label must consist of letters.*got 'a b'"),
        ("{name='shapes', label='reward'}", "reward", "must not be 'reward'"),
        ("{name='shapes'}, {name='shapes'}", "reward", r"bench\[1\]: there are two benchmarks 'shapes'"),
        ("{name='shapes', limit=-1}", "reward", r"bench\[0\].limit must be at least 0, got -1"),
        ("{name='shapes', when='every'}", "shaps", r"no reward, metric or benchmark 'shaps'; did you mean 'shapes'.*known: reward, strict, graded, shapes"),
        ("{name='a.b:Mine', label='x'}, {name='shapes'}", "shapes", r'set when = "every" in evaluation.bench\[1\]'),
        ("{name='shapes', when='final'}", "shapes/overall", "at every evaluation"),
        ("{name='shapes', label='a_b-2', limit=0}, {name='shapes', when='every'}", "shapes/overall", ""),
    ],
)  # fmt: skip
def test_benchmarks_of_a_run(bench: str, best: str, problem: str) -> None:
    # Metrics have names of their own, which are known after the first evaluation.
    found = config(
        f"evaluation.bench=[{bench}]", f"evaluation.best={best}", "evaluation.metrics=[]"
    )
    assert [b.tag for b in found.evaluation.bench][-1] in bench
    if not problem:
        found.check()
        return
    with pytest.raises(ConfigError, match=problem):
        found.check()
    outside = config("evaluation.bench=[{name='a.b:Mine'}, {name='c.d'}]").evaluation.bench
    assert [b.tag for b in outside] == ["Mine", "d"]


ALGORITHM_OF = {
    "algorithm.group_size": "draft", "algorithm.last": "draft", "algorithm.renoised": "draft",
    "algorithm.span": "srpo", "algorithm.distinct_times": "pictures",
    "algorithm.empty_prompts": "pictures",
}  # fmt: skip
"""An algorithm that has the key, and whose bound is the lowest."""


def test_the_bounds_themselves_are_allowed() -> None:
    for key, ends in BOUNDS.items():
        if key.startswith("model.weights"):
            continue
        for end in ends:
            if abs(end) != float("inf"):
                others = [f"algorithm.kind={ALGORITHM_OF[key]}"] if key in ALGORITHM_OF else []
                others += ["train.groups=1"] if key == "algorithm.group_size" else []
                others += ["algorithm.group_size=2"] if key == "train.groups" else []
                others += ["evaluation.grid_samples=1"] if key == "evaluation.grid_prompts" else []
                others += ["evaluation.grid_prompts=1"] if key == "evaluation.grid_samples" else []
                try:
                    found = config(*others, f"{key}={end}")
                except ConfigError:
                    found = config(*others, f"{key}={int(end)}")
                check_bounds(found)
    check_bounds(config("train.groups=62500"))
    with pytest.raises(ConfigError, match=r"train.groups = 62501 times algorithm.group_size = 16 are 1,000,016 samples"):  # fmt: skip
        check_bounds(config("train.groups=62501"))


# What may change.


def test_which_keys_may_change_when_a_run_is_resumed() -> None:
    may = [
        "train.iterations", "train.lr", "memory.offload", "memory.x.y", "failures.retries", "run.device", "run.trackers",
        "evaluation.metrics", "evaluation.bench", "evaluation.bench.0.limit", "prompts.train",
    ]  # fmt: skip
    not_ = [
        "train.groups", "run.seed", "memory.quantize", "memory", "run", "evaluation.seed", "evaluation", "rewards.0.weight",
        "prompts.balance", "train", "algorithm.group_size", "train.lrs",
    ]  # fmt: skip
    assert [k for k in (*may, *not_) if may_change(k)] == may
    assert may_change("rewards.1.ignores_prompt")
    assert not may_change("guard.ignores_prompt")
    # The most special reason comes first.
    assert why_fixed("train.ema_decay") == "the checkpoint holds the moving average that it defines"
    assert why_fixed("train.groups").endswith("of different size or kind")
    assert why_fixed("run.seed") == "every random draw depends on it"
    assert why_fixed("elsewhere") == "it defines the run"
    assert all(CHANGEABLE.values())


def test_differences_are_by_dotted_key() -> None:
    one = config("rewards.0.weight=0.5", "run.folder=a", "run.trackers=['wandb', 'aim']", "sampling.guidance_scale=2.0")  # fmt: skip
    other = config("rewards=[{model='jpeg_size'}]", "run.folder=b", "run.trackers=['aim']", "train.lr=0.5")  # fmt: skip
    found = differences(one, other)
    assert found["run.trackers"] == (["wandb", "aim"], ["aim"])
    assert found["train.lr"] == (1.5e-4, 0.5)
    assert found["rewards.0.model"] == ("flowgrpo.shapes.rewards:Strict", "jpeg_size")
    assert found["rewards.0.weight"] == (0.5, 1.0)
    assert found["rewards.1.name"] == ("graded", None)
    assert found["sampling.guidance_scale"] == (2.0, 1.0)
    assert "run.folder" not in found
    assert differences(one, one) == {}
    assert differences(other, one)["rewards.1.name"] == (None, "graded")
    assert flat_table(config("rewards.0.options.token=abc"))["rewards.0.options.token"] == "(redacted)"  # fmt: skip


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model", "shapes", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.txt").write_text("a\n")
    found = absolute(
        config(
            "model={path='model', base='~/absent', adapters=[{path='adapter'}], weights={kind='lora', init='adapter'}}",
            "prompts.train=mine.txt", "prompts.held_out=hf:a/b:c", "run.folder=~/runs",
        )
    )  # fmt: skip
    assert found.model.path == str(tmp_path / "model")
    assert found.model.base == str(tmp_path / "absent")
    assert found.model.adapters[0].path == found.model.weights.init == str(tmp_path / "adapter")  # type: ignore[union-attr]
    assert found.prompts.train == str(tmp_path / "mine.txt")
    assert found.prompts.held_out == "hf:a/b:c"
    assert found.run.folder == str(tmp_path / "runs")
    # The model in the package is not a folder of this name.
    names = absolute(config("model.weights={kind='full'}", "run.folder=runs/x"))
    assert (names.model.path, names.model.base) == ("shapes", "")
    assert names.prompts.train == "prompts/shapes_train.jsonl"
    assert names.run.folder == str(tmp_path / "runs" / "x")


# Evidence.


def test_the_strongest_level_that_still_holds_counts(tmp_path: Path) -> None:
    def record(level: str, **changes: Any) -> dict[str, Any]:
        found = {"recipe": "quickstart", "level": level, "passed": True, "fingerprint": fingerprint("quickstart")} | changes  # fmt: skip
        (tmp_path / f"{found['recipe']}.{level}.json").write_text(json.dumps(found))
        return found

    assert evidence("quickstart", tmp_path) == "validated"
    assert counts(record("tiny"))
    assert evidence("quickstart", tmp_path) == "tiny"
    assert not counts(record("rises", passed=False))
    assert not counts(record("device", fingerprint="0" * 16))
    assert evidence("quickstart", tmp_path) == "tiny"
    record("rises")
    assert evidence("quickstart", tmp_path) == "rises"
    assert evidence("flux_fast", tmp_path) == "validated"
    assert len(fingerprint("quickstart")) == 16
    assert fingerprint("quickstart") == fingerprint("configs/quickstart.toml")
    assert [next_level(level) for level in list(LEVELS)[:3]] == ["tiny", "device", "rises"]
    for last in ("rises", "reproduces"):
        with pytest.raises(ValueError, match="only a full run shows"):
            next_level(last)


# Names, tables and explanations.


def test_old_names_are_found_wherever_they_are() -> None:
    table = {
        "rewards": [{"model": "flow_grpo_server"}, {"model": "flowgrpo.pairwise:Judge"}],
        "algorithm": {"preference": {"model": "flow_grpo_server"}, "name": "flow_grpo_server"},
        "evaluation": {"metrics": ["flowgrpo.frames:Mean", "flowgrpo.frames", "x flowgrpo.frames:Mean"]},
    }  # fmt: skip
    found = dict(old_names(table))
    assert list(found) == [
        ("rewards", 0, "model"), ("rewards", 1, "model"), ("algorithm", "preference", "model"), ("evaluation", "metrics", 0),
    ]  # fmt: skip
    assert found["rewards", 1, "model"] == "'flowgrpo.pairwise:Judge' has moved; write 'flowgrpo.rewards.pairs:Judge'"  # fmt: skip
    assert dotted(("rewards", 1, "options", "x", 0)) == "rewards[1].options.x[0]"
    assert dotted((0, "a")) == "[0].a"
    with pytest.raises(ConfigError, match=r"^the configuration must be a table, got 3"):
        read(Config, 3)
    with pytest.raises(ConfigError, match=r"^train must be a table, got 3"):
        read(Config, 3, "train")


def test_tables_leave_out_what_is_not_set() -> None:
    table = to_table(config())
    assert "num_frames" not in table["sampling"]
    assert table["algorithm"]["steps"] == {"kind": "random_window", "size": 1, "first": 0, "last": 4}  # fmt: skip
    assert table["run"]["trackers"] == ["tensorboard"]
    assert to_table({"a": None, "b": (1, {"c": None})}) == {"b": [1, {}]}


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A table that holds tables of its own kind."""

    name: str
    """Its name."""
    size: int | None = None
    """Its size, if it is known."""
    children: tuple["Tree", ...] = ()
    """The tables below."""


def test_tables_may_hold_tables_of_their_own_kind() -> None:
    schema = json_schema(Tree)
    children = {"type": "array", "items": {"allOf": [{"$ref": "#/$defs/Tree"}]}}
    assert {k: schema["properties"]["children"][k] for k in children} == children
    assert schema["$defs"]["Tree"]["properties"]["children"] == schema["properties"]["children"]
    found = read(Tree, {"name": "a", "size": 3, "children": [{"name": "b", "size": None}]})
    assert found == Tree(name="a", size=3, children=(Tree(name="b"),))
    with pytest.raises(ConfigError, match=r"children\[0\].size must be a whole number"):
        read(Tree, {"name": "a", "children": [{"name": "b", "size": "x"}]})


def test_a_table_of_another_kind_takes_the_place_of_the_extended_one(tmp_path: Path) -> None:
    text = 'extends = "quickstart_flow_grpo"\n[algorithm.transition]\n'
    (tmp_path / "own.toml").write_text(text + 'kind = "flow_sde"\n')
    assert load(str(tmp_path / "own.toml")).algorithm.transition == FlowSDE()
    (tmp_path / "own.toml").write_text(text + "noise_level = 0.25\n")
    assert load(str(tmp_path / "own.toml")).algorithm.transition == CPS(noise_level=0.25)


def test_files_of_runs_and_of_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "config.toml"
    file.write_text('extends = "quickstart_flow_grpo"\n[run]\nfolder = "~/elsewhere"\n')
    assert find("~/run/config.toml") == file
    assert load("~/run/config.toml").run.folder == str(tmp_path / "elsewhere")
    # In a run directory it is that of the run in it, wherever it was moved.
    (tmp_path / "run" / "inputs.json").write_text("{}")
    assert load(str(file)).run.folder == str(tmp_path / "run")
    assert load(str(file), ["run.folder=x"]).run.folder == "x"
    file.rename(tmp_path / "run" / "copy.toml")
    assert load(str(tmp_path / "run" / "copy.toml")).run.folder == str(tmp_path / "elsewhere")
    assert find("hf:a/b") == Path("hf:a/b")


def test_ten_mistakes_are_listed_and_the_others_counted() -> None:
    def lines(number: int) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            config(*(f"train.wrong{i}=1" for i in range(number)))
        return str(caught.value).splitlines()

    assert len(lines(10)) == 10
    assert len(lines(12)) == 11
    assert lines(12)[-1] == "and 2 more"
    with pytest.raises(ConfigError, match="'2' is not an entry of a list of 2, counted from 0"):
        config("rewards.2.weight=1")
    for seed in (-(2**63), 2**63 - 1):
        assert config(f"run.seed={seed}").run.seed == seed
    with pytest.raises(ConfigError, match=r"run.seed must be a whole number of at most 64 bits"):
        config(f"run.seed={-(2**63) - 1}")
    with pytest.raises(ConfigError, match="ddof must be one of 0, 1, got True"):
        config("algorithm.advantage={kind='group', ddof=true}")


def test_explanations_line_by_line() -> None:
    assert explain(Config, "train.split").splitlines() == [
        "train.split  (Train; default 'groups')",
        "    What is divided among an epoch's optimizer steps: whole ``groups``; the ``samples`` of every group "
        "(DanceGRPO); the denoising ``steps``, from noise to data (G2RPO); or single ``actions`` in random order "
        "(BranchGRPO). Advantages are computed before, from whole groups.",
        "    allowed: 'groups', 'samples', 'steps', 'actions'",
    ]  # fmt: skip
    lines = explain(Config, "model.weights").splitlines()
    assert lines[0].startswith("model.weights  (Model; default {'kind': 'lora'")
    assert [x.split(":")[0] for x in lines if x.startswith("    kind")] == ["    kind = 'lora'", "    kind = 'full'", "    kind = 'noise'"]  # fmt: skip
    assert any(x.startswith("        rank: ") for x in lines)
    assert not any(x.startswith("        kind: ") for x in lines)
    assert (
        explain(Config, "evaluation")
        .splitlines()[2]
        .startswith("    keys: Evaluations on held-out")
    )
    with pytest.raises(ConfigError, match=r"known below the top: algorithm, evaluation"):
        explain(Config, "trian")
    with pytest.raises(ConfigError, match=r"unknown key 'train.lr.x'"):
        explain(Config, "train.lr.x")
    with pytest.raises(ConfigError, match=r"known below train: betas"):
        explain(Config, "train.x")


def test_a_begun_configuration_keeps_its_head_and_explains_its_keys() -> None:
    lines = starter("owner/My.Model-2", "quickstart_flow_grpo", {"memory.offload.x": 1, "run.seed": 3}, ["One note."]).splitlines()  # fmt: skip
    head = lines[: lines.index("")]
    assert (
        head[0]
        == "# A run on owner/My.Model-2, after the recipe quickstart_flow_grpo that comes with flowgrpo:"
    )
    first = find("quickstart_flow_grpo").read_text().splitlines()[0].removeprefix("# ")
    assert head[1] == f"#   {first}"
    assert head[-2:] == ["# One note.", "# 'flowgrpo config explain KEY' explains any key, also those that are not here."]  # fmt: skip
    assert 'path = "owner/My.Model-2"' in lines
    assert 'folder = "runs/my_model-2"' in lines
    assert lines[lines.index("seed = 3") - 1] == "# Seed of all random draws."
    assert lines[lines.index("[train]") - 1] == "# Length of the run, batch geometry and optimizer."
    # A list of tables is explained once, above it; tables with a kind by their kind.
    start = lines.index("rewards = [")
    assert lines[start - 1].startswith("# ")
    assert not any(x.startswith("#") for x in lines[start : lines.index("]", start)])
    assert lines[lines.index("noise_level = 0.7") - 1].startswith("# ")
