"""The configuration of a run: one TOML file, read strictly, checked before any model is loaded."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import tomli_w

from flowgrpo.algorithms import (
    FIND,
    G2RPO,
    TPGRPO,
    VGPO,
    Algorithm,
    BranchGRPO,
    DanceGRPO,
    DiffusionNFT,
    FlowGRPO,
    MixGRPO,
    PrefGRPO,
    TempFlowGRPO,
)
from flowgrpo.config.reader import override, read, to_table
from flowgrpo.core.advantages import BetaAdvantage
from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import suggest
from flowgrpo.core.random import Random
from flowgrpo.data.prompt_files import HUB
from flowgrpo.losses.losses import ClippedLoss, Loss, NFTLoss
from flowgrpo.policy import Full, LoRA, Memory, Noise, Sampling
from flowgrpo.rewards.loading import check_rewards
from flowgrpo.rewards.scorer import Failures, Reward

__all__ = ["Config", "ConfigError", "find", "load", "override", "save"]

COUNTED = (
    FlowGRPO, DanceGRPO, MixGRPO, PrefGRPO, TempFlowGRPO, G2RPO, TPGRPO, VGPO, BranchGRPO,
)  # fmt: skip
"""Algorithms that choose their steps and know beforehand what they cost."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The pipeline that is trained."""

    path: str
    """Hub id or folder of a diffusers pipeline, or ``shapes`` for the model in the package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the denoiser's arithmetic. Trained weights are fp32 whatever it is."""
    weights: LoRA | Full | Noise = field(default_factory=LoRA)
    """What is trained."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is generated."""

    train: str
    """File of training prompts (``.txt`` with one per line, ``.jsonl``, ``.csv``, ``.parquet``), or a
    Hugging Face dataset as ``hf:owner/name:split``. Besides ``prompt`` it may give
    ``negative_prompt``, ``image`` or ``images``, ``height``, ``width`` and ``num_frames``."""
    held_out: str
    """File of prompts that are only evaluated on."""
    balance: str = ""
    """Metadata key whose values are drawn equally often, such as GenEval's ``tag``; empty takes the
    file in a shuffled order, over and over."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, how large, how fast."""

    iterations: int
    """Rollouts; each is followed by ``updates`` optimizer steps."""
    groups: int
    """Prompts per iteration, over all processes. Each is sampled ``algorithm.group_size`` times."""
    updates: int = 1
    """Optimizer steps per iteration; ``groups`` is divided among them. From the second on they are
    off-policy, which is what the clip range acts on."""
    rollout_batch: int = 64
    """Samples in one call of the pipeline."""
    train_batch: int = 64
    """States in one forward pass with gradients."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """``adamw8bit`` keeps the moments in 8 bits (bitsandbytes), which saves 6 bytes per trained weight."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup: int = 0
    """Optimizer steps over which the learning rate rises to its peak."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to a tenth at the end."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's moment decays."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    spike_factor: float = 20.0
    """An update whose gradient norm exceeds the running median this many times is skipped; 0 never
    skips."""
    monitor_states: int = 16
    """States per iteration on which the distance to the reference model is measured (the metric
    ``kl/velocity``), at most ``train_batch``; 0 for none, which saves the copy of the weights that
    full fine-tuning then keeps."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that is evaluated and exported; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measured with the deterministic sampler at fixed seeds, before, during and after training."""

    every: int = 50
    """Iterations between evaluations; 0 evaluates only before and after."""
    images: int = 240
    """Images before and after training, spread evenly over the classes of ``prompts.balance`` and
    over the held-out prompts of each. Fewer than 200 mislead."""
    images_during: int = 0
    """The same for evaluations during training, which may be fewer; 0 as ``images``."""
    metrics: tuple[str, ...] = ()
    """Import paths of metrics that see all images of a prompt, such as a diversity."""
    num_steps: int | None = None
    """Denoising steps; unset as in ``sampling``."""
    guidance_scale: float | None = None
    """Guidance; unset as in ``sampling``."""
    grid_prompts: int = 6
    """Prompts on the before/after grid."""
    grid_samples: int = 4
    """Images per prompt and model on the grid."""
    inspected_prompts: int = 1
    """Training prompts whose credit, step by step, the report shows at the end; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where things go, and what does not change the result."""

    folder: str
    """The run directory. The same command again goes on where it stopped."""
    seed: int = 0
    """Every random draw follows from it."""
    device: str = "auto"
    """``auto`` takes a GPU if there is one."""
    threads: int = 0
    """CPU threads for torch; 0 takes all cores."""
    checkpoint_every: int = 25
    """Iterations between checkpoints; the last iteration always has one."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, besides the best."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """accelerate trackers: tensorboard, wandb, trackio, mlflow, comet_ml, aim, clearml, swanlab."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run."""

    model: Model
    """The pipeline."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the pipeline is called in rollouts."""
    memory: Memory = field(default_factory=Memory)
    """What trades memory for time."""
    algorithm: (
        FlowGRPO | DanceGRPO | MixGRPO | PrefGRPO | DiffusionNFT
        | TempFlowGRPO | G2RPO | TPGRPO | VGPO | BranchGRPO | FIND | Algorithm
    )  # fmt: skip
    """Who judges which denoising step; ``kind`` may be the import path of an algorithm of your own."""
    loss: Loss = field(default_factory=ClippedLoss)
    """What an update minimises."""
    rewards: tuple[Reward, ...]
    """What is rewarded: the weighted sum is trained on."""
    failures: Failures = field(default_factory=Failures)
    """What happens when a reward fails."""
    prompts: Prompts
    """What is generated."""
    train: Train
    """Batch geometry and optimizer."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """What is measured on held-out prompts."""
    run: Run
    """Where things go."""

    def check(self, num_processes: int = 1) -> None:
        """Find contradictions before any long work.

        Raises:
            ConfigError: Naming the keys, their values and what is possible.
        """
        for key, value, least in self._bounds():
            if value < least:
                raise ConfigError(f"{key} must be at least {least}, got {value}")
        if self.train.ema_decay >= 1:
            raise ConfigError(f"train.ema_decay must be below 1, got {self.train.ema_decay}")
        betas = self.train.betas
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ConfigError(f"train.betas must be two numbers in [0, 1), got {list(betas)}")
        # A preference is something to train on beside the rewards.
        alone = not isinstance(self.algorithm, PrefGRPO)
        binary = isinstance(getattr(self.algorithm, "advantage", None), BetaAdvantage)
        check_rewards(self.rewards, self.train.iterations, alone, binary)
        train = self.train
        if train.groups % (train.updates * num_processes):
            step = train.updates * num_processes
            nearest = max(step, round(train.groups / step) * step)
            raise ConfigError(
                f"train.groups = {train.groups} cannot be divided among train.updates = {train.updates} optimizer "
                f"steps and {num_processes} processes ({train.updates} x {num_processes} = {step}); "
                f"the nearest that can is train.groups = {nearest}"
            )
        try:
            self.algorithm.check(self.sampling.num_steps)
            if isinstance(self.algorithm, PrefGRPO):
                self.algorithm.check_rewards([r.label for r in self.rewards])
        except ValueError as error:
            raise ConfigError(f"algorithm: {error}") from error
        try:
            self.memory.check(isinstance(self.model.weights, Full))
            self.loss.check()
            if isinstance(self.loss, ClippedLoss):
                self.loss.check_transition(self.algorithm.transition)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._check_kinds()

    def _check_kinds(self) -> None:
        """Raise ConfigError if an algorithm is without what belongs to it."""
        algorithm, loss, weights = self.algorithm, self.loss, self.model.weights
        if isinstance(algorithm, DiffusionNFT) != isinstance(loss, NFTLoss):
            raise ConfigError(
                "algorithm.kind = 'diffusion_nft' and loss.kind = 'nft' belong together, but these are "
                f"{type(algorithm).__name__} and {type(loss).__name__}"
            )
        if isinstance(algorithm, FIND) != isinstance(weights, Noise):
            raise ConfigError(
                "algorithm.kind = 'find' and model.weights.kind = 'noise' belong together, but these "
                f"are {type(algorithm).__name__} and {type(weights).__name__}"
            )
        clipped = loss if isinstance(loss, ClippedLoss) else ClippedLoss()
        needs_a_step = clipped.needs_old_mean or clipped.kl == "flow_grpo"
        if isinstance(algorithm, FIND) and needs_a_step:
            raise ConfigError(
                "algorithm.kind = 'find' has no denoising step, so that loss.ratio = 'guard', loss.clip "
                "= 'kl' and loss.kl = 'flow_grpo' have no meaning; leave them at 'plain', 'ratio' and "
                "'exact'"
            )

    def _bounds(self) -> Sequence[tuple[str, int | float, int | float]]:
        t, e, tiny = self.train, self.evaluation, 1e-12
        return [
            ("sampling.num_steps", self.sampling.num_steps, 2),
            ("algorithm.group_size", self.algorithm.group_size, 2),
            ("train.iterations", t.iterations, 1),
            ("train.groups", t.groups, 1),
            ("train.updates", t.updates, 1),
            ("train.rollout_batch", t.rollout_batch, 1),
            ("train.train_batch", t.train_batch, 1),
            ("train.lr", t.lr, tiny),
            ("train.warmup", t.warmup, 0),
            ("train.ema_decay", t.ema_decay, 0),
            ("train.weight_decay", t.weight_decay, 0),
            ("train.spike_factor", t.spike_factor, 0),
            ("failures.retries", self.failures.retries, 0),
            ("failures.wait", self.failures.wait, 0),
            ("train.max_grad_norm", t.max_grad_norm, tiny),
            ("evaluation.every", e.every, 0),
            ("evaluation.images", e.images, 1),
            ("evaluation.images_during", e.images_during, 0),
            ("evaluation.grid_prompts", e.grid_prompts, 1),
            ("evaluation.grid_samples", e.grid_samples, 1),
            ("evaluation.inspected_prompts", e.inspected_prompts, 0),
            ("train.monitor_states", t.monitor_states, 0),
            ("failures.max_rate", self.failures.max_rate, 0),
            *self.model.weights.bounds(),
            ("run.checkpoint_every", self.run.checkpoint_every, 1),
            ("run.keep_checkpoints", self.run.keep_checkpoints, 1),
        ]

    def steps_by_density(self) -> list[int]:
        """The steps that are trained in any iteration by the ratio of their densities as it is.

        GRPO-Guard's ratio, TempFlow-GRPO's weights, densities without their variance and the
        likelihood-free objective bring the gradients of all steps to one size by themselves.
        """
        algorithm, loss = self.algorithm, self.loss
        if (
            not isinstance(algorithm, COUNTED)
            or isinstance(algorithm, TempFlowGRPO)
            or (isinstance(loss, ClippedLoss) and loss.ratio == "guard")
            or getattr(algorithm.transition, "log_prob", "") == "unnormalised"
        ):
            return []
        found = set(getattr(algorithm, "splits", ()))
        for iteration in range(self.train.iterations):
            random = Random(self.run.seed).at("train", iteration)
            generator = random.generator("steps")
            found.update(algorithm.steps.select(self.sampling.num_steps, iteration, generator))
        return sorted(found)

    def evaluation_sampling(self) -> Sampling:
        """How the pipeline is called in evaluations."""
        changed: dict[str, Any] = {
            "num_steps": self.evaluation.num_steps,
            "guidance_scale": self.evaluation.guidance_scale,
        }
        return replace(self.sampling, **{k: v for k, v in changed.items() if v is not None})

    def geometry(self, num_processes: int = 1) -> dict[str, str]:
        """The batch geometry in words, for people to check before a long run."""
        t, size = self.train, self.algorithm.group_size
        samples = t.groups * size
        return {
            "groups x samples": f"{t.groups} prompts x {size} samples = {samples} per iteration",
            "processes": f"{num_processes}, {t.groups // num_processes} groups on each",
            "rollout": f"{-(-samples // num_processes // t.rollout_batch)} calls of {min(t.rollout_batch, samples)} samples on each process",
            "per prompt": self._work(),
            "optimizer steps": f"{t.updates} per iteration, {t.groups // t.updates} groups in each",
            "in all": f"{t.iterations} iterations, {t.iterations * samples:,} samples, {t.iterations * t.updates:,} optimizer steps",
            "denoising": f"{self.sampling.num_steps} steps, guidance {self.sampling.guidance_scale if self.sampling.guidance_scale is not None else 'as the pipeline has it'}",
        }

    def _work(self) -> str:
        """What the first iteration costs per prompt, in words."""
        algorithm, num_steps = self.algorithm, self.sampling.num_steps
        if isinstance(algorithm, DiffusionNFT | FIND):
            cost = algorithm.cost(num_steps, [])
        elif isinstance(algorithm, COUNTED):
            random = Random(self.run.seed).at("train", 0)
            steps = algorithm.steps.select(num_steps, 0, random.generator("steps"))
            cost = algorithm.cost(num_steps, steps)
        else:
            return "unknown before it is done; metrics.jsonl has it"
        return f"{cost.nfe:,.0f} denoiser evaluations, {cost.decodes:,.0f} decodes, {cost.rewards:,.0f} calls of each reward in the first iteration"


def find(name: str) -> Path:
    """A file by its path, or by the name of one that comes with flowgrpo.

    ``quickstart`` and ``configs/quickstart.toml`` name the same configuration.

    Raises:
        FileNotFoundError: With the nearest name.
    """
    if Path(name).is_file() or name.startswith(HUB):
        return Path(name)
    package = Path(str(resources.files("flowgrpo")))
    roots = [package.parent, package / "data"]
    for root in roots:
        for candidate in (root / name, root / "configs" / f"{name}.toml"):
            if candidate.is_file():
                return candidate
    known = {
        f"{p.parent.name}/{p.name}"
        for r in roots
        for d in ("configs", "prompts")
        for p in (r / d).glob("*.*")
    }
    raise FileNotFoundError(
        f"no such file: {name}{suggest(name, known | {Path(k).stem for k in known})}"
    )


def load(name: str, settings: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply ``key=value`` settings to it.

    Raises:
        ConfigError: On a wrong key, type or value, with the file's name.
        FileNotFoundError: If there is no such file.
    """
    path = find(name)
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    try:
        return read(Config, override(table, settings))
    except ConfigError as error:
        at_fault = f"--set on {path}" if settings and _is_sound(table) else str(path)
        raise ConfigError(f"{at_fault}: {error}") from error


def _is_sound(table: dict[str, Any]) -> bool:
    """Whether a configuration can be read from a table."""
    try:
        read(Config, table)
    except ConfigError:
        return False
    return True


def dump(config: Config) -> str:
    """A configuration as TOML; :func:`load` gives an equal one."""
    return tomli_w.dumps(to_table(config))


def save(config: Config, path: Path) -> None:
    """Write a configuration so that :func:`load` gives an equal one."""
    path.write_text(dump(config))
