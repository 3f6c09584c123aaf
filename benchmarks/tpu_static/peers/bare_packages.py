"""Imports tpu-inference's kernels without the rest of it.

Its packages' `__init__` bring up much that a kernel does not need (vLLM and torch), and that
`pip install --no-deps` leaves out. Each package on the way is entered as a bare namespace; in the
place of two of its modules stand the standard library's logger and the chip's name.
"""

import importlib
import importlib.util
import logging
import pathlib
import sys
import types
from typing import Any

from pallas_kernels import tpu_chip

PACKAGE = "tpu_inference"


def kernel_module(name: str) -> Any:
    """The module `tpu_inference.kernels.<name>`, of its own file, without any `__init__`."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.find_spec(PACKAGE)
        _enter(PACKAGE, pathlib.Path(next(iter(spec.submodule_search_locations))))
        _stand_in("logger", init_logger=_logger)
        _stand_in("utils", get_device_name=_device_name)
    path, folder = PACKAGE, pathlib.Path(sys.modules[PACKAGE].__path__[0])
    for part in ("kernels", *name.split(".")[:-1]):
        path, folder = f"{path}.{part}", folder / part
        if path not in sys.modules:
            _enter(path, folder)
    return importlib.import_module(f"{PACKAGE}.kernels.{name}")


def _logger(name: str) -> logging.Logger:
    logger = logging.getLogger(name)
    logger.warning_once, logger.info_once = logger.warning, logger.info
    return logger


def _device_name() -> str:
    """The chip by its name in the library's tables of tiles."""
    generation = tpu_chip.current().generation
    return "TPU v7" if generation == "7x" else f"TPU {generation}"


def _enter(name: str, folder: pathlib.Path) -> None:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def _stand_in(name: str, **contents: Any) -> None:
    module = types.ModuleType(f"{PACKAGE}.{name}")
    vars(module).update(contents)
    sys.modules[module.__name__] = module
