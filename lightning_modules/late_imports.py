"""Keeps slow imports that other packages make without need out of the way until somebody uses them."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class LateModule(ModuleType):
    """A module that is imported when something of it is first asked for.

    `importlib.util.LazyLoader` does so too, but at `hasattr`, which is all that the first user does.

    Args:
        name: dotted name of the module.
        placeholders: attributes that answer without the import; each calls the function of that dotted name.
    """

    def __init__(self, name: str, placeholders: dict[str, str]) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # `importlib.util.find_spec` asks for it
        for attribute, function in placeholders.items():
            setattr(self, attribute, self._calling(function))

    def __getattr__(self, attribute: str) -> Any:
        # `inspect` asks every module for its file; a submodule's import asks for the path.
        if attribute.startswith("__") and attribute != "__path__":
            raise AttributeError(attribute)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)

    def _calling(self, function: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            module, _, name = function.rpartition(".")
            return getattr(importlib.import_module(module), name)(*args, **kwargs)

        return call


def postpone() -> None:
    """Postpones `scipy.signal` (with `scipy.ndimage` and `scipy.stats`), and bitsandbytes (with PyTorch's compiler).

    torchmetrics imports the first to give packages for speech quality a function that SciPy has moved; diffusers the
    second, which would also use a GPU at once, whether anything is quantized or not.
    """
    if "scipy.signal" not in sys.modules:
        sys.modules["scipy.signal"] = LateModule("scipy.signal", {"hamming": "scipy.signal.windows.hamming"})
    if "bitsandbytes" not in sys.modules and find_spec("bitsandbytes"):
        sys.modules["bitsandbytes"] = LateModule("bitsandbytes", {})
