"""``flowgrpo grid``."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.cli.common import (
    UsageError,
    add_lora_argument,
    add_weights_argument,
    check_folder,
    checkpoint_of,
    is_run,
    load_run,
    quiet,
    run_config,
)
from flowgrpo.core.text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from flowgrpo.data.prompts import Prompt
    from flowgrpo.evaluation.grid_settings import Cell, GridSettings
    from flowgrpo.policy import PipelinePolicy, Sampling
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Reward

Place = tuple[int, int]
"""Row of each prompt and column of a cell."""
SUMMARY = "draw a comparison grid: models, checkpoints, adapters, guidance, steps, seeds or samplers, same noise"
EXAMPLE = """\
flowgrpo grid runs/quickstart --out grid.png
  flowgrpo grid runs/quickstart --out grid.png --axis checkpoint=base,20,40 --axis guidance=1,3
  flowgrpo grid --axis model=shapes,runs/a,runs/b --out grid.png --prompts prompts.txt
  flowgrpo grid --from grid.png --out again.png                    the same grid again"""
STEPS = 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run", nargs="?", help="run directory or model (not with --axis model)")
    parser.add_argument(
        "--out",
        required=True,
        help=".png (of videos also an MP4 beside it), .webp (videos play), or .html, a contact sheet for more images than a picture holds",
    )
    parser.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="KIND=A,B,...",
        help="the columns; given again, the rows of each prompt. KIND is model, checkpoint (base, best, last or iterations), lora, scale, guidance, steps, seed, sampler or base_after (default: of a run, checkpoint=base,last)",
    )
    parser.add_argument(
        "--from",
        dest="picture",
        metavar="FILE",
        help="draw a grid of this command again, from the settings that its file (PNG, WebP or HTML) holds",
    )
    parser.add_argument("--prompts", help="file of prompts (default: the run's held-out prompts)")
    parser.add_argument("--rows", type=int, default=6, help="prompts (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=4, help="images per prompt and model (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for the noise (default: %(default)s)")
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="[NAME=]MODEL",
        help="reward whose scores are shown; can be given again (default: the run's first reward)",
    )
    parser.add_argument(
        "--reward-option",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="an option of a --reward",
    )
    parser.add_argument(
        "--narrow", action="store_true", help="for a phone: the models below each other"
    )
    add_weights_argument(parser)
    add_lora_argument(parser)
    _add_sampling_arguments(parser)


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What a grid samples with where no axis says it."""
    parser.add_argument(
        "--steps",
        type=int,
        help=f"denoising steps (default: as in the run's evaluations; of a model {STEPS})",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        help="guidance scale (default: as in the run's evaluations; of a model the pipeline's)",
    )
    parser.add_argument(
        "--sampler",
        default="ode",
        metavar="NAME[:STRENGTH]",
        help="ode, the deterministic sampler of evaluations; dpm_2m; or a transition of training: flow_sde, dance_sde, cps or ddim, such as cps:0.5; shipped, the pipeline's own scheduler; or a class of diffusers, such as UniPCMultistepScheduler (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Generate the images of all cells, score them and draw the grid."""
    from flowgrpo.evaluation.grid_settings import PICTURES, SHEETS
    from flowgrpo.evaluation.samplers import Sampler

    for name in ("rows", "samples", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if Path(options.out).suffix.lower() not in (*PICTURES, *SHEETS):
        raise UsageError(f"--out must end in .png, .webp or .html, got {options.out!r}")
    try:
        Sampler.parse(options.sampler)
    except ValueError as error:
        raise UsageError(f"--sampler: {error}") from error
    if options.picture is not None:
        settings, prompts = _again(options)
    else:
        settings, prompts = _new(options)
    quiet()
    if is_sheet(options.out):
        _draw_sheet(settings, prompts, Path(options.out))
        print(options.out)
        return 0
    print(written := _draw(settings, prompts, Path(options.out)))
    if written != Path(options.out):
        print(
            "the grid is larger than a WebP file can be (16383 pixels on a side)", file=sys.stderr
        )
    return 0


def is_sheet(out: str) -> bool:
    """Whether a contact sheet is written."""
    return Path(out).suffix.lower() == ".html"


def _again(options: argparse.Namespace) -> "tuple[GridSettings, Sequence[Prompt]]":
    """The settings and the prompts of a picture.

    Raises:
        UsageError: If another option contradicts it.
        ValueError: If the picture lacks them, or a checkpoint is not the same any more.
    """
    from flowgrpo.evaluation.grid_settings import GridSettings, prompt_of

    defaults = vars(options.parser.parse_args(["--out", options.out, "--from", options.picture]))
    given = [
        k for k, v in vars(options).items() if k in defaults and k != "parser" and v != defaults[k]
    ]
    if given:
        name = "a model" if given[0] == "run" else f"--{given[0].replace('_', '-')}"
        raise UsageError(f"--from draws the grid of {options.picture} as it is: remove {name}")
    settings = GridSettings.from_picture(Path(options.picture))
    if settings.prompts is None:
        raise ValueError(
            f"{options.picture} does not hold its prompts, because they have pictures in memory or "
            "arguments of the call that are not text: draw it with the original command"
        )
    settings.check(len(settings.prompts), is_sheet(options.out))
    _check_models(settings)
    now = _digests(settings)
    changed = [k for k, v in settings.digests.items() if now.get(k) != v]
    if changed:
        raise ValueError(
            f"the checkpoint {changed[0]} is not the one of {options.picture}: the run is not there, or "
            "was trained further or again"
        )
    return settings, [prompt_of(p) for p in settings.prompts]


def _new(options: argparse.Namespace) -> "tuple[GridSettings, Sequence[Prompt]]":
    """The settings and the prompts of the command line."""
    from flowgrpo.config import find
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.evaluation.comparison_grid import ComparisonGrid
    from flowgrpo.evaluation.grid_settings import Axis, Cell, GridSettings, prompt_record

    axes = tuple(Axis.parse(t) for t in options.axis)
    models = next((a.values for a in axes if a.kind == "model"), ())
    if bool(models) == (options.run is not None):
        raise UsageError(
            "grid needs a run or a model"
            if not models
            else "--axis model names the models: remove the other one"
        )
    _refuse_twice(options, [a.kind for a in axes])
    main = models[0] if models else options.run
    check_folder(main)
    if not axes:
        run_config(Path(main))  # raises if it is no run
        axes = (Axis("checkpoint", ("base", options.weights)),)
    run = next((m for m in (main, *models) if is_run(m)), None)
    config = run_config(Path(run)) if run is not None else None
    if run is None and options.weights != options.parser.get_default("weights"):
        raise UsageError(
            f"--checkpoint {options.weights} is for a run directory, and {main} is none"
        )
    if not options.prompts and config is None:
        raise UsageError(f"{main} is no run, which has prompts: give --prompts FILE")
    place = options.prompts or (config.prompts.held_out if config else "")
    prompts = PromptSet.load(find(place))
    chosen = ComparisonGrid.of(prompts, options.rows, options.samples, options.seed).prompts
    start = Cell(
        main,
        options.weights,
        tuple(options.lora),
        options.guidance,
        options.steps,
        options.seed,
        options.sampler,
    )
    records = [prompt_record(p) for p in chosen]
    settings = GridSettings(
        start=start,
        axes=axes,
        samples=options.samples,
        prompts=None if None in records else [r for r in records if r is not None],
        rewards=_rewards(options, config.rewards if config else ()),
        narrow=options.narrow,
        digests={},
    )
    settings.check(len(chosen), is_sheet(options.out))
    _check_models(settings)
    settings = _resolved(settings)
    return replace(settings, digests=_digests(settings)), chosen


def _refuse_twice(options: argparse.Namespace, kinds: Sequence[str]) -> None:
    """Raise UsageError if an option and an axis give the same thing."""
    names = {kind: kind for kind in ("steps", "guidance", "seed", "sampler")}
    for kind, name in {**names, "checkpoint": "weights"}.items():
        if kind in kinds and getattr(options, name) != options.parser.get_default(name):
            raise UsageError(f"--axis {kind} gives the values: remove --{kind}")


def _rewards(options: argparse.Namespace, own: "Sequence[Reward]") -> list[Mapping[str, Any]]:
    """The rewards that score the images: those of the command line, else the run's first one."""
    from flowgrpo.cli.score import named_rewards
    from flowgrpo.core.secrets import redact_table

    if options.reward_option and not options.reward:
        raise UsageError("--reward-option is for a --reward; the rewards of a run have their own")
    rewards = named_rewards(options.reward, options.reward_option) if options.reward else own[:1]
    return [
        redact_table({"model": r.model, "name": r.name, "options": dict(r.options)})
        for r in rewards
    ]


def _check_models(settings: "GridSettings") -> None:
    """Refuse folders that are no models and checkpoints that do not exist, before anything is loaded."""
    from flowgrpo.policy.model_files import check_adapter, require
    from flowgrpo.policy.settings import Adapter

    on_axis = any(a.kind == "checkpoint" for a in settings.axes)
    for cell in [c for _, _, c in settings.cells()]:
        check_folder(cell.model)
        if is_run(cell.model):
            run_config(Path(cell.model))
            if cell.checkpoint != "base":
                checkpoint_of(Path(cell.model), str(cell.checkpoint))
        else:
            require(cell.model, _given(settings, "model"))
        if not is_run(cell.model) and (on_axis or cell.base_after is not None):
            kind = "checkpoint" if on_axis else "base_after"
            raise UsageError(f"--axis {kind} is for run directories, and {cell.model} is none")
        for text in cell.loras:
            require(Adapter.parse(text).path, _given(settings, "lora"), check_adapter)
        _check_sampling(settings, cell)


def _given(settings: "GridSettings", kind: str) -> str:
    """The option that gave a value of the cells, as a user typed it."""
    if any(a.kind == kind for a in settings.axes):
        return f"--axis {kind}"
    return "the model" if kind == "model" else f"--{kind}"


def _check_sampling(settings: "GridSettings", cell: "Cell") -> None:
    """Raise UsageError if the arguments of a cell contradict each other, by the names under which they were given."""
    from flowgrpo.evaluation.samplers import Sampler

    sampling, sampler = _sampling(settings, cell), Sampler.parse(cell.sampler)
    mixes = "evaluation.base_after of the run" if cell.base_after is None else _given(settings, "base_after")  # fmt: skip
    try:
        sampling.check()
    except ValueError as error:
        name = _given(settings, "steps") if sampling.base_after is None else mixes
        raise UsageError(f"{name}: {error}") from error
    named = f"{_given(settings, 'sampler')} has {cell.sampler}"
    if sampling.base_after is not None and (sampler.scheduler or sampler.transition is not None):
        other = f", or remove {mixes}" if mixes.startswith("--") else ""
        raise UsageError(
            f"{mixes} exchanges the model between two steps of the samplers ode and dpm_2m, and {named}; use only "
            f"these samplers{other}"
        )
    if sampling.shift is not None and sampler.scheduler:
        raise UsageError(
            f"sampling.shift of the run sets the grid of flowgrpo's own samplers, and {named}; use only ode, dpm_2m or "
            "transitions"
        )


def _resolved(settings: "GridSettings") -> "GridSettings":
    """The settings with the iterations of the checkpoint in place of ``last``, if there is one run.

    With several runs ``last`` stays, since their iterations may differ; the digests tell them apart.
    """
    if any(a.kind == "model" for a in settings.axes) or not is_run(settings.start.model):
        return settings
    folder = Path(settings.start.model)

    def number(checkpoint: Any) -> Any:
        return str(int(checkpoint_of(folder, "last").name)) if checkpoint == "last" else checkpoint

    axes = tuple(
        replace(a, values=tuple(map(number, a.values))) if a.kind == "checkpoint" else a
        for a in settings.axes
    )
    named = any(a.kind == "checkpoint" for a in axes)
    start = settings.start
    return replace(
        settings,
        axes=axes,
        start=start if named else replace(start, checkpoint=number(start.checkpoint)),
    )


def _digests(settings: "GridSettings") -> dict[str, str]:
    """The SHA-256 of the state of each checkpoint, by ``MODEL@CHECKPOINT``."""
    import hashlib

    from flowgrpo.training.checkpoints import STATE

    found = {}
    for _, _, cell in settings.cells():
        if is_run(cell.model) and cell.checkpoint != "base":
            state = checkpoint_of(Path(cell.model), str(cell.checkpoint)) / STATE
            key = f"{cell.model}@{cell.checkpoint}"
            found[key] = hashlib.sha256(state.read_bytes()).hexdigest()
    return found


def _draw(settings: "GridSettings", prompts: "Sequence[Prompt]", out: Path) -> Path:
    """Generate, score and draw a picture. Returns its file."""
    from flowgrpo.data.videos import frames_per_second
    from flowgrpo.evaluation.comparison_grid import conditions, write_grid
    from flowgrpo.evaluation.grid_drawing import GridRow
    from flowgrpo.evaluation.grid_settings import KEY

    images, trained = _images(settings, prompts)
    scorer = _scorer(settings)
    notes = {place: _notes(settings, prompts, block, scorer) for place, block in images.items()}
    if scorer is not None:
        scorer.close()
    columns, inner = settings.axes[0], _inner_titles(settings)
    rows = []
    for index, prompt in enumerate(prompts):
        part = slice(index * settings.samples, (index + 1) * settings.samples)
        for row, name in enumerate(inner):
            places = [(row, column) for column in range(len(columns.values))]
            blocks = [images[p][part] for p in places]
            own = [notes[p][part] for p in places]
            label = prompt.text + (f" ({name})" if name else "")
            rows.append(GridRow(label, blocks, own, conditions(prompt)))
    titles = [title_of(columns.kind, v, trained[c]) for c, v in enumerate(columns.values)]
    title, subtitle = _heading(settings, images[0, 0].shape)
    fps = frames_per_second(_sampling(settings, settings.start).call)
    metadata = {KEY: settings.to_json()}
    return write_grid(
        rows,
        titles,
        out,
        title=title,
        subtitle=subtitle,
        fps=fps,
        narrow=settings.narrow,
        metadata=metadata,
    )


def _draw_sheet(settings: "GridSettings", prompts: "Sequence[Prompt]", out: Path) -> None:
    """Generate, score and write a contact sheet.

    Of each cell only the reduced images are kept, so that main memory holds one cell at a time.
    """
    from flowgrpo.data.videos import frames_per_second
    from flowgrpo.evaluation.comparison_grid import conditions
    from flowgrpo.evaluation.contact_sheet import SheetPrompt, SheetRow, media_uri, write_sheet

    fps = frames_per_second(_sampling(settings, settings.start).call)
    shown: dict[Place, list[tuple[str, str]]] = {}
    trained: dict[int, int] = {}
    scorer = _scorer(settings)
    for place, block, iteration in _cells(settings, prompts):
        notes = _notes(settings, prompts, block, scorer)
        shown[place] = [(media_uri(m, fps), n) for m, n in zip(block, notes, strict=True)]
        trained[place[1]], shape = iteration, block.shape
    if scorer is not None:
        scorer.close()
    columns = settings.axes[0]
    rows = []
    for index, prompt in enumerate(prompts):
        part = slice(index * settings.samples, (index + 1) * settings.samples)
        own = [
            SheetRow(name, [shown[row, column][part] for column in range(len(columns.values))])
            for row, name in enumerate(_inner_titles(settings))
        ]
        rows.append(SheetPrompt(prompt.text, conditions(prompt), own))
    titles = [title_of(columns.kind, v, trained[c]) for c, v in enumerate(columns.values)]
    title, subtitle = _heading(settings, shape)
    write_sheet(out, rows, titles, title, subtitle, settings.to_json(), shape[-1] / shape[-2])


def _inner_titles(settings: "GridSettings") -> list[str]:
    """The title of each row of a prompt; one empty title without a second axis."""
    _, *inner = settings.axes
    return [title_of(inner[0].kind, v, None) for v in inner[0].values] if inner else [""]


def _images(
    settings: "GridSettings", prompts: "Sequence[Prompt]"
) -> "tuple[dict[Place, Tensor], dict[int, int]]":
    """The images of each cell, prompt by prompt, and the iterations trained of each column."""
    images: dict[Place, Tensor] = {}
    trained: dict[int, int] = {}
    for place, block, iteration in _cells(settings, prompts):
        images[place], trained[place[1]] = block, iteration
    return images, trained


def _cells(
    settings: "GridSettings", prompts: "Sequence[Prompt]"
) -> "Iterator[tuple[Place, Tensor, int]]":
    """Generates the images of one cell after the other, with the iterations trained.

    One model is loaded at a time, and draws all of its cells.
    """
    from flowgrpo.evaluation.comparison_grid import ComparisonGrid
    from flowgrpo.evaluation.samplers import Sampler

    cells = list(settings.cells())
    for weights in dict.fromkeys(c.weights for _, _, c in cells):
        mine = [(row, column, c) for row, column, c in cells if c.weights == weights]
        mixes = any(c.base_after is not None for _, _, c in mine)
        policy, iteration = _load(mine[0][2], _sampling(settings, mine[0][2]), mixes)
        for row, column, cell in mine:
            grid = ComparisonGrid(prompts, settings.samples, cell.seed)
            sampler = Sampler.parse(cell.sampler)
            block = grid.generate_with(policy, _sampling(settings, cell), sampler)
            yield (row, column), block.cpu(), iteration
        del policy


def _sampling(settings: "GridSettings", cell: "Cell") -> "Sampling":
    """How a cell is sampled: as the run of the cell, or the first run of the grid, with its changes."""
    from flowgrpo.policy import Sampling

    runs = [m for m in (cell.model, *(c.model for _, _, c in settings.cells())) if is_run(m)]
    sampling = run_config(Path(runs[0])).evaluation_sampling() if runs else Sampling(num_steps=STEPS)  # fmt: skip
    changes: dict[str, Any] = {}
    if cell.steps is not None:
        changes |= {"num_steps": cell.steps, "sigmas": (), "timesteps": ()}
    if cell.guidance is not None:
        changes["guidance_scale"] = cell.guidance
    if cell.base_after is not None:
        changes["base_after"] = cell.base_after
    return replace(sampling, **changes)


def _load(cell: "Cell", sampling: "Sampling", mixes: bool) -> "tuple[PipelinePolicy, int]":
    """The model of a cell, with the model before training if a cell mixes them, and the iterations trained."""
    from flowgrpo.cli.common import device_of
    from flowgrpo.policy import PipelinePolicy
    from flowgrpo.policy.settings import Adapter, ModelSource

    adapters = tuple(Adapter.parse(text) for text in cell.loras)
    if is_run(cell.model):
        folder, weights = Path(cell.model), str(cell.checkpoint)
        return load_run(folder, weights, sampling=sampling, adapters=adapters, with_reference=mixes)
    source = ModelSource(path=cell.model, adapters=adapters)
    policy = PipelinePolicy.from_pretrained(
        source, sampling=sampling, batch_size=16, device=device_of("auto")
    )
    return policy, 0


def _scorer(settings: "GridSettings") -> "RewardScorer | None":
    """The rewards of the captions; None if there are none."""
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Failures, Reward

    rewards = [Reward(**r) for r in settings.rewards]
    return RewardScorer(rewards, Failures()) if rewards else None


def _notes(
    settings: "GridSettings",
    prompts: "Sequence[Prompt]",
    block: "Tensor",
    scorer: "RewardScorer | None",
) -> list[str]:
    """A note for each image of a cell: a mark or a score of one reward, or the scores of several."""
    from flowgrpo.evaluation.comparison_grid import marks

    if scorer is None:
        return [""] * len(block)
    labels = [r.label for r in scorer.rewards]
    raw = scorer.score(block, [p for p in prompts for _ in range(settings.samples)]).raw
    if len(labels) == 1:
        return marks(raw[labels[0]])
    each = [[f"{v:.2f}" for v in raw[k].tolist()] for k in labels]
    return [" / ".join(parts) for parts in zip(*each, strict=True)]


def title_of(kind: str, value: Any, trained: int | None) -> str:
    """The title of a column or row: the value of its axis.

    Args:
        kind: Kind of the axis.
        value: The value.
        trained: Iterations of the checkpoint, if it is known.
    """
    if kind == "checkpoint":
        number = trained if trained is not None else value
        return "base" if value == "base" else f"after {counted(number, 'iteration')}" if str(number).isdecimal() else str(value)  # fmt: skip
    if kind in ("model", "lora"):
        return Path(value).name or str(value)
    if kind == "sampler":
        # Classes of diffusers have long names, and columns are narrow.
        value = str(value).removesuffix("Scheduler")
    return f"{kind} {value:g}" if isinstance(value, float) else f"{kind} {value}"


def _heading(settings: "GridSettings", shape: Sequence[int]) -> tuple[str, str]:
    """Title and subtitle: what is the same in all cells."""
    from flowgrpo.rewards.settings import Reward

    start, kinds = settings.start, {a.kind for a in settings.axes}
    title = Path(start.model).name or start.model
    if is_run(start.model):
        title = f"{run_config(Path(start.model)).model.path}: {Path(start.model).resolve().name}"
    if "model" in kinds:
        title = "Models"
    height, width = shape[-2:]
    used = [_sampling(settings, cell) for _, _, cell in settings.cells()]
    scales = {"default" if s.guidance_scale is None else f"{s.guidance_scale:g}" for s in used}
    guidance = " and ".join(sorted(scales))
    steps = " and ".join(str(n) for n in sorted({s.num_steps for s in used}))
    same = ["deterministic sampler" if start.sampler == "ode" else f"sampler {start.sampler}"]
    same = same if "sampler" not in kinds else []
    same += [f"{counted(steps, 'step')}"] if "steps" not in kinds else []
    same += [f"guidance {guidance}"] if "guidance" not in kinds else []
    same += [f"{width}x{height}"]
    same += [f"seed {start.seed}, same noise in the same place"] if "seed" not in kinds else []
    same += [f"adapters {', '.join(start.loras)}"] if start.loras else []
    labels = " / ".join(Reward(**r).label for r in settings.rewards)
    return title, ", ".join(same) + (f"; marks: {labels}" if labels else "")
