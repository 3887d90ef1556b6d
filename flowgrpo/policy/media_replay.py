"""Replays the end of a rollout to decoded media, with gradients through the steps and the decoder.

The pipeline makes its own call, as in a replay of one step (:meth:`PipelinePolicy.replay`), and decodes.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowgrpo.core.transitions import ODE, Transition
from flowgrpo.data.prompts import Prompt
from flowgrpo.policy.call import UnsupportedPipelineError
from flowgrpo.policy.loading import autoencoders
from flowgrpo.policy.pipeline import PipelinePolicy
from flowgrpo.policy.placement import is_quantized
from flowgrpo.policy.step_plan import StepPlan, StepRecord


def replay_to_media(
    policy: PipelinePolicy,
    prompts: Sequence[Prompt],
    x: Float[Tensor, "batch *latent"],
    nodes: Sequence[int],
    transition: Transition | None = None,
) -> tuple[StepRecord, Float[Tensor, "batch *frames channels height width"]]:
    """Step from states to the data with gradients, and decode the data with gradients.

    Args:
        policy: The policy.
        prompts: One per state; all can share a call (:func:`flowgrpo.policy.arguments.call_key`).
        x: The states at ``nodes[0]``.
        nodes: Nodes of the grid, ascending, to the data; at least two.
        transition: How the first step is taken; its mean is the next state. None for the ODE, which
            all other steps follow.

    Returns:
        The record of the first step, and media in [0, 1] on the policy's device. Values outside of
        [0, 1] are clamped by the pipeline, and have no gradient.

    Raises:
        UnsupportedPipelineError: If the media have no gradient.
    """
    step = nodes[0]
    plan = StepPlan(
        nodes=list(nodes),
        stochastic=() if transition is None else {step},
        transition=transition or ODE(),
        record={step},
    )
    # Compiled blocks are made for one size of a batch.
    number, extra = len(prompts), policy._extra(len(prompts), policy.replay_batch)
    whole = [*prompts, *[prompts[-1]] * extra]
    if extra:
        x = torch.cat([x, x[-1:].expand(extra, *x.shape[1:])])
    called = policy._run(whole, plan, x, True, policy.sampling)
    policy.num_decodes += number
    media = called.output.float()[:number]
    if not media.requires_grad:
        raise UnsupportedPipelineError(
            f"{type(policy.pipeline).__name__} gives no gradient from step {step} of "
            f"{policy.num_steps()} to its media: the denoiser of these steps is not trained, or the decoder "
            "cuts the gradient; rewards cannot be differentiated through it, but any other loss can train it"
        )
    record = called.records[0]
    return record.first(number, {}) if extra else record, media


def check_differentiable(policy: PipelinePolicy) -> None:
    """Refuse a policy whose decoder cannot be differentiated as it is placed.

    Raises:
        UnsupportedPipelineError: If a VAE is quantised, or parameters are divided among processes.
    """
    if any(is_quantized(vae) for vae in autoencoders(policy.pipeline)):
        raise UnsupportedPipelineError(
            "loss.kind = 'reward_gradient' differentiates the VAE, and this one is quantised, whose kernels have no "
            "backward pass; load a VAE that is not, or use another loss"
        )
    if policy.in_lockstep:
        raise UnsupportedPipelineError(
            "loss.kind = 'reward_gradient' is not possible with parallel.shard = 'denoiser'; set it to 'none'"
        )


def probe_media_gradient(
    policy: PipelinePolicy, prompt: Prompt, x: Float[Tensor, "1 *latent"]
) -> Float[Tensor, "1 *frames channels height width"]:
    """Media of the last step from a state, with gradients, as a check before training starts.

    Args:
        policy: The policy.
        prompt: A prompt.
        x: A state at the last node before the data.

    Raises:
        UnsupportedPipelineError: If the pipeline fails with gradients, or its media have none.
    """
    end = policy.num_steps()
    try:
        with torch.enable_grad():
            return replay_to_media(policy, [prompt], x, [end - 1, end])[1]
    except (UnsupportedPipelineError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise UnsupportedPipelineError(
            f"{type(policy.pipeline).__name__} cannot be differentiated from its last step to its media: {error}"
        ) from error
