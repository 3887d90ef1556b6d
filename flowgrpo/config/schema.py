"""The tables of a configuration file, and what can be checked about them before a model is loaded.

Each table is a frozen dataclass. The docstring below a field is its help text: ``flowgrpo config
explain`` prints it, and the JSON schema shows it in editors.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flowgrpo.algorithms import (
    DMD,
    FIND,
    G2RPO,
    RTDMD,
    SRPO,
    TPGRPO,
    VGPO,
    Algorithm,
    BranchGRPO,
    DanceGRPO,
    DiffusionNFT,
    Distillation,
    DRaFT,
    FlowGRPO,
    Matching,
    MixGRPO,
    NeighborGRPO,
    Pairs,
    Pictures,
    PrefGRPO,
    ReFL,
    SelfOPD,
    TempFlowGRPO,
)
from flowgrpo.algorithms.guard import Guard
from flowgrpo.config.advantages import check_advantage
from flowgrpo.config.benchmarks import Bench, check_benchmarks
from flowgrpo.config.best import check_best
from flowgrpo.config.bounds import check_bounds
from flowgrpo.config.distillation import check_distillation
from flowgrpo.config.distribution_matching import check_distribution_matching
from flowgrpo.config.examples import check_examples
from flowgrpo.config.kinds import check_interfaces, check_kinds
from flowgrpo.config.loss import check_loss
from flowgrpo.config.previews import check_previews
from flowgrpo.config.regimes import Regime, check_regimes
from flowgrpo.config.replay import ReplaySettings, check_replay
from flowgrpo.config.reward_gradients import check_reward_gradients
from flowgrpo.config.steps import check_grid, check_steps, steps_of_any_iteration
from flowgrpo.config.updates import check_split, check_staleness, check_updates
from flowgrpo.core.errors import ConfigError
from flowgrpo.losses.base import Loss
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.losses.distillation import DistillationLoss
from flowgrpo.losses.dmd import DMDLoss
from flowgrpo.losses.dpo import DPOLoss
from flowgrpo.losses.group_matching import CRDLoss, DGPOLoss
from flowgrpo.losses.matching import MatchingLoss
from flowgrpo.losses.neighbor import NeighborLoss
from flowgrpo.losses.nft import NFTLoss
from flowgrpo.losses.reward_gradient import RewardGradientLoss
from flowgrpo.losses.self_opd import SelfOPDLoss
from flowgrpo.losses.supervised import SupervisedLoss
from flowgrpo.policy.settings import (
    Adapter,
    Full,
    LoRA,
    Memory,
    ModelSource,
    Noise,
    Parallel,
    Sampling,
)
from flowgrpo.rewards.settings import Failures, Reward, check_rewards

Split = Literal["groups", "samples", "steps", "actions"]
"""What is divided among the optimizer steps of an iteration."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The pipeline, its precision, and which of its weights are trained."""

    path: str
    """Hub id or folder of a diffusers pipeline; a checkpoint in one file (``.safetensors``, ``.ckpt``); or
    ``shapes`` for the model in the package."""
    base: str = ""
    """Hub id or folder of the pipeline that has what a checkpoint in one file lacks: the configuration,
    the tokenizers and often the text encoders and the VAE. If empty, the published pipeline of the model
    that the file contains."""
    revision: str = ""
    """Branch, tag or commit of a hub id. If empty, the main branch."""
    variant: str = ""
    """Variant of the weights, such as ``fp16``. If empty, the weights without a variant or, where there
    are none, the only variant."""
    adapters: tuple[Adapter, ...] = ()
    """Earlier LoRA adapters, added to the weights before training as a frozen part of the model. To
    train an adapter further, see ``model.weights.init``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the denoiser's arithmetic. Trained weights are always kept in fp32."""
    weights: LoRA | Full | Noise = field(default_factory=LoRA)
    """The weights that are trained: adapters, all weights, or the initial noise."""

    @property
    def source(self) -> ModelSource:
        """Where the pipeline is loaded from."""
        return ModelSource(
            path=self.path,
            base=self.base,
            revision=self.revision,
            variant=self.variant,
            adapters=self.adapters,
        )


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Files of training prompts and of held-out prompts."""

    train: str
    """File of training prompts (``.txt`` with one per line, ``.jsonl``, ``.csv``, ``.parquet``), or a
    Hugging Face dataset as ``hf:owner/name:split``. Besides ``prompt`` it may give
    ``negative_prompt``, ``image`` or ``images``, ``height``, ``width`` and ``num_frames``. With the
    algorithms ``pictures`` and ``pairs``: a ``.jsonl`` file or a folder of pictures to train on."""
    held_out: str
    """File of prompts for evaluations; they are never trained on."""
    balance: str = ""
    """Metadata key whose values are drawn equally often, such as GenEval's ``tag``. If empty, the whole
    file is drawn in a shuffled order, again and again."""
    weights: dict[str, float] = field(default_factory=dict)
    """How often training draws the classes of ``balance`` relative to each other, such as
    ``{color_attr = 3.0}`` for the hardest class; 1 for a class that is not named."""

    def check(self) -> None:
        """Raise ConfigError if there are weights without classes, or a weight is out of range."""
        if self.weights and not self.balance:
            raise ConfigError(
                "prompts.weights needs prompts.balance, the metadata key whose values have the weights"
            )
        for name, weight in self.weights.items():
            if not 1e-6 <= weight <= 1e6:
                raise ConfigError(f"prompts.weights.{name} must be from 1e-6 to 1e6, got {weight}")


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Ends a run when a held-out number no longer improves, and exports the best weights."""

    metric: str = ""
    """The number, named as in ``evaluation.best``; empty for no early stopping. Choose one that is not
    trained on, where there is one."""
    patience: int = 3
    """Evaluations without an improvement after which the run ends."""
    min_gain: float = 0.0
    """An evaluation improves if it exceeds the best one before it by more than this."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Length of the run, batch geometry and optimizer."""

    iterations: int
    """Rollouts of the run; each is followed by ``epochs`` times ``updates`` optimizer steps."""
    groups: int
    """Prompts per iteration, over all processes. Each is sampled ``algorithm.group_size`` times."""
    updates: int = 1
    """Optimizer steps per iteration and epoch; ``split`` says what is divided among them. All but the
    first are off-policy, so the clip range takes effect."""
    split: Split = "groups"
    """What is divided among an epoch's optimizer steps: whole ``groups``; the ``samples`` of every
    group (DanceGRPO); the denoising ``steps``, from noise to data (G2RPO); or single ``actions`` in
    random order (BranchGRPO). Advantages are computed before, from whole groups."""
    epochs: int = 1
    """How often an iteration's actions are trained on: each epoch divides them anew among ``updates``
    optimizer steps. All but the first optimizer step are off-policy; ratios are to the policy that
    sampled, in every epoch."""
    without_advantage: Literal["count", "drop"] = "count"
    """Samples whose actions all have advantage 0, as in groups of equal rewards: ``count`` includes them
    in the means of loss and KL; ``drop`` leaves them out of both, as Flow-GRPO's code does, so that the
    policy term keeps its size relative to the KL of the other samples."""
    refill: int = 0
    """Rounds in which groups of equal rewards, which carry no training signal, are replaced by groups of
    further prompts; 0 keeps them. After the last round, groups of equal rewards remain."""
    staleness: int = 0
    """With 1, an iteration is sampled before the update of the iteration before it, while that one's
    candidates are still being scored, so that slow rewards do not hold up sampling. Actions are then
    trained on with weights one update newer than those that sampled them; their ratios are exact. It needs
    memory for the rollouts of two iterations and for one more copy of the trained weights."""
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    """Earlier groups that are trained on again, with importance weights."""
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
    """Curve on which the learning rate falls to a tenth of its peak by the end of the run."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's moment decays."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm."""
    spike_factor: float = 20.0
    """An update is skipped if its gradient norm exceeds the running median by this factor; 0 skips
    none."""
    monitor_states: int = 16
    """States per iteration on which the distance to the reference policy is computed (the metric
    ``kl/velocity``), at most ``train_batch``. With 0 the metric is left out, and full fine-tuning
    keeps no copy of the initial weights for it."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is then evaluated and exported instead of the
    weights; 0 for no average."""
    ema_every: int = 1
    """Optimizer steps between two moves of the average; Flow-GRPO's code has 8."""
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    """When the run ends before its last iteration."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps per iteration."""
        return self.epochs * self.updates


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluations on held-out prompts before, during and after training.

    They use the deterministic sampler and the same noise every time.
    """

    every: int = 50
    """Iterations between evaluations; 0 evaluates only before and after."""
    images: int = 240
    """Images of the evaluations before and after training, spread evenly over the classes of
    ``prompts.balance`` and over the held-out prompts of each class. Below 200 the standard errors are
    too large to compare models."""
    images_during: int = 0
    """Images of the evaluations during training; 0 for as many as ``images``."""
    metrics: tuple[str, ...] = ()
    """Import paths of metrics that need all images of a prompt, such as a diversity."""
    artefacts: bool = True
    """Measure high frequencies, periodic grids, saturation, contrast, and how alike images are, and compare
    them with the model before training, to recognise reward hacking."""
    bench: tuple[Bench, ...] = ()
    """Benchmarks that are run at evaluations, as tables ``[[evaluation.bench]]``."""
    best: str = "reward"
    """The number whose best value so far decides which weights are kept as ``checkpoints/best``: the
    held-out ``reward``; a reward's or a metric's name; ``artefacts/MEASURE``; or a benchmark's label, for
    its first main result, or ``LABEL/RESULT``. The highest value is the best, with ``min:`` before the
    name the lowest. A benchmark must be run at every evaluation."""
    keep_best: tuple[str, ...] = ()
    """Further numbers whose best weights are kept, each as ``checkpoints/best-NAME``."""
    num_steps: int | None = None
    """Denoising steps; if unset, as in ``sampling``."""
    guidance_scale: float | None = None
    """Guidance scale; if unset, as in ``sampling``."""
    regimes: tuple[Regime, ...] = ()
    """Further ways to sample, as tables ``[[evaluation.regimes]]``. Users often deploy with more steps and
    with guidance; these evaluations show whether the model is better there, too."""
    base_after: float | None = None
    """Where the sampler changes from the trained model to the model before training: a share of the steps
    if below 1, else a number of steps. If unset, the trained model takes all steps."""
    grid_prompts: int = 6
    """Prompts on the comparison grid."""
    grid_samples: int = 4
    """Images per prompt and model on the grid."""
    inspected_prompts: int = 1
    """Training prompts for which the report shows the advantage of every denoising step; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run directory, the seed, the device, checkpoints and trackers."""

    folder: str
    """The run directory. The same command with the same folder resumes the run."""
    seed: int = 0
    """Seed of all random draws."""
    device: str = "auto"
    """Device such as ``cpu`` or ``cuda:1``; ``auto`` uses a GPU if there is one."""
    threads: int = 0
    """CPU threads of torch; 0 for one per core."""
    checkpoint_every: int = 25
    """Iterations between checkpoints. The last iteration always writes one."""
    checkpoint_minutes: float = 0.0
    """Minutes after which the next iteration writes a checkpoint, in addition to ``checkpoint_every``;
    0 for none."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
    rank_timeout_minutes: float = 60.0
    """With several processes: minutes that one waits for the others before it ends with status 75. It must
    be longer than anything that only the first process does, such as drawing a grid and the export."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Experiment trackers of accelerate: tensorboard, wandb, trackio, mlflow, comet_ml, aim, clearml, swanlab,
    dvclive. They get the run's name, its configuration and, where they show pictures, the grids."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    model: Model
    """The pipeline, its precision, and which of its weights are trained."""
    sampling: Sampling = field(default_factory=Sampling)
    """Arguments of the pipeline's call in rollouts."""
    memory: Memory = field(default_factory=Memory)
    """Settings that save memory at the cost of time."""
    parallel: Parallel = field(default_factory=Parallel)
    """How the processes of a run divide the model."""
    algorithm: (
        FlowGRPO | DanceGRPO | MixGRPO | PrefGRPO | DiffusionNFT | Matching
        | NeighborGRPO | TempFlowGRPO | G2RPO | TPGRPO | VGPO | BranchGRPO | FIND | Distillation | DRaFT | ReFL
        | SelfOPD | SRPO | Pictures | Pairs | DMD | RTDMD | Algorithm
    )  # fmt: skip
    """What is sampled, and which candidates give each action its advantage; ``kind`` may be the import
    path of an algorithm of your own."""
    loss: (
        ClippedLoss | NFTLoss | MatchingLoss | DGPOLoss | CRDLoss | DistillationLoss | SupervisedLoss
        | DPOLoss | NeighborLoss | SelfOPDLoss | RewardGradientLoss | DMDLoss | Loss
    ) = field(default_factory=ClippedLoss)  # fmt: skip
    """The objective of an update; ``kind`` may be the import path of a loss of your own."""
    rewards: tuple[Reward, ...] = ()
    """The reward models; training maximises the weighted sum of their scores. Algorithms that train on no
    reward need none, and only measure those that there are."""
    guard: Guard = field(default_factory=Guard)
    """Guards against reward hacking."""
    failures: Failures = field(default_factory=Failures)
    """Retries of a reward that fails, and what happens to the sample afterwards."""
    prompts: Prompts
    """Files of training prompts and of held-out prompts."""
    train: Train
    """Length of the run, batch geometry and optimizer."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """Evaluations on held-out prompts."""
    run: Run
    """The run directory, the seed, the device, checkpoints and trackers."""

    def check(self, num_processes: int = 1) -> None:
        """Find contradictions between settings before any model is loaded.

        Each check is in the module of its subject; together they are in the order in which a user is told.

        Raises:
            ConfigError: With the keys, their values and what is allowed.
        """
        check_interfaces(self)
        check_bounds(self)
        self.prompts.check()
        if self.train.ema_decay >= 1:
            raise ConfigError(f"train.ema_decay must be below 1, got {self.train.ema_decay}")
        betas = self.train.betas
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ConfigError(f"train.betas must be two numbers in [0, 1), got {list(betas)}")
        check_grid(self)
        algorithm = self.algorithm
        check_distillation(self)
        alone, binary = algorithm.needs_rewards, algorithm.needs_binary_rewards
        check_rewards(self.rewards, self.train.iterations, alone=alone, binary=binary)
        try:
            algorithm.check(self.sampling.num_steps)
            algorithm.check_rewards([r.label for r in self.rewards])
        except ValueError as error:
            raise ConfigError(f"algorithm: {error}") from error
        shares = self.parallel.shares(num_processes)
        check_split(self, shares, self.parallel.workers(shares))
        try:
            weights, dtype = self.model.weights, self.model.dtype
            self.memory.check(isinstance(weights, Full), dtype)
            optimizer = self.train.optimizer
            self.parallel.check(num_processes, weights, self.memory, dtype, optimizer)
            self.loss.check()
            check_loss(self)
            self.guard.check({r.label: r.weight for r in self.rewards}, self.loss.kl_coef)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        check_previews(algorithm, self.sampling)
        check_advantage(self)
        if self.loss.needs.average and not self.train.ema_decay:
            raise ConfigError(
                f"the loss {type(self.loss).__name__} needs a moving average of the weights; set "
                "train.ema_decay above 0"
            )
        check_reward_gradients(self)
        check_distribution_matching(self)
        check_examples(self)
        check_updates(self)
        check_staleness(self)
        check_replay(self, shares)
        check_steps(self)
        check_kinds(self)
        check_benchmarks(self.evaluation.bench)
        check_regimes(self.evaluation.regimes, self.evaluation_sampling())
        check_best(self)

    def steps_by_density(self) -> list[int]:
        """The steps that are trained in any iteration by the plain ratio of their densities.

        GRPO-Guard's ratio, TempFlow-GRPO's weights, densities without their variance and the
        likelihood-free objective already give the gradients of all steps the same scale, so with them
        the list is empty.
        """
        algorithm, loss = self.algorithm, self.loss
        if (
            algorithm.scales_steps
            or not loss.needs.balanced_steps
            or getattr(algorithm.transition, "log_prob", "") == "unnormalised"
        ):
            return []
        return steps_of_any_iteration(self, algorithm)

    def evaluation_sampling(self) -> Sampling:
        """Arguments of the pipeline's call in evaluations."""
        changed: dict[str, Any] = {
            "num_steps": self.evaluation.num_steps,
            "guidance_scale": self.evaluation.guidance_scale,
            "base_after": self.evaluation.base_after,
        }
        return replace(self.sampling, **{k: v for k, v in changed.items() if v is not None})
