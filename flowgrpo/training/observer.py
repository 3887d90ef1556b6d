"""Everything around the loop that does not change the weights: evaluation, pictures, report."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo.config import Config, ConfigError, find
from flowgrpo.core.imports import import_path
from flowgrpo.core.random import Random
from flowgrpo.core.transitions import require_path
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.evaluation import held_out, inspection
from flowgrpo.evaluation.comparison_grid import ComparisonGrid, load_images, save_images
from flowgrpo.evaluation.report import write_report
from flowgrpo.policy import Full, LoRA, PipelinePolicy
from flowgrpo.policy.export import export
from flowgrpo.policy.memory import require_installed
from flowgrpo.policy.probe import check_scales, check_sizes, fit_noise
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.training.learner import Learner
from flowgrpo.training.session import Session


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        folder: The run directory.
        evaluations: The held-out evaluations, the first before training.
        finished: False if the run was interrupted; the same command goes on.
    """

    folder: Path
    evaluations: list[Mapping[str, Any]]
    finished: bool


class Observer:
    """Loads what a run needs, watches it, and says at the end what came of it."""

    def __init__(
        self,
        config: Config,
        session: Session,
        scorer: RewardScorer,
        policy: PipelinePolicy,
        prompts: PromptSet,
        trained_on: PromptSet,
    ):
        self.config, self.session, self.scorer, self.policy = config, session, scorer, policy
        self.prompts, self.trained_on = prompts, trained_on
        self.metrics = [_instance(import_path(m)) for m in config.evaluation.metrics]
        self.sampling = config.evaluation_sampling()
        self.evaluations: list[Mapping[str, Any]] = []
        e = config.evaluation
        self.comparison_grid = ComparisonGrid.of(
            prompts, e.grid_prompts, e.grid_samples, config.run.seed
        )

    @classmethod
    def prepare(cls, config: Config, prompts: PromptSet) -> "Observer":
        """Load what a run needs, the cheap and fallible first."""
        require_installed(config.memory, config.train.optimizer)
        held_out_prompts = PromptSet.load(find(config.prompts.held_out), config.prompts.balance)
        session = Session(config)
        scorer = RewardScorer(config.rewards, config.failures, config.memory.score_batch)
        for some in (prompts, held_out_prompts):
            scorer.check_prompts(some.prompts)
        session.scorer = scorer
        policy = PipelinePolicy.from_pretrained(
            config.model.path,
            sampling=config.sampling,
            weights=config.model.weights,
            batch_size=config.train.rollout_batch,
            dtype=config.model.dtype,
            device=session.accelerator.device,
            seed=config.run.seed,
            with_reference=config.loss.kl_coef > 0 or config.train.monitor_states > 0,
            memory=config.memory,
        )
        check_sizes(policy, held_out_prompts.prompts, config.evaluation_sampling())
        # Last, so that the grid that is looked at below is that of rollouts.
        check_sizes(policy, prompts.prompts, config.sampling)
        fit_noise(policy, [*prompts.prompts, *held_out_prompts.prompts])
        try:
            require_path(config.algorithm.transition, policy.scheduler.interval(0, 1).path)
            check_scales(policy, config.algorithm.transition, config.steps_by_density())
        except ValueError as error:
            raise ConfigError(f"algorithm.transition: {error}") from error
        return cls(config, session, scorer, policy, held_out_prompts, prompts)

    def start(self, learner: Learner) -> None:
        """Go back to the last checkpoint, check the rewards, keep the base model's pictures."""
        self.learner, session = learner, self.session
        base = session.folder / "grids" / "base.safetensors"
        if not base.exists() and session.is_main:
            save_images(base, self.comparison_grid.generate(self.policy, self.sampling))
        session.restore(learner)
        self.evaluations = session.past_evaluations()
        images = load_images(base)
        if images is not None and session.is_main:
            self.scorer.probe(images, self.comparison_grid.expanded)
            self.base_images = images
        session.start_trackers()

    def evaluate_if_due(self, iteration: int) -> None:
        """Evaluate before training and every so often."""
        every = self.config.evaluation.every
        if iteration == 0 or (every and iteration % every == 0):
            self.evaluate(iteration, full=iteration == 0)

    def evaluate(self, iteration: int, full: bool) -> None:
        """Held-out scores and a grid, with the averaged weights if there are any."""
        e, session = self.config.evaluation, self.session
        number = e.images if full or not e.images_during else e.images_during
        averaged = self.learner.ema.applied() if self.learner.ema else nullcontext()
        with session.phase("evaluation"), averaged:
            result = held_out.evaluate(
                self.policy,
                self.scorer,
                held_out.plan(self.prompts, number),
                seed=self.config.run.seed,
                sampling=self.sampling,
                balance=self.prompts.balance,
                metrics=self.metrics,
                gather=session.gather_objects,
                rank=session.accelerator.process_index,
                num_ranks=session.accelerator.num_processes,
            )
            if session.is_main:
                self._save_grid(iteration)
        result = {"iteration": iteration, **result}
        self.evaluations.append(result)
        session.log_evaluation(result)
        session.save_best(self.learner, iteration, result["reward"])
        scores = ", ".join(f"{k} {v:.3f}" for k, v in result["scores"].items())
        session.console.say(
            f"held out, after {iteration} iterations, {result['images']} images: {scores}"
        )

    def finish(self) -> Result:
        """The last evaluation, the export and the report; or how to go on."""
        session, config = self.session, self.config
        finished = not session.stopping
        if finished:
            self.evaluate(config.train.iterations, full=True)
            session.drop_phases()
            if session.is_main:
                self._inspect()
                with self.learner.ema.applied() if self.learner.ema else nullcontext():
                    assert self.policy.trainable is not None
                    export(
                        self.policy.stock_pipeline(),
                        self.policy.trainable,
                        session.folder / "export",
                    )
        if session.is_main:
            write_report(session.folder)
            self._say_result(finished)
        self.scorer.close()
        session.close()
        return Result(session.folder, self.evaluations, finished)

    def _inspect(self) -> None:
        """What the algorithm rewards now, for the report."""
        number = self.config.evaluation.inspected_prompts
        if number:
            groups = self.trained_on.groups(0, number, Random(self.config.run.seed))
            prompts = [g.prompt for g in groups]
            with self.learner.acting():
                strips = inspection.inspect(
                    self.policy,
                    self.config.algorithm,
                    self.scorer,
                    prompts,
                    seed=self.config.run.seed,
                )
            inspection.write_fragment(strips, self.session.folder)

    def _save_grid(self, iteration: int) -> None:
        tuned = self.comparison_grid.generate(self.policy, self.sampling)
        self.comparison_grid.save(
            ["base", f"after {iteration} iterations"],
            [self.base_images, tuned],
            self.scorer,
            self.sampling,
            f"{self.config.model.path}: {self.session.folder.name}",
            self.session.folder / "grids" / f"{iteration:06d}.png",
        )

    def _say_result(self, finished: bool) -> None:
        console, folder = self.session.console, self.session.folder
        if not finished:
            console.say(
                f"stopped and saved; the same command goes on, or: flowgrpo train {folder / 'config.toml'}"
            )
            return
        before, after = self.evaluations[0], self.evaluations[-1]
        rows = [("all", before["scores"], after["scores"])]
        rows += [(c, before["by_class"][c], after["by_class"][c]) for c in before["by_class"]]
        title = f"held out, {after['images']} images, deterministic sampler"
        # More than two side by side do not fit into a terminal.
        every = list(before["scores"])
        for names in (every[i : i + 2] for i in range(0, len(every), 2)):
            cells = [
                [
                    c,
                    *(
                        x
                        for n in names
                        for x in (f"{b[n]:.3f}", f"{a[n]:.3f}", f"{a[n] - b[n]:+.3f}")
                    ),
                ]
                for c, b, a in rows
            ]
            heads = [h for n in names for h in (f"{n}: before", "after", "change")]
            console.table(title, ["", *heads], cells)
        for name, value in after["metrics"].items():
            console.say(f"{name}: {before['metrics'][name]:.3f} before, {value:.3f} after")
        grid = folder / "grids" / f"{after['iteration']:06d}.png"
        console.say(f"report:  {folder / 'report.html'}")
        console.say(f"grid:    {grid}")
        kinds = {Full: "pipeline, diffusers format", LoRA: "LoRA adapter, diffusers format"}
        kind = kinds.get(type(self.config.model.weights), "mean and std of the initial noise")
        console.say(f"weights: {folder / 'export'} ({kind})")


def _instance(target: Any) -> Any:
    return target() if isinstance(target, type) else target
