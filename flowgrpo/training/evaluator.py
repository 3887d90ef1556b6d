"""Evaluation during a run: when it is due, its scores and its comparison grid, and the best weights."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from flowgrpo.config.schema import Evaluation
from flowgrpo.core.imports import import_path
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.evaluation import held_out
from flowgrpo.evaluation.bench_section import direction
from flowgrpo.evaluation.comparison_grid import ComparisonGrid, load_audio, load_images, save_images
from flowgrpo.policy import PipelinePolicy, Sampling
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.training.benchmarks import Benchmarks
from flowgrpo.training.learner import Learner
from flowgrpo.training.session import Session


class Evaluator:
    """Evaluates the policy on held-out prompts. It does not change the weights.

    Attributes:
        evaluations: The results so far, those of earlier sessions of the run included.
    """

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
    ):
        self.benchmarks = benchmarks
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
        if not self.session.is_main:
            return
        try:
            is_there = load_images(self._base_file) is not None
        except ValueError as error:
            self.session.console.say(f"WARNING: {error}; the base model draws them again")
            is_there = False
        if not is_there:
            drawn = self.comparison_grid.generate_with_audio(self.policy, self.sampling)
            save_images(self._base_file, *drawn)

    def resume(self) -> None:
        """Read the results of earlier sessions, and probe the rewards on the base model's images.

        Raises:
            RewardError: If a reward is constant or not finite on them.
        """
        self.evaluations = self.session.past_evaluations()
        images = load_images(self._base_file)
        if images is not None and self.session.is_main:
            audio = load_audio(self._base_file)
            self.scorer.probe(images, self.comparison_grid.expanded, audio)
            self.base_images = images

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
        with session.phase("evaluation"), self.evaluated_weights():
            result = held_out.evaluate(
                self.policy,
                self.scorer,
                held_out.plan(self.prompts, number),
                seed=self.seed,
                sampling=self.sampling,
                balance=self.prompts.balance,
                metrics=self.metrics,
                gather=session.gather_objects,
                rank=session.accelerator.process_index,
                num_ranks=session.accelerator.num_processes,
            )
            if session.is_main:
                self._save_grid(iteration)
            found = self.benchmarks.run(iteration, full) if self.benchmarks else {}
        self.scorer.check_media()
        result = {"iteration": iteration, **result, **({"bench": found} if found else {})}
        self.evaluations.append(result)
        session.log_evaluation(result)
        if session.is_main:
            session.log_grid(iteration)
        best = self.benchmarks.best_of(result) if self.benchmarks else result["reward"]
        session.save_best(self.learner, iteration, best)
        scores = ", ".join(f"{k} {v:.3f}" for k, v in result["scores"].items())
        session.console.say(
            f"held out, after {iteration} iterations, {result['images']} images: {scores}"
        )
        for line in bench_lines(found):
            session.console.say(line)

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Inside, the policy has the weights that are evaluated and exported.

        These are the moving average if there is one, else the trained weights.
        """
        return self.learner.ema.applied() if self.learner.ema else nullcontext()

    @property
    def _base_file(self) -> Path:
        return self.session.folder / "grids" / "base.safetensors"

    def _save_grid(self, iteration: int) -> None:
        tuned = self.comparison_grid.generate(self.policy, self.sampling)
        self.comparison_grid.save(
            ["base", f"after {iteration} iterations"],
            [self.base_images, tuned],
            self.scorer,
            self.sampling,
            f"{self.model_name}: {self.session.folder.name}",
            self.session.grid(iteration),
        )


def bench_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The first result of each benchmark of an evaluation, with its change, in words."""
    lines = []
    for record in found.values():
        results = record.get("results", {})
        for name in list(record.get("main", ()))[:1]:
            low, high = record["intervals"][name]
            text = f"{record['title']}, {record['images']} images: {name} {_number(results[name])}"
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
