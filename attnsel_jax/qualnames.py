"""From a dotted path to the object it names; imports happen here, and only when asked for."""

import importlib
from typing import Any


def resolve_obj_by_qualname(qualname: str) -> Any:
    """Imports and returns what "package.module:name" or "package.module.name" names.

    Raises:
        ImportError: the module, or something that it imports, is not there.
        ValueError: the text is no dotted path, or the module has no such name.
    """
    module_name, colon, name = qualname.partition(":")
    if not colon:
        module_name, _, name = qualname.rpartition(".")
    if not module_name or not name:
        raise ValueError(f"qualname is {qualname!r}, must be like package.module:name")
    module = importlib.import_module(module_name)
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ValueError(
            f"qualname is {qualname!r}, but {module_name} has no {name!r}: correct the path"
        ) from error
