"""Results kept as JSON: what was measured on a GPU, or what the compiler made without one."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import sys
from typing import Any

import jax

PACKAGES = ("attnsel-jax", "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc",
            "nvidia-cudnn-cu13", "numpy", "tokamax", "torch")  # fmt: skip
FOLDER = pathlib.Path(__file__).parents[1] / "results"
STATIC = "gpu_static"


def head(**more: Any) -> dict[str, Any]:
    """What every file begins with: command, date, versions, device."""
    return {
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        **more,
    }


def versions() -> dict[str, str]:
    """Of what compiles and is compiled."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def written(folder: pathlib.Path, name: str, data: dict[str, Any]) -> pathlib.Path:
    """Writes one file whole; what is there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    unfinished.replace(path)
    return path


def device() -> dict[str, Any]:
    """The GPU that is measured, as jax has it."""
    gpu = jax.devices()[0]
    asked = ("core_count", "compute_capability", "shared_memory_per_block_optin")
    return {"kind": gpu.device_kind} | {name: str(getattr(gpu, name, "")) for name in asked}
