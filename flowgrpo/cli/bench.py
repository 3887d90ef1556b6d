"""``flowgrpo bench``: benchmarks of models; heavy imports are inside, so that ``--help`` is fast."""

import argparse
import os
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.cli.common import (
    CHECKPOINT_HELP,
    LORA_HELP,
    SOURCE_OPTIONS,
    UsageError,
    checkpoint_or_base,
    is_run,
)
from flowgrpo.core.text import counted

if TYPE_CHECKING:
    from flowgrpo.bench.base import Benchmark
    from flowgrpo.bench.generation import Plan
    from flowgrpo.bench.models import Subject
    from flowgrpo.bench.run import Part

SUMMARY = "measure a model on a benchmark"
EXAMPLE = """\
flowgrpo bench shapes --model shapes
  flowgrpo bench geneval --model MODEL              generate, judge and report
  flowgrpo bench generate geneval --model MODEL     the images only
  flowgrpo bench score FOLDER                       judge images, of ours or made elsewhere (--benchmark NAME)
  flowgrpo bench score results.jsonl --benchmark geneval    summarise an official results file
  flowgrpo bench report FOLDER [FOLDER ...]         tables and a page; compares the first with the others
  flowgrpo bench compare geneval --model RUN        the model before and after training: both, and the difference
  flowgrpo bench compare geneval --model M --lora A         without and with adapters
  flowgrpo bench list [NAME]                        the benchmarks and their requirements"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="NAME | VERB ...",
        help="a benchmark by name or import path; or generate NAME, score FOLDER, report FOLDER ..., compare NAME, list",
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, text, more in options:
            group.add_argument(*name.split(), help=text, **more)


AGAIN: dict[str, Any] = {"action": "append", "default": []}
FLAG: dict[str, Any] = {"action": "store_true"}
OPTIONS: Mapping[str, Sequence[tuple[str, str, dict[str, Any]]]] = {
    "what": [
        ("--data", "the benchmark's data: a path or hf:owner/name:file", {"metavar": "FILE"}),
        ("--samples", "images per prompt (default: the official number)", {"type": int}),
        ("--limit", "only N prompts, spread evenly", {"type": int, "metavar": "N"}),
        ("--dimension", "only prompts of a task or test point; can be given again", {**AGAIN, "metavar": "NAME"}),
        ("--set", "any other setting of the benchmark; 'bench list NAME' shows them", {**AGAIN, "metavar": "KEY=VALUE"}),
        ("--out", "folder (default: bench/NAME/LABEL)", {}),
        ("--label", "name of the model in paths and tables", {}),
        ("--estimate", "print images, judge calls and time; make nothing", FLAG),
    ],
    "model": [
        ("--model", "hub id, pipeline folder, single file, run directory, or 'shapes'", {}),
        ("--lora --adapter", LORA_HELP, {**AGAIN, "metavar": "PATH[:SCALE]"}),
        *((name, text, {}) for name, text in SOURCE_OPTIONS.items()),
        ("--checkpoint --weights", CHECKPOINT_HELP, {"dest": "weights", "type": checkpoint_or_base, "metavar": "NAME"}),
        ("--steps", "denoising steps (default: 28; of a run: as in its evaluations)", {"type": int}),
        ("--guidance", "guidance scale (default: the pipeline's; of a run: as in its evaluations)", {"type": float}),
        ("--size", "WIDTHxHEIGHT in pixels (default: the pipeline's)", {}),
        ("--frames", "frames of a video (default: the pipeline's)", {"type": int}),
        ("--call", "any other argument of the pipeline's call", {**AGAIN, "metavar": "NAME=VALUE"}),
        ("--dtype", "precision of the denoiser (default: float32; of a run: its own)", {"choices": ("float32", "bfloat16", "float16")}),
        ("--device", "cpu, cuda, ... (default: a GPU if there is one)", {"default": "auto"}),
        ("--seed", "for the noise (default: %(default)s)", {"type": int, "default": 0}),
        ("--batch", "images in one call of the pipeline (default: %(default)s)", {"type": int, "default": 16}),
    ],
    "judging": [
        ("--judge", "judge model, as its server calls it", {"metavar": "MODEL"}),
        ("--judge-url", "OpenAI-compatible server; can be given again for equal servers", {"action": "append", "metavar": "URL"}),
        ("--judge-key-env", "environment variable with the judge's key", {"metavar": "NAME"}),
        ("--benchmark", "with score: what a folder made elsewhere is of", {"metavar": "NAME"}),
        ("--allow-missing", "score although images are missing", FLAG),
    ],
}  # fmt: skip
"""Name, help and further arguments of each option, by group."""


def run(options: argparse.Namespace) -> int:
    """Dispatch to a verb, or run a whole benchmark."""
    verb, *rest = options.words
    if verb == "list":
        return _list(rest)
    if verb == "report":
        return _report(rest, options.out)
    if verb == "score":
        return _score(rest, options)
    if verb == "compare":
        return _compare(rest, options)
    names = rest if verb == "generate" else options.words
    if len(names) != 1:
        raise UsageError(f"bench {verb}: one benchmark at a time, got {' '.join(names) or 'none'}")
    return _whole(names[0], options, judge=verb != "generate")


def _whole(name: str, options: argparse.Namespace, judge: bool) -> int:
    """Generate, and judge unless only images are wanted."""
    from flowgrpo.bench.base import BenchError, load_benchmark
    from flowgrpo.bench.run import Part, generate_folder, score_folder

    benchmark = load_benchmark(name, settings_of(options))
    part = Part(options.limit, options.dimension)
    plan = _plan(benchmark, part, options)
    if options.estimate:
        return _estimate(plan, benchmark)
    if judge:
        benchmark.check_judge()
    loaded = benchmark.judge() if judge and plan.rank == 0 and _is_remote(benchmark) else None
    generate_folder(plan)
    if plan.rank or not judge:
        if not plan.rank:
            print(plan.folder)
        return 0
    try:
        result = score_folder(plan.folder, benchmark, part, plan.subject.label, judge=loaded)
    except OSError as error:  # of a judge whose files cannot be had
        raise BenchError(
            f"the images are made, but not judged: {error}\nTo judge them once this is mended: flowgrpo bench "
            f"score {plan.folder}"
        ) from error
    _show(result, plan.folder)
    return 0


def _compare(words: Sequence[str], options: argparse.Namespace) -> int:
    """Measure a model before and after, and compare; or compare folders with results."""
    if len(words) > 1 or (words and Path(words[0]).is_dir()):
        if len(words) < 2:
            raise UsageError(
                f"bench compare needs two folders with results, or a benchmark; got {words[0]}"
            )
        return _report(words, options.out)
    if len(words) != 1:
        raise UsageError("bench compare needs a benchmark, or two folders with results")
    both = _before_and_after(options)
    codes = [_whole(words[0], one, judge=True) for one in both]
    if any(codes) or options.estimate or int(os.environ.get("RANK", "0")):
        return max(codes)
    folders = [_folder(words[0], one) for one in both]
    _show_comparison(*folders)
    print(_write_page(folders, folders[-1] / "comparison.html"))
    return 0


def _before_and_after(options: argparse.Namespace) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The options of both models: a run before and after training, or a model without and with adapters.

    Raises:
        ValueError: If the options describe one model only.
    """
    if not options.model:
        raise UsageError("bench compare needs --model: a run directory, or a model with --lora")
    changes: dict[str, Any] = {"lora": [], "label": None}
    if not options.lora:
        if not is_run(options.model) or options.weights == "base":
            raise UsageError(
                "bench compare needs two models: a run directory as --model (before and after training, "
                "--checkpoint last or best), or --lora (without and with it)"
            )
        changes["weights"] = "base"
    before = argparse.Namespace(**{**vars(options), **changes})
    after = argparse.Namespace(**vars(options))
    if options.out:
        before.out, after.out = (str(Path(options.out) / n) for n in ("before", "after"))
    return before, after


