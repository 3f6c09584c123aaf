"""From a dotted path to the object it names; imports happen here, and only when asked for."""

import functools
import importlib
from typing import Any

# What code of another package may raise while it is imported, beside ImportError and OSError.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


def resolve_obj_by_qualname(qualname: str, *, contained: bool = False) -> Any:
    """Imports and returns what "package.module:name" or "package.module.name" names.

    After a colon the name may be dotted: a class within a class.

    Args:
        qualname: the dotted path.
        contained: whatever the module raises while it is imported becomes an `ImportError`.

    Raises:
        ImportError: the module, or something that it imports, is not there.
        ValueError: the text is no dotted path, or the module has no such name.
    """
    module_name, name = split_qualname(qualname)
    try:
        module = importlib.import_module(module_name)
    except FAILURES as error:
        if not contained:
            raise
        raise ImportError(f"{module_name} raises {type(error).__name__}: {error}") from error
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError as error:
        raise ValueError(
            f"qualname is {qualname!r}, but {module_name} has no {name!r}: correct the path"
        ) from error


def split_qualname(qualname: str, argument: str = "qualname") -> tuple[str, str]:
    """(module, name) of a dotted path.

    Raises:
        ValueError: the text is none.
    """
    module_name, colon, name = qualname.partition(":")
    if not colon:
        module_name, _, name = qualname.rpartition(".")
    if not all((*module_name.split("."), *name.split("."))):
        raise ValueError(f"{argument} is {qualname!r}, must be like package.module:name")
    return module_name, name


def path_of(target: type | str) -> str:
    """The dotted path "module:Class" of a class, or of another way to write it."""
    if isinstance(target, str):
        return target if ":" in target else ":".join(target.rsplit(".", 1))
    return f"{target.__module__}:{target.__qualname__}"
