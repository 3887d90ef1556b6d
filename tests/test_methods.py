"""Published methods by name: what selects each, in errors, explanations, lists and the plan."""

import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from flowgrpo.cli.main import main
from flowgrpo.config import Config, load
from flowgrpo.config.changes import flat_table
from flowgrpo.config.files import dropped_keys
from flowgrpo.config.method_rows import method_rows
from flowgrpo.config.methods import METHODS, method, partners
from flowgrpo.config.reader import kind_of, members_of
from flowgrpo.config.reference import explain
from flowgrpo.core.errors import ConfigError

ALGORITHMS_PAGE = Path(__file__).parents[1] / "docs/algorithms.md"


@pytest.mark.parametrize("one", [m for m in METHODS if m.recipe], ids=lambda m: m.names[0])
def test_the_recipe_of_a_method_has_the_settings_that_select_it(one):
    table = flat_table(load(one.recipe))
    assert {k: table.get(k) for k in one.settings} == dict(one.settings)


@pytest.mark.parametrize("one", METHODS, ids=lambda m: m.names[0])
def test_the_settings_of_a_method_can_be_set_and_pass_the_checks(one):
    """As ``explain`` prints them, in the recipe or in the configuration that they are said to suit."""
    assert bool(one.recipe) != bool(one.base)
    words = one.words()
    settings = [f"{k}={json.dumps(v)}" for k, v in one.settings.items()]
    assert all(s.replace("=", " = ", 1) in words for s in settings)
    config = load(one.recipe or one.base, settings)
    config.check()
    table = flat_table(config)
    assert {k: table.get(k) for k in one.settings} == dict(one.settings)


def test_no_two_methods_have_the_same_settings():
    rows = [(json.dumps(m.settings, sort_keys=True), m.names[0]) for m in METHODS]
    assert len({settings for settings, _ in rows}) == len(rows)
    assert method("V-GRPO") is not method("EPG") is not method("PEPG") is method("PAR")
    assert len({id(method(n)) for n in ("DRaFT", "DRaFT-K", "DRaFT-LV", "AlignProp")}) == 4


def test_every_name_in_the_table_of_the_documentation_is_known():
    table = ALGORITHMS_PAGE.read_text().split("|---|---|---|---|\n", 1)[1].split("\n\n", 1)[0]
    cells = [re.sub(r" \(.*\)", "", line.split("|")[1]).strip() for line in table.splitlines()]
    assert len(cells) > 30
    assert [n for cell in cells for n in cell.split(", ") if method(n) is None] == []


def test_every_kind_belongs_to_a_method_and_every_loss_to_its_algorithm():
    hints = get_type_hints(Config)
    losses = {kind_of(m) if get_args(get_type_hints(m)["kind"]) else m.kind: m for m in members_of(hints["loss"])}  # fmt: skip
    algorithms = {kind_of(m): m for m in members_of(hints["algorithm"])}
    pairs = {(m.settings["algorithm.kind"], m.settings.get("loss.kind", "clipped")) for m in METHODS if "algorithm.kind" in m.settings}  # fmt: skip
    assert {a for a, _ in pairs} == set(algorithms)
    assert {b for _, b in pairs} == set(losses)
    for algorithm, loss in pairs:
        assert algorithms[algorithm].action_kind in losses[loss]().needs.action_kinds


def test_names_are_found_in_any_spelling():
    assert method("flow_grpo_fast").recipe == "sd35_medium_fast"
    assert method("awm") is method("AWM") is method("Advantage Weighted Matching")
    assert method("train.lr") is None
    names = [re.sub(r"\W|_", "", n.lower()) for m in METHODS for n in m.names]
    assert len(set(names)) == len(names)
    page = ALGORITHMS_PAGE.read_text()
    assert [m.names[0] for m in METHODS if m.names[0].lower() not in page.lower()] == []


def test_an_unknown_kind_that_is_a_method_is_answered_with_its_settings():
    with pytest.raises(ConfigError, match=r'AWM is algorithm.kind = "matching" with loss.kind = "matching", algorithm.share_noise = false, .*; all its settings: the recipe sd35_medium_awm'):  # fmt: skip
        load("sd35_medium_geneval", ["algorithm.kind=awm"])
    with pytest.raises(ConfigError, match=r"with algorithm.kind = 'diffusion_nft', loss.kind is 'nft'; with loss.kind = 'clipped', algorithm.kind is 'flow_grpo', "):  # fmt: skip
        load("sd35_medium_geneval", ["algorithm.kind=diffusion_nft"]).check()
    assert partners("mine:Algorithm", "mine:Loss") == ""


