"""Evaluation during a run: when it is due, its scores and its comparison grid, and the best weights."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flowgrpo.config.schema import Evaluation
from flowgrpo.core.imports import import_path
from flowgrpo.core.measures import Measured, waited
from flowgrpo.core.text import counted
from flowgrpo.data import files, strict_json
from flowgrpo.data.audio import Audio
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.evaluation import held_out
from flowgrpo.evaluation.bench_section import direction
from flowgrpo.evaluation.comparison_grid import ComparisonGrid, load_audio, load_images, save_images
from flowgrpo.evaluation.hacking import changes_between, fallen, seen
from flowgrpo.evaluation.records import PROMPT_USE
from flowgrpo.evaluation.samples import FOLDER, Sample, save_samples
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.rewards.prompt_use import find_ignoring, prompt_notes
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.training.benchmarks import Benchmarks
from flowgrpo.training.learner import Learner
from flowgrpo.training.run_changes import stopped_before
from flowgrpo.training.session import Session


class Evaluator:
    """Evaluates the policy on held-out prompts. It does not change the weights.

    Attributes:
        evaluations: The results so far, those of earlier sessions of the run included.
        base_images: The base model's images for the comparison grids, in the processes that draw these. Set by
            :meth:`resume`.
    """

    base_images: Tensor

    def __init__(
        self,
        settings: Evaluation,
        session: Session,
        scorer: RewardScorer,
        policy: PipelinePolicy,
        learner: Learner,
        prompts: PromptSet,
        *,
        sampling: Sampling,
        seed: int,
        model_name: str,
        benchmarks: Benchmarks | None = None,
        needs_rewards: bool = True,
    ):
        """
        Args:
            settings: The table ``[evaluation]``.
            session: Writes the results.
            scorer: The rewards.
            policy: The policy.
            learner: Has the moving average of the weights, and the state of a checkpoint.
            prompts: The held-out prompts.
            sampling: Arguments of the pipeline's call in evaluations.
            seed: Seed of the noise.
            model_name: Name of the model in the headline of grids.
            benchmarks: Benchmarks that run with evaluations.
            needs_rewards: Whether the algorithm trains on rewards, so that one of them has to read the prompts.
        """
        self.needs_rewards, self.benchmarks = needs_rewards, benchmarks
        self._warned = set[str]()
        self._best_after: int | None = None
        """The iterations after which the weights were saved that :meth:`show_best` has put into the policy."""
        self.settings, self.session, self.scorer = settings, session, scorer
        self.policy, self.learner, self.prompts = policy, learner, prompts
        self.sampling, self.seed, self.model_name = sampling, seed, model_name
        self.metrics = [_instance(import_path(path)) for path in settings.metrics]
        self.evaluations: list[Mapping[str, Any]] = []
        self.comparison_grid = ComparisonGrid.of(
            prompts, settings.grid_prompts, settings.grid_samples, seed
        )

    def keep_base_images(self) -> None:
        """Draw and save the base model's images for the grids, unless an earlier session did."""
        session = self.session
        missing = session.shares_main and not session.once(self._has_base_images)
        with self.policy.together():
            if missing:
                drawn = self.comparison_grid.generate_with_audio(self.policy, self.sampling)
                if session.is_main:
                    save_images(self._base_file, *drawn)

    def _has_base_images(self) -> bool:
        try:
            return load_images(self._base_file) is not None
        except ValueError as error:
            self.session.console.say(f"WARNING: {error}; the base model draws them again")
            return False

    def resume(self) -> None:
        """Read the results of earlier sessions, and probe the rewards on the base model's images.

        Raises:
            RewardError: If a reward is constant or not finite on them.
        """
        self.evaluations = self.session.past_evaluations()
        if not self.session.shares_main:
            return
        images, audio = self.session.once(self._load_base_images)
        if images is not None:
            self.scorer.probe(images, self.comparison_grid.expanded, audio)
            self._check_prompt_use(images, audio)
            self.base_images = images

    def _load_base_images(self) -> tuple[Tensor | None, Audio | None]:
        images = load_images(self._base_file)
        return images, None if images is None else load_audio(self._base_file)

    def _check_prompt_use(self, images: Tensor, audio: Audio | None) -> None:
        """Name the trained rewards that ignore their prompts; measured once per run.

        Raises:
            ConfigError: If nothing else is trained on, and this is not meant.
        """
        scorer, session = self.scorer, self.session
        if scorer.failures.probe == "off":
            return
        file = session.folder / PROMPT_USE
        trained = {r.label for r in scorer.rewards if r.weight != 0}
        found = session.once(partial(_read_prompt_use, file))
        if found.keys() != trained:
            found = find_ignoring(scorer, images, self.comparison_grid.expanded, audio)
        notes = prompt_notes(
            scorer.rewards, found, self.needs_rewards, refuse=scorer.failures.probe == "refuse"
        )
        if session.is_main:
            record = {"ignores_prompt": found, "notes": notes}
            files.write_whole(file, strict_json.dumps(record, indent=1))
        for note in notes:
            session.console.say(f"WARNING: {note}")

    def evaluate_if_due(self, iteration: int, before: Callable[[], None] = lambda: None) -> None:
        """Evaluate before the first iteration, and before every ``every``-th.

        Args:
            iteration: Iterations trained so far.
            before: Called before an evaluation.
        """
        every = self.settings.every
        if iteration == 0 or (every and iteration % every == 0):
            before()
            self.evaluate(iteration, full=iteration == 0)

    def evaluate(self, iteration: int, full: bool) -> None:
        """Score held-out images and draw a grid; save the weights if they are the best so far.

        Args:
            iteration: Iterations trained so far.
            full: Whether to use the larger number of images, as before and after training.
        """
        settings, session = self.settings, self.session
        number = settings.images if full or not settings.images_during else settings.images_during
        session.console.say(f"evaluating {counted(number, 'held-out image')} ...")
        with session.phase("evaluation"), self.evaluated_weights():
            result = self._scored(self.sampling, number, iteration)
            regimes = {
                regime.tag: self._scored(
                    regime.sampling(self.sampling), min(regime.images or number, number)
                )
                for regime in settings.regimes
                if full or regime.when == "every"
            }
            with self.policy.together():
                if session.shares_main:
                    self._save_grid(iteration)
            found = self.benchmarks.run(iteration, full) if self.benchmarks else {}
        self.scorer.check_media()
        shown = {} if self._best_after is None else {"weights_after": self._best_after}
        parts = {"regimes": regimes, "bench": found}
        result = {
            "iteration": iteration,
            **shown,
            **result,
            **{k: v for k, v in parts.items() if v},
        }
        self.evaluations.append(result)
        session.log_evaluation(result)
        if session.is_main:
            session.log_grid(iteration)
        if self._best_after is None:
            self._save_best(iteration, result)
        for tag, table in {"": result, **regimes}.items():
            scores = ", ".join(f"{k} {v:.3f}" for k, v in table["scores"].items())
            of = f", {tag}" if tag else ""
            session.console.say(
                f"held out{of}, after {counted(iteration, 'iteration')}, {counted(table['images'], 'image')}: "
                f"{scores or 'no reward, see the grid'}"
            )
        for line in bench_lines(found):
            session.console.say(line)
        self._warn(result)

    def _save_best(self, iteration: int, result: Mapping[str, Any]) -> None:
        """Save the weights for each number of which they are the best so far.

        Raises:
            ConfigError: If the first evaluation does not have a number.
        """
        session, best = self.session, Measured.parse(self.settings.best)
        stopping = session.config.train.early_stopping.metric
        kept = [Measured.parse(t) for t in self.settings.keep_best]
        if len(self.evaluations) == 1:
            best.require(result, "evaluation.best")
            for index, one in enumerate(kept):
                one.require(result, f"evaluation.keep_best[{index}]")
            if stopping:
                Measured.parse(stopping).require(result, "train.early_stopping.metric")
        session.save_best(self.learner, iteration, best.of(result))
        others = dict.fromkeys([*kept, *([Measured.parse(stopping)] if stopping else [])])
        for one in others:
            if one != best:
                session.save_best(self.learner, iteration, one.of(result), one)

    @property
    def is_over(self) -> bool:
        """Whether the last evaluation ends the run (``train.early_stopping``)."""
        settings, folder = self.session.config.train.early_stopping, self.session.folder
        if not settings.metric:
            return False
        # A resumed run repeats evaluations; the last one of an iteration counts.
        latest = {e["iteration"]: e for e in self.evaluations}
        found = [latest[i] for i in sorted(latest)]
        number = Measured.parse(settings.metric)
        return waited(found, number, settings.min_gain, stopped_before(folder)) >= settings.patience

    def show_best(self) -> tuple[str, int, float]:
        """Put the best weights by the number of ``train.early_stopping`` into the policy, for good.

        Returns:
            Their checkpoint, the iterations after which it was saved, and the number's value.
        """
        number = Measured.parse(self.session.config.train.early_stopping.metric)
        is_main_one = number == Measured.parse(self.settings.best)
        folder = self.session.checkpoints / ("best" if is_main_one else number.folder)
        parts, state = self.session.load(folder, self.learner)
        assert self.policy.trainable is not None
        self.policy.trainable.load(parts["weights"])
        self._best_after = int(state["iteration"])
        return folder.name, self._best_after, float(state["score"])

    def _warn(self, result: Mapping[str, Any]) -> None:
        """Print each sign of reward hacking in an evaluation, once per session."""
        first = self.evaluations[0]
        weights = {r.label: r.weight for r in self.scorer.rewards}
        found = fallen(changes_between(first, result), weights) | seen(first, result)
        for name in (n for n in found if n not in self._warned):
            self.session.console.say(f"WARNING: {found[name]}")
        self._warned |= found.keys()

    def _scored(
        self, sampling: Sampling, number: int, shown_after: int | None = None
    ) -> dict[str, Any]:
        """The scores of ``number`` held-out images; all processes take part.

        With ``shown_after``, the iteration, images of highest and lowest reward are saved, and artefacts
        measured as configured.
        """
        shares = self.session.shares
        return held_out.evaluate(
            self.policy,
            self.scorer,
            held_out.plan(self.prompts, number),
            seed=self.seed,
            sampling=sampling,
            balance=self.prompts.balance,
            metrics=self.metrics,
            artefacts=self.settings.artefacts and shown_after is not None,
            gather=self.session.gather_objects,
            rank=shares.index,
            num_ranks=shares.number,
            show=None if shown_after is None else partial(self._save_samples, shown_after),
        )

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights that are evaluated and exported.

        These are the moving average if there is one, else the trained weights; after
        :meth:`show_best`, the best ones.
        """
        average = self.learner.ema if self._best_after is None else None
        return average.applied() if average else nullcontext()

    @property
    def _base_file(self) -> Path:
        return self.session.folder / "grids" / "base.safetensors"

    def _save_samples(self, iteration: int, found: Sequence[Sample]) -> None:
        """Keep the images of highest and of lowest reward for the report."""
        if self.session.is_main:
            save_samples(self.session.folder / FOLDER / f"{iteration:06d}.png", found)

    def _save_grid(self, iteration: int) -> None:
        tuned = self.comparison_grid.generate(self.policy, self.sampling)
        self.comparison_grid.save(
            ["base", f"after {counted(iteration, 'iteration')}"],
            [self.base_images, tuned],
            self.scorer,
            self.sampling,
            title=f"{self.model_name}: {self.session.folder.name}",
            path=self.session.grid(iteration) if self.session.is_main else None,
        )


def _read_prompt_use(file: Path) -> Mapping[str, bool | None]:
    """Which rewards ignore their prompts, as an earlier session found; empty if none did."""
    try:
        found = json.loads(file.read_text("utf-8"))["ignores_prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def bench_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The first result of each benchmark of an evaluation, with its change, in words."""
    lines = []
    for record in found.values():
        results = record.get("results", {})
        for name in list(record.get("main", ()))[:1]:
            low, high = record["intervals"][name]
            text = f"{record['title']}, {counted(record['images'], 'image')}: {name} {_number(results[name])}"
            text += f" ({_number(low)} to {_number(high)})"
            if name in record["changes"]:
                change = record["changes"][name]
                noise = "" if direction(change) else ", within noise"
                text += f", {_number(change[0], '+')} since the first evaluation{noise}"
            lines.append(text)
    return lines


def _number(value: float | None, sign: str = "") -> str:
    return "unknown" if value is None else f"{value:{sign}.4g}"


def _instance(target: Any) -> Any:
    """A metric: a function as it is, a class called without arguments."""
    return target() if isinstance(target, type) else target
