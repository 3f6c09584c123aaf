"""The rivals: jax.nn's attention, and PyTorch's where it is installed."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from attnsel_jax.bench.race import Inputs, Rival, jitted_call
from attnsel_jax.bench.timing import Call
from attnsel_jax.platforms import Device


def jax_nn_dense(*, gradients: bool) -> Rival:
    """`jax.nn.dot_product_attention`, causal; with gradients through its own rules."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    function = with_gradients(attend) if gradients else attend
    return Rival("jax.nn", lambda sets: jitted_call(function, sets))


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """q, k, v, dout -> dq, dk, dv."""

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        return jax.vjp(attend, q, k, v)[1](dout)

    return backward


def jax_nn_gathered() -> Rival:
    """One jit: gathers every sequence's pages, then `jax.nn.dot_product_attention`."""

    def attend(
        q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, kv_lens: jax.Array, **batch: Any
    ) -> jax.Array:
        num_seqs, _, head_dim = q.shape
        k, v = (
            pages[page_table].reshape(num_seqs, -1, pages.shape[2], head_dim) for pages in kv_pages
        )
        out = jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=kv_lens)
        return out[:, 0]

    return Rival("gather + jax.nn", lambda sets: jitted_call(attend, sets))


def torch_dense(*, gradients: bool) -> Rival:
    """`torch.nn.functional.scaled_dot_product_attention`, (B, H, T, D) contiguous, same cores."""

    def prepare(sets: Sequence[Inputs]) -> Call:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        attend = torch.nn.functional.scaled_dot_product_attention

        def tensor(array: np.ndarray) -> Any:
            return torch.from_numpy(np.ascontiguousarray(np.swapaxes(array, 1, 2)))

        placed = [{name: tensor(array) for name, array in inputs.items()} for inputs in sets]
        if not gradients:
            return lambda number: _swapped(attend(*placed[number].values(), is_causal=True))

        def forward_and_backward(number: int) -> Any:
            inputs = dict(placed[number])
            dout = inputs.pop("dout")
            leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
            grads = torch.autograd.grad(attend(*leaves, is_causal=True), leaves, dout)
            return tuple(map(_swapped, grads))

        return forward_and_backward

    return Rival("torch", prepare, _torch_missing)


def _swapped(tensor: Any) -> Any:
    """(B, T, H, D), a view: no copy is timed."""
    return tensor.transpose(1, 2)


def _torch_missing(device: Device) -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "not installed (pip install torch)"
    return None if device.platform == "cpu" else f"it is timed on a cpu only, not on {device}"
