"""The scheduler that turns a diffusers pipeline into a policy.

It stands in for the pipeline's own scheduler. Before each call of the pipeline it is given an
``StepPlan``: which nodes of the sampling grid to visit, where to be stochastic, what to record.
The pipeline then runs its usual loop over ``timesteps`` and calls ``step``.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from flowgrpo.core.random import SampleNoise
from flowgrpo.core.solvers import SecondOrder
from flowgrpo.core.transitions import ODE, Predicted, Prediction, Step
from flowgrpo.policy.calling import UnsupportedPipelineError
from flowgrpo.policy.entering import Place, locate, place, shapes_of
from flowgrpo.policy.samplers import first_order, is_flow
from flowgrpo.policy.step_plan import StepPlan, StepRecord

PREDICTED: dict[str, Predicted] = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}
"""What diffusers calls what a model predicts."""
Grid = list[float] | np.ndarray | Tensor
"""What pipelines hand to ``set_timesteps``."""


class _Steps:
    """What both schedulers share: walking an itinerary over a grid."""

    timesteps: Tensor
    sigmas: Tensor
    plan: StepPlan
    _grid_timesteps: Tensor
    _walked: StepPlan | None = None
    _nodes: Sequence[int]
    _cursor: int
    taken: int = 0
    """Steps of the itinerary so far."""
    _whole: bool = False
    _state: Tensor | None = None
    _version: int = 0
    init_noise_sigma: float
    noise_scale: float = 1.0
    """What the pipeline multiplies its initial noise by (PRX in pixel space)."""
    counted: bool = False
    """Whether the pipeline's loop takes the steps with their index on the grid."""
    prepared_by: list[tuple[str, list[Any]]]
    """What the pipeline's methods prepared before its loop, in the order of their calls."""
    entered_at: Place | None = None
    """Where in what ``prepare_latents`` prepared the first state was."""
    auxiliary: Any = None
    """The copy of this scheduler with which the pipeline steps a second state."""
    _all_prepared: bool = False

    @property
    def initial_std(self) -> float:
        """Standard deviation of the noise that a loop begins with."""
        return float(self.init_noise_sigma) * self.noise_scale

    def begin(self, plan: StepPlan) -> None:
        """Go where the itinerary says in the next call of the pipeline."""
        self.plan, self._walked = plan, None
        self.prepared_by, self.entered_at, self.auxiliary = [], None, None
        self.taken, self._state = 0, None

    @property
    def prepared(self) -> list[Any]:
        """What the first call of ``prepare_latents`` prepared; for a copy, what all methods did."""
        if self._all_prepared:
            return [part for _, parts in self.prepared_by for part in parts]
        return next((parts for name, parts in self.prepared_by if name == "prepare_latents"), [])

    @property
    def arrived(self) -> Tensor | None:
        """The last state, once the itinerary has been walked."""
        there = self._walked is self.plan and self.taken == len(self._nodes) - 1
        return self._state if there else None

    def check_walk(self, name: str) -> torch.Size | None:
        """Check that the pipeline's loop that just ended was the itinerary.

        Args:
            name: Of the pipeline, for the message.

        Returns:
            The shape of its states, if none of the tensors that it prepared holds one as it is.

        Raises:
            UnsupportedPipelineError: If it took other steps.
        """
        if self._walked is not self.plan:
            raise UnsupportedPipelineError(
                f"{name} cannot be a policy: its call does not use its scheduler's timesteps"
            )
        due = len(self._nodes) - 1
        if self.taken != due:
            raise UnsupportedPipelineError(
                f"{name} cannot be a policy: it took {self.taken} of {due} denoising steps, because "
                "an argument such as strength cuts its schedule or because it samples in its own way"
            )
        shapes = shapes_of(self.prepared)
        if self._state is None or not shapes or self.entered_at is not None:
            return None
        return None if place(self._state.shape, shapes) else self._state.shape

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """One copy, for a state beside the latents (a video's sound), which goes the same way."""
        if self.auxiliary is not None:
            raise UnsupportedPipelineError(
                "the pipeline cannot be a policy: it steps several states at once, each with a copy of "
                "the scheduler (frames at different noise)"
            )
        noise = self.plan.noise
        self.auxiliary = other = copy.copy(self)
        other.plan = replace(
            self.plan,
            noise=SampleNoise([s.at("beside") for s in noise.streams]) if noise else noise,
            records=[],
        )
        other._walked, other._all_prepared, other.auxiliary = None, True, self
        other.taken, other._state, other.entered_at = 0, None, None
        return other

    def _restrict(self) -> None:
        """Keep only the itinerary's nodes of the grid that was just set."""
        if self._walked is not self.plan:
            self.taken, self._state = 0, None
        self._grid_timesteps, self._walked, self._cursor = self.timesteps, self.plan, 0
        self._solver = SecondOrder() if self.plan.solver == "dpm_2m" else None
        nodes = self.plan.nodes
        self._nodes = list(range(len(self.timesteps) + 1)) if nodes is None else list(nodes)
        if self._nodes != sorted(set(self._nodes)) or not 0 <= self._nodes[0] <= self._nodes[
            -1
        ] <= len(self.timesteps):
            raise ValueError(
                f"nodes {self._nodes} are not an ascending part of 0 to {len(self.timesteps)}"
            )
        self._whole = self.counted
        if not self._whole:
            self.timesteps = self.timesteps[self._nodes[:-1]]

    def ahead(self) -> list[tuple[int, int]]:
        """The steps of the itinerary: the index of each on the grid, and in ``timesteps``."""
        nodes = self._nodes[:-1]
        return [(node, node if self._whole else i) for i, node in enumerate(nodes)]

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **unknown: Any,
    ) -> tuple[Tensor] | SchedulerOutput:
        """Move one node on; arithmetic and result are fp32 whatever the model's precision.

        ``generator`` is for pipelines that always pass one; noise comes from the itinerary.

        Raises:
            UnsupportedPipelineError: If what the pipeline does is no walk along the grid.
        """
        self._check_step(sample, [k for k, v in unknown.items() if v is not None])
        plan, node, next_node = (
            self.plan,
            self._nodes[self._cursor],
            self._nodes[self._cursor + 1],
        )
        if self.taken == 0:
            self.entered_at = locate(sample, self.prepared)
        self._cursor, self.taken = self._cursor + 1, self.taken + 1
        interval = self.interval(node, next_node)
        x = self._unrounded(sample)
        prediction = self._predict(model_output.float(), x, node, interval)
        stochastic = node in plan.stochastic
        take = plan.transition if stochastic else self._deterministic(node)
        gaussian = take(x, prediction, interval)
        x_next = gaussian.mean
        if plan.hold:
            x_next = x
        elif stochastic and plan.noise is not None:
            x_next = gaussian.sample(plan.noise.at_step(node, x.shape[1:]).to(x.device))
        self._state, self._version = x_next, x_next._version
        if node in plan.record:
            # Some loops write the next state over this one.
            x = x.clone() if x.data_ptr() == sample.data_ptr() else x
            plan.records.append(StepRecord(node, interval, x, x_next, prediction, gaussian))
        return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    def _check_step(self, sample: Tensor, unknown: Sequence[str]) -> None:
        """Refuse a step that is not the itinerary's next one, from where the last one ended."""
        if unknown:
            raise UnsupportedPipelineError(
                f"the pipeline cannot be a policy: it steps with {', '.join(unknown)}, so that parts of "
                "its state are at different noise"
            )
        if self.taken >= len(self._nodes) - 1:
            raise UnsupportedPipelineError(
                "the pipeline cannot be a policy: one call denoises several times (segments of a long "
                "video, or stages)"
            )
        noise = self.plan.noise
        if noise and len(noise) != len(sample):
            raise UnsupportedPipelineError(
                f"the pipeline cannot be a policy: it steps {len(sample)} states for {len(noise)} prompts "
                "(the frames of a video one by one)"
            )
        state = self._state
        if self.taken == 0 or state is None:
            return
        # Most loops hand back the very tensor that they got, and no accelerator waits for this.
        kept = state._version == self._version
        if not kept or (
            sample is not state
            and (state.shape != sample.shape or not torch.equal(state.to(sample.dtype), sample))
        ):
            raise UnsupportedPipelineError(
                "the pipeline cannot be a policy: between two steps it changes its state, which no "
                "log-probability accounts for (inpainting does, where the denoiser takes no mask)"
            )

    def _deterministic(self, node: int) -> ODE | SecondOrder:
        after_all = node > max(self.plan.stochastic, default=-1)
        return self._solver if self._solver is not None and after_all else ODE()

    def _unrounded(self, sample: Tensor) -> Tensor:
        """The loop's state in fp32, also where the pipeline rounded what it got (CogVideoX)."""
        return sample.float() if self.taken == 0 or self._state is None else self._state

    def interval(self, node: int, next_node: int) -> Step:
        """The weights of data and noise between two nodes of the current grid."""
        raise NotImplementedError

    def _predict(self, output: Tensor, x: Tensor, node: int, interval: Step) -> Prediction:
        raise NotImplementedError

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Ignored: the itinerary says where to begin."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The identity."""
        return sample


