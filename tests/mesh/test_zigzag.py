"""Zig-zag order balances causal work: the logits that each device's queries see, counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh, put

from attnsel_jax.mesh import ring

N, LENGTH = 4, 128


def seen_logits(monkeypatch, zigzag):
    """Logits seen, [device, whose keys]: those of the ring's own meetings.

    Queries and keys hold their positions, so that the counting kernel knows what lies where: the
    count is of what causality shows, not of what the ring says of it; that the ring says the same
    is held against it.
    """
    on, met = mesh(seq=N), []

    def record(*meeting):  # by several threads: one append is safe
        met.append([int(x) for x in meeting])

    def kernel(arrays):
        q, k = arrays["q"][0, :, 0, :1], arrays["k"][0, :, 0, :1]
        by_value = jnp.sum(q >= k.T)
        rows = jnp.arange(len(q))[:, None] + arrays["q_offset"][0]
        by_offset = jnp.sum(jnp.arange(len(k)) <= rows)
        jax.debug.callback(record, jax.lax.axis_index("seq"), k[0, 0], by_value, by_offset)
        return arrays["q"], jnp.zeros(arrays["q"].shape[:3])

    made = ring.Ring
    monkeypatch.setattr(ring, "Ring", lambda *fields: made(*fields[:-1], zigzag))

    def attend(q, k):
        arrays = {"q": q, "k": k, "v": k}
        return ring.ring_attention(kernel, arrays, {"causal": True}, "seq", N)[0]

    x = np.arange(LENGTH, dtype=np.float32).reshape(1, LENGTH, 1, 1)
    cut = jax.P(None, "seq")
    over = jax.shard_map(attend, mesh=on, in_specs=(cut, cut), out_specs=cut, check_vma=False)
    jax.block_until_ready(jax.jit(over)(*[put(x, on, None, "seq")] * 2))
    jax.effects_barrier()
    seen = np.zeros((N, N), np.int64)
    for device, key, by_value, by_offset in met:
        assert by_value == by_offset
        part = key * 2 * N // LENGTH
        seen[device, min(part, 2 * N - 1 - part) if zigzag else part // 2] += by_value
    return seen


@pytest.mark.parametrize("zigzag", [True, False], ids=["zig-zag", "natural"])
def test_what_each_device_sees(zigzag, monkeypatch):
    seen = seen_logits(monkeypatch, zigzag)
    total = LENGTH * (LENGTH + 1) // 2
    assert seen.sum() == total  # every visible pair is met once
    shares = seen.sum(axis=1) / total * N
    # A step is over when its slowest device is: at step r, device d meets the keys of d - r.
    devices = np.arange(N)
    slowest = sum(seen[devices, (devices - step) % N].max() for step in range(N)) / total * N
    if zigzag:
        np.testing.assert_allclose(shares, 1, atol=0.02)
        assert slowest < 1.05
    else:
        assert shares.max() > 1.7
        assert shares.min() < 0.3
        assert slowest > 1.7


def test_causal_calls_go_in_zig_zag_order_and_others_do_not(monkeypatch):
    made, orders = ring.Ring, []
    monkeypatch.setattr(ring, "Ring", lambda *fields: orders.append(fields[-1]) or made(*fields))
    on, cut = mesh(False, seq=N), jax.P(None, "seq")
    for length, causal in ((LENGTH, True), (LENGTH, False), (5 * N, True)):
        x = jnp.zeros((1, length, 1, 1))

        def attend(q, causal=causal):
            kernel = lambda arrays: (arrays["q"], arrays["q"][..., 0])  # noqa: E731
            return ring.ring_attention(
                kernel, {"q": q, "k": q, "v": q}, {"causal": causal}, "seq", N
            )[0]

        over = jax.shard_map(attend, mesh=on, in_specs=cut, out_specs=cut, check_vma=False)
        jax.eval_shape(over, x)
    assert orders == [True, False, False]
