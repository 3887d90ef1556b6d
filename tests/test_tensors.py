"""The stand-ins of torch and of shape annotations, where torch is not loaded."""

import copy
import importlib.util
import pickle
import sys
import types
from typing import Any

import pytest
import torch

from flowgrpo.core import tensors


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as it is loaded without torch; importing torch then gives the real one."""
    assert tensors.__file__
    specification = importlib.util.spec_from_file_location("without_torch", tensors.__file__)
    assert specification is not None
    assert specification.loader is not None
    found = importlib.util.module_from_spec(specification)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        specification.loader.exec_module(found)
    monkeypatch.setitem(sys.modules, "without_torch", found)
    return found


def test_torch_is_loaded_at_its_first_use_and_takes_the_place_of_its_stand_in(module: Any) -> None:
    user, other = types.ModuleType("user"), types.ModuleType("other")
    user.torch = module.torch  # type: ignore[attr-defined]
    other.torch = "its own"  # type: ignore[attr-defined]
    sys.modules |= {"user": user, "other": other}
    try:
        stand_in = module.torch
        assert stand_in is not torch
        # Looking at the stand-in loads nothing.
        with pytest.raises(AttributeError):
            stand_in.__wrapped__  # noqa: B018
        copy.copy(stand_in)
        assert module.torch is stand_in
        assert stand_in.zeros is torch.zeros
        assert module.torch is user.torch is torch  # type: ignore[attr-defined]
        assert other.torch == "its own"  # type: ignore[attr-defined]
        assert pickle.loads(pickle.dumps(stand_in)) is torch
    finally:
        for name in ("user", "other"):
            del sys.modules[name]


def test_annotations_and_instances(module: Any) -> None:
    assert module.Float[module.Tensor, "batch"] is Any
    assert module.Bool is module.Int is module.Float
    assert isinstance(torch.zeros(1), module.Tensor)
    assert not isinstance(1.0, module.Tensor)


def test_with_torch_the_names_are_the_real_ones() -> None:
    assert tensors.torch is torch
    assert tensors.Tensor is torch.Tensor
