"""A bounded wait for the other processes of a run.

Collective operations of gloo raise an error when another process does not answer for the time that the
process group was created with, or when its connection closes. Those of NCCL do not raise: after the same
time torch ends the process with SIGABRT and a report of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate.utils import InitProcessGroupKwargs

from flowgrpo.core.errors import LostRankError
from flowgrpo.policy.arguments import is_lost_rank


def process_group(minutes: float) -> InitProcessGroupKwargs:
    """The settings of a process group whose operations wait for this time at most."""
    return InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))


@contextmanager
def bounded_wait(minutes: float) -> Iterator[None]:
    """Inside, the loss of another process is a :class:`LostRankError`.

    Args:
        minutes: The time that operations wait, for the message.

    Raises:
        LostRankError: If another process has ended, or has not answered for this time.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRankError) or not is_lost_rank(error):
            raise
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            problem = (
                f"another process of the run has not answered for {minutes:g} minutes "
                "(run.rank_timeout_minutes): it is stopped, hangs, or its network is gone"
            )
        else:
            problem = "another process of the run has ended; its own output says why"
        raise LostRankError(
            f"{problem}. This process ends ({str(error).splitlines()[0]})"
        ) from error