class FlowPolicyScheduler(_Steps, FlowMatchEulerDiscreteScheduler):
    """For rectified-flow models.

    Attributes:
        source: What the grid is taken from, where that is not flow-matching Euler.
    """

    source: SchedulerMixin | None = None
    init_noise_sigma = 1.0
    """Initial latents are standard normal; some pipelines ask."""

    # Pipelines inspect these names to see which arguments a scheduler takes.
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Grid | None = None,
        mu: float | None = None,
        timesteps: Grid | None = None,
    ) -> None:
        """The grid as diffusers makes it, restricted to the itinerary's nodes."""
        if mu is not None and not self.config.use_dynamic_shifting:
            mu = None
        if self.source is None:
            super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        else:
            given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
            given = {k: v for k, v in given.items() if v is not None}
            self.source.set_timesteps(num_inference_steps, device=device, **given)
            self.timesteps, self.sigmas = self.source.timesteps, self.source.sigmas
            self.num_inference_steps = len(self.timesteps)
        # On the CPU, so that no step waits for the accelerator.
        self._grid_sigmas = [float(s) for s in self.sigmas.cpu()]
        if max(self._grid_sigmas) > 1.001:
            raise UnsupportedPipelineError(
                "the pipeline cannot be a policy: its noise grows to "
                f"{max(self._grid_sigmas):g} (Cosmos 2), and that of a rectified flow from 0 to 1"
            )
        if self.config.invert_sigmas:
            self._grid_sigmas = [1 - s for s in self._grid_sigmas]
        self._restrict()
        if not self._whole:
            self.sigmas = self.sigmas[self._nodes]

    def interval(self, node: int, next_node: int) -> Step:
        sigmas = self._grid_sigmas
        return Step.flow(sigmas[node], sigmas[next_node], sigmas[1], self.noise_scale)

    def _predict(self, output: Tensor, x: Tensor, node: int, interval: Step) -> Prediction:
        # Inverted grids (Mochi) run from 0 to 1, and so their models predict x0 - x1.
        velocity = -output if self.config.invert_sigmas else output
        return Prediction.from_output(x, velocity, interval)


