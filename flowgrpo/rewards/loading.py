"""Finds and constructs the reward model that a configuration names.

The rewards that ship with flowgrpo are the package ``reward_models``, installed next to the package
``flowgrpo``. Its modules are listed from that folder and imported by path, so that ``flowgrpo``
does not depend on ``reward_models``, and a folder of the same name in the working directory cannot
take its place.
"""

import importlib
import inspect
import sys
from collections.abc import Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from flowgrpo.core.errors import ConfigError
from flowgrpo.core.imports import import_path, suggest
from flowgrpo.policy.model_files import ask_hub, may_be_id
from flowgrpo.rewards.protocols import PairwiseJudge, RewardModel
from flowgrpo.rewards.settings import Reward

PACKAGE = "reward_models"
FOLDER = Path(__file__).resolve().parents[2] / PACKAGE
"""The folder next to the ``flowgrpo`` package, both in a checkout and in site-packages."""
REMOVED = {
    "flow_grpo_server": "it spoke pickle, which lets a server run code in the training process. Serve "
    "that reward with 'flowgrpo serve-reward' and set model = \"remote\"; docs/serving.md, section "
    '"Putting an existing reward server behind flowgrpo\'s", shows how'
}
"""Names of rewards that older configurations may hold, with the way to replace them."""


def available_rewards() -> list[str]:
    """Short names of the rewards that ship with flowgrpo: the modules in the folder of the package."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))


def check_name(model: str, key: str = "reward") -> None:
    """Refuse a model that does not exist. A short name is looked up without importing anything.

    Args:
        model: Short name or import path ``"package.module:name"``.
        key: How the message calls it, such as ``algorithm.preference.model``.

    Raises:
        ValueError: If there is no such reward; names the nearest one, or the replacement of a reward
            that was removed.
    """
    if model in REMOVED:
        raise ValueError(f"{key} {model!r} was removed: {REMOVED[model]}")
    if ":" in model:
        _import(model)
    elif model not in available_rewards():
        known = available_rewards()
        raise ValueError(
            f"unknown {key} {model!r}{suggest(model, known)} (known: {', '.join(known)}; others by "
            "import path 'package.module:name')"
        )


def check_installed(model: str) -> None:
    """Import the module of a reward, and check that the packages that it imports later are installed.

    A module names these in ``REQUIRES``. No model is loaded.

    Args:
        model: Short name or import path; :func:`check_name` has accepted it.

    Raises:
        ImportError: With the command that installs what is missing.
    """
    if ":" not in model:
        _ensure_package()
        model = f"{PACKAGE}.{model}:"
    module = importlib.import_module(model.partition(":")[0])
    absent = [name for name in getattr(module, "REQUIRES", ()) if find_spec(name) is None]
    if absent:
        extra = getattr(module, "EXTRA", "")
        install = f"'flowgrpo[{extra}]'" if extra else " ".join(absent)
        raise ImportError(
            f"reward {module.__name__.rpartition('.')[2]!r} needs {' and '.join(absent)}: pip install {install}"
        )


def check_places(reward: Reward, key: str) -> None:
    """Check the files, folders and models that the options of a reward name, before anything is loaded.

    A module names the options that are a file, a folder or a hub id in ``WEIGHTS``, and those that are a
    file or a folder in ``PATHS``. Models that are not here are looked up on the hub, if it can be asked.

    Args:
        reward: The reward; :func:`check_installed` has accepted its model.
        key: The key of its options, for the error.

    Raises:
        ConfigError: If one does not exist.
    """
    module = sys.modules[
        reward.model.partition(":")[0] if ":" in reward.model else f"{PACKAGE}.{reward.model}"
    ]
    may_be_ids = _option_names(module, "WEIGHTS")
    for option in (*may_be_ids, *_option_names(module, "PATHS")):
        name = reward.options.get(option)
        if not isinstance(name, str) or not name or Path(name).exists():
            continue
        place = f"{key}.{option}"
        if Path(name).expanduser().exists():
            raise ConfigError(f"{place}: rewards do not replace ~; give the whole path of {name}")
        if option not in may_be_ids or not may_be_id(name):
            raise ConfigError(f"{place}: no such file or folder: {name}")
        try:
            ask_hub(name)
        except FileNotFoundError as error:
            raise ConfigError(f"{place}: {error}") from error


def _option_names(module: ModuleType, declaration: str) -> Sequence[str]:
    """The options that a module declares; none if its name has another meaning there."""
    names = getattr(module, declaration, ())
    is_declaration = isinstance(names, tuple | list) and all(isinstance(n, str) for n in names)
    return names if is_declaration else ()


def found(model: str) -> object:
    """The class or function that a reward's name means, imported but not called.

    Raises:
        ValueError: If there is no such reward.
        ImportError: If it needs a package that is not installed.
    """
    check_name(model)
    if ":" not in model:
        _ensure_package()
        module = importlib.import_module(f"{PACKAGE}.{model}")
        # Each file defines one reward, the first name in its __all__.
        model = f"{PACKAGE}.{model}:{module.__all__[0]}"
    return _import(model)


def load_model(reward: Reward) -> RewardModel | PairwiseJudge:
    """Import a reward model or a pairwise judge and construct it with its options.

    Raises:
        ValueError: If there is no such model, with the nearest name, or its options are wrong.
        ImportError: If it needs a package that is not installed.
    """
    model: RewardModel | PairwiseJudge = construct(reward)
    return model


def construct(reward: Reward) -> Any:
    """As :func:`load_model`, for a model that may have another interface."""
    target: Any = found(reward.model)
    check_options(reward, target)
    return target(**reward.options) if isinstance(target, type) else target


def check_options(reward: Reward, target: Any) -> None:
    """Check that a reward's class takes its options, without constructing it.

    Args:
        reward: The reward.
        target: The class or function that :func:`found` returns.

    Raises:
        ValueError: If it does not, or is neither a class nor a function.
    """
    if not callable(target):
        raise ValueError(f"reward {reward.model!r} is {target!r}, neither a class nor a function")
    if isinstance(target, type):
        try:
            inspect.signature(target).bind(**reward.options)
        except TypeError as error:
            raise ValueError(
                f"reward {reward.label!r}: {error}; it takes {inspect.signature(target)}"
            ) from error
    elif reward.options:
        raise ValueError(
            f"reward {reward.label!r} is a function and takes no options, got {reward.options}"
        )


def load_reward(reward: Reward) -> RewardModel:
    """Load a model that scores single samples; see :func:`load_model`.

    Raises:
        ValueError: If the model compares pairs instead.
    """
    model = load_model(reward)
    if not isinstance(model, RewardModel):
        raise ValueError(
            f"reward {reward.label!r} compares pairs and does not score single samples: use it with the "
            "algorithm 'pref_grpo', as algorithm.preference.model"
        )
    return model


def _import(path: str) -> object:
    if path.startswith(f"{PACKAGE}."):
        _ensure_package()
    return import_path(path)


def _ensure_package() -> None:
    """Import ``reward_models`` from :data:`FOLDER`, whatever ``sys.path`` would find first.

    Raises:
        ValueError: If another package of that name is already imported.
    """
    loaded = sys.modules.get(PACKAGE)
    if loaded is None:
        spec = spec_from_file_location(
            PACKAGE, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = module_from_spec(spec)
        sys.modules[PACKAGE] = package
        spec.loader.exec_module(package)
    elif FOLDER not in [Path(p).resolve() for p in loaded.__path__]:
        raise ValueError(
            f"another package {PACKAGE!r} is imported, from {[*loaded.__path__]}, which hides flowgrpo's "
            f"in {FOLDER}: rename yours"
        )
