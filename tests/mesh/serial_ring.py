"""A planted fault: a ring that sends keys on, waits until the next have come, and only then works.

`compile_for` compiles in a process of its own, so the fault is named as that process finds it: the
backends here are the real ones, and importing this file spoils the ring.
"""

import jax

from attnsel_jax.backends.mosaic_tpu import MosaicTpuBackend
from attnsel_jax.mesh import ring

__all__ = ["MosaicTpuBackend"]

_onward, _pair = ring.Ring.onward, ring._pair
_on_its_way = []


def onward(self, tree):
    _on_its_way[:] = [_onward(self, tree)]
    return _on_its_way[0]


def pair_that_waits(held_by, arrays, step, i, j):
    mine, told, some = _pair(held_by, arrays, step, i, j)
    if isinstance(step, jax.core.Tracer):  # within the loop: there is something to wait for
        mine, _ = jax.lax.optimization_barrier((mine, _on_its_way[0]))
    return mine, told, some


ring.Ring.onward = onward
ring._pair = pair_that_waits
