"""Teaches the TPU interpreter to read through bitcasts and reshapes of references.

`fill_gaps()` makes `ref.bitcast(dtype).reshape(shape)[...]` readable, as Mosaic compiles it:
numbers narrower than 32 bits that lie in one sublane are one word, the first of them lowest. It
reaches into `jax._src`: `tests/mosaic_tpu` says loudly when something has moved.
"""

import functools

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret import utils
from jax._src.state import types

_get = interpreter.get
_VIEWS = (types.BitcastTransform, types.ReshapeTransform)


def fill_gaps() -> None:
    """Replaces the interpreter's read; once is enough."""
    interpreter.get = get


@functools.wraps(_get)
def get(token, device_id, local_core_id, memory_space, buffer_id, transforms, *args, **kwargs):
    """Reads what lies below the first view as the interpreter does, and looks through the rest."""
    below = next((i for i, t in enumerate(transforms) if isinstance(t, _VIEWS)), len(transforms))
    token, values = _get(
        token, device_id, local_core_id, memory_space, buffer_id, transforms[:below], *args,
        **kwargs,
    )  # fmt: skip
    for transform in transforms[below:]:
        values = _seen_through(transform, np.asarray(values))
    return token, values


def _seen_through(transform, values: np.ndarray) -> np.ndarray:
    if isinstance(transform, types.BitcastTransform):
        return _words(values, np.dtype(transform.dtype))
    if isinstance(transform, types.ReshapeTransform):
        return values.reshape(transform.shape)
    return values[utils.to_range((jax.tree.map(int, transform),))]


def _words(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Neighbours along the last dimension but one as one wider number each."""
    packed = dtype.itemsize // values.dtype.itemsize
    *outer, lines, lanes = values.shape
    bits = values.view(f"u{values.dtype.itemsize}").reshape(*outer, lines // packed, packed, lanes)
    shifts = np.arange(packed, dtype=np.uint64) * (8 * values.dtype.itemsize)
    words = np.bitwise_or.reduce(bits.astype(np.uint64) << shifts[:, None], axis=-2)
    return words.astype(f"u{dtype.itemsize}").view(dtype)
