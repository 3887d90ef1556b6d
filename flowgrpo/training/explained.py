"""Adds to the errors of a run what is safe and how to resume."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from flowgrpo.core.errors import DivergenceError, LostRankError
from flowgrpo.training import checkpoints
from flowgrpo.training.ranks import bounded_wait
from flowgrpo.training.session import Session
from flowgrpo.training.signals import StopRequested

NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def explained(session: Session) -> Iterator[None]:
    """Raise errors from inside again with the state of the run in their message.

    Raises:
        DivergenceError: With the last good checkpoint.
        LostRankError: If another process of the run ends or does not answer.
        StopRequested: If it ends after a signal asked the run to stop.
        OSError: On a full disk, with the last checkpoint.
        RuntimeError: If code inside calls ``sys.exit``, which would end an unfinished run without an
            error.
    """
    try:
        with bounded_wait(session.config.run.rank_timeout_minutes):
            yield
    except LostRankError as error:
        if session.signals.stopping:
            # The first process has saved and ended.
            raise StopRequested(session.signals.stopping) from error
        raise LostRankError(f"{error}. {_safe(session)}") from error
    except DivergenceError as error:
        lower = f"--set train.lr={session.config.train.lr / 10:g}"
        raise DivergenceError(
            f"{error}. The run stopped. {_safe(session)} Lower the learning rate first ({lower})"
        ) from error
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise OSError(
            f"the disk of {error.filename or session.folder} is full. {_safe(session)} Free some space first"
        ) from error
    except SystemExit as error:
        raise RuntimeError(
            f"code that the run called, such as a reward, ended the process by sys.exit({error.code!r}). "
            f"The run has not finished. {_safe(session)}"
        ) from error


def _safe(session: Session) -> str:
    """The last good checkpoint and the best one, in sentences."""
    last = checkpoints.newest(session.checkpoints)
    if last is None:
        return "Nothing was trained yet; the same command starts again."
    best = session.checkpoints / "best"
    also = f" The best weights by held-out reward are in {best}." if best.exists() else ""
    return f"Everything up to {last} is safe, and the same command resumes from there.{also}"
