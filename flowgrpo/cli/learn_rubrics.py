"""``flowgrpo learn-rubrics``."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.cli.common import UsageError, parse_setting, read_image
from flowgrpo.core.text import counted

if TYPE_CHECKING:
    from flowgrpo.data.prompts import Prompt

SUMMARY = "select the questions to a vision-language model that predict human preferences"
EXAMPLE = (
    "flowgrpo learn-rubrics pairs.jsonl --rubrics candidates.txt --model Qwen/Qwen3-VL-8B-Instruct --out rubrics.jsonl\n"
    '  pairs.jsonl: {"prompt": "a cat", "preferred": "a.png", "other": "b.png"} on each line\n'
    '  in the configuration of a run:\n    [[rewards]]\n    model = "vlm_judge"\n'
    '    options = { model = "Qwen/Qwen3-VL-8B-Instruct", rubrics = "rubrics.jsonl" }'
)
DEFAULT_URL = "http://127.0.0.1:8000/v1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("pairs", help="a .jsonl file; paths of its images are relative to it")
    parser.add_argument(
        "--rubrics", required=True, help="candidates: a question per line (.txt), or .jsonl"
    )
    parser.add_argument("--model", required=True, help="as the server calls it")
    parser.add_argument("--base-url", default="", help=f"of the server (default: {DEFAULT_URL})")
    parser.add_argument(
        "--judge-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the vlm_judge reward, such as cache=answers; can be given again",
    )
    parser.add_argument("--most", type=int, default=0, help="keep no more (default: no limit)")
    parser.add_argument("--out", required=True, help="file for the rubrics that are kept (.jsonl)")


def run(options: argparse.Namespace) -> int:
    """Ask the judge about every pair, fit the weights of the rubrics and write those above 0."""
    import numpy as np
    import torch

    from flowgrpo.data.rubrics import Rubric, fit_rubrics, read_rubrics, write_rubrics
    from flowgrpo.rewards.loading import load_reward
    from flowgrpo.rewards.settings import Reward
    from flowgrpo.training.console import Console

    if options.most < 0 or not options.out.endswith(".jsonl"):
        raise UsageError(
            f"--most must be at least 0 and --out end in .jsonl, got {options.most}, {options.out!r}"
        )
    pairs = _pairs(Path(options.pairs))
    candidates = read_rubrics(options.rubrics)
    settings = {"model": options.model, "base_url": options.base_url or DEFAULT_URL}
    settings |= {"rubrics": [c.text for c in candidates]}
    settings |= dict(parse_setting(s, "--judge-option") for s in options.judge_option)
    judge: Any = load_reward(Reward(model="vlm_judge", options=settings))
    console = Console()
    rows = []
    for prompt, files in console.track(pairs, "judging", total=len(pairs)):
        # (2 images, rubrics)
        scores = torch.cat([judge.by_rubric(read_image(f)[None], [prompt]) for f in files])
        rows.append((scores[0] - scores[1]).double().numpy())
    differences = np.stack(rows)
    fit = fit_rubrics(differences, most=options.most)
    kept = []
    for i in np.argsort(-fit.weights):
        if fit.weights[i] > 0:
            column = differences[np.isfinite(differences[:, i]), i]
            agreed = ((column > 0) + 0.5 * (column == 0)).mean()
            note = f"alone agrees with {agreed:.0%} of {counted(len(column), 'pair')}"
            kept.append(Rubric(candidates[i].text, round(float(fit.weights[i]), 4), note))
    write_rubrics(Path(options.out), kept)
    console.table(
        f"{len(kept)} of {counted(len(candidates), 'rubric')} kept; together they order {fit.accuracy:.0%} of "
        f"held-out pairs as people did ({fit.pairs} of {counted(len(pairs), 'pair')} could be used)",
        ["rubric", "weight", ""],
        [[r.text, f"{r.weight:.3f}", r.note] for r in kept],
    )
    return 0


def _pairs(path: Path) -> "list[tuple[Prompt, tuple[Path, Path]]]":
    """Prompts with the preferred picture and the other one."""
    from flowgrpo.data.prompts import Prompt

    if not path.is_file():
        raise FileNotFoundError(f"no file of pairs {path}")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, files = record["prompt"], (record["preferred"], record["other"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected an object with prompt, preferred and other"
            ) from error
        first, second = (path.parent / str(f) for f in files)
        for file in (first, second):
            if not file.is_file():
                raise FileNotFoundError(f"{path}, line {number}: no picture {file}")
        pairs.append((Prompt(str(text)), (first, second)))
    return pairs
