"""The schedulers that turn a diffusers pipeline into a policy.

A policy scheduler replaces the pipeline's own. Before each call of the pipeline it receives a
:class:`~flowgrpo.policy.step_plan.StepPlan`: the grid nodes to pass through, the stochastic steps, the
steps to record. The pipeline runs its usual loop over ``scheduler.timesteps`` and calls
``scheduler.step`` with the model's output; the step is taken here.

A state lies on a path between data ``x0`` and Gaussian noise ``x1``::

    x = signal * x0 + noise * x1

On a rectified-flow path ``signal = 1 - sigma`` and ``noise = sigma``, and the model predicts the
velocity ``x1 - x0``. On a diffusion path ``signal = sqrt(alpha_bar)`` and
``noise = sqrt(1 - alpha_bar)``, and the model predicts the noise ``x1``, the data ``x0`` or
``v = signal * x1 - noise * x0``. A step from ``x`` to ``x_next`` draws from a Gaussian whose mean and
standard deviation come from the predicted ``x0`` and ``x1`` (:mod:`flowgrpo.core.transitions`).

The grid of a policy scheduler comes from diffusers' first-order counterpart of the shipped scheduler
(:func:`first_order`), so a pipeline is sampled at the noise levels for which it was shipped, and without
noise the policy's steps equal the counterpart's. Only the order of the solver is reduced to one, because
a step of higher order depends on more than the current state.
"""

import copy
import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from flowgrpo.core.transitions import Gaussian, Predicted, Prediction, Step, Transition
from flowgrpo.policy.call import (
    Loop,
    PipelineCall,
    UnsupportedPipelineError,
    place_by_value,
)
from flowgrpo.policy.step_plan import StepPlan, StepRecord

PREDICTED: dict[str, Predicted] = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}
"""Our names for diffusers' prediction types."""
Grid = list[float] | list[int] | np.ndarray | Tensor
"""Types of the grids that pipelines pass to ``set_timesteps``."""


