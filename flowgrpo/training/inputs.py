"""Checks of a configuration that need neither torch nor a model: a mistake is answered at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowgrpo.config import Config, ConfigError, find
from flowgrpo.core.imports import import_path
from flowgrpo.data.prompt_sets import PromptSet
from flowgrpo.policy.settings import require_installed
from flowgrpo.rewards.loading import check_name


def check_names(config: Config, num_processes: int) -> None:
    """Check the settings, and that files, rewards and optional packages exist.

    No prompt file is read, and no module of the user is imported for a reward or a metric.

    Raises:
        ConfigError: If settings contradict each other, do not fit the number of processes, or name
            a prompt file or a reward that does not exist.
        ImportError: If an optional package is not installed.
    """
    config.check(num_processes)
    require_installed(config.memory, config.train.optimizer)
    for key, file in _files(config).items():
        with _setting(key):
            find(file)
    for key, name in _weights(config).items():
        is_file = name.startswith((".", "/", "~")) or name.endswith(".safetensors")
        if is_file and not Path(name).expanduser().exists():
            raise ConfigError(f"{key}: no such file or folder: {name}")
    for index, reward in enumerate(config.rewards):
        if ":" not in reward.model:
            with _setting(f"rewards[{index}].model"):
                check_name(reward.model)


def check_inputs(config: Config, num_processes: int) -> tuple[PromptSet, PromptSet]:
    """Check everything that can be checked before anything is loaded or written.

    - The names of files, packages and rewards (:func:`check_names`).
    - The device exists.
    - The prompt files can be read, and have the metadata to balance by.
    - The rewards and metrics that are named by an import path can be imported.

    Returns:
        The training prompts and the held-out prompts.

    Raises:
        ConfigError: As :func:`check_names`, or if an import path cannot be imported.
        ImportError: If an optional package is not installed.
        PromptError: If a prompt file cannot be used.
    """
    check_names(config, num_processes)
    with _setting("run.device"):
        # Imports torch, which the checks above do without.
        from flowgrpo.policy.placement import resolve_device

        resolve_device(config.run.device, num_processes)
    fixed_size = config.sampling.height is not None
    prompts, held_out = (
        PromptSet.load(find(file), config.prompts.balance, fixed_size)
        for file in _files(config).values()
    )
    for index, path in enumerate(config.evaluation.metrics):
        with _setting(f"evaluation.metrics[{index}]"):
            import_path(path)
    for index, reward in enumerate(config.rewards):
        with _setting(f"rewards[{index}].model"):
            check_name(reward.model)
    return prompts, held_out


def _files(config: Config) -> dict[str, str]:
    return {
        "prompts.train": config.prompts.train,
        "prompts.held_out": config.prompts.held_out,
    }


def _weights(config: Config) -> dict[str, str]:
    """Weights besides the model itself: the base of a single file, and earlier adapters."""
    found = {"model.base": config.model.base}
    found |= {f"model.adapters[{i}].path": a.path for i, a in enumerate(config.model.adapters)}
    return found | {"model.weights.init": getattr(config.model.weights, "init", "")}


@contextmanager
def _setting(key: str) -> Iterator[None]:
    """Name the setting in an error about its value."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"{key}: {error}") from error
