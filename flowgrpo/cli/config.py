"""``flowgrpo config``."""

import argparse
from pathlib import Path
from typing import Any

from flowgrpo.cli.common import UsageError, add_set_argument, parse_setting
from flowgrpo.core.errors import ConfigError
from flowgrpo.data import strict_json

SUMMARY = "explain, list, show or begin configurations, or write their JSON schema"
EXAMPLE = """\
flowgrpo config explain algorithm.steps
  flowgrpo config explain AWM                       which keys select a published method
  flowgrpo config list sd35                         the configurations for a model or a method
  flowgrpo config init MODEL --recipe NAME --out my.toml    begin a file of your own
  flowgrpo config show my.toml                      all keys with their values"""

OPTIONS = {
    "set": ("show", "init"),
    "out": ("init", "schema"),
    "recipe": ("init",),
    "memory_gb": ("init",),
}
"""The actions that take an option."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "action",
        choices=("explain", "init", "list", "schema", "show"),
        help="explain a key; begin a commented configuration for a model; list the configurations that come "
        "with flowgrpo; write a JSON schema for editors; show a configuration with all defaults",
    )
    parser.add_argument(
        "name",
        nargs="?",
        help="a key such as train.lr or a method (explain), a model (init), a configuration (show), or a "
        "word to look for (list)",
    )
    add_set_argument(parser)
    parser.add_argument(
        "--out", metavar="FILE", help="of init and schema: new file (default: print the text)"
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="of init: the configuration to begin with (default: the one for the model)",
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        metavar="N",
        help="of init: change settings until the run fits into N GB by the estimate of --dry-run, which "
        "takes a minute",
    )


def run(options: argparse.Namespace) -> int:
    """Do one of the five actions."""
    needs = {"explain": "key", "init": "model", "show": "configuration"}.get(options.action)
    if needs and options.name is None:
        raise UsageError(f"config {options.action} needs a {needs}")
    for name, of in OPTIONS.items():
        if getattr(options, name) and options.action not in of:
            raise UsageError(f"--{name.replace('_', '-')} is for config {' and '.join(of)}")
    actions = {"explain": _explain, "init": _init, "list": _list, "schema": _schema, "show": _show}
    actions[options.action](options)
    return 0


def _explain(options: argparse.Namespace) -> None:
    from flowgrpo.config import Config
    from flowgrpo.config.reference import explain

    print(explain(Config, options.name))


def _init(options: argparse.Namespace) -> None:
    """Write a configuration for a model."""
    from flowgrpo.config.reader import override
    from flowgrpo.config.starter import recipes_for, similar_recipes, starter

    model, out = options.name, Path(options.out) if options.out else None
    if out is not None and out.exists():
        raise UsageError(f"{out} exists; choose another --out")
    if options.memory_gb is not None and not options.memory_gb > 0:
        raise UsageError(f"--memory-gb must be above 0, got {options.memory_gb:g}")
    recipes = recipes_for(model)
    if not recipes and options.recipe is None:
        near = " or ".join(f"--recipe {r} ({m})" for m, r in similar_recipes(model).items())
        begin = f"a model with a similar name, {near} ('flowgrpo config list' lists all)"
        begin = begin if near else "another model (--recipe NAME; 'flowgrpo config list')"
        raise UsageError(
            f"no recipe for {model}. Begin with one for {begin}, and check the model with "
            f"'flowgrpo doctor {model}'"
        )
    recipe = options.recipe or recipes[0]
    others = [r for r in recipes if r != recipe]
    notes = [f"Other recipes for it: {', '.join(others)}."] if others else []
    settings: dict[str, Any] = {}
    for setting in options.set:
        override({}, [setting])
        key, value = parse_setting(setting, "--set")
        settings[key] = value
    if options.memory_gb is not None:
        found, words = _fitting(starter(model, recipe, settings), options.memory_gb)
        settings |= found
        notes.append(words)
    else:
        notes.append(
            "'flowgrpo train FILE --dry-run --memory-gb N' estimates the memory of this file."
        )
    text = starter(model, recipe, settings, notes)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        print(out)


def _fitting(text: str, memory_gb: float) -> tuple[dict[str, Any], str]:
    """The settings with which a run fits into a device, and a sentence about its memory."""
    from tempfile import TemporaryDirectory

    from flowgrpo.cli.common import quiet
    from flowgrpo.config import load
    from flowgrpo.config.training_data import training_prompts
    from flowgrpo.memory import GB, advise, budget, estimate_footprint, memory_options

    quiet()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(text, encoding="utf-8")
        config = load(str(file))
    parts = estimate_footprint(config, training_prompts(config).prompts)
    options = memory_options(config)
    changes, fits = advise(parts, options, round(memory_gb * GB))
    peak = (changes[-1].peak if changes else budget(parts, options).peak) / GB
    if not fits:
        raise ConfigError(
            f"it does not fit into {memory_gb:g} GB by any setting: the peak is {peak:.1f} GB; use a smaller "
            "image, a smaller model, or LoRA"
        )
    found = dict(parse_setting(c.setting) for c in changes)
    return found, f"Estimated peak {peak:.1f} GB, for a device of {memory_gb:g} GB."


def _list(options: argparse.Namespace) -> None:
    """Print the configurations, all or those that a word is about, and the evidence that they work."""
    from flowgrpo.config.evidence import LEVELS, evidence
    from flowgrpo.config.methods import method
    from flowgrpo.config.recipes import summaries

    found, word = summaries(), options.name
    if word is not None:
        known = method(word)
        recipe = known.recipe if known is not None else ""
        found = {
            name: text
            for name, text in found.items()
            if word.lower() in f"{name} {text}".lower() or name == recipe
        }
        if not found:
            words = f"{known.words(word)}; " if known is not None else ""
            raise UsageError(
                f"no configuration for {word!r}: {words}'flowgrpo config list' lists all"
            )
    for name, text in found.items():
        print(f"{name:<24} {text}")
    names: dict[str, list[str]] = {}
    for name in found:
        names.setdefault(evidence(name), []).append(name)
    most = max(names, key=lambda level: len(names[level]))
    print("\nevidence that they work (docs/recipes.md; 'flowgrpo verify NAME' adds more):")
    for level in LEVELS:
        if level in names:
            of = "all" if len(names) == 1 else "the others" if level == most else ", ".join(names[level])  # fmt: skip
            print(f"  {LEVELS[level]}: {of}")


def _schema(options: argparse.Namespace) -> None:
    from flowgrpo.config import Config
    from flowgrpo.config.reference import json_schema

    text = strict_json.dumps(json_schema(Config), indent=2)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
        print(options.out)
    else:
        print(text)


def _show(options: argparse.Namespace) -> None:
    from flowgrpo.config.files import dump, load

    print(dump(load(options.name, options.set)), end="")
