"""What installed packages offer, and what a third party's backend may be called.

A package offers backends by entry points of the group "attnsel_jax.backends": name = path. One that
cannot be registered is left out with a warning: installing it must neither change what an existing
name means, nor stop every other backend.
"""

import contextlib
import importlib.metadata
import re
import warnings
from collections.abc import Iterator
from typing import Any

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backend_names import RESERVED
from attnsel_jax.qualnames import resolve_obj_by_qualname, split_qualname

ENTRY_POINT_GROUP = "attnsel_jax.backends"


def offered() -> Iterator[tuple[str, str]]:
    """(name, dotted path) of every entry point of the group."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        yield point.name, point.value


@contextlib.contextmanager
def left_out_with_a_warning(name: str, path: str) -> Iterator[None]:
    """Turns the refusal of an offer into a warning; other errors propagate."""
    try:
        yield
    except (TypeError, ValueError) as error:
        message = f"the attention backend {name} = {path} is left out: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def declared_before(name: str, path: str) -> str | None:
    """The `before` of an offered class; None where it does not import (selection will say why).

    Raises:
        TypeError: the path names no backend class.
        ValueError: the class has another name, or its module has no such class.
    """
    try:
        cls = resolve_obj_by_qualname(path, contained=True)
    except (ImportError, OSError):
        return None
    if not (isinstance(cls, type) and issubclass(cls, AttentionBackend)):
        raise TypeError(f"{path} is {cls!r}, must be a subclass of AttentionBackend")
    check_own_name(name, cls)
    return cls.before


def check_name(name: Any) -> None:
    """Refuses what cannot be a backend's name, or means something already.

    Raises:
        TypeError: no text.
        ValueError: not upper case, or reserved.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, must be text or a member of AttentionBackendEnum")
    if not re.fullmatch("[A-Z][A-Z0-9_]*", name):
        suggestion = re.sub("[^A-Z0-9_]+", "_", name.upper()).strip("_0123456789")
        hint = f": {suggestion!r}?" if suggestion else ""
        raise ValueError(
            f"name is {name!r}, must be upper case letters, digits and underscores, a letter "
            f"first{hint}"
        )
    if name in RESERVED:
        raise ValueError(f"name is {name!r}, which is taken: {RESERVED[name]}; choose another")


def check_target(name: str, target: Any, overrides: bool) -> None:
    """Refuses what a name cannot stand for; a path is looked at, not imported.

    Raises:
        TypeError: neither a backend class nor text.
        ValueError: no dotted path, a class without a name, or of another where none is overridden.
    """
    if isinstance(target, str):
        split_qualname(target, "target")
        return
    if not (isinstance(target, type) and issubclass(target, AttentionBackend)):
        raise TypeError(
            f"target is {target!r}, must be a subclass of AttentionBackend or its dotted path"
        )
    check_own_name(getattr(target, "name", name) if overrides else name, target)


def check_own_name(name: str, cls: type[AttentionBackend]) -> None:
    """Refuses a second name for a class: what prints must be what can be asked for.

    Raises:
        ValueError: the class has none, or another.
    """
    own = getattr(cls, "name", None)
    if own is None:
        raise ValueError(f"{cls.__name__}.name is not set, must be text such as {name!r}")
    if own != name:
        raise ValueError(
            f"name is {name!r}, must be {own!r}, as {cls.__name__}.name says: no two names mean "
            f"one backend"
        )


def check_place(name: str, before: str | None, place: str | None) -> None:
    """Refuses to move an existing name by overriding it.

    Raises:
        ValueError: `before` is given, and is not the place that the name has.
    """
    if before is not None and before != place:
        wanted = "None" if place is None else f"{place!r} or None"
        raise ValueError(
            f"before is {before!r}, must be {wanted}: {name} is registered, and an override keeps "
            f"its place"
        )
