"""A fault in each phase of paged attention's TPU kernel, and the checks that find it.

Each fault is planted in the kernel itself, and must be found in the tokens of every computation
that has the phase: a decode, a few tokens, a prompt. Faults that can be told apart are planted
together: a trace takes most of a test's time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tpu_paged import batch
from tpu_interpreter import tpu_interpreter

from attnsel_jax.compare.deviations import deviation
from attnsel_jax.compare.expected import expected
from attnsel_jax.compare.kernel_runs import run
from pallas_kernels.paged import (
    mosaic_tpu,
    mosaic_tpu_decode,
    mosaic_tpu_prefill,
    mosaic_tpu_prompt,
    mosaic_tpu_softmax,
    mosaic_tpu_write,
)
from pallas_kernels.paged.mosaic_tpu_geometry import Masks
from pallas_kernels.paged.mosaic_tpu_tiles import Tiles
from pallas_kernels.paged.mosaic_tpu_walk import Walk

pytestmark = pytest.mark.once

Q_LENS, KV_LENS = (1, 3, 66), (30, 21, 75)
SPANS = {"decode": slice(0, 1), "few": slice(1, 4), "prompt": slice(4, 70)}
# Without a prompt, for what all computations share: a smaller kernel.
FEW = {"q_lens": (1, 9), "kv_lens": (30, 21)}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several blocks each, and nothing that was traced without the fault."""
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_: Tiles(128, 32, 16, 3))
    jax.clear_caches()


def ran(q_lens=Q_LENS, kv_lens=KV_LENS, **options):
    """What the faulty kernel says, and what is expected."""
    arguments = batch(q_lens, kv_lens, pad_tokens=0, **options)
    with tpu_interpreter("v5e"):
        results = run(mosaic_tpu.paged_attention, "paged", arguments, layout="side_by_side")
    return results, expected("paged", arguments)


def found_in(*quantities, **options):
    """The spans where one of these quantities is outside its budget; the cache is one."""
    found = ran(**options)
    return set().union(*(spans_outside(quantity, *found) for quantity in quantities))


def spans_outside(quantity, results, answers):
    """The spans where a quantity is outside its budget."""
    if quantity == "kv_pages":
        return (
            set() if deviation(quantity, results[quantity], answers[quantity]).passed else {"cache"}
        )
    outside = deviation(quantity, results[quantity], answers[quantity]).map > 1
    return {name for name, tokens in SPANS.items() if outside[tokens].any()}


def heads_outside(quantity, results, answers):
    """For each span, the query heads in which a quantity is outside its budget."""
    outside = deviation(quantity, results[quantity], answers[quantity]).map > 1
    return [set(np.flatnonzero(outside[tokens].any(axis=0))) for tokens in SPANS.values()]


def limits(change):
    """`Masks.limits` with (first, last) changed."""
    true = Masks.limits

    def faulty(self, q_pos, start, stop):
        return change(*true(self, q_pos, start, stop))

    return Masks, "limits", faulty


ALL = set(SPANS)
FAULTS = {
    "one key too far": (limits(lambda first, last: (first, last + 1)), {}),
    "window one too long": (limits(lambda first, last: (first - 1, last)), {"sliding_window": 9}),
}


@pytest.mark.parametrize(
    "fault", ["window one too long", pytest.param("one key too far", marks=pytest.mark.sweep)]
)
def test_a_wrong_mask_is_found_in_every_computation(monkeypatch, fault):
    planted, options = FAULTS[fault]
    monkeypatch.setattr(*planted)
    assert found_in("lse", **options) == ALL


# A fault of each number of a head, each in heads of its own: two query heads to a kv head, which
# have one factor; the last two have no fault.
FACTOR, SLOPE, SINK, K_SCALE, V_SCALE, NONE = {0, 1}, {2}, {3}, {4, 5}, {6}, {8, 9}


def test_a_wrong_number_of_a_head_is_found_in_every_computation(monkeypatch):
    true = mosaic_tpu._per_head

    def faulty(*arguments, **more):
        factor, v_factor, slope, sink, *rest = true(*arguments, **more)
        factor = factor.at[np.array([*FACTOR])].multiply(1.03)
        factor = factor.at[np.array([*K_SCALE])].set(factor[min(V_SCALE)])
        slope = slope.at[np.array([*SLOPE])].multiply(-1)
        sink = sink.at[np.array([*SINK])].add(-1)
        v_factor = v_factor.at[np.array([*V_SCALE])].set(1)
        return mosaic_tpu.PerHead(factor, v_factor, slope, sink, *rest)

    monkeypatch.setattr(mosaic_tpu, "_per_head", faulty)
    options = {"cache_dtype": "int8", "scales": "head", "alibi": True, "sinks": True}
    found = ran(heads=(10, 5), **options)
    assert heads_outside("lse", *found) == [FACTOR | SLOPE | SINK | K_SCALE] * len(SPANS)
    assert all(heads >= V_SCALE and not heads & NONE for heads in heads_outside("out", *found))


