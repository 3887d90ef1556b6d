"""``flowgrpo train``."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flowgrpo.cli.common import CONFIG_HELP, UsageError, add_set_argument, is_run, quiet
from flowgrpo.core.text import counted, plain

if TYPE_CHECKING:
    from flowgrpo.config import Config
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.training.launch import Nodes

SUMMARY = "fine-tune a model, or resume a run"
EXAMPLE = "flowgrpo train quickstart --set run.seed=1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("config", help=f"{CONFIG_HELP}; or a run directory, to resume the run")
    add_set_argument(parser)
    parser.add_argument(
        "--resume-with",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change keys of a run that exists and resume it, for instance train.iterations=400; the change "
        "stays in force when the run is resumed again",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked without the model, print the plan and the memory "
        "that it takes, stop",
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        metavar="N",
        help="with --dry-run: the device's memory to compare with (default: that of the GPU here)",
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="start N processes on this machine, one per GPU"
    )
    parser.add_argument(
        "--nnodes",
        type=int,
        default=1,
        metavar="N",
        help="with --nproc: number of machines, on each of which this command is started",
    )
    parser.add_argument(
        "--node-rank",
        type=int,
        metavar="N",
        help="with --nnodes: number of this machine, from 0 (default: that of Slurm or of a Kubernetes Indexed Job)",
    )
    parser.add_argument(
        "--master",
        default="",
        metavar="HOST[:PORT]",
        help="with --nnodes: address of machine 0 (default port: 29500)",
    )


def run(options: argparse.Namespace) -> int:
    """Check the configuration, then train or print the plan."""
    from flowgrpo.core.errors import LostRankError
    from flowgrpo.training.inputs import check_names
    from flowgrpo.training.launch import launch, num_ranks, watch_launcher

    if options.memory_gb is not None and not options.dry_run:
        raise UsageError("--memory-gb is for --dry-run")
    if options.memory_gb is not None and not options.memory_gb > 0:
        raise UsageError(f"--memory-gb must be above 0, got {options.memory_gb:g}")
    nodes = _nodes(options)
    config, kept = _configuration(options)
    num_processes = num_ranks() if nodes is None else nodes.size
    is_launcher = nodes is not None and nodes.size > 1 and not options.dry_run
    for note in () if is_launcher else _left_out(options):
        print(plain(f"note: {note}"))
    if options.dry_run:
        return _dry_run(config, num_processes, options.memory_gb)
    # Before torch and diffusers are imported, which takes seconds.
    check_names(config, num_processes)
    if nodes is not None and nodes.size > 1:
        return launch(_command(options), nodes)
    watch_launcher()
    quiet()
    from flowgrpo.training.loop import train
    from flowgrpo.training.signals import AGAIN, EXIT_STATUS

    try:
        result = train(config, kept)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except LostRankError as error:
        print(plain(f"flowgrpo: {error}"), file=sys.stderr)
        _leave(AGAIN)  # Python's own end would wait for the process that is lost.
    if result.finished:
        return 0
    _leave(EXIT_STATUS[result.stopped_by])


def _nodes(options: argparse.Namespace) -> "Nodes | None":
    """The processes to start; None without ``--nproc``."""
    from flowgrpo.training.launch import Nodes

    if options.nproc is None:
        if options.nnodes != 1 or options.node_rank is not None or options.master:
            raise UsageError(
                "--nnodes, --node-rank and --master need --nproc N, the processes per machine"
            )
        return None
    return Nodes.of(options.nproc, options.nnodes, options.node_rank, options.master)


def _command(options: argparse.Namespace) -> list[str]:
    """The command of one process."""
    settings = [f"--set={setting}" for setting in options.set]
    settings += [f"--resume-with={setting}" for setting in options.resume_with]
    return [sys.executable, "-m", "flowgrpo", "train", *settings, "--", options.config]


def _configuration(options: argparse.Namespace) -> "tuple[Config, list[str]]":
    """The configuration of the command, and the keys of it that ``--resume-with`` changes."""
    from flowgrpo.config import load
    from flowgrpo.training.run_changes import extend

    name = options.config
    if is_run(name):
        name = str(Path(name) / "config.toml")
    if not options.resume_with:
        return load(name, options.set), []
    others = [s for s in options.set if s.partition("=")[0].strip() != "run.folder"]
    if others:
        raise UsageError(
            f"--set {others[0]}: with --resume-with the configuration is that of the run; give every change "
            "to --resume-with, and only run.folder to --set"
        )
    return extend(Path(load(name, options.set).run.folder), options.resume_with)


def _left_out(options: argparse.Namespace) -> list[str]:
    """Sentences about keys that do not apply any more; from one of the processes."""
    from flowgrpo.config.files import dropped_keys

    if options.resume_with or is_run(options.config) or os.environ.get("RANK", "0") != "0":
        return []
    return dropped_keys(options.config, options.set)


def _leave(status: int) -> NoReturn:
    """End the process at once: Python's own end would wait for a reward that is still scoring."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _dry_run(config: "Config", num_processes: int, memory_gb: float | None) -> int:
    """Check everything that can be checked without the model, and print the plan."""
    from flowgrpo.config.few_steps import few_step_notes
    from flowgrpo.config.geometry import geometry
    from flowgrpo.config.method_rows import method_rows
    from flowgrpo.config.plan import plan
    from flowgrpo.config.without_effect import idle_notes
    from flowgrpo.policy.model_files import locate
    from flowgrpo.training.inputs import absent_weights, check_inputs
    from flowgrpo.training.run_changes import in_force
    from flowgrpo.training.run_folder import preview

    config, kept = in_force(config)
    packages: list[str] = []
    train, held_out = check_inputs(config, num_processes, packages)
    model, work = locate(config.model.path), plan(config, num_processes)
    absent = absent_weights(config, and_model=False)
    rows = [
        ("model", f"{config.model.path}, {model.words}"),
        *method_rows(config).items(),
        *geometry(config, num_processes).items(),
        *work.rows().items(),
    ]
    for label, prompts, file in (
        ("training prompts", train, config.prompts.train),
        ("held-out prompts", held_out, config.prompts.held_out),
    ):
        classes = (
            f" in {counted(len(prompts.classes()), 'class')}" if config.prompts.balance else ""
        )
        rows.append((label, f"{len(prompts.prompts)}{classes} ({file})"))
    rows += _judges(config)
    rows += [("metric", metric) for metric in config.evaluation.metrics]
    if config.run.trackers:
        rows.append(("trackers", ", ".join(config.run.trackers)))
    rows += _benchmarks(config)
    rows.append(("run directory", f"{config.run.folder}, {preview(config)}"))
    quiet()
    from flowgrpo.memory.printing import print_estimate
    from flowgrpo.training.console import Console

    console = Console()
    for name, value in rows:
        console.say(f"{name:>20}  {value}")
    notes = (*work.notes(), *idle_notes(config), *few_step_notes(config))
    warnings = [f"WARNING: {n}" for n in notes]
    for note in [*kept, *warnings, *_notes(config, train, held_out), *absent]:
        console.say(note)
    print_estimate(config, num_processes, memory_gb, console)
    console.say("the configuration is valid; nothing was loaded")
    if packages:
        console.say(f"before the run can start: {'; '.join(packages)}")
    if not model.is_here:
        console.say(f"the model {config.model.path} has to be downloaded before the run can start")
    return 0