class DiffusionPolicyScheduler(_Steps, DDIMScheduler):
    """For models that predict noise, v or data on a diffusion path.

    Its states have DDIM's size. Where the shipped sampler's grow with the noise (Euler), they are
    these, divided by what a model's input is divided by there.

    Attributes:
        source: What the grid is taken from.
    """

    source: SchedulerMixin

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """The grid as diffusers makes it, restricted to the itinerary's nodes."""
        source = self.source
        source.set_timesteps(num_inference_steps, device=device)
        self.timesteps, self.num_inference_steps = source.timesteps, source.num_inference_steps
        if isinstance(source, DDIMScheduler):
            grid = [int(t) for t in self.timesteps.cpu()]
            # DDIM lands by its own rule, which on some grids is not the next timestep.
            stride = self.config.num_train_timesteps // num_inference_steps
            self._landings = [self._alpha_bar(t - stride) for t in grid]
            self._alpha_bars = [self._alpha_bar(t) for t in (*grid, -1)]
        else:
            self._alpha_bars = [1 / (1 + float(s) ** 2) for s in source.sigmas.cpu()]
            self._landings = self._alpha_bars[1:]
        if self._alpha_bars[0] == 0 and self.config.prediction_type == "epsilon":
            raise UnsupportedPipelineError(
                "the pipeline cannot be a policy: its model predicts noise, and its grid begins where "
                "there is nothing else (rescale_betas_zero_snr), which takes a v-prediction"
            )
        if isinstance(source, EulerDiscreteScheduler):
            self.init_noise_sigma = float(source.init_noise_sigma) * self._alpha_bars[0] ** 0.5
        self._restrict()
        if hasattr(source, "sigmas"):
            self.sigmas = source.sigmas if self._whole else source.sigmas[self._nodes]

    def interval(self, node: int, next_node: int) -> Step:
        landing = self._landings[node] if next_node == node + 1 else self._alpha_bars[next_node]
        return Step.diffusion(
            self._alpha_bars[node], landing, PREDICTED[self.config.prediction_type]
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Data as noisy as states are at timesteps of the grid."""
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


PolicyScheduler = FlowPolicyScheduler | DiffusionPolicyScheduler


def policy_scheduler(shipped: SchedulerMixin) -> PolicyScheduler:
    """Our scheduler for a pipeline that was shipped with another one.

    Raises:
        ValueError: If the shipped scheduler belongs to a sampler whose steps are no transitions.
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
