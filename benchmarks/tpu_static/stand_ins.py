"""Puts a batch's lengths into kernels, so that the compiler's schedule runs as the batch makes it.

Nothing of a batch is known when a program is compiled, yet its lengths decide how often a loop
runs. So the program first runs on the CPU with every `pallas_call` replaced by one that records its
scalar-prefetch operands and dynamic grid sizes (`recorded`). Then it is traced again, and each
kernel writes the small recorded operands into its own SMEM before its first step (`injecting`);
dynamic grids become static. Operands above `MOST` elements (page tables) stay unknown and read as
0: they only feed DMA addresses. Where a block's index comes from such a table, a block that is
fetched again at each change is counted once.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MOST = 600  # elements; each costs a store at the kernel's start
RUN = 24  # elements of an arithmetic sequence from which a loop writes them


@dataclasses.dataclass
class Recorded:
    """What one `pallas_call` was given: its scalar operands, and its grid."""

    scalars: list[np.ndarray | None] = dataclasses.field(default_factory=list)
    dynamic_sizes: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Call:
    """One `pallas_call` of a program: what is known of it before it is compiled."""

    grid: tuple[Any, ...]
    known: tuple[int, ...] = ()
    unknown: tuple[int, ...] = ()
    parallel: bool = False
    empty: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain data; `known` and `unknown` are positions of scalar operands."""
        return dataclasses.asdict(self) | {"grid": [str(size) for size in self.grid]}


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
def injecting(given: list[Recorded]) -> Iterator[list[Call]]:
    """Inside, every `pallas_call` that is traced has its recorded scalars in it."""
    calls: list[Call] = []
    real = pl.pallas_call

    def pallas_call(kernel: Any, *positional: Any, **options: Any) -> Any:
        number = len(calls)
        record = given[number] if number < len(given) else Recorded()
        sizes = iter(record.dynamic_sizes)
        grid = tuple(
            size if isinstance(size, int) else next(sizes, size) for size in _grid(options)
        )
        call = Call(grid, parallel=_is_parallel(options, grid), empty=0 in grid)
        if record.scalars and not call.empty:
            kernel, options, call = _injected(kernel, options, record, call)
        calls.append(call)
        if call.empty:
            return _nothing(options.get("out_shape", *positional[:1]), options)
        return real(kernel, *positional, **options)

    with _replaced(pl, "pallas_call", pallas_call):
        yield calls


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
            jax.debug.callback(keep, list(operands[: _num_scalars(options)]), dynamic)
            return _zeros(shapes)

        return call

    return pallas_call


def _injected(
    kernel: Any, options: dict[str, Any], record: Recorded, call: Call
) -> tuple[Any, dict[str, Any], Call]:
    """The kernel with its scalars in it, its options with room for them, and what was done."""
    spec, scalars = options["grid_spec"], record.scalars
    scratch = spec.scratch_shapes
    given = [i for i, scalar in enumerate(scalars) if scalar is not None]
    known = [i for i in given if scalars[i].size <= MOST]
    if isinstance(scratch, dict):  # scratch by name: nowhere to put them
        known = []
    call = dataclasses.replace(call, known=tuple(known), unknown=tuple(set(given) - set(known)))
    room = [pltpu.SMEM(scalars[i].shape, scalars[i].dtype) for i in known]
    options = options | {
        "grid_spec": pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=spec.num_scalar_prefetch,
            grid=call.grid,
            in_specs=spec.in_specs,
            out_specs=spec.out_specs,
            scratch_shapes=scratch if isinstance(scratch, dict) else [*scratch, *room],
        )
    }
    return (_with_scalars(kernel, scalars, known, call.grid) if known else kernel), options, call


def _with_scalars(
    kernel: Any, scalars: list[np.ndarray | None], known: list[int], grid: tuple[int, ...]
) -> Callable[..., Any]:
    """The kernel; before its first step it writes the known scalars into the last references."""
    # A zero of run time (what is unknown reads as 0) keeps the compiler from folding them in.
    given_numbers = [i for i, scalar in enumerate(scalars) if scalar is not None]
    opaque = max(given_numbers, key=lambda i: scalars[i].size)

    def body(*references: Any) -> Any:
        given, own = list(references[: -len(known)]), references[-len(known) :]

        def write() -> None:
            zero = given[opaque][(0,) * scalars[opaque].ndim].astype(jnp.int32)
            for reference, i in zip(own, known, strict=True):
                _write(reference, scalars[i], zero)

        first = True
        for axis, size in enumerate(grid):
            if size > 1:
                first = (pl.program_id(axis) == 0) & first
        if first is True:
            write()
        else:
            pl.when(first)(write)
        for reference, i in zip(own, known, strict=True):
            given[i] = reference
        return kernel(*given)

    inner = getattr(kernel, "func", kernel)  # functools.partial
    body.__name__ = getattr(inner, "__name__", "kernel")
    return body


def _write(reference: Any, value: np.ndarray, zero: jax.Array) -> None:
    """Stores a constant in SMEM; arithmetic sequences by a loop."""
    flat, at = value.reshape(-1).astype(int), 0

    def place(i: Any) -> tuple[Any, ...]:
        if value.ndim == 1:
            return (i,)
        return tuple(
            i // math.prod(value.shape[d + 1 :]) % value.shape[d] for d in range(value.ndim)
        )

    while at < len(flat):
        end = at + 1
        step = int(flat[end] - flat[at]) if end < len(flat) else 0
        while end < len(flat) and flat[end] - flat[end - 1] == step:
            end += 1
        if end - at >= RUN:
            _write_sequence(reference, place, (at, end), (int(flat[at]), step), zero)
        else:
            end = at + 1
            reference[place(at)] = (int(flat[at]) + zero).astype(reference.dtype)
        at = end


def _write_sequence(
    reference: Any, place: Any, span: tuple[int, int], values: tuple[int, int], zero: jax.Array
) -> None:
    (begin, end), (first, step) = span, values

    @pl.loop(0, end - begin)
    def _(i: jax.Array) -> None:
        reference[place(begin + i)] = (first + step * i + zero).astype(reference.dtype)


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