def _folder(name: str, options: argparse.Namespace) -> Path:
    """Where the results of a benchmark are."""
    from flowgrpo.bench.base import load_benchmark

    benchmark = load_benchmark(name, settings_of(options))
    return (
        Path(options.out)
        if options.out
        else Path("bench") / benchmark.name / _subject(options).label
    )


def _write_page(folders: Sequence[Path], out: Path) -> Path:
    from flowgrpo.bench.page import write_html

    return write_html(folders, out)


def _is_remote(benchmark: "Benchmark") -> bool:
    """Whether the judge is a server, whose key and name are checked before hours of sampling."""
    return bool(getattr(benchmark, "judge_url", ""))


def _plan(benchmark: "Benchmark", part: "Part", options: argparse.Namespace) -> "Plan":
    from flowgrpo.bench.generation import Plan

    if not options.model:
        raise UsageError(
            "bench needs --model: a hub id, a folder, a file, a run directory or 'shapes'"
        )
    if options.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {options.batch}")
    _quiet()
    subject = _subject(options)
    folder = Path(options.out) if options.out else Path("bench") / benchmark.name / subject.label
    return Plan(
        folder=folder,
        benchmark=benchmark,
        entries=part.of(benchmark),
        subject=subject,
        seed=options.seed,
        batch=options.batch,
        rank=int(os.environ.get("RANK", "0")),
        num_ranks=int(os.environ.get("WORLD_SIZE", "1")),
    )


