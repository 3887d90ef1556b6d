"""The checkpoints of a run on disk: written by the main process or, of a divided model, by all processes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrpo.core.errors import DivergenceError
from flowgrpo.training import checkpoints, sharded_checkpoints
from flowgrpo.training.checkpoints import CheckpointError, Tensors
from flowgrpo.training.divergence import require_finite
from flowgrpo.training.shares import Shares

Division = Callable[[str, str, torch.Size], Tensor | None]
"""From part, name and shape of a tensor to the parameter as which it is divided; None if it is whole."""


class CheckpointFiles:
    """Writes, checks and reads the checkpoints of a run.

    Attributes:
        folder: The folder of checkpoints.
        is_sharded: Whether the model is divided. Then all processes write and read together.
    """

    def __init__(self, folder: Path, processes: Shares, is_sharded: bool, keep: int):
        """
        Args:
            folder: The folder of checkpoints.
            processes: The processes, each by itself.
            is_sharded: Whether the model is divided among them.
            keep: Number of checkpoints that are kept.
        """
        self.folder, self.is_sharded = folder, is_sharded
        self._processes, self._keep = processes, keep

    @property
    def is_written_here(self) -> bool:
        """Whether this process writes a part of each checkpoint."""
        return self._is_main or self.is_sharded

    @property
    def _is_main(self) -> bool:
        return bool(self._processes.accelerator.is_main_process)

    def write(self, name: str, parts: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        """Write a checkpoint; processes that have no part in it do nothing.

        Args:
            name: Of its folder.
            parts: Tensors by part and name.
            state: Values for JSON.
        """
        place = self.folder / name
        if self.is_sharded:
            gather = self._processes.gather_objects
            sharded_checkpoints.save(place, parts, state, is_main=self._is_main, gather=gather)
        elif self._is_main:
            checkpoints.save(place, parts, state)

    def read(
        self, place: Path, division: Division
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Read a checkpoint; of a divided model only this process's parts. All processes must call this.

        Returns:
            Tensors by part and name, divided as ``division`` says, and the state.
        """
        if self.is_sharded:
            return sharded_checkpoints.load(place, division)
        return checkpoints.load(place)

    def prune(self) -> None:
        """Delete all but the newest checkpoints; for the main process."""
        checkpoints.prune(self.folder, self._keep)

    def mend(self, say: Callable[[str], None]) -> None:
        """Make the newest checkpoint a sound one, before a run resumes; for the main process.

        What was not finished is deleted, and damaged checkpoints are renamed.

        Args:
            say: Gets a warning for each damaged checkpoint.

        Raises:
            CheckpointError: If there are checkpoints and none is sound; then nothing is renamed.
        """
        checkpoints.tidy(self.folder)
        damaged: list[tuple[Path, CheckpointError]] = []
        for place in reversed(checkpoints.numbered(self.folder)):
            try:
                checkpoints.verify(place)
                break
            except CheckpointError as error:
                damaged.append((place, error))
        else:
            if damaged:
                raise CheckpointError(
                    f"{damaged[0][1]}. No earlier checkpoint is sound; to start again, delete {self.folder.parent}"
                )
        for place, problem in damaged:
            aside = checkpoints.set_aside(place)
            say(
                f"WARNING: {problem}. It was renamed to {aside.name}, and the run resumes from the "
                "checkpoint before it"
            )
        self.prune()

    def require_finite(self, parts: Mapping[str, Tensors]) -> None:
        """Check the parts of a checkpoint; if the model is divided, in all processes.

        Raises:
            DivergenceError: If a part is not finite; in all processes that call this.
        """
        problem = None
        try:
            require_finite(parts)
        except DivergenceError as error:
            problem = error
        if self.is_sharded:
            every = self._processes.gather_objects([problem and str(problem)])
            found = [text for text in every if text]
            problem = DivergenceError(found[0]) if found else None
        if problem is not None:
            raise problem
