"""``flowgrpo compare``; heavy imports are inside, so that ``--help`` is fast."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo.cli.common import UsageError, check_folder, is_run

if TYPE_CHECKING:
    from flowgrpo.bench.comparison import Measured, Setting
    from flowgrpo.bench.comparison_files import Comparison, Pair
    from flowgrpo.bench.run_scores import RecordedRun
    from flowgrpo.data.prompt_sets import PromptSet
    from flowgrpo.policy import PipelinePolicy, Sampling
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Reward

SUMMARY = (
    "compare runs, models, benchmark results or votes: paired differences, and a verdict in words"
)
EXAMPLE = """\
flowgrpo compare runs/flow_0 runs/flow_1 runs/tp_0 runs/tp_1
  flowgrpo compare base=shapes tuned=runs/quickstart               a model and a run: images are drawn
  flowgrpo compare bench/geneval/a bench/geneval/b                 results of 'flowgrpo bench'
  flowgrpo compare votes                                           votes of 'flowgrpo vote'"""
DRAWING = ("prompts", "images", "reward", "reward_option", "by", "steps", "guidance", "seed")
"""Options about drawing images; any of them means that images are drawn."""
STEPS, IMAGES = 28, 240


@dataclass(frozen=True)
class Subject:
    """What is compared: a path or a model, and the name that the user gave it, or None."""

    name: str | None
    path: str

    @classmethod
    def parse(cls, text: str) -> "Subject":
        """Read ``PATH`` or ``NAME=PATH``.

        Raises:
            UsageError: If the name or the path is empty.
        """
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            return cls(None, text)
        if not name.strip() or not path:
            raise UsageError(f"{text!r}: expected PATH or NAME=PATH")
        return cls(name.strip(), path)

    @property
    def label(self) -> str:
        """The name for tables."""
        return self.name or (Path(self.path).resolve().name if Path(self.path).exists() else self.path)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "subjects",
        nargs="+",
        metavar="[NAME=]A",
        help="run directories and models, or folders with benchmark results; the first is compared with each other one. Or folders of votes",
    )
    parser.add_argument(
        "--out",
        default="comparison",
        help="folder for comparison.html, .json and .md (default: %(default)s)",
    )
    parser.add_argument(
        "--at",
        default="last",
        help="evaluation of each run: last, best, or after how many iterations (default: %(default)s)",
    )
    drawing = parser.add_argument_group(
        "drawing images", "where recorded scores do not suffice; any of these options asks for it"
    )
    drawing.add_argument("--generate", action="store_true", help="draw images although scores are recorded")  # fmt: skip
    drawing.add_argument("--prompts", help="file of prompts (default: the first run's held-out prompts)")  # fmt: skip
    drawing.add_argument("--by", metavar="KEY", help="metadata that names the task of a prompt (default: the run's, else tag or task)")  # fmt: skip
    drawing.add_argument("--images", type=int, help=f"images of each model (default: as in the first run's evaluations, else {IMAGES})")  # fmt: skip
    drawing.add_argument("--reward", action="append", default=[], metavar="[NAME=]MODEL", help="reward; can be given again (default: those of the first run)")  # fmt: skip
    drawing.add_argument("--reward-option", action="append", default=[], metavar="NAME.KEY=VALUE", help="an option of a --reward")  # fmt: skip
    drawing.add_argument("--steps", type=int, help=f"denoising steps (default: as in the run's evaluations; of a model: as in the first run's, else {STEPS})")  # fmt: skip
    drawing.add_argument("--guidance", type=float, help="guidance scale (default: likewise)")
    drawing.add_argument("--seed", type=int, help="for the noise (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Compare, print the verdicts and write the files."""
    from flowgrpo.data.votes import is_ballot

    subjects = [Subject.parse(t) for t in options.subjects]
    votes = [is_ballot(Path(s.path)) for s in subjects]
    if any(votes):
        _say(_votes(subjects, votes, options), Path(options.out))
        return 0
    if len(subjects) < 2:
        raise UsageError(
            "compare needs at least two runs, models or folders with benchmark results"
        )
    if options.at not in ("last", "best") and not options.at.isdecimal():
        raise UsageError(f"--at must be last, best or a number of iterations, got {options.at!r}")
    for name in ("images", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if options.reward_option and not options.reward:
        raise UsageError("--reward-option is for a --reward; the rewards of a run have their own")
    draws = options.generate or any(getattr(options, n) not in (None, []) for n in DRAWING)
    results = [(Path(s.path) / "bench.json").is_file() for s in subjects]
    if any(results):
        found = _results(subjects, results, draws or options.at != "last")
    else:
        found = _models(subjects, options, draws)
    _say(found, Path(options.out))
    return 0


def _say(found: "Comparison", out: Path) -> None:
    """Print and write a comparison."""
    from flowgrpo.bench.comparison_files import verdicts, write
    from flowgrpo.training.console import Console

    console = Console()
    for line in verdicts(found):
        console.say(line)
    for note in found.notes:
        console.say(f"note: {note}")
    for file in write(found, out):
        console.say(str(file))


def _votes(
    subjects: Sequence[Subject], are_votes: Sequence[bool], options: argparse.Namespace
) -> "Comparison":
    """The win rates of the two sides of votes, and how far voters agree."""
    from flowgrpo.bench.comparison_files import Comparison
    from flowgrpo.bench.vote_comparison import compare_votes
    from flowgrpo.data.votes import read_votes

    if not all(are_votes):
        odd = subjects[are_votes.index(False)].path
        raise UsageError(f"{odd} has no votes, the others have: compare folders of votes by themselves")  # fmt: skip
    given = [n for n in (*DRAWING, "generate") if getattr(options, n) not in (None, [], False)]
    if given or options.at != "last":
        raise UsageError(f"votes are compared as they are: remove --{given[0].replace('_', '-') if given else 'at'}")  # fmt: skip
    named = next((s for s in subjects if s.name), None)
    if named is not None:
        raise UsageError(f"{named.name}={named.path}: votes have the names of their sources; remove the name")  # fmt: skip
    pairs, notes = compare_votes([read_votes(Path(s.path)) for s in subjects])
    return Comparison(pairs, notes=notes)


def _results(subjects: Sequence[Subject], are_results: Sequence[bool], other: bool) -> "Comparison":
    """Compare benchmark folders."""
    from flowgrpo.bench.comparison_files import Comparison, Pair
    from flowgrpo.bench.report import comparison_rows, read_result

    if not all(are_results):
        odd = subjects[are_results.index(False)].path
        raise UsageError(
            f"{odd} has no bench.json, the others have: compare results of 'flowgrpo bench' with each "
            "other, or runs and models with each other"
        )
    if other:
        raise UsageError("results of benchmarks are compared as they are: remove the other options")
    folders = [Path(s.path) for s in subjects]
    labels = [s.name or read_result(f)["label"] for s, f in zip(subjects, folders, strict=True)]
    pairs = [
        Pair(labels[0], label, comparison_rows(folders[0], folder), 0)
        for label, folder in zip(labels[1:], folders[1:], strict=True)
    ]
    return Comparison(pairs)


def _models(subjects: Sequence[Subject], options: argparse.Namespace, draws: bool) -> "Comparison":
    """Compare runs and models: by recorded scores if they suffice, else by images drawn now."""
    from flowgrpo.bench.comparison_files import ONE_RUN, Comparison
    from flowgrpo.bench.run_scores import RecordedRun, pooled

    for one in subjects:
        check_folder(one.path)
    runs = {s: RecordedRun(Path(s.path)) for s in subjects if is_run(s.path)}
    groups = pooled([(s.name, runs[s]) for s in subjects if s in runs])
    if len(groups) + len(subjects) - len(runs) < 2:
        raise UsageError(
            f"these runs differ in their seeds only, so they are one setting, {groups[0][0]}: name a "
            "run of another setting, or a model"
        )
    names = [n for n, _ in groups] + [s.label for s in subjects if s not in runs]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UsageError(f"two settings are named {twice!r}: name them apart with NAME=PATH")
    notes: list[str] = []
    recorded = len(runs) == len(subjects) and not draws
    if recorded and all(r.has_scores for r in runs.values()):
        settings = _recorded(groups, options.at, notes)
    else:
        if recorded:
            notes.append(
                "not all runs recorded the scores of each image (they are of an earlier version), so "
                "images were drawn"
            )
        settings = _drawn(subjects, groups, runs, options)
    further = _regimes(groups, settings, notes) if recorded else {}
    first, pairs = settings[0], _pairs(settings, further)
    if any(len(s.members) < 2 for s in settings) and runs:
        notes.append(ONE_RUN)
    after = {m.iteration for s in settings for m in s.members if m.iteration is not None}
    if len(after) > 1:
        listed = ", ".join(map(str, sorted(after)))
        notes.append(f"the runs were trained for different numbers of iterations: {listed}")
    known = dict(groups)
    differing = {
        n: members[0].differences(known[first.name][0])
        for n, members in groups
        if first.name in known and n != first.name
    }
    differing = {n: {k: (b, a) for k, (a, b) in d.items()} for n, d in differing.items()}
    curves = {n: [r.curve() for r in members] for n, members in groups}
    return Comparison(pairs, settings, curves, differing, notes)


def _pairs(settings: "Sequence[Setting]", further: "dict[str, list[Setting]]") -> "list[Pair]":
    """The first setting with each other one; rewards have rows for further ways to sample as well."""
    from flowgrpo.bench.comparison import rows
    from flowgrpo.bench.comparison_files import Pair
    from flowgrpo.core.text import tag_words

    first, pairs = settings[0], []
    for number, other in enumerate(settings[1:]):
        found = rows(first, other)
        for tag, (base, *others) in further.items():
            name = tag_words(tag)
            found += [
                replace(row, reward=f"{row.reward}, {name}")
                for row in rows(base, others[number])
                if not row.task
            ]
        images = min(len(m.prompts) for m in other.members)
        pairs.append(Pair(first.name, other.name, found, images))
    return pairs


def _recorded(
    groups: "Sequence[tuple[str, list[RecordedRun]]]", at: str, notes: list[str]
) -> "list[Setting]":
    """The settings with the scores that the runs recorded; notes are appended to ``notes``.

    Raises:
        BenchError: If the runs were evaluated on different prompts, or have no reward in common.
    """
    from flowgrpo.bench.base import BenchError
    from flowgrpo.bench.comparison import Setting

    one = groups[0][1][0]
    names = list(one.rewards())
    for _, members in groups:
        for run in members:
            if run.prompts != one.prompts:
                raise BenchError(
                    f"{one.folder} and {run.folder} were evaluated on different prompts "
                    f"({one.config.prompts.held_out} and {run.config.prompts.held_out}, or their "
                    "prompts.balance differs): draw images of the same prompts with --generate or "
                    "--prompts FILE"
                )
            if run.config.evaluation_sampling() != one.config.evaluation_sampling():
                notes.append(
                    f"{one.name} and {run.name} are sampled differently in their evaluations, which is "
                    "part of the difference; --generate with --steps and --guidance draws both alike"
                )
            for name in [n for n in names if run.rewards().get(n) != one.rewards()[n]]:
                names.remove(name)
                notes.append(f"the reward {name} is left out: {run.name} has none, or another one")
    if not names:
        raise BenchError(
            f"{one.folder} has no reward in common with the others: score the same images by the same "
            "rewards with --reward"
        )
    settings = []
    for name, members in groups:
        measured = [_only(run.measured(at), names) for run in members]
        before = [_only(b, names) for run in members if (b := run.before()) is not None]
        weights = members[0].weights()
        settings.append(
            Setting(name, measured, before if len(before) == len(members) else (), weights)
        )
    return settings


def _regimes(
    groups: "Sequence[tuple[str, list[RecordedRun]]]",
    settings: "Sequence[Setting]",
    notes: list[str],
) -> "dict[str, list[Setting]]":
    """The settings at the same evaluations, sampled in each way that all runs evaluated.

    Notes about ways that have one name and different meanings are appended to ``notes``.
    """
    runs = [run for _, members in groups for run in members]
    found: dict[str, list[Setting]] = {}
    for tag, sampling in runs[0].regimes.items():
        if any(tag not in r.regimes for r in runs):
            continue
        other = next((r for r in runs if r.regimes[tag] != sampling), None)
        if other is not None:
            notes.append(
                f"the further evaluation {tag} is left out: {runs[0].name} and {other.name} sample it "
                "differently"
            )
            continue
        each = [
            [
                run.in_regime(tag, measured.iteration)
                for run, measured in zip(members, setting.members, strict=True)
            ]
            for (_, members), setting in zip(groups, settings, strict=True)
        ]
        if all(m is not None for members in each for m in members):
            found[tag] = [
                replace(
                    setting,
                    members=[_only(m, setting.rewards) for m in members if m is not None],
                    before=(),
                )
                for setting, members in zip(settings, each, strict=True)
            ]
    return found


def _only(measured: "Measured", names: Sequence[str]) -> "Measured":
    """The scores by some rewards."""
    return replace(measured, scores={n: measured.scores[n] for n in names if n in measured.scores})


def _drawn(
    subjects: Sequence[Subject],
    groups: "Sequence[tuple[str, list[RecordedRun]]]",
    runs: "dict[Subject, RecordedRun]",
    options: argparse.Namespace,
) -> "list[Setting]":
    """The settings with scores of images that are drawn now: same prompts, same noise, same rewards.

    Raises:
        UsageError: If prompts or rewards are not known.
    """
    from flowgrpo.bench.comparison import Setting
    from flowgrpo.cli.common import checkpoint_of, quiet
    from flowgrpo.rewards.scorer import RewardScorer
    from flowgrpo.rewards.settings import Failures
    from flowgrpo.training.cpu import prepare_cpu

    if options.at.isdecimal():
        raise UsageError(
            "--at with a number is for recorded scores; images are drawn of last or best"
        )
    for one in runs.values():
        checkpoint_of(one.folder, options.at)  # before images of the others are drawn
    first = next(iter(runs.values()), None)
    prompts = _prompts(options, first)
    rewards = _rewards(options, first)
    quiet()
    prepare_cpu(0)
    scorer = RewardScorer(rewards, first.config.failures if first else Failures())
    images = options.images or (first.config.evaluation.images if first else IMAGES)
    sampling = first.config.evaluation_sampling() if first else None
    names = {id(run): name for name, members in groups for run in members}
    found: dict[str, list[Measured]] = {}
    for subject in subjects:
        run = runs.get(subject)
        name = names[id(run)] if run else subject.label
        policy, trained = _load(subject, run, options.at, _sampling(options, run, sampling))
        measured = _measure(policy, scorer, prompts, images, options.seed or 0)
        seed = run.config.run.seed if run else None
        label = run.name if run else name
        found.setdefault(name, []).append(
            replace(measured, name=label, iteration=trained, seed=seed)
        )
        del policy
    scorer.close()
    weights = {name: members[0].weights() for name, members in groups}
    return [Setting(n, m, (), weights.get(n, {})) for n, m in found.items()]


def _prompts(options: argparse.Namespace, first: "RecordedRun | None") -> "PromptSet":
    from flowgrpo.cli.score import task_key
    from flowgrpo.config import find
    from flowgrpo.data.prompt_sets import PromptSet

    if not options.prompts and first is None:
        absent = [s for s in options.subjects if not Path(Subject.parse(s).path).exists()]
        raise UsageError(
            "models alone are compared on --prompts FILE; a run has its own prompts"
            + (f". No run directory is here: {', '.join(absent)}" if absent else "")
        )
    if not options.prompts and first is not None and not options.by:
        return PromptSet.load(find(first.config.prompts.held_out), first.config.prompts.balance)
    place = options.prompts or (first.config.prompts.held_out if first else "")
    loaded = PromptSet.load(find(place))
    return PromptSet.load(find(place), task_key(loaded.prompts, options.by))


def _rewards(options: argparse.Namespace, first: "RecordedRun | None") -> "Sequence[Reward]":
    from flowgrpo.cli.score import named_rewards

    if options.reward:
        return named_rewards(options.reward, options.reward_option)
    if first is None:
        raise UsageError("models alone are compared by --reward NAME; a run has its own rewards")
    return first.config.rewards


def _sampling(
    options: argparse.Namespace, run: "RecordedRun | None", default: "Sampling | None"
) -> "Sampling":
    """How a subject is sampled."""
    from flowgrpo.policy import Sampling

    sampling = run.config.evaluation_sampling() if run else default or Sampling(num_steps=STEPS)
    changes: dict[str, Any] = {}
    if options.steps is not None:
        changes |= {"num_steps": options.steps, "sigmas": (), "timesteps": ()}
    if options.guidance is not None:
        changes["guidance_scale"] = options.guidance
    return replace(sampling, **changes)


def _load(
    subject: Subject, run: "RecordedRun | None", at: str, sampling: "Sampling"
) -> "tuple[PipelinePolicy, int | None]":
    """The policy of a subject, and the iterations trained; None for a model that is no run."""
    from flowgrpo.cli.common import device_of, load_run
    from flowgrpo.policy import PipelinePolicy
    from flowgrpo.policy.settings import ModelSource

    if run is not None:
        return load_run(run.folder, at, sampling=sampling)
    policy = PipelinePolicy.from_pretrained(
        ModelSource(path=subject.path), sampling=sampling, batch_size=16, device=device_of("auto")
    )
    return policy, None


def _measure(
    policy: "PipelinePolicy", scorer: "RewardScorer", prompts: "PromptSet", images: int, seed: int
) -> "Measured":
    from flowgrpo.bench.comparison import Measured
    from flowgrpo.evaluation import held_out

    result = held_out.evaluate(
        policy,
        scorer,
        held_out.plan(prompts, images),
        seed=seed,
        sampling=policy.sampling,
        balance=prompts.balance,
    )
    return Measured.of("", result)