class _PlannedSteps:
    """Takes the steps of a plan on a grid; the part that both schedulers share.

    The scheduler itself holds the sampling grid only. The progress of a call is in :attr:`loop`.

    Attributes:
        call: The current call of the pipeline.
        loop: The steps of this scheduler in the call.
        noise_scale: Factor of the pipeline's initial noise (PRX in pixel space).
    """

    timesteps: Tensor
    sigmas: Tensor
    call: PipelineCall
    loop: Loop
    init_noise_sigma: float
    noise_scale: float = 1.0
    _grid_timesteps: Tensor
    """The timesteps of the whole grid; ``timesteps`` may be restricted to the plan."""

    @property
    def initial_std(self) -> float:
        """Standard deviation of the noise with which a loop begins."""
        return float(self.init_noise_sigma) * self.noise_scale

    def begin(self, plan: StepPlan, whole_grid: bool = False) -> PipelineCall:
        """Follow a plan in the next call of the pipeline.

        Args:
            plan: The steps to take.
            whole_grid: Whether ``timesteps`` keeps the whole grid (:mod:`flowgrpo.policy.step_counter`).
        """
        self.call = PipelineCall(plan, whole_grid)
        self.loop = self.call.main
        return self.call

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the scheduler for auxiliary latents, which follow the same plan.

        A pipeline that steps two states, such as LTX-2's video and audio, copies its scheduler in its
        call, and steps one state with each.

        Raises:
            UnsupportedPipelineError: If it copies the scheduler a second time.
        """
        if self.loop is not self.call.main or self.call.auxiliary is not None:
            raise UnsupportedPipelineError(
                "the pipeline cannot be a policy: it steps several states at once, each with a copy of "
                "the scheduler (frames at different noise levels)"
            )
        other = copy.copy(self)
        other.loop = self.call.add_auxiliary()
        return other

    def _restrict(self) -> None:
        """Start the loop on the grid that was just set, and keep only the plan's timesteps.

        A loop that enumerates the whole grid (``whole_grid``) gets all timesteps, and its ``enumerate``
        skips those that are not in the plan.
        """
        self._grid_timesteps = self.timesteps
        self.loop.start(len(self.timesteps))
        if not self.call.whole_grid:
            self.timesteps = self.timesteps[self.loop.nodes[:-1]]

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **unknown: Any,
    ) -> tuple[Tensor] | SchedulerOutput:
        """Take the plan's next step.

        The arithmetic and the returned state are fp32 whatever the model's precision, so that no
        rounding comes between a draw and its log-probability.

        Args:
            model_output: The model's prediction ``(B, *latent)`` after guidance.
            timestep: Ignored; the plan gives the position on the grid.
            sample: The state ``x`` before the step, ``(B, *latent)``.
            generator: Ignored; the noise comes from the plan's random streams.
            return_dict: Whether to return a ``SchedulerOutput`` in place of a tuple.
            unknown: Arguments of other samplers; refused unless None.

        Returns:
            The state ``x_next`` after the step, ``(B, *latent)``.

        Raises:
            UnsupportedPipelineError: If the step does not continue from the previous one.
        """
        loop = self.loop
        loop.check_next(sample, [k for k, v in unknown.items() if v is not None])
        plan, (node, next_node) = loop.plan, loop.nodes[loop.taken : loop.taken + 2]
        interval = self.interval(node, next_node)
        if loop.taken == 0:
            loop.start_place = place_by_value(sample, self.call.prepared_for(loop))
        x = loop.current(sample)
        prediction = self._predict(model_output.float(), x, node, interval)
        loop.observe(node, prediction, interval)
        gaussian = loop.transition(node)(x, prediction, interval)
        x_next = gaussian.mean
        if plan.hold:
            x_next = x
        elif node in plan.stochastic and plan.noise is not None:
            # x_next = mean + std * noise; the streams draw on the CPU, alike on every device.
            x_next = gaussian.sample(plan.noise.at_step(node, x.shape[1:]).to(x.device))
        loop.advance(x_next)
        if node in plan.record:
            # Some loops write the next state into the tensor that they began with.
            x = x.clone() if loop.taken == 1 and x.data_ptr() == sample.data_ptr() else x
            if node in plan.stochastic and not torch.is_grad_enabled():
                predict = partial(self._predict_again, model_output, x, node, interval)
                distribute = partial(_distribution, plan.transition, x, interval)
                loop.record(
                    StepRecord(node, interval, x, x_next, predict, distribute, model_output)
                )
            else:
                loop.record(StepRecord(node, interval, x, x_next, prediction, gaussian))
        return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    def interval(self, node: int, next_node: int) -> Step:
        """The signal and noise weights at two nodes of the current grid."""
        raise NotImplementedError

    def _predict(self, output: Tensor, x: Tensor, node: int, interval: Step) -> Prediction:
        """The predicted data ``x0`` and noise ``x1``, from the model's output at ``x``."""
        raise NotImplementedError

    def _predict_again(self, output: Tensor, x: Tensor, node: int, interval: Step) -> Prediction:
        return self._predict(output.float(), x, node, interval)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Do nothing: the plan says where the loop begins."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Return the sample: states have the scale that the model expects."""
        return sample


def _distribution(
    transition: Transition, x: Tensor, interval: Step, prediction: Prediction
) -> Gaussian:
    return transition(x, prediction, interval)


