"""A whole run as data: what was measured, by which versions, on which machine, when, how."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

from attnsel_jax.bench.results import CaseResult, Settings, missed
from attnsel_jax.bench.roofline import Roofline
from attnsel_jax.platforms import Device

PACKAGES = ("attnsel-jax", "jax", "jaxlib", "numpy", "torch")


def to_json(
    results: Sequence[CaseResult],
    settings: Settings,
    device: Device,
    roofline: Roofline | None,
    command: Sequence[str],
) -> dict[str, Any]:
    """The run as plain data; no paths of this machine in it.

    Args:
        results: of the cases that ran.
        settings: how it was measured.
        device: that it was measured on.
        roofline: of the device.
        command: what was typed.
    """
    return {
        "command": " ".join(command),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": {
            "platform": device.platform,
            "kind": device.kind,
            "processor": _processor() if device.platform == "cpu" else None,
            "cores": len(os.sched_getaffinity(0)),
        },
        "roofline": dataclasses.asdict(roofline) if roofline else None,
        "settings": dataclasses.asdict(settings),
        "cases": [result.to_json() for result in results],
        "missed": [str(verdict) for verdict in missed(results)],
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The CPU's name as Linux says it, else as Python does."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor()
