"""Faults planted in the dense TPU kernels and their backward: each one is found.

The right kernel passes every problem here; with any one fault the problem that is named beside it
fails, in a quantity that the fault touches.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from dense_kernels import CUT, SHAPE, compared, problem, use

from attnsel_jax.compare.comparison import FAIL, PASS
from attnsel_jax.problems import Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from pallas_kernels.dense import mosaic_tpu, mosaic_tpu_backward, mosaic_tpu_forward
from pallas_kernels.dense import mosaic_tpu_logits as logits
from pallas_kernels.dense import mosaic_tpu_schedule as schedule
from pallas_kernels.dense.mosaic_tpu_tiles import Tiles

pytestmark = pytest.mark.once

SMALL = {"q_len": 140, "heads": (2, 1)}


def nearly_whole(rng, **options):
    """Inputs of four tiles, of each of which the mask hides a key from all but one query."""
    mask = np.ones((1, 1, 256, 256), bool)
    mask[:, :, 1:, 100::128] = False
    return dense_inputs(rng, **options | {"q_len": 256}) | {"mask": mask}


PROBLEMS = {
    "causal": problem("causal", causal=True, **SMALL),
    "gradients by causality": problem(
        "gradients by causality", causal=True, gradients=True, **SMALL | {"q_len": 128}
    ),
    "window": problem("window", causal=True, sliding_window=40, **SMALL),
    "lengths": problem("lengths", batch=2, q_lens=(140, 90), kv_lens=(133, 140), **SMALL),
    "segments": problem("segments", segments=3, causal=True, **SMALL),
    "mask": problem("mask", masked=True, **SMALL),
    "mask of nearly whole tiles": Problem("nearly", "dense", "", nearly_whole, SHAPE | SMALL),
    "sinks": problem("sinks", sinks=True, causal=True, **SMALL),
    "gradients": problem(
        "gradients", causal=True, soft_cap=8.0, sinks=True, alibi=True, segments=2,
        bias=(False, True, True, True), gradients=True, **SMALL,
    ),
    "lengths, gradients": problem(
        "lengths, gradients", batch=2, q_lens=(140, 90), kv_lens=(133, 140), gradients=True, **SMALL
    ),
}  # fmt: skip


def changed(module, name, change):
    """A fault: `change(what it is, *arguments)` in place of the function of that name."""

    def plant(monkeypatch):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: change(real, *given))

    return plant


def other_static(module, name, **fields):
    """A fault: the function is given other static facts, each made of the call's."""

    def change(real, static, *rest):
        made = {field: of(static) for field, of in fields.items()}
        return real(dataclasses.replace(static, **made), *rest)

    return changed(module, name, change)


def forward_made(change):
    """A fault in what the forward kernel gives, or is given."""
    return changed(mosaic_tpu_forward, "forward", change)


def backward_made(change):
    """A fault in what the backward kernel gives, or is given."""
    return changed(mosaic_tpu_backward, "backward", change)


def gradients_made(change):
    """A fault in the gradients, or in what they are made of."""
    return changed(mosaic_tpu, "_gradients", change)


def without_cap_slope(real, *given):
    """The derivative of the soft cap is taken for 1."""
    finished, slope = real(*given)
    return finished, None if slope is None else jnp.ones_like(slope)


def one_key_more(real, static, extras, at):
    """The key after the last one is seen."""
    offset, q_len, kv_len = at.facts
    return real(static, extras, at._replace(facts=(offset, q_len, kv_len + 1)))


def mask_moved(real, static, extras, at):
    """A query sees the key after its own, and not the first of its window."""
    return real(static, extras, at._replace(kv_index=at.kv_index - 1))


def begun_before(real, sums, start, size, first):
    """What a sum begins with is what was there."""
    return real(sums, start, size, first & False)


def everything_used(real, *given):
    """Keys that nobody sees are not set to 0."""
    used = real(*given)
    return used._replace(start=jnp.int32(0), stop=jnp.int32(1 << 20), some=None)


def last_tile_lost(real, xp, met):
    """A row of tiles ends one tile early."""
    return xp.maximum(real(xp, met) - 1, 0)


def never_masked(real, *given):
    """Tiles that some queries see are taken for tiles that all see."""
    some, _ = real(*given)
    return some, some


def window_of(change):
    """Another left side of the window."""
    return lambda static: (change(static.sliding_window[0]), static.sliding_window[1])


