"""Imports kernels of large libraries without the rest of them.

Their packages' `__init__` bring up much that a kernel does not need (vLLM, the
rest of a server) and that `pip install --no-deps` leaves out. Each package on the way is entered as a bare namespace, and
vLLM's logger is replaced by the standard library's.
"""

import importlib
import importlib.util
import logging
import pathlib
import sys
import types
from typing import Any


def kernel_module(package: str, name: str) -> Any:
    """The module `package.name`, of its own file, without any `__init__` above it."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        _enter(package, pathlib.Path(next(iter(spec.submodule_search_locations))))
        logger = types.ModuleType(f"{package}.logger")
        logger.init_logger = logging.getLogger
        sys.modules[logger.__name__] = logger
    path, folder = package, pathlib.Path(sys.modules[package].__path__[0])
    for part in name.split(".")[:-1]:
        path, folder = f"{path}.{part}", folder / part
        if path not in sys.modules:
            _enter(path, folder)
    return importlib.import_module(f"{package}.{name}")


def _enter(name: str, folder: pathlib.Path) -> None:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