class FlowPolicyScheduler(_PlannedSteps, FlowMatchEulerDiscreteScheduler):
    """The scheduler of rectified-flow models: ``signal = 1 - sigma``, ``noise = sigma``.

    Attributes:
        source: The scheduler that makes the grid, if it is not flow-matching Euler (Wan's UniPC).
        fixed_shift: Shift of a grid that replaces the pipeline's own; None for the pipeline's.
    """

    source: SchedulerMixin | None = None
    fixed_shift: float | None = None
    init_noise_sigma = 1.0
    """Initial latents are standard normal. Some pipelines read this attribute."""
    _grid_sigmas: list[float]
    """``sigma`` at the nodes of the whole grid, from 1 (noise) to 0 (data)."""

    # Pipelines inspect the parameter names of this method to see which arguments it takes.
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Grid | None = None,
        mu: float | None = None,
        timesteps: Grid | None = None,
    ) -> None:
        """Set the grid as diffusers does, and restrict it to the plan's nodes.

        Raises:
            UnsupportedPipelineError: If the noise of the grid does not stay between 0 and 1.
        """
        if mu is not None and not self.config.use_dynamic_shifting:
            mu = None
        if self.fixed_shift is not None:
            grid = timesteps if sigmas is None else sigmas
            self._set_shifted(num_inference_steps if grid is None else len(grid), device)
        elif self.source is None:
            super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        else:
            given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
            _set_grid(self.source, num_inference_steps, device, given)
            self.timesteps, self.sigmas = self.source.timesteps, self.source.sigmas
            self.num_inference_steps = len(self.timesteps)
        # On the CPU, so that no step waits for the accelerator.
        self._grid_sigmas = [float(s) for s in self.sigmas.cpu()]
        if max(self._grid_sigmas) > 1.001:
            raise UnsupportedPipelineError(
                "the pipeline cannot be a policy: its noise level grows to "
                f"{max(self._grid_sigmas):g} (Cosmos 2), and that of a rectified flow stays between 0 and 1"
            )
        if self.config.invert_sigmas:
            self._grid_sigmas = [1 - s for s in self._grid_sigmas]
        self._restrict()
        if not self.call.whole_grid:
            # Pipelines may read sigmas[i] by the index of their loop.
            self.sigmas = self.sigmas[self.loop.nodes]

    def _set_shifted(self, num_steps: int | None, device: str | torch.device | None) -> None:
        """Set the grid ``shift u / (1 + (shift - 1) u)``, with ``u`` in equal steps from 1 to 0."""
        assert num_steps is not None
        assert self.fixed_shift is not None
        u = torch.linspace(1, 0, num_steps + 1)
        self.sigmas = (self.fixed_shift * u / (1 + (self.fixed_shift - 1) * u)).to(device)
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self.num_inference_steps = num_steps

    def interval(self, node: int, next_node: int) -> Step:
        sigmas = self._grid_sigmas
        return Step.flow(sigmas[node], sigmas[next_node], sigmas[1], self.noise_scale, node)

    def _predict(self, output: Tensor, x: Tensor, node: int, interval: Step) -> Prediction:
        # Inverted grids (Mochi) run from 0 to 1, so their models predict x0 - x1, not x1 - x0.
        velocity = -output if self.config.invert_sigmas else output
        return Prediction.from_output(x, velocity, interval)


class DiffusionPolicyScheduler(_PlannedSteps, DDIMScheduler):
    """The scheduler of diffusion models: ``signal = sqrt(alpha_bar)``, ``noise = sqrt(1 - alpha_bar)``.

    Its states have the scale of DDIM's, ``signal^2 + noise^2 = 1``. Euler schedulers hold states
    ``x0 + sigma * x1`` instead, and divide them by ``sqrt(1 + sigma^2)`` before the model sees them; the
    states here are those divided states, with ``alpha_bar = 1 / (1 + sigma^2)``.

    Attributes:
        source: The scheduler that makes the grid.
    """

    source: SchedulerMixin
    _alpha_bars: list[float]
    """``alpha_bar`` at the nodes of the whole grid."""
    _landings: list[float]
    """For each step of the grid, the ``alpha_bar`` at which it ends: that of the next node, except on
    some grids of DDIM."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Grid | None = None,
        sigmas: Grid | None = None,
    ) -> None:
        """Set the grid as the source does, and restrict it to the plan's nodes.

        DDIM of diffusers has no grids of one's own; here each of its steps then ends at the next timestep.

        Raises:
            UnsupportedPipelineError: If the source takes no such grid, or a model that predicts noise
                starts from pure noise, where the data cannot be computed from its prediction.
        """
        source = self.source
        is_ddim = isinstance(source, DDIMScheduler)
        if is_ddim and timesteps is not None:
            grid = [int(t) for t in timesteps]
            if max(grid) >= len(self.alphas_cumprod):
                raise UnsupportedPipelineError(
                    f"sampling.timesteps must be below {len(self.alphas_cumprod)}, got {max(grid)}"
                )
            self.timesteps = torch.tensor(grid, device=device)
            self._alpha_bars = [self._alpha_bar(t) for t in (*grid, -1)]
            self._landings = self._alpha_bars[1:]
        else:
            given = {"sigmas": sigmas, "timesteps": timesteps}
            _set_grid(source, num_inference_steps, device, given)
            self.timesteps = source.timesteps
            if is_ddim:
                assert num_inference_steps is not None
                grid = [int(t) for t in self.timesteps.cpu()]
                # DDIM steps from t to t - stride, which on some grids is not the next timestep.
                stride = self.config.num_train_timesteps // num_inference_steps
                if grid[0] >= len(self.alphas_cumprod):
                    raise ValueError(
                        f"sampling.num_steps = {len(grid)} gives the timestep {grid[0]}, and the scheduler has "
                        f"0 to {len(self.alphas_cumprod) - 1} (its steps_offset moves the grid up); set fewer steps"
                    )
                self._landings = [self._alpha_bar(t - stride) for t in grid]
                self._alpha_bars = [self._alpha_bar(t) for t in (*grid, -1)]
            else:
                self._alpha_bars = [1 / (1 + float(s) ** 2) for s in source.sigmas.cpu()]
                self._landings = self._alpha_bars[1:]
        self.num_inference_steps = len(self.timesteps)
        if self._alpha_bars[0] == 0 and self.config.prediction_type == "epsilon":
            raise UnsupportedPipelineError(
                "the pipeline cannot be a policy: its model predicts noise, and its grid begins at pure "
                "noise (rescale_betas_zero_snr), which requires a v-prediction"
            )
        if isinstance(source, EulerDiscreteScheduler):
            self.init_noise_sigma = float(source.init_noise_sigma) * self._alpha_bars[0] ** 0.5
        self._restrict()
        if hasattr(source, "sigmas"):
            whole = self.call.whole_grid
            self.sigmas = source.sigmas if whole else source.sigmas[self.loop.nodes]

    def interval(self, node: int, next_node: int) -> Step:
        landing = self._landings[node] if next_node == node + 1 else self._alpha_bars[next_node]
        return Step.diffusion(
            self._alpha_bars[node], landing, PREDICTED[self.config.prediction_type]
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add to data the noise that states have at timesteps of the grid.

        Returns:
            ``sqrt(alpha_bar) * original_samples + sqrt(1 - alpha_bar) * noise``.
        """
        nodes = (self._grid_timesteps[None].cpu() - timesteps.reshape(-1, 1).cpu()).abs().argmin(1)
        bars = torch.tensor(self._alpha_bars)[nodes].to(original_samples)
        bars = bars.reshape(-1, *(1,) * (original_samples.ndim - 1))
        return bars.sqrt() * original_samples + (1 - bars).sqrt() * noise

    def _alpha_bar(self, timestep: int) -> float:
        return float(self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod)

    def _predict(self, output: Tensor, x: Tensor, node: int, interval: Step) -> Prediction:
        prediction = Prediction.from_output(x, output, interval)
        if not self.config.clip_sample:
            return prediction
        bound = self.config.clip_sample_range
        return replace(prediction, x0=prediction.x0.clamp(-bound, bound))


