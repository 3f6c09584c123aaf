"""Runs works, contenders and generations, one after another, and keeps each row as it comes."""

import contextlib
import importlib.util
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.tpu_static.contenders import contender, is_installed
from benchmarks.tpu_static.measuring import Measurement, measure
from benchmarks.tpu_static.results import row, written
from benchmarks.work import Work

NOT_INSTALLED, DOES_NOT_SERVE = "not installed", "does not serve"


def check_compiler() -> None:
    """Refuses where nothing compiles for TPUs.

    Raises:
        ValueError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu is not installed, must be: `pip install libtpu` (as `pip show jax` says which)"
        )


def rows(
    works: Sequence[Work],
    names: Sequence[str],
    generation: str,
    known: Mapping[tuple[str, str], dict[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """The row of everything asked; a contender of another op is left out.

    Args:
        works, names: of works and contenders.
        generation: the chip.
        known: (work, contender) -> a row that need not be measured again.
    """
    for work in works:
        for name in names:
            if known and (work.name, name) in known:
                yield known[work.name, name]
            elif found := list(_measured(work, name, generation)):
                yield row(found)


def _measured(work: Work, name: str, generation: str) -> Iterator[Measurement]:
    module = contender(name)
    reason = module.refuses(work)
    if reason is not None:
        if not reason.startswith(("op is", "work is", "head_size is")):
            yield Measurement(work.name, name, {}, DOES_NOT_SERVE, reason)
        return
    if not is_installed(name):
        reason = f"{module.PACKAGE} is not installed: `pip install --no-deps {module.PACKAGE}`"
        yield Measurement(work.name, name, {}, NOT_INSTALLED, reason)
        return
    for options in module.choices(work, generation):
        yield measure(work, name, generation, options)


def keep(
    found: Iterator[dict[str, Any]],
    generation: str,
    command: str,
    folder: pathlib.Path | None,
) -> Iterator[dict[str, Any]]:
    """The same rows, each written to the generation's file as it comes."""
    for this in found:
        if folder is not None:
            with contextlib.suppress(KeyboardInterrupt):  # a file is written whole
                written(generation, [this], command, folder)
        yield this