# (fault, how it is planted, the problem that finds it, a quantity that it spoils)
FAULTS = (
    ("mask edge", changed(logits, "seen", mask_moved), "causal", "out"),
    ("rows begin with what was there", changed(mosaic_tpu_forward, "before", begun_before),
     "causal", "out"),
    ("gradients begin with what was there", changed(mosaic_tpu_backward, "before", begun_before),
     "gradients by causality", "grad v"),
    ("window one too wide", other_static(logits, "seen", sliding_window=window_of(lambda w: w + 1)),
     "window", "out"),
    ("window one too narrow",
     other_static(logits, "seen", sliding_window=window_of(lambda w: w - 1)), "window", "out"),
    ("one key too many", changed(logits, "seen", one_key_more), "lengths", "out"),
    ("a tile lost", changed(schedule, "_last", last_tile_lost), "causal", "out"),
    ("free tiles left over are lost", changed(schedule, "_surplus",
     lambda real, xp, free, together: 0 * free), "causal", "out"),
    ("no mask", changed(schedule, "meetings", never_masked), "causal", "out"),
    ("NaN of unseen keys", changed(logits, "used", everything_used), "lengths", "out"),
    ("segments not asked", changed(logits, "seen", lambda real, static, extras, at: real(
        static, extras._replace(q_segments=None), at)), "segments", "out"),
    ("mask not asked", changed(logits, "seen", lambda real, static, extras, at: real(
        static, extras._replace(mask=None), at)), "mask", "out"),
    ("a mask's tiles are whole or empty", changed(schedule, "_in_tiles", never_masked),
     "mask of nearly whole tiles", "out"),
    ("no sink", forward_made(lambda real, static, x, *rest: real(
        static, x._replace(sinks=None), *rest)), "sinks", "out"),
    ("lse in base 2", forward_made(lambda real, *given: tuple(
        y * f for y, f in zip(real(*given), (1, logits.LOG2E), strict=True))), "causal", "lse"),
    ("no derivative of the cap", changed(logits, "finished", without_cap_slope),
     "gradients", "grad q"),
    ("the sinks' gradient has the other sign", gradients_made(lambda real, *given: (
        lambda found: found._replace(sinks=-found.sinks))(real(*given))),
     "gradients", "grad sinks"),
    ("the slopes' gradient is 0", backward_made(lambda real, *given: (
        lambda found: found._replace(slopes=0 * found.slopes))(real(*given))),
     "gradients", "grad alibi_slopes"),
    ("lse has no gradient", gradients_made(lambda real, *given: real(*given[:-1], 0 * given[-1])),
     "gradients", "grad k"),
    ("no delta", backward_made(lambda real, static, x, *rest: real(
        static, x._replace(delta=0 * x.delta), *rest)), "gradients", "grad bias"),
    ("lse of another query", backward_made(lambda real, static, x, *rest: real(
        static, x._replace(lse=jnp.roll(x.lse, 1, -1)), *rest)), "gradients", "grad v"),
    ("NaN of unseen keys, backward", changed(logits, "used", everything_used),
     "lengths, gradients", "grad q"),
    ("queries that do not exist", changed(mosaic_tpu, "_counted", lambda real, exists, x, fill: x),
     "lengths, gradients", "grad k"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _cut_tiles(monkeypatch):
    use(CUT, monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_right_kernel_passes(name):
    row = compared(PROBLEMS[name])
    assert row.verdict == PASS, str(row)


# What another fault's like shows too, on demand.
ON_DEMAND = (
    "mask edge", "mask not asked", "window one too narrow", "segments not asked", "no sink",
    "lse in base 2",
    "no derivative of the cap", "the sinks' gradient has the other sign",
    "the slopes' gradient is 0", "lse of another query", "NaN of unseen keys",
)  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "plant", "name", "quantity"),
    [
        pytest.param(*fault, id=fault[0], marks=pytest.mark.sweep if fault[0] in ON_DEMAND else ())
        for fault in FAULTS
    ],
)
def test_a_planted_fault_is_found(fault, plant, name, quantity, monkeypatch):
    plant(monkeypatch)
    row = compared(PROBLEMS[name])
    assert row.verdict == FAIL, str(row)
    assert not row.deviation(quantity).passed, str(row)


def test_a_fault_on_the_diagonal_is_found(monkeypatch):
    """Four tiles on it, in one run; a query that sees one key less, and one key more."""
    use(Tiles(128, 128, 128, 512, 512), monkeypatch)
    case = problem("diagonal", causal=True, q_len=512, heads=(1, 1))
    assert compared(case).verdict == PASS
    real = logits.below_diagonal
    for less in (1, -1):
        monkeypatch.setattr(
            logits, "below_diagonal", lambda x, n=less: jnp.roll(real(jnp.roll(x, -n, 1)), n, 1)
        )
        assert compared(case).verdict == FAIL