def _set_grid(
    source: SchedulerMixin,
    num_steps: int | None,
    device: str | torch.device | None,
    given: dict[str, Any],
) -> None:
    """Set the grid of a scheduler of diffusers.

    Args:
        source: The scheduler.
        num_steps: Number of steps of its own grid.
        device: Device of its tensors.
        given: Further arguments by name; None for those that are not set.

    Raises:
        UnsupportedPipelineError: If the scheduler does not take one of them.
    """
    given = {k: v for k, v in given.items() if v is not None}
    known = inspect.signature(source.set_timesteps).parameters
    unknown = [k for k in given if k not in known]
    if unknown:
        takes = [f"sampling.{k}" for k in ("sigmas", "timesteps") if k in known]
        raise UnsupportedPipelineError(
            f"{type(source).__name__} takes no {unknown[0]}; use {' or '.join([*takes, 'its own grid'])}"
        )
    source.set_timesteps(num_steps, device=device, **given)


REFUSED = ("LCM", "TCD", "Consistency", "DiffusionForcing", "SCM")
"""Parts of the names of schedulers that predict the data and add fresh noise to it. Such a step does
not draw from a Gaussian around the current state."""
DDIM_INSTEAD = (
    ". A model that was distilled for it can be trained on DDIM: save the pipeline with "
    "DDIMScheduler.from_config(pipe.scheduler.config), and set sampling.timesteps to the timesteps of its sampler"
)
FIRST_ORDER = {
    "solver_order": 1,
    "algorithm_type": "dpmsolver++",
    "predict_x0": True,
    # UniPC corrects a state with the model's output at the next one.
    "disable_corrector": list(range(10000)),
    "thresholding": False,
}
"""Settings that reduce a multistep solver of diffusers to order one."""