def test_a_wrong_end_is_found_in_every_computation(monkeypatch):
    """The sum of the weights, seen in outputs; an lse in base 2."""
    true = mosaic_tpu_softmax.finish

    def faulty(m, l, *numbers):
        return true(m, l * 1.02, *numbers)[0], true(m, l, *numbers)[1] / mosaic_tpu_softmax.LN2

    monkeypatch.setattr(mosaic_tpu_softmax, "finish", faulty)
    found = ran()
    assert spans_outside("out", *found) == spans_outside("lse", *found) == ALL


@pytest.mark.sweep
def test_a_decode_s_token_at_another_s_place_is_found(monkeypatch):
    """Every token but the first of its sequence sees too few keys."""
    monkeypatch.setattr(mosaic_tpu_decode, "_place", lambda geometry: 0)
    results, answers = ran((2, 4, 4, 4), (30, 21, 9, 4))
    outside = deviation("lse", results["lse"], answers["lse"]).map > 1
    found = set(np.flatnonzero(outside.any(axis=1)))
    assert found >= {1, 5, 9, 13}
    assert not found & {0, 2, 6, 10}


@pytest.mark.sweep
def test_no_soft_cap_is_found(monkeypatch):
    true = mosaic_tpu_softmax.join
    monkeypatch.setattr(
        mosaic_tpu_softmax,
        "join",
        lambda *x, soft_cap, slope: true(*x, soft_cap=None, slope=slope) * soft_cap,
    )
    assert found_in("lse", soft_cap=3.0) == ALL


def test_values_that_nobody_wrote_are_found(monkeypatch):
    for module in (mosaic_tpu_decode, mosaic_tpu_prefill, mosaic_tpu_prompt):
        monkeypatch.setattr(module, "rows_kept", lambda v, kept: v)
    assert found_in("out") == ALL


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("_stored", lambda values, scale, dtype: values.astype(dtype)),
        pytest.param(
            "_run_lengths", lambda slots, *_: jnp.full_like(slots, 2), marks=pytest.mark.sweep
        ),
    ],
    ids=["unscaled", "runs"],
)
def test_a_wrong_write_is_found(monkeypatch, name, faulty):
    monkeypatch.setattr(mosaic_tpu_write, name, faulty)
    assert found_in("kv_pages", **FEW, cache_dtype="int8", scales="tensor") == {"cache"}


WAITS = {
    "block": (Walk, "wait", FEW),
    "step": (Walk, "wait_step", FEW),
    "window": (mosaic_tpu_write._Ring, "free_one", FEW),
    "group": (mosaic_tpu_write._Ring, "_await_group", {"q_lens": (1,) * 8, "kv_lens": (9,) * 8}),
}


# One of reading and one of writing on each push.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("step", "window") else pytest.mark.sweep)
        for name in WAITS
    ],
)
def test_a_copy_that_nobody_waits_for_is_found(monkeypatch, name):
    """A race, a semaphore that is not 0 at the end, or numbers that had not come."""
    *wait, lens = WAITS[name]
    true = getattr(*wait)

    def faulty(self, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jax.experimental.pallas.tpu.make_async_copy", lambda *_: _NoCopy())
            return true(self, *arguments)

    monkeypatch.setattr(*wait, faulty)
    try:
        results, answers = ran(**lens)
    except (jax.errors.JaxRuntimeError, AssertionError, ValueError) as error:
        assert any(word in str(error) for word in ("RACE DETECTED", "emaphore"))  # noqa: PT017
        return
    assert not deviation("out", results["out"], answers["out"]).passed


class _NoCopy:
    def start(self):
        """Starts nothing."""

    def wait(self):
        """Waits for nothing."""


@pytest.mark.sweep
def test_the_checks_pass_without_a_fault():
    everything = {"sliding_window": 9, "sinks": True, "soft_cap": 3.0, "alibi": True}
    assert found_in("out", "lse", "kv_pages", **everything) == set()
