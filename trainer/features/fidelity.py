"""Single modules of torch-fidelity. The package as a whole would import every network that it has, and torchvision,
which not every machine has and which none of what is used here calls.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from trainer.errors import ConfigError

_PACKAGE = "torch_fidelity"
_REPLACED = (_PACKAGE, "torchvision")


def fidelity_module(name: str) -> ModuleType:
    """The module torch_fidelity.`name`. Raises ConfigError where torch-fidelity is missing."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError(
            "features of inception and of clip: need torch-fidelity; pip install --no-deps torch-fidelity (its "
            "torchvision is not needed), or take --features efficientnet-lite0"
        )
    with _bare_packages(list(spec.submodule_search_locations)):
        return importlib.import_module(f"{_PACKAGE}.{name}")


@contextmanager
def _bare_packages(folders: list[str]) -> Iterator[None]:
    """The package's name stands for its folder alone, and torchvision's for nothing; afterwards for what they did
    before.
    """

    def replaced() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in _REPLACED}

    before = replaced()
    for name in before:
        del sys.modules[name]
    package = ModuleType(_PACKAGE)
    package.__path__ = folders
    sys.modules.update({_PACKAGE: package, "torchvision": ModuleType("torchvision")})
    try:
        yield
    finally:
        for name in replaced():
            del sys.modules[name]
        sys.modules.update(before)