def test_explanations_show_the_name_that_was_asked_for_and_suggest_names():
    assert explain(Config, "par").startswith('PAR is algorithm.kind = "matching" with loss.kind = "matching", ')  # fmt: skip
    assert 'loss.surrogate = "pepg"' in explain(Config, "par")
    assert explain(Config, "flow_dpo").startswith('Flow-DPO is algorithm.kind = "pairs" with ')
    assert explain(Config, "online_dpo") == 'Online DPO is algorithm.kind = "matching" with loss.kind = "dpo"; it has no recipe, but these settings can be applied to quickstart'  # fmt: skip
    with pytest.raises(ConfigError, match=r"unknown key 'FooGRPO'; methods with similar names: Flow-GRPO, .* \(known below the top: algorithm, "):  # fmt: skip
        explain(Config, "FooGRPO")
    with pytest.raises(ConfigError, match=r"unknown key 'algoritm'; did you mean 'algorithm'\? \("):
        explain(Config, "algoritm")
    with pytest.raises(ConfigError, match=r"unknown key 'train.draft' \(known below train"):
        explain(Config, "train.draft")


def test_keys_that_another_kind_leaves_out_are_named():
    kind, again = "algorithm.kind=mix_grpo", "algorithm.group_size=24"
    (note,) = dropped_keys("sd35_medium_geneval", [again, kind])
    assert note.startswith(f"--set {kind} leaves out group_size, noise_last, transition, steps, ")
    (note,) = dropped_keys("sd35_medium_geneval", [kind, again])
    assert note.startswith(f"--set {kind} leaves out noise_last, transition, steps, advantage of ")
    assert dropped_keys("sd35_medium_geneval", ["algorithm.kind=flow_grpo", "train.lr=1"]) == []
    assert dropped_keys("quickstart", ["loss.new.kind=x", "model.weights.kind=lora"]) == []


@pytest.mark.parametrize(("number", "shown"), [(2, 0), (1, 1)])
def test_a_launcher_leaves_notes_to_its_first_process(number, shown, monkeypatch, capsys):
    monkeypatch.setattr("flowgrpo.training.launch.launch", lambda *_: 0)
    monkeypatch.setattr("flowgrpo.cli.train._dry_run", lambda *_: 0)
    dry = ["--dry-run"] if number == 1 else []
    settings = ["--set", "algorithm.kind=diffusion_nft", "--set", "loss.kind=nft"]
    assert main(["train", "quickstart", "--nproc", str(number), *dry, *settings]) == 0
    assert capsys.readouterr().out.count("--set algorithm.kind=diffusion_nft leaves out") == shown


def test_the_plan_says_what_is_trained():
    rows = method_rows(load("flux_mix"))
    assert rows["algorithm"] == "mix_grpo; advantages per_reward, by the group's deviation"
    assert rows["trained steps"] == "0 to 3 of 0 to 24 in the first iteration (sliding_window); flow_sde with noise_level 0.7"  # fmt: skip
    assert rows["loss"] == "clipped, clip_range 0.0001, kl_coef 0"
    assert rows["trained weights"].startswith("all weights; arithmetic in bfloat16; adamw8bit with")
    rows = method_rows(load("sd35_medium_nft", ["model.weights.rank=8"]))
    assert "trained steps" not in rows
    assert rows["loss"] == "nft, beta 1, kl_coef 0.0001"
    assert rows["trained weights"].startswith("LoRA of rank 8, alpha 64; arithmetic in float16")
    rows = method_rows(load("quickstart_flow_grpo", ["algorithm.steps={kind='random_steps', count=3, first=0, last=7}", "run.seed=3"]))  # fmt: skip
    assert re.match(r"\d(, \d| to \d)+ of 0 to 7 in the first iteration \(random_steps\); cps", rows["trained steps"])  # fmt: skip


def test_list_looks_for_words_and_methods(capsys):
    assert main(["config", "list", "awm"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("flux_awm                 Advantage Weighted Matching on ")
    assert "\nsd35_medium_awm          Advantage Weighted Matching on " in out
    assert "runs whole on tiny parts: all\n" in out
    assert main(["config", "list", "Flow-GRPO-Fast"]) == 0
    assert {"flux_fast", "sd35_medium_fast"} <= set(re.findall("^\\w+", capsys.readouterr().out, re.M))  # fmt: skip
    assert main(["config", "list", "bnpo"]) == 2
    assert "no configuration for 'bnpo': BNPO is algorithm.advantage.kind = \"beta\"" in capsys.readouterr().err  # fmt: skip
    assert main(["config", "list"]) == 0
    assert "to four steps without guidance, without rewards: the model that sd35_medium_rtdmd starts from.\n" in capsys.readouterr().out  # fmt: skip
    assert main(["config", "explain", "grpo-guard"]) == 0
    assert capsys.readouterr().out == 'GRPO-Guard is algorithm.kind = "flow_grpo" with loss.ratio = "guard"; all its settings: the recipe sd35_medium_guard\n'  # fmt: skip


def test_a_configuration_of_another_kind_begins_without_the_keys_of_the_old_one(capsys):
    command = ["config", "init", "shapes", "--recipe", "quickstart_flow_grpo"]
    assert main([*command, "--set", "algorithm.kind=mix_grpo", "--set", "rewards.0.weight=2"]) == 0
    text = capsys.readouterr().out
    assert '[algorithm]\nkind = "mix_grpo"\n\n' in text
    assert "weight = 2" in text