def _quiet() -> None:
    from flowgrpo.cli.common import quiet
    from flowgrpo.training.cpu import prepare_cpu

    quiet()
    prepare_cpu(int(os.environ.get("OMP_NUM_THREADS", "0")))


def _subject(options: argparse.Namespace) -> "Subject":
    """The model of the options: a pipeline or a run, with adapters."""
    from flowgrpo.bench.models import label_of, parse_label, subject
    from flowgrpo.cli.common import (
        adapters_of,
        changed_sampling,
        run_config,
        sampling_of,
        source_of,
    )

    adapters = adapters_of(options)
    run, of_run = Path(options.model), is_run(options.model)
    given = [o for o in SOURCE_OPTIONS if getattr(options, o.removeprefix("--"))]
    if of_run and given:
        raise UsageError(f"{given[0]} is for models; a run has its own")
    if options.weights is not None and not of_run:
        raise UsageError(
            f"--checkpoint {options.weights} is for a run directory, and {options.model} is none"
        )
    if of_run and options.weights != "base":
        return _run_subject(run, adapters, options)
    source, sampling = source_of(options), sampling_of(options, 28)
    dtype, label = options.dtype or "float32", label_of(source.path, adapters)
    if of_run:
        config = run_config(run)
        own, sampling = config.model.source, changed_sampling(config.evaluation_sampling(), options)
        source = replace(own, adapters=(*own.adapters, *adapters))
        label, dtype = (
            label_of(f"{run.resolve().name}-base", adapters),
            options.dtype or config.model.dtype,
        )
    return subject(
        source,
        sampling=sampling,
        dtype=dtype,
        device=_device(options.device),
        batch=options.batch,
        label=parse_label(options.label) if options.label else label,
    )


