"""Teaches the TPU interpreter to look through bitcasts and reshapes, and to let devices go alone.

`fill_gaps()` makes `ref.bitcast(dtype).reshape(shape)[...]` readable, and `ref.bitcast(dtype)[...]`
writable, as Mosaic compiles it: numbers narrower than 32 bits that lie in one sublane are one word,
the first of them lowest. `pltpu.pack_elementwise` makes such words of two bfloat16. And under
`jax.shard_map` it lets a device begin and end a kernel when it likes: as jax has it all devices
meet before and after each kernel, so a kernel that only some of them run (in a ring, a piece of
keys that this device's queries do not see) waits for ever. It reaches into `jax._src`:
`tests/mosaic_tpu` and `tests/mesh` say loudly when something has moved.
"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir
from jax._src.pallas.mosaic import primitives
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.pallas.mosaic.interpret import utils
from jax._src.state import types

_get, _swap = interpreter.get, interpreter.swap
_enter = interpreter._initialize_shared_memory
_entering = threading.Lock()
_VIEWS = (types.BitcastTransform, types.ReshapeTransform)


def fill_gaps() -> None:
    """Replaces the interpreter's reads, writes and meeting of devices; once is enough."""
    interpreter.get, interpreter.swap = get, swap
    in_two = mlir.lower_fun(_packed, multiple_results=False)
    mlir.register_lowering(primitives.pack_elementwise_p, in_two, platform="cpu")
    interpreter._initialize_shared_memory = enter


class _Inside:
    """Stands for a barrier: counts the devices that are inside a kernel; the last clears up."""

    def __init__(self):
        self.count = 0

    def wait(self) -> None:
        with _entering:
            self.count -= 1
            if self.count == 0:
                interpreter._clear_shared_memory()

    def abort(self) -> None:
        """Nobody waits."""


class _Open:
    """Stands for a barrier at which nobody waits: no kernel here writes to another device."""

    def wait(self) -> None:
        """Goes on."""

    abort = wait


@functools.wraps(_enter)
def enter(token, device_id, *args, **kwargs):
    """As the interpreter does, and what the device's last kernel visited is forgotten."""
    with _entering:
        token = _enter(token, device_id, *args, **kwargs)
        memory = interpreter._get_shared_memory()
        if not isinstance(memory.clean_up_barrier, _Inside):
            memory.barrier, memory.clean_up_barrier = _Open(), _Inside()
        memory.clean_up_barrier.count += 1
        for (device, _), visited in memory.output_ranges.items():
            if device == int(device_id):
                visited.clear()
    return token


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


@functools.wraps(_swap)
def swap(token, device_id, local_core_id, memory_space, buffer_id, transforms, val, mask, **kwargs):
    """Writes words as the numbers that they are: reads all below the bitcast, and puts it back."""
    below = next((i for i, t in enumerate(transforms) if isinstance(t, _VIEWS)), None)
    place = (device_id, local_core_id, memory_space, buffer_id)
    if below is None:
        return _swap(token, *place, transforms, val, mask, **kwargs)
    bitcast, index = transforms[below:]
    token, numbers = _get(token, *place, transforms[:below], **kwargs)
    words = _words(np.asarray(numbers), np.dtype(bitcast.dtype))
    there = utils.to_range((jax.tree.map(int, index),))
    old = words[there].copy()
    words[there] = np.asarray(val)
    numbers = _numbers(words, numbers)
    token, _ = _swap(token, *place, transforms[:below], numbers, None, **kwargs)
    return token, old


def _packed(low, high, *, packed_dtype):
    """Two arrays in 32 bits as one of words."""
    low, high = (
        jax.lax.bitcast_convert_type(x.astype(packed_dtype), jnp.uint16).astype(jnp.uint32)
        for x in (low, high)
    )
    return low | high << 16


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


def _numbers(words: np.ndarray, like: np.ndarray) -> np.ndarray:
    """What `_words` made words of."""
    bits = 8 * like.dtype.itemsize
    shifts = np.arange(words.dtype.itemsize // like.dtype.itemsize, dtype=np.uint64) * bits
    parts = words.view(f"u{words.dtype.itemsize}")[..., None, :] >> shifts[:, None]
    return parts.astype(f"u{like.dtype.itemsize}").reshape(like.shape).view(like.dtype)