def first_order(shipped: SchedulerMixin) -> SchedulerMixin:
    """The first-order deterministic scheduler of diffusers on the grid of a shipped scheduler.

    Multistep solvers (DPM-Solver++, UniPC, DEIS) keep their class at order one. Schedulers whose states
    grow with the noise (Euler, Heun, LMS) become Euler. Other diffusion schedulers become DDIM, and
    other rectified-flow schedulers become flow-matching Euler.

    Raises:
        UnsupportedPipelineError: If the steps of the shipped scheduler have no density, or its noise
            schedule is unknown.
    """
    name, config = type(shipped).__name__, dict(shipped.config)
    if any(word in name for word in REFUSED):
        raise UnsupportedPipelineError(
            f"a pipeline with {name} cannot be a policy: its sampler jumps to the data and adds fresh noise, so "
            "it has no deterministic counterpart for evaluations, and its steps are none of the transitions"
            + DDIM_INSTEAD
            * hasattr(shipped, "alphas_cumprod")
        )
    if isinstance(shipped, FlowMatchEulerDiscreteScheduler) or name.startswith("FlowMatch"):
        return FlowMatchEulerDiscreteScheduler.from_config({**config, "stochastic_sampling": False})
    if is_flow(shipped) and "solver_order" not in config:
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config["num_train_timesteps"],
            shift=config.get("flow_shift") or 1.0,
            use_dynamic_shifting=bool(config.get("use_dynamic_shifting", False)),
        )
    if not hasattr(shipped, "alphas_cumprod"):
        raise UnsupportedPipelineError(
            f"a pipeline with {name} cannot be a policy: only rectified-flow schedulers and diffusion "
            "schedulers with alphas_cumprod are supported"
        )
    if "solver_order" in config:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        changes = FIRST_ORDER | (flow if is_flow(shipped) else {})
        return type(shipped).from_config(
            {**config, **{k: v for k, v in changes.items() if k in config}}
        )
    if hasattr(shipped, "sigmas"):
        return EulerDiscreteScheduler.from_config(config)
    return _ddim(shipped, config)


def is_flow(shipped: SchedulerMixin) -> bool:
    """Whether a scheduler is made for rectified-flow models."""
    config = shipped.config
    return (
        type(shipped).__name__.startswith("FlowMatch")
        or isinstance(shipped, FlowMatchEulerDiscreteScheduler)
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def _ddim(shipped: SchedulerMixin, config: dict[str, Any]) -> DDIMScheduler:
    """DDIM with the noise schedule of the shipped scheduler.

    DDIM clips the predicted data by default. Latents must not be clipped, so clipping stays on only if
    the shipped scheduler has it on.
    """
    scheduler = DDIMScheduler.from_config(
        {**config, "clip_sample": bool(config.get("clip_sample", False)), "thresholding": False}
    )
    # CogVideoX rescales its alphas; the model was trained on the rescaled ones.
    scheduler.alphas_cumprod = shipped.alphas_cumprod.clone()
    if hasattr(shipped, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.as_tensor(shipped.final_alpha_cumprod).clone()
    return scheduler


PolicyScheduler = FlowPolicyScheduler | DiffusionPolicyScheduler


def policy_scheduler(shipped: SchedulerMixin) -> PolicyScheduler:
    """The policy scheduler for a pipeline that was shipped with the scheduler ``shipped``.

    Its grid is the shipped scheduler's grid (:func:`first_order`).

    Raises:
        UnsupportedPipelineError: If the steps of the shipped scheduler have no density.
    """
    source = first_order(shipped)
    scheduler: PolicyScheduler
    if isinstance(source, FlowMatchEulerDiscreteScheduler):
        scheduler = FlowPolicyScheduler.from_config(dict(source.config))
    elif is_flow(source):
        scheduler = FlowPolicyScheduler(
            num_train_timesteps=source.config.num_train_timesteps,
            shift=source.config.get("flow_shift") or 1.0,
            use_dynamic_shifting=bool(source.config.get("use_dynamic_shifting", False)),
        )
        scheduler.source = source
    else:
        clips = isinstance(source, DDIMScheduler) and source.config.clip_sample
        scheduler = DiffusionPolicyScheduler.from_config(
            {**source.config, "clip_sample": bool(clips), "thresholding": False}
        )
        scheduler.source, scheduler.alphas_cumprod = source, source.alphas_cumprod
        if isinstance(source, DDIMScheduler):
            scheduler.final_alpha_cumprod = source.final_alpha_cumprod
    scheduler.begin(StepPlan())
    return scheduler
