"""A fault in each phase of paged attention's TPU kernel, and the checks that find it.

Each fault is planted in the kernel itself, and must be found in the tokens of every computation
that has the phase: a decode, a few tokens, a prompt.
"""

import jax
import jax.numpy as jnp
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

pytestmark = pytest.mark.planted

Q_LENS, KV_LENS = (1, 3, 66), (30, 21, 75)
SPANS = {"decode": slice(0, 1), "few": slice(1, 4), "prompt": slice(4, 70)}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several blocks each, and nothing that was traced without the fault."""
    monkeypatch.setattr(mosaic_tpu, "tiles_for", lambda *_: Tiles(128, 16, 16, 2))
    jax.clear_caches()


def found_in(*quantities, **options):
    """The spans where one of these quantities is outside its budget; the cache is one."""
    arguments = batch(Q_LENS, KV_LENS, pad_tokens=0, **options)
    with tpu_interpreter("v5e"):
        results = run(mosaic_tpu.paged_attention, "paged", arguments, layout="side_by_side")
    answers = expected("paged", arguments)
    return set().union(*(_outside(name, results, answers[name]) for name in quantities))


def _outside(quantity, results, answer):
    if quantity == "kv_pages":
        return set() if deviation(quantity, results[quantity], answer).passed else {"cache"}
    outside = deviation(quantity, results[quantity], answer).map.max(axis=1) > 1
    return {name for name, tokens in SPANS.items() if outside[tokens].any()}


def limits(change):
    """`Masks.limits` with (first, last) changed."""
    true = Masks.limits

    def faulty(self, q_pos, start, stop):
        return change(*true(self, q_pos, start, stop))

    return Masks, "limits", faulty


def per_head(**changes):
    """`_per_head` with some numbers changed."""
    true = mosaic_tpu._per_head

    def faulty(*arguments):
        numbers = true(*arguments)
        changed = {name: f(getattr(numbers, name)) for name, f in changes.items()}
        return numbers._replace(**changed)

    return mosaic_tpu, "_per_head", faulty


def in_finish(change):
    """`softmax.finish` with its arguments or its results changed."""
    true = mosaic_tpu_softmax.finish
    return mosaic_tpu_softmax, "finish", lambda *arguments: change(true, *arguments)


ALL = set(SPANS)
FAULTS = {
    "one key too far": (limits(lambda first, last: (first, last + 1)), "lse", {}),
    "window one too long": (
        limits(lambda first, last: (first - 1, last)),
        "lse",
        {"sliding_window": 9},
    ),
    "scale": (per_head(factor=lambda x: x * 1.03), "lse", {}),
    "scale of keys": (
        per_head(factor=lambda x: x * 0 + x[0]),
        "lse",
        {"cache_dtype": "int8", "scales": "head"},
    ),
    "scale of values": (
        per_head(v_factor=lambda x: x * 0 + 1),
        "out",
        {"cache_dtype": "int8", "scales": "head"},
    ),
    "ALiBi": (per_head(slope=lambda x: -x), "lse", {"alibi": True}),
    "sink": (per_head(sink=lambda x: x - 1), "lse", {"sinks": True}),
    "lse in base 2": (
        in_finish(lambda true, *x: (true(*x)[0], true(*x)[1] / mosaic_tpu_softmax.LN2)),
        "lse",
        {},
    ),
    "sum of weights": (
        in_finish(lambda true, m, l, *x: true(m, l * 1.02, *x)),
        "out",
        {},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_in_every_computation(monkeypatch, fault):
    planted, quantity, options = FAULTS[fault]
    monkeypatch.setattr(*planted)
    assert found_in(quantity, **options) == ALL


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
        ("_run_lengths", lambda slots, *_: jnp.full_like(slots, 2)),
    ],
    ids=["unscaled", "runs"],
)
def test_a_wrong_write_is_found(monkeypatch, name, faulty):
    monkeypatch.setattr(mosaic_tpu_write, name, faulty)
    assert found_in("kv_pages", cache_dtype="int8", scales="tensor") == {"cache"}


@pytest.mark.parametrize("wait", [(Walk, "wait"), (mosaic_tpu_write._Ring, "free_one")])
def test_a_copy_that_nobody_waits_for_is_found(monkeypatch, wait):
    """A race, a semaphore that is not 0 at the end, or numbers that had not come."""
    true = getattr(*wait)

    def faulty(self, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jax.experimental.pallas.tpu.make_async_copy", lambda *_: _NoCopy())
            return true(self, *arguments)

    monkeypatch.setattr(*wait, faulty)
    try:
        found = found_in("out")
    except (jax.errors.JaxRuntimeError, AssertionError, ValueError) as error:
        assert any(word in str(error) for word in ("RACE DETECTED", "emaphore"))  # noqa: PT017
        return
    assert found


class _NoCopy:
    def start(self):
        """Starts nothing."""

    def wait(self):
        """Waits for nothing."""


def test_the_checks_pass_without_a_fault():
    everything = {"sliding_window": 9, "sinks": True, "soft_cap": 3.0, "alibi": True}
    assert found_in("out", "lse", "kv_pages", **everything) == set()
