"""torch and the shape annotations, for modules that also define settings.

Settings are read by every command, by ``--help`` and by every error about a configuration, which
should answer at once; importing torch takes two seconds, and jaxtyping imports NumPy. Modules that a
configuration is made of (transitions, advantages, losses, algorithms) therefore import these names
from here: torch is loaded when a function first uses it, and annotations cost nothing.

Where torch is already loaded (under pytest, which checks the annotations at run time) and for type
checkers, the names are the real ones.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["Bool", "Float", "Int", "Tensor", "torch"]

if TYPE_CHECKING or "torch" in sys.modules:
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
else:

    class _DeferredModule:
        """Imports a module at the first use of one of its names, and then gives way to it.

        Modules that imported the stand-in get the real module in its place, so that code which
        inspects globals (``torch.compile``) finds it there.
        """

        def __init__(self, name: str):
            self._name = name

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                # Protocols of copy, pickle and inspect, for which nothing needs to be imported.
                raise AttributeError(name)
            real = import_module(self._name)
            for module in list(sys.modules.values()):
                names = getattr(module, "__dict__", {})
                if names.get(self._name) is self:
                    names[self._name] = real
            return getattr(real, name)

        def __reduce__(self) -> Any:
            return import_module, (self._name,)

    class _ShapeAnnotation:
        """``Float[Tensor, "batch"]`` without a check."""

        def __class_getitem__(cls, item: Any) -> Any:
            return Any

    class _TensorType(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, torch.Tensor)

    class Tensor(metaclass=_TensorType):
        """Stands for ``torch.Tensor`` in annotations and in ``isinstance``."""

    torch = _DeferredModule("torch")
    Bool = Float = Int = _ShapeAnnotation
