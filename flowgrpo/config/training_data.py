"""The training prompts of a configuration, with the pictures to train on if its algorithm needs them."""

from pathlib import Path
from typing import Any

from flowgrpo.config.files import find
from flowgrpo.data.prompt_sets import PromptSet


def training_source(config: Any) -> Path:
    """The file of training prompts, or the file or folder of pictures.

    Raises:
        FileNotFoundError: If there is none.
        IsADirectoryError: If it is a folder, and the algorithm trains on no given pictures.
    """
    name = config.prompts.train
    folder = Path(name).expanduser()
    if folder.is_dir():
        if config.algorithm.num_targets:
            return folder
        raise IsADirectoryError(
            f"{name} is a folder; to train on pictures in it, set algorithm.kind = 'pictures' or 'pairs'"
        )
    return find(name)


def training_prompts(config: Any) -> PromptSet:
    """The training prompts, with the pictures to train on if the algorithm needs them.

    Raises:
        PromptError: If a file cannot be used.
        FileNotFoundError: If there is none.
    """
    return PromptSet.load(
        training_source(config),
        config.prompts.balance,
        config.sampling.height is not None,
        config.algorithm.num_targets,
        config.prompts.weights,
    )
