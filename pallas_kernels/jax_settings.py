"""JAX's settings that kernels are traced under, whatever those of the caller are.

A kernel is written for 32-bit numbers: under `jax_enable_x64` a loop's index, a constant or a sum
of lengths would be 64 bits wide, which Mosaic has not and `jax.lax` does not mix. It makes arrays
of its own (sums, lists of work), which inside a caller's `jax.shard_map` are not marked as varying
over the mesh, as its arguments are: under `check_vma=True` no loop would take both.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax._src import config as _config  # what `jax.shard_map(check_vma=...)` sets; not public

P = ParamSpec("P")
T = TypeVar("T")


def under_own_settings(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run or traced under JAX's default rules, and with no check of mesh axes.

    A kernel's door has it, and so has each rule of a `jax.custom_vjp`, which is traced when the
    caller differentiates, long after the door was left. Where arguments vary over manual mesh axes,
    all results do. They are marked so at the end, which is wrong under differentiation (the
    mark's transpose is a sum over devices): what is differentiated by JAX takes
    `under_default_rules`.
    """
    under_rules = under_default_rules(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        leaves, tree = jax.tree.flatten((args, kwargs))
        axes = varying_axes(leaves)
        if not axes:
            return under_rules(*args, **kwargs)
        which = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        def unmarked(arrays: list[jax.Array]) -> T:
            given = dict(zip(which, map(_without_mark, arrays), strict=True))
            args, kwargs = tree.unflatten(given.get(i, leaf) for i, leaf in enumerate(leaves))
            return under_rules(*args, **kwargs)

        with _config._check_vma(False):
            results = jax.jit(unmarked)([leaves[i] for i in which])
        return jax.tree.map(lambda x: _marked(x, axes), results)

    return call


def under_default_rules(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run or traced under JAX's default number and promotion rules.

    Where arguments vary over manual mesh axes, all do: gradients of those that did not are summed
    over the axes, as those of an array that devices share must be.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        axes = varying_axes(jax.tree.leaves((args, kwargs)))
        with contextlib.ExitStack() as settings:
            settings.enter_context(jax.enable_x64(False))
            settings.enter_context(jax.numpy_dtype_promotion("standard"))
            settings.enter_context(jax.numpy_rank_promotion("allow"))
            settings.enter_context(jax.default_matmul_precision(None))
            args, kwargs = jax.tree.map(lambda x: _marked(x, axes), (args, kwargs))
            return function(*args, **kwargs)

    return call


def unchecked(function: Callable[P, T]) -> Callable[P, T]:
    """The function under the same rules, and with no check of mesh axes.

    For what JAX traces again after the door was left, as it does under a `jax.vmap`.
    """
    under_rules = under_default_rules(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _config._check_vma(False):
            return under_rules(*args, **kwargs)

    return call


def varying_axes(leaves: list[Any]) -> frozenset[str]:
    """The manual mesh axes that some array of a checked `shard_map` varies over."""
    if not _config._check_vma.value:
        return frozenset()
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def _marked(x: Any, axes: frozenset[str]) -> Any:
    """An array that varies over the axes, too; anything else as it is."""
    if not isinstance(x, jax.Array):
        return x
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _without_mark(array: jax.Array) -> jax.Array:
    """The same array, of no axes: what is computed with no check has none."""
    return _without_mark_p().bind(array)


@functools.cache
def _without_mark_p() -> Any:
    """A primitive of its own: others take their argument's axes when JAX evaluates them again."""
    from jax.extend.core import Primitive  # at first use: it imports Pallas, some 40 ms
    from jax.interpreters import batching, mlir

    primitive = Primitive("without_mark")
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x.update(manual_axis_type=type(x.manual_axis_type)()))
    mlir.register_lowering(primitive, lambda _, x: [x])
    batching.defvectorized(primitive)
    return primitive