def _judges(config: "Config") -> list[tuple[str, str]]:
    """The rewards and a judge of pairs. None is loaded: they may be large, or need weights that are not here."""
    from flowgrpo.rewards.pairs import PairwisePreference

    rows = [(f"reward {r.label}", f"weight {r.weight:g} ({r.model})") for r in config.rewards]
    preference = getattr(config.algorithm, "preference", None)
    if isinstance(preference, PairwisePreference):
        rows.append(("judge of pairs", f"weight {preference.weight:g} ({preference.model})"))
    return rows


def _notes(config: "Config", train: "PromptSet", held_out: "PromptSet") -> list[str]:
    """Warnings about the prompts that need no model, as a run prints them at its start."""
    from flowgrpo.memory.meta_pipeline import (
        EstimateError,
        config_folder,
        pipeline_class,
        tokenizers,
    )
    from flowgrpo.policy.text_length import cut_prompts
    from flowgrpo.training.inputs import shared_note

    notes = [f"WARNING: {text}" for text in shared_note(train, held_out)]
    scale, true_scale = (
        config.sampling.guidance_scale,
        config.sampling.call.get("true_cfg_scale", 0),
    )
    for label, some in (("training", train.prompts), ("held-out", held_out.prompts)):
        number = sum(p.negative is not None for p in some)
        if number and scale is not None and scale <= 1 and true_scale <= 1:
            notes.append(
                f"WARNING: {label} prompts: {number} of {len(some)} have a negative prompt, which pipelines ignore "
                f"without guidance (sampling.guidance_scale = {scale:g})"
            )
    try:
        folder = config_folder(config.model.path)
    except EstimateError:
        return notes
    known, call = tokenizers(folder), pipeline_class(folder).__call__
    for label, some in (("training", train.prompts), ("held-out", held_out.prompts)):
        cut = cut_prompts(known, call, config.sampling, some)
        notes += [f"WARNING: {label} prompts: {text}" for text in cut]
    if not known:
        notes.append(
            f"the tokenizers of {config.model.path} are not here, so it is not known whether prompts are too "
            "long for its text encoders; the run says it at its start"
        )
    return notes


def _benchmarks(config: "Config") -> list[tuple[str, str]]:
    """The cost of each benchmark of the run."""
    if not config.evaluation.bench:
        return []
    from flowgrpo.training.benchmarks import load_benchmarks

    every, last = config.evaluation.every, config.train.iterations
    during = len(range(every, last, every)) if every else 0
    rows = []
    for one in load_benchmarks(config.evaluation):
        times = {"every": during + 2, "ends": 2, "final": 1}[one.settings.when]
        rows.append(
            (
                f"benchmark {one.settings.tag}",
                f"{counted(len(one.entries), 'prompt')} x {counted(one.benchmark.samples, 'image')}, {times} times: "
                f"{counted(times * one.images, 'image', ',')}; judge: {one.benchmark.about.judge}",
            )
        )
    return rows
