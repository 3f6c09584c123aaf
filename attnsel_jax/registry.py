"""Which backends exist, in order of priority, and how third parties add theirs.

`BUILT_IN` is the one table: position is priority in automatic selection. `AttentionBackendEnum` is
made from it, and from what `register_backend` and the entry points of the group
"attnsel_jax.backends" add. A plug-in may always be named; it joins automatic selection only where
it says which backend it goes before.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backend_names import UnknownBackendError, unregistered
from attnsel_jax.plugins import (
    check_name,
    check_place,
    check_target,
    declared_before,
    left_out_with_a_warning,
    offered,
)
from attnsel_jax.qualnames import path_of
from attnsel_jax.qualnames import resolve_obj_by_qualname as resolve_obj_by_qualname

# CUDNN stands after XLA, so that it runs only by name, until a run on a GPU has shown it to work
# with the cuDNN and CUDA installed there (jax issue 32430).
BUILT_IN: dict[str, str] = {
    "MOSAIC_GPU": "attnsel_jax.backends.mosaic_gpu:MosaicGpuBackend",
    "MOSAIC_TPU": "attnsel_jax.backends.mosaic_tpu:MosaicTpuBackend",
    "XLA": "attnsel_jax.backends.xla:XlaBackend",
    "CUDNN": "attnsel_jax.backends.cudnn:CudnnBackend",
    "XLA_REFERENCE": "attnsel_jax.backends.xla_reference:XlaReferenceBackend",
    "MOSAIC_GPU_MLA": "attnsel_jax.backends.mosaic_gpu_mla:MosaicGpuMlaBackend",
    "MOSAIC_TPU_MLA": "attnsel_jax.backends.mosaic_tpu_mla:MosaicTpuMlaBackend",
    "XLA_MLA": "attnsel_jax.backends.xla_mla:XlaMlaBackend",
    "MOSAIC_GPU_MLA_SPARSE": "attnsel_jax.backends.mosaic_gpu_mla_sparse:MosaicGpuMlaSparseBackend",
    "MOSAIC_TPU_MLA_SPARSE": "attnsel_jax.backends.mosaic_tpu_mla_sparse:MosaicTpuMlaSparseBackend",
    "XLA_MLA_SPARSE": "attnsel_jax.backends.xla_mla_sparse:XlaMlaSparseBackend",
}

BackendOrPath = type[AttentionBackend] | str


@dataclasses.dataclass
class _Entry:
    """A name, what it stands for, and what overrides that."""

    member: "AttentionBackendEnum"
    target: BackendOrPath
    override: BackendOrPath | None = None
    before: str | None = None
    automatic: bool = True


class _Members(type):
    """Makes `AttentionBackendEnum["XLA"]`, `("XLA")`, `.XLA`, iteration, `len` and `in` work."""

    def __call__(cls, name: "str | AttentionBackendEnum") -> "AttentionBackendEnum":
        return cls[_text(name)]

    def __getitem__(cls, name: str) -> "AttentionBackendEnum":
        entries = _REGISTRY.entries()
        if name not in entries:
            raise unregistered(name, entries)
        return entries[name].member

    def __getattr__(cls, name: str) -> "AttentionBackendEnum":
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return cls[name]
        except UnknownBackendError as error:
            raise AttributeError(str(error)) from error

    def __iter__(cls) -> Iterator["AttentionBackendEnum"]:
        return iter([entry.member for entry in _REGISTRY.entries().values()])

    def __len__(cls) -> int:
        return len(_REGISTRY.entries())

    def __contains__(cls, item: Any) -> bool:
        return _text(item) in _REGISTRY.entries()


class AttentionBackendEnum(metaclass=_Members):
    """The registered backends, in order of priority; members compare and hash by name."""

    __slots__ = ("name",)
    name: str

    @classmethod
    def _of(cls, name: str) -> "AttentionBackendEnum":
        """The member of a name, registered or not yet, or where a pickle is read no more."""
        member = cls.__new__(cls)
        object.__setattr__(member, "name", name)
        return member

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self!r} is constant; use register_backend to override its class")

    def get_path(self, include_classname: bool = True) -> str:
        """Dotted path of its class, "module:Class"; without the class: its module."""
        path = path_of(self._entry().override or self._entry().target)
        return path if include_classname else path.partition(":")[0]

    def get_class(self) -> type[AttentionBackend]:
        """Its class; imports the declaration, never a kernel.

        Raises:
            ImportError, OSError: a plug-in's package does not import, whatever it raises.
            TypeError: what the path names is no `AttentionBackend`.
        """
        target = self._entry().override or self._entry().target
        is_path = isinstance(target, str)
        found = resolve_obj_by_qualname(target, contained=True) if is_path else target
        if not (isinstance(found, type) and issubclass(found, AttentionBackend)):
            raise TypeError(f"{self.name} is {found!r}, must be a subclass of AttentionBackend")
        return found

    def is_overridden(self) -> bool:
        """Whether `register_backend` replaced the class that the name stood for."""
        return self._entry().override is not None

    def clear_override(self) -> None:
        """Goes back to the class that the name stood for before."""
        _REGISTRY.clear_override(self.name)

    def _entry(self) -> _Entry:
        entries = _REGISTRY.entries()
        if self.name not in entries:
            raise unregistered(self.name, entries)
        return entries[self.name]

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, AttentionBackendEnum) and other.name == self.name

    def __hash__(self) -> int:
        return hash((AttentionBackendEnum, self.name))

    def __repr__(self) -> str:
        return f"AttentionBackendEnum.{self.name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return AttentionBackendEnum._of, (self.name,)


class _Registry:
    """The table, in order of priority, and a number that grows at each change of it."""

    def __init__(self):
        self.generation = 0
        self._lock = threading.RLock()
        self._entries = {
            name: _Entry(AttentionBackendEnum._of(name), path) for name, path in BUILT_IN.items()
        }
        self._plugins_found = False
        self._finding_plugins = False

    def entries(self) -> dict[str, _Entry]:
        """Name -> entry; finds the entry points at the first call."""
        if not self._plugins_found:
            self._find_plugins()
        return self._entries

    def put(self, name: str, target: BackendOrPath, before: str | None) -> None:
        """Adds a name, or overrides the class of one that is there."""
        with self._lock:
            entries = dict(self.entries())
            if name in entries:
                check_place(name, before, entries[name].before)
                entries[name] = dataclasses.replace(entries[name], override=target)
            else:
                entries = _inserted(entries, name, target, before)
            self._changed(entries)

    def remove(self, name: str) -> None:
        """Takes a plug-in's name away."""
        with self._lock:
            entries = dict(self.entries())
            if name not in entries:
                raise unregistered(name, entries)
            if name in BUILT_IN:
                raise ValueError(f"name is {name}, must be a plug-in's: built-in backends stay")
            del entries[name]
            self._changed(entries)

    def clear_override(self, name: str) -> None:
        """Makes a name stand for what it stood for before it was overridden."""
        with self._lock:
            entries = dict(self.entries())
            entries[name] = dataclasses.replace(entries[name], override=None)
            self._changed(entries)

    def _changed(self, entries: dict[str, _Entry]) -> None:
        self._entries = entries
        self.generation += 1

    def _find_plugins(self) -> None:
        """Registers what installed packages offer; other threads wait, this one does not nest."""
        with self._lock:
            if self._plugins_found or self._finding_plugins:
                return
            self._finding_plugins = True
            try:
                for name, path in offered():
                    with left_out_with_a_warning(name, path):
                        self._add_plugin(name, path)
                self._plugins_found = True
            finally:
                self._finding_plugins = False

    def _add_plugin(self, name: str, path: str) -> None:
        if name in self._entries:
            raise ValueError(f"name is {name!r}, which is taken by {self._entries[name].target}")
        register_backend(name, path, before=declared_before(name, path))


