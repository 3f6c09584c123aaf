"""Learns what a batch gives to kernels before they are compiled: scalar operands and grids.

Nothing of a batch is known to the compiler, yet its lengths decide how often a loop runs. So the
program first runs on the CPU with every `pallas_call` replaced by one that records its
scalar-prefetch operands and dynamic grid sizes (`recorded`). Then it is traced for the chip
(`traced_as`): dynamic grids become static, each call gets a number in its name, and all of VMEM as
its limit. The replay starts with the recorded operands in SMEM; what a kernel brings to SMEM by a
DMA of its own reads as 0.
"""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

UNKNOWN = 1  # stands for a dynamic grid size of a call that is traced and never runs
_NUMBER = re.compile(r"call(\d+)_")


@dataclasses.dataclass
class Recorded:
    """What one `pallas_call` was given: its scalar operands, and its grid."""

    scalars: list[np.ndarray] = dataclasses.field(default_factory=list)
    dynamic_sizes: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Call:
    """One `pallas_call` of a program, as it was traced for the chip.

    Attributes:
        grid: its sizes.
        parallel: whether two cores may split it.
        scalars: its scalar-prefetch operands, in order.
        is_known: whether its dynamic sizes were recorded: it runs.
    """

    grid: tuple[int, ...]
    parallel: bool
    scalars: tuple[np.ndarray, ...]
    is_known: bool

    def to_json(self) -> dict[str, Any]:
        """As plain data; a scalar operand as (shape, bytes of an element, values)."""
        scalars = [
            (list(array.shape), array.itemsize, array.reshape(-1).astype(int).tolist())
            for array in self.scalars
        ]
        return {
            "grid": list(self.grid),
            "parallel": self.parallel,
            "scalars": scalars,
            "is_known": self.is_known,
        }


def recorded(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Recorded]:
    """What each `pallas_call` of a program is given, in the order in which they are traced."""
    found: list[Recorded] = []
    leaves, structure = jax.tree.flatten(arguments)
    numbers = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]

    def dry(*given: jax.Array) -> None:
        rest = iter(given)
        full = [
            next(rest) if isinstance(leaf, np.ndarray) else jnp.zeros(leaf.shape, leaf.dtype)
            for leaf in leaves
        ]
        function(*jax.tree.unflatten(structure, full))

    with _replaced(pl, "pallas_call", _recorder(found)), _constraints_ignored():
        jax.block_until_ready(jax.jit(dry)(*numbers))
        jax.effects_barrier()
    jax.clear_caches()
    return found


@contextlib.contextmanager
def traced_as(given: list[Recorded], vmem_bytes: int) -> Iterator[list[Call]]:
    """Inside, every `pallas_call` that is traced is a call of the recorded batch.

    Args:
        given: as recorded.
        vmem_bytes: limit given to every kernel, where its own is not larger. With nearly all of
            VMEM none is left for XLA, which would otherwise move operands there beforehand where
            they fit: bytes would cross HBM that no kernel's schedule shows.
    """
    calls: list[Call] = []
    real = pl.pallas_call

    def pallas_call(kernel: Any, *positional: Any, **options: Any) -> Any:
        number = len(calls)
        record = given[number] if number < len(given) else Recorded()
        sizes = iter(record.dynamic_sizes)
        # A differentiated call is traced once more than it runs: nothing was recorded of that one.
        grid = tuple(
            size if isinstance(size, int) else next(sizes, UNKNOWN) for size in _grid(options)
        )
        dynamic = [size for size in _grid(options) if not isinstance(size, int)]
        is_known = len(dynamic) == len(record.dynamic_sizes)
        calls.append(Call(grid, _is_parallel(options, grid), tuple(record.scalars), is_known))
        if 0 in grid:
            return _nothing(options.get("out_shape", *positional[:1]), options)
        own = options.get("compiler_params") or pltpu.CompilerParams()
        limit = max(own.vmem_limit_bytes or 0, vmem_bytes)
        options |= {
            "compiler_params": dataclasses.replace(own, vmem_limit_bytes=limit),
            "name": f"call{number}_{options.get('name') or _name(kernel)}",
        } | _static(options, grid)
        return real(kernel, *positional, **options)

    with _replaced(pl, "pallas_call", pallas_call):
        yield calls


def number_of(instruction: str) -> int:
    """Which `pallas_call`, counted as they were traced, an instruction of the program is."""
    found = _NUMBER.search(instruction)
    if not found:
        raise ValueError(f"kernel is {instruction!r}, must be named call<number>_...")
    return int(found[1])


def _static(options: dict[str, Any], grid: tuple[int, ...]) -> dict[str, Any]:
    """The grid with the sizes that the batch makes it have."""
    spec = options.get("grid_spec")
    if spec is None or all(isinstance(size, int) for size in _grid(options)):
        return {}
    spec = copy.copy(spec)
    spec.grid, spec.num_dynamic_grid_bounds = grid, 0
    return {"grid_spec": spec}


def _name(kernel: Any) -> str:
    return getattr(getattr(kernel, "func", kernel), "__name__", "kernel")


def _recorder(found: list[Recorded]) -> Callable[..., Any]:
    def pallas_call(kernel: Any, *positional: Any, **options: Any) -> Any:
        record = Recorded()
        found.append(record)
        shapes = options["out_shape"] if "out_shape" in options else positional[0]

        def keep(scalars: list[Any], sizes: list[Any]) -> None:
            record.scalars = [
                scalar if scalar is None else np.asarray(scalar) for scalar in scalars
            ]
            record.dynamic_sizes = [int(size) for size in sizes]

        def call(*operands: Any) -> Any:
            dynamic = [size for size in _grid(options) if not isinstance(size, int)]
            scalars = jax.tree.leaves(operands[: _num_scalars(options)])  # None is no operand
            jax.debug.callback(keep, scalars, dynamic)
            return _zeros(shapes)

        return call

    return pallas_call


def _grid(options: dict[str, Any]) -> tuple[Any, ...]:
    spec = options.get("grid_spec")
    grid = options.get("grid", ()) if spec is None else spec.grid
    return tuple(grid) if isinstance(grid, tuple | list) else (grid,)


def _num_scalars(options: dict[str, Any]) -> int:
    return getattr(options.get("grid_spec"), "num_scalar_prefetch", 0)


def _is_parallel(options: dict[str, Any], grid: tuple[Any, ...]) -> bool:
    """Whether two cores may split the grid."""
    semantics = getattr(options.get("compiler_params"), "dimension_semantics", None) or ()
    return any(
        str(kind).lower().endswith("parallel") and size != 1
        for kind, size in zip(semantics, grid, strict=False)
    )


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        shapes,
        is_leaf=lambda leaf: hasattr(leaf, "shape"),
    )


def _nothing(shapes: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """What a kernel with an empty grid leaves: the operands it may write into, else zeros."""
    source = {out: i for i, out in options.get("input_output_aliases", {}).items()}

    def call(*operands: Any) -> Any:
        flat, structure = jax.tree.flatten(_zeros(shapes))
        kept = [operands[source[i]] if i in source else zero for i, zero in enumerate(flat)]
        return jax.tree.unflatten(structure, kept)

    return call


@contextlib.contextmanager
def _constraints_ignored() -> Iterator[None]:
    """The CPU has no memory spaces to constrain arrays to."""
    if not hasattr(pltpu, "with_memory_space_constraint"):
        yield
        return
    with _replaced(pltpu, "with_memory_space_constraint", lambda array, *_: array):
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, stand_in: Any) -> Iterator[None]:
    real = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, real)