def _run_subject(run: Path, adapters: Sequence[Any], options: argparse.Namespace) -> "Subject":
    """A checkpoint of a run, sampled as in its evaluations unless told otherwise."""
    from flowgrpo.bench.files import sha256
    from flowgrpo.bench.models import (
        Subject,
        identify_source,
        label_of,
        parse_label,
    )
    from flowgrpo.cli.common import changed_sampling, checkpoint_of, load_run, run_config
    from flowgrpo.policy import PipelinePolicy
    from flowgrpo.training import checkpoints

    config = run_config(run)
    own = config.model.source
    if options.dtype and options.dtype != config.model.dtype:
        raise ValueError(
            f"--dtype: a run has its own, {config.model.dtype!r}; export it to change that"
        )
    weights = options.weights or "last"
    place = checkpoint_of(run, weights)
    sampling = changed_sampling(config.evaluation_sampling(), options)

    def load() -> PipelinePolicy:
        policy, _ = load_run(run, weights, sampling=sampling, adapters=adapters)
        policy.batch_size = options.batch
        return policy

    def identity() -> Mapping[str, Any]:
        return {
            **identify_source(replace(own, adapters=(*own.adapters, *adapters))),
            "run": run.resolve().name,
            "weights": weights,
            "checkpoint_sha256": sha256(place / checkpoints.STATE),
        }

    label = label_of(f"{run.resolve().name}-{weights.replace('/', '-')}", adapters)
    name = parse_label(options.label) if options.label else label
    return Subject(name, identity, load, sampling, config.model.dtype)


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The benchmark's settings that the command line gives; dots in keys go into tables."""
    named = {
        "data_file": options.data,
        "samples": options.samples,
        "judge_model": options.judge,
        "judge_url": options.judge_url,
        "judge_key_env": options.judge_key_env,
    }
    settings: dict[str, Any] = {k: v for k, v in named.items() if v is not None}
    if options.samples is not None and options.samples < 1:
        raise UsageError(f"--samples must be at least 1, got {options.samples}")
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set needs KEY=VALUE, got {text!r}")
        try:
            parsed: Any = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value
        *tables, last = key.split(".")
        place = settings
        for table in tables:
            place = place.setdefault(table, {})
        place[last] = parsed
    return settings


def _score(words: Sequence[str], options: argparse.Namespace) -> int:
    """Judge a folder, or summarise a file of results."""
    from flowgrpo.bench.base import load_benchmark
    from flowgrpo.bench.models import label_of
    from flowgrpo.bench.run import Part, import_results, score_folder, stored

    if len(words) != 1:
        raise UsageError(f"bench score needs one folder or results file, got {len(words)}")
    source = Path(words[0])
    if not source.exists():
        raise FileNotFoundError(f"no such folder or file: {source}")
    made = stored(source) if source.is_dir() else None
    if made is None and not options.benchmark:
        raise ValueError(
            f"{source} was not made by flowgrpo: say what it is of with --benchmark NAME"
        )
    settings = settings_of(options)
    if made is not None and options.benchmark in (None, made["name"]):
        settings = {**made["settings"], **settings}
    benchmark = load_benchmark(options.benchmark or made["name"], settings)  # type: ignore[index]
    part = Part(options.limit, options.dimension)
    label = options.label or (made["label"] if made else label_of(str(source.resolve())))
    if source.is_file() or _holds_results(benchmark, source):
        out = Path(options.out) if options.out else Path("bench") / benchmark.name / label
        result = import_results(out, benchmark, source, label)
    else:
        _quiet()
        out = (
            Path(options.out)
            if options.out
            else source
            if made
            else Path("bench") / benchmark.name / label
        )
        images = (
            None if made and out == source else source / benchmark.root(label) if made else source
        )
        result = score_folder(out, benchmark, part, label, images, options.allow_missing)
    _show(result, out)
    return 0


def _holds_results(benchmark: "Benchmark", folder: Path) -> bool:
    """Whether a folder holds results of an official evaluator, not images."""
    is_results = getattr(benchmark, "is_results", None)
    return is_results is not None and bool(is_results(folder))


def _report(words: Sequence[str], out: str | None) -> int:
    """Print results, and compare the first folder with the others."""
    from flowgrpo.bench.base import BenchError
    from flowgrpo.bench.report import read_result

    if not words:
        raise UsageError("bench report needs at least one folder")
    folders = [Path(w) for w in words]
    for folder in folders:
        _show(read_result(folder), folder)
    for other in folders[1:]:
        try:
            _show_comparison(folders[0], other)
        except BenchError as error:
            print(f"not compared: {error}")
    name = "report.html" if len(folders) == 1 else "comparison.html"
    print(_write_page(folders, Path(out) if out else folders[-1] / name))
    return 0