_REGISTRY = _Registry()


def register_backend(
    name: str | AttentionBackendEnum,
    target: BackendOrPath | None = None,
    *,
    before: str | AttentionBackendEnum | None = None,
) -> Callable[[type[AttentionBackend]], type[AttentionBackend]] | None:
    """Adds a backend under a new name, or overrides the class of an existing one.

        @register_backend("MY_BACKEND", before="XLA")
        class MyBackend(AttentionBackend): ...

        register_backend("MY_BACKEND", "my_package.backend:MyBackend")

    Args:
        name: upper case, digits and underscores; becomes a member of `AttentionBackendEnum`.
        target: the class, or its dotted path (imported when it is first needed); None = decorate.
        before: the backend that it precedes in automatic selection; None = the class's own
            `before`, and if that is None too (or only a path is given), it runs by name only. An
            override keeps the place that the name has.

    Raises:
        ValueError: a name that cannot be one, a name reserved for automatic selection or for one of
            vLLM's, a class without a `name`, a new name that is not the class's own, what is no
            dotted path, an unknown `before`, or another `before` than an existing name has.
        TypeError: the target is neither a backend class nor a path.
    """
    text, before = _text(name), _text(before)
    check_name(text)
    if target is None:

        def decorate(cls: type[AttentionBackend]) -> type[AttentionBackend]:
            register_backend(text, cls, before=before)
            return cls

        return decorate
    overrides = text in AttentionBackendEnum
    check_target(text, target, overrides)
    declared = None if overrides or isinstance(target, str) else target.before
    _REGISTRY.put(text, target, before or declared)
    return None


def unregister_backend(name: str | AttentionBackendEnum) -> None:
    """Takes a plug-in's name out of the registry; built-in backends stay.

    Raises:
        ValueError: unknown, or built in.
    """
    _REGISTRY.remove(_text(name))


def generation() -> int:
    """A number that grows whenever the registry changes; part of the selector's cache key."""
    return _REGISTRY.generation


def automatic_backends() -> list[AttentionBackendEnum]:
    """The members that automatic selection may choose, best first."""
    return [entry.member for entry in _REGISTRY.entries().values() if entry.automatic]


def _inserted(
    entries: dict[str, _Entry], name: str, target: BackendOrPath, before: str | None
) -> dict[str, _Entry]:
    """The table with one more entry, before another or last."""
    entry = _Entry(AttentionBackendEnum._of(name), target, None, before, before is not None)
    if before is None:
        return {**entries, name: entry}
    if before not in entries:
        raise unregistered(before, entries, argument="before")
    rows = list(entries.items())
    rows.insert(list(entries).index(before), (name, entry))
    return dict(rows)


def _text(name: Any) -> Any:
    """A member's name; anything else as it is."""
    return name.name if isinstance(name, AttentionBackendEnum) else name
