"""Equal calls of the denoiser on all processes, for models whose parameters are sharded.

A sharded denoiser gathers its parameters from all processes inside its forward and backward pass. So
every process must make the same number of passes, with the same weights, with or without gradients, in
the same order; otherwise they wait for each other forever. The work of processes differs: a process may
have no group to refill, nothing to train on, or fewer pictures to make.

Code whose calls may differ runs in a section (:meth:`Lockstep.together`). Before each call of the
pipeline in a section, the processes exchange the kinds of their next calls. Those whose next call is of
the chosen kind make it. The others join: they make a call of the same kind with one sample of the process
that was chosen, and discard the result. At the end of a section each process joins until all have
finished. Algorithms need not know of this.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowgrpo.data.prompts import Prompt
from flowgrpo.policy.settings import Sampling
from flowgrpo.policy.step_plan import StepPlan, StepRecord

Weights = Callable[[], AbstractContextManager[None]]
"""Enters a context inside which the policy has other weights."""
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Call:
    """A call of the pipeline, as the processes exchange it.

    Attributes:
        prompts: The prompts, which can share a call.
        plan: The step plan.
        x: The first states; None for the pipeline's initial latents.
        sampling: Arguments of the pipeline's call.
        gradient: Whether the call records gradients.
        weights: The name of the weights in :attr:`Lockstep.weights`; empty for those of the section.
    """

    prompts: Sequence[Prompt]
    plan: StepPlan
    x: Tensor | None
    sampling: Sampling
    gradient: bool
    weights: str

    @property
    def nodes(self) -> list[int]:
        """The grid nodes of the plan."""
        nodes = self.plan.nodes
        return list(range(self.sampling.num_steps + 1) if nodes is None else nodes)

    def kind(self) -> int:
        """A number that is equal for calls with equal passes of the denoiser.

        Calls with equally many steps may differ in their passes: a negative prompt adds a pass in some
        pipelines, guidance may end at a step, and a pipeline may have two denoisers, one for early and
        one for late steps. So all of these are part of the kind.
        """
        prompt = self.prompts[0]
        arguments = {
            k: v if isinstance(v, PLAIN) else type(v).__name__
            for k, v in self.sampling.arguments().items()
        }
        own = (prompt.negative is None, len(prompt.images), sorted(prompt.call))
        return _number((self.weights, self.gradient, self.nodes, sorted(arguments.items()), own))

    def of_one_sample(self) -> "Call":
        """The call with its first sample only, on the CPU."""
        noise = self.plan.noise
        return replace(
            self,
            prompts=self.prompts[:1],
            plan=replace(self.plan, noise=noise[:1] if noise else noise),
            x=None if self.x is None else self.x[:1].detach().cpu(),
        )


_BACKWARD = 1
"""The kind of a backward pass. It belongs to the last call with gradients."""


class Lockstep:
    """Makes the calls of all processes equal within sections.

    Attributes:
        weights: Contexts by the names that :meth:`using` takes.
        timeout: How long a process waits for the others.
    """

    def __init__(self, perform: Callable[[Call], Sequence[StepRecord]]):
        """Create it for a policy.

        Args:
            perform: Runs a call of the pipeline and returns the recorded steps, without counting it
                among the policy's work.
        """
        self._perform = perform
        self.weights: dict[str, Weights] = {}
        self.timeout = timedelta(minutes=30)
        self.in_section = False
        self._name = ""
        self._is_open = False
        # The output of the last call with gradients, made or joined, before its backward pass.
        self._output: Tensor | None = None
        self._group: Any = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """A section, which all processes enter and leave. A section inside another has no effect.

        No other collective operation may run in a section.
        """
        if self.in_section:
            yield
            return
        self.in_section = True
        try:
            yield
            while (turn := self._next(None)) is not None:
                self._join(turn.call)
        finally:
            self.in_section = self._is_open = False
            self._output = None

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """The weights of this name, for calls of this process and of those that join them."""
        before, self._name = self._name, name
        try:
            with self.weights[name]():
                yield
        finally:
            self._name = before

    def describe(
        self, prompts: Sequence[Prompt], plan: StepPlan, x: Tensor | None, sampling: Sampling
    ) -> Call:
        """A call with the present weights."""
        return Call(prompts, plan, x, sampling, torch.is_grad_enabled(), self._name)

    def wait(self, call: Call) -> None:
        """Wait until it is this process's turn to make a call, and join calls of others before it."""
        while (turn := self._next(call)) is not None and not turn.is_own:
            self._join(turn.call)
        # The call and all that follows it, to the backward pass, comes before other calls.
        self._is_open = self._is_open or call.gradient

    def made(self, call: Call, records: Sequence[StepRecord]) -> None:
        """Note that a call was made, and the steps that it recorded."""
        if call.gradient and records:
            output = records[-1].prediction.output
            self._output = output if output.requires_grad else None

    def backward(self, loss: Tensor, run: Callable[[Tensor], None]) -> None:
        """Backpropagate a loss, if it has a gradient.

        Args:
            loss: The loss of the last call with gradients.
            run: Backpropagates it.
        """
        # The loss need not depend on the denoiser: FIND trains the initial noise.
        if self._is_open and self._output is not None:
            while (turn := self._next(_BACKWARD)) is not None and not turn.is_own:
                self._join(turn.call)
            if not loss.requires_grad:
                self._backward_of_zeros()
        self._is_open, self._output = False, None
        if loss.requires_grad:
            run(loss)

    def _backward_of_zeros(self) -> None:
        """The backward pass of the last call, which changes nothing."""
        assert self._output is not None, "a backward pass without a call before it"
        self._output.backward(torch.zeros_like(self._output))
        self._output = None

    def _next(self, own: "Call | int | None") -> "_Turn | None":
        """The call that comes next, after all processes have said what theirs is.

        Calls that belong to a gradient in progress come first, then those that begin nearer to noise.

        Args:
            own: The next call of this process, ``_BACKWARD``, or None if it has finished the section.

        Returns:
            None if all have finished.
        """
        group = self.messages()
        rank, kind, node = dist.get_rank(), 0, 0
        if isinstance(own, Call):
            kind, node = own.kind(), own.nodes[0]
        elif own is not None:
            kind = own
        mine = torch.tensor([int(own is None), int(not self._is_open), node, kind])
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine, group=group)
        said = [tuple(row.tolist()) for row in rows]
        first = min(said)
        if first[0]:
            return None
        is_own = own is not None and kind == first[-1]
        if all(not s[0] and s[-1] == first[-1] for s in said):
            return _Turn(is_own, None)
        source = said.index(first)
        told: list[Any] = [None]
        if rank == source and isinstance(own, Call):
            told = [own.of_one_sample()]
        dist.broadcast_object_list(told, src=source, group=group)
        return _Turn(is_own, told[0])

    def _join(self, call: Call | None) -> None:
        """Make a call of another process with one sample, or the backward pass of the last one."""
        if call is None:
            self._backward_of_zeros()
            return
        assert self._name in ("", call.weights), "calls of two weights at the same time"
        enters = bool(call.weights) and call.weights != self._name
        with (
            torch.set_grad_enabled(call.gradient),
            self.using(call.weights) if enters else nullcontext(),
        ):
            self.made(call, self._perform(call))

    def messages(self) -> Any:
        """The processes, connected for messages on the CPU, which do not wait for the accelerator."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        return self._group


@dataclass(frozen=True)
class _Turn:
    """The call that comes next.

    Attributes:
        is_own: Whether this process's next call is of the same kind.
        call: The call with one sample, for processes that join; None for a backward pass.
    """

    is_own: bool
    call: Call | None


def _number(value: Any) -> int:
    """A positive number above 1 that depends on the value's text only."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 1) | 2
