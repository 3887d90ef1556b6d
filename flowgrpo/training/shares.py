"""How the processes of a run share its work, and what they tell each other.

Without context parallelism each process has a share of its own. With ``parallel.context = N``, each N
consecutive processes have one share together: they do the same work on the same inputs, and differ in the
tokens that they compute inside the denoiser. Whatever is counted or collected over processes then comes from
the first process of each such group.
"""

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

Result = TypeVar("Result")


class Shares:
    """The place of this process among those of the run, and sums and lists over shares.

    Attributes:
        accelerator: The processes.
        context: Number of consecutive processes that have one share together.
        index: The share of this process.
        number: Number of shares.
        leads: Whether this process is the first one of its share.
    """

    def __init__(self, accelerator: Accelerator, context: int = 1):
        self.accelerator, self.context = accelerator, context
        rank = accelerator.process_index
        self.index, self.number = rank // context, accelerator.num_processes // context
        self.leads = rank % context == 0

    def gather(self, tensor: Tensor) -> Tensor:
        """The concatenation of a tensor of each share, on the CPU; all have equally many rows."""
        processes = self.accelerator.num_processes
        if processes == 1:
            return tensor.cpu()
        every: Tensor = self.accelerator.gather(tensor.to(self.accelerator.device)).cpu()
        if self.context == 1:
            return every
        rows = every.reshape(processes, len(every) // processes, *every.shape[1:])
        return rows[:: self.context].flatten(0, 1)

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The concatenation of a list of each share."""
        if self.accelerator.num_processes == 1:
            return values
        if self.context == 1:
            return list(gather_object(values))
        return [value for own in gather_object([values])[:: self.context] for value in own]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the shares."""
        own = tensor if self.leads else torch.zeros_like(tensor)
        total: Tensor = self.accelerator.reduce(own, "sum")
        return total


class Once:
    """Lets the first process of each share do what must be done once, and tells the others the result.

    Two calls of a judge may differ, and so may two looks at a file that another process writes. Works of one
    instance must be done in the same order in all processes of a share. It has connections of its own, on the
    CPU, so that another thread may use it.
    """

    def __init__(self, shares: Shares, timeout: timedelta):
        """Connect the processes of each share. All processes call this, in the same order.

        Args:
            shares: The shares.
            timeout: How long a process waits for the result.
        """
        self._shares, self._first = shares, 0
        self._group: Any = None
        size = shares.context
        for start in range(0, shares.number * size, size) if size > 1 else ():
            group = dist.new_group([*range(start, start + size)], timeout=timeout, backend="gloo")
            if start == shares.index * size:
                self._group, self._first = group, start

    def __call__(self, work: Callable[[], Result]) -> Result:
        """The result of the work; an error is raised in all processes of the share."""
        if self._group is None:
            return work()
        told: list[Any] = [None]
        if self._shares.leads:
            try:
                told = [(work(), None)]
            except BaseException as error:
                told = [(None, _sendable(error))]
                dist.broadcast_object_list(told, src=self._first, group=self._group)
                raise
        dist.broadcast_object_list(told, src=self._first, group=self._group)
        result, problem = told[0]
        if problem is not None:
            raise problem
        return result


def _sendable(error: BaseException) -> BaseException:
    """The error, or one with its text if it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