def _list(words: Sequence[str]) -> int:
    """Print the benchmarks, or the settings of one."""
    from dataclasses import MISSING, fields

    from flowgrpo.bench.base import available, benchmark_class
    from flowgrpo.config.reference import documentation

    for name in words or available():
        kind = benchmark_class(name)
        about = kind.about
        print(f"{name}\n    {about.summary}")
        for label in ("judge", "calls", "licence", "source"):
            if getattr(about, label):
                print(f"    {label + ':':<9} {getattr(about, label)}")
        if words:
            texts = documentation(kind)
            print("    settings (--set KEY=VALUE):")
            for field in fields(kind):
                default = field.default if field.default is not MISSING else "{}"
                print(f"      {field.name} = {default!r}")
                print(f"          {' '.join(texts.get(field.name, '').split())}")
    return 0


def _estimate(plan: "Plan", benchmark: "Benchmark") -> int:
    """Print how much work there is; times one batch of images."""
    from flowgrpo.bench.generation import sample
    from flowgrpo.bench.progress import clock

    batches = plan.items()
    images = sum(map(len, batches))
    absent = sum(not i.path.exists() for b in batches for i in b)
    print(
        f"{benchmark.title}: {counted(len(plan.entries), 'prompt')}, {counted(images, 'image')}, {absent} of them to be made"
    )
    print(f"judge: {type(benchmark).about.judge}")
    print(
        f"judge calls: {type(benchmark).about.calls} in a full run; images already judged need none"
    )
    in_flight = getattr(benchmark, "concurrency", 0) if _is_remote(benchmark) else 0
    if in_flight:
        calls = benchmark.samples * sum(benchmark.num_calls(e) for e in plan.entries)
        print(f"judge calls of these prompts: {calls}")
        each = clock(calls / in_flight)
        print(f"judging: {each} for every second that an answer takes, {in_flight} at a time")
    if absent:
        batch = min(batches, key=lambda b: abs(len(b) - plan.batch))
        policy = plan.subject.load()
        sample(policy, plan, batch)  # warms up
        began = time.perf_counter()
        sample(policy, plan, batch)
        each_image = (time.perf_counter() - began) / len(batch)
        left = clock(absent * each_image / plan.num_ranks)
        print(f"generation: {each_image:.2f} s per image in batches of {len(batch)}, {left} in all")
    print("nothing was made")
    return 0


def _show(result: Mapping[str, Any], folder: Path) -> None:
    """Print a table of results with what a reader must know."""
    from flowgrpo.bench.report import interval, settings_line, show
    from flowgrpo.training.console import Console

    console, counts = Console(), result["counts"]
    console.say(f"{result['title']}: {result['label']}")
    console.say(f"  {settings_line(result)}")
    console.say(
        f"  {counted(counts['judged'], 'image')} judged, {counts['failed']} failed, {counts['missing']} missing; "
        f"{counts['prompts']} of {counted(counts['prompts_of_benchmark'], 'prompt')}"
    )
    rows = []
    for m in result["metrics"]:
        value = show(m["value"], m["percent"])
        if m.get("strict") is not None and m["strict"] != m["value"]:
            value += f" (strict {show(m['strict'], m['percent'])})"
        rows.append((("* " if m["headline"] else "") + m["name"], value, interval(m), m["points"]))
    console.table("", ("metric", result["label"], "95 % interval", "points"), rows)
    published = [
        f"{r['model']} {show(r['values'][m['name']], True)}"
        for m in result["metrics"]
        if m["headline"]
        for r in result["references"]
        if m["name"] in r["values"]
    ]
    if published:
        console.say(f"  published: {', '.join(published)}")
    for warning in result["warnings"]:
        console.say(f"  note: {warning}")
    console.say(f"  {folder / 'bench.json'}, {folder / 'report.html'}")


def _show_comparison(first: Path, second: Path) -> None:
    """Print the differences of two results."""
    from flowgrpo.bench.report import compared, interval, read_result, show
    from flowgrpo.training.console import Console

    labels = [read_result(f)["label"] for f in (first, second)]
    rows = [
        (
            ("* " if r["headline"] else "") + r["name"],
            show(r["first"], r["percent"]),
            show(r["second"], r["percent"]),
            show(r["value"], r["percent"]),
            interval(r),
            r["verdict"],
        )
        for r in compared(first, second)
    ]
    columns = ("metric", *labels, "difference", "95 % interval", "")
    Console().table("second minus first, same prompts", columns, rows)
