"""Forcing: takes effect at the next call, under jit too; local to its thread and task; validated.

No test here, nor anywhere, clears a cache: if one had to, the cache would be keyed wrongly.
"""

import asyncio
import concurrent.futures
import contextvars
import threading
import warnings

import jax
import jax.numpy as jnp
import pytest
from third_party import backend

from attnsel_jax import (
    AttentionBackendEnum,
    AttentionSelectorConfig,
    NoAttentionBackendError,
    get_attn_backend,
    get_global_forced_attn_backend,
    global_force_attn_backend,
    global_force_attn_backend_context_manager,
    register_backend,
    select,
)

QUESTION = (64, "float32", "auto", 16)
forced = global_force_attn_backend_context_manager
REFERENCE = AttentionBackendEnum["XLA_REFERENCE"]


def chosen():
    return get_attn_backend(*QUESTION).name


def test_forcing_takes_effect_at_the_next_call_although_the_answer_was_cached():
    assert chosen() == chosen() == "XLA"
    global_force_attn_backend(REFERENCE)
    assert chosen() == "XLA_REFERENCE"
    assert get_global_forced_attn_backend() is REFERENCE
    global_force_attn_backend(None)
    assert chosen() == "XLA"
    assert get_global_forced_attn_backend() is None


@pytest.mark.parametrize("name", ["xla_reference", "XLA_REFERENCE", " Xla_Reference ", REFERENCE])
def test_names_in_any_case(name):
    global_force_attn_backend(name)
    assert get_global_forced_attn_backend() is REFERENCE
    assert chosen() == "XLA_REFERENCE"


@pytest.mark.parametrize("name", [None, "auto", "AUTO", ""])
def test_automatic_again(name):
    global_force_attn_backend("XLA_REFERENCE")
    global_force_attn_backend(name)
    assert get_global_forced_attn_backend() is None
    assert chosen() == "XLA"


@pytest.mark.parametrize("force", [global_force_attn_backend, lambda n: forced(n).__enter__()])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("XLA_REFERENC", r"attn_backend is 'XLA_REFERENC' \(did you mean XLA_REFERENCE.*must be"),
        (
            "NO_SUCH_THING",
            "attn_backend is 'NO_SUCH_THING'.*must be one of MOSAIC_GPU, .*; or auto",
        ),
        (3, "attn_backend is 3, must be a member of AttentionBackendEnum, a name, or None"),
    ],
)
def test_an_unknown_name_is_refused_at_once(force, name, message):
    with pytest.raises(ValueError, match=message):
        force(name)
    assert chosen() == "XLA"


def test_the_context_manager_nests_and_restores():
    with forced("XLA_REFERENCE"):
        assert chosen() == "XLA_REFERENCE"
        with forced("XLA"):
            assert chosen() == "XLA"
            with forced(None):
                assert get_global_forced_attn_backend() is None
                assert chosen() == "XLA"
            assert get_global_forced_attn_backend().name == "XLA"
        assert chosen() == "XLA_REFERENCE"
    assert get_global_forced_attn_backend() is None
    assert chosen() == "XLA"


def test_the_context_manager_restores_after_an_exception():
    with pytest.raises(ZeroDivisionError), forced("XLA_REFERENCE"):
        raise ZeroDivisionError
    assert chosen() == "XLA"


def test_the_context_manager_goes_before_the_global_setter():
    global_force_attn_backend("XLA_REFERENCE")
    with forced("XLA"):
        assert chosen() == "XLA"
        global_force_attn_backend(None)
        assert chosen() == "XLA"
    assert chosen() == "XLA"
    global_force_attn_backend("XLA_REFERENCE")
    with forced(None):
        assert chosen() == "XLA"
    assert chosen() == "XLA_REFERENCE"


def test_an_argument_goes_before_what_is_forced_and_that_before_the_environment(monkeypatch):
    monkeypatch.setenv("ATTNSEL_BACKEND", "XLA_REFERENCE")
    assert chosen() == "XLA_REFERENCE"
    with forced("XLA"):
        assert chosen() == "XLA"
        assert get_attn_backend(*QUESTION, backend="XLA_REFERENCE").name == "XLA_REFERENCE"
    global_force_attn_backend("XLA")
    assert chosen() == "XLA"


def test_a_forced_backend_that_does_not_serve_is_an_error_never_replaced():
    with (
        forced("CUDNN"),
        pytest.raises(
            NoAttentionBackendError,
            match=r"CUDNN, asked for by forced, does not serve this question",
        ) as caught,
    ):
        chosen()
    assert "op is paged, must be dense" in str(caught.value)
    assert "these would serve it: XLA, XLA_REFERENCE" in str(caught.value)
    assert chosen() == "XLA"


def test_overriding_and_registering_take_effect_although_the_answer_was_cached():
    with forced("XLA"):
        built_in = get_attn_backend(*QUESTION)
        register_backend("XLA", backend("XLA"))
        assert get_attn_backend(*QUESTION) is not built_in
        AttentionBackendEnum["XLA"].clear_override()
        assert get_attn_backend(*QUESTION) is built_in


class Traced:
    """A jitted function that notes, at each trace, which backend it was traced with."""

    def __init__(self):
        self.traces = []
        self.call = jax.jit(self._call)

    def _call(self, x):
        self.traces.append(chosen())
        return x + len(self.traces)


def test_entering_retraces_and_leaving_finds_the_earlier_trace():
    f, x = Traced(), jnp.zeros(())
    assert f.call(x) == 1
    with forced("XLA_REFERENCE"):
        assert f.call(x) == 2
        assert f.call(x) == 2
    assert f.call(x) == 1
    with forced("XLA_REFERENCE"):
        assert f.call(x) == 2
    assert f.traces == ["XLA", "XLA_REFERENCE"]


def test_the_global_setter_retraces_too():
    f, x = Traced(), jnp.zeros(())
    f.call(x)
    global_force_attn_backend("XLA_REFERENCE")
    f.call(x)
    global_force_attn_backend(None)
    f.call(x)
    assert f.traces == ["XLA", "XLA_REFERENCE"]


def test_forcing_inside_a_jitted_function_is_seen_by_the_function_within():
    inner, x = Traced(), jnp.zeros(())

    @jax.jit
    def outer(x):
        with forced("XLA_REFERENCE"):
            inner.call(x)
        return inner.call(x)

    outer(x)
    assert inner.traces == ["XLA_REFERENCE", "XLA"]


def test_forcing_through_grad_vmap_and_scan():
    seen = []

    def f(x):
        seen.append(chosen())
        return x * x

    with forced("XLA_REFERENCE"):
        jax.grad(f)(1.0)
        jax.vmap(f)(jnp.ones(2))
        jax.lax.scan(lambda c, x: (f(c), x), 1.0, jnp.ones(2))
    assert set(seen) == {"XLA_REFERENCE"}


def test_a_thread_forces_for_itself_only():
    """Two threads meet at a barrier inside their own `with`, many times over."""
    barrier, seen = threading.Barrier(2, timeout=20), {"XLA": set(), "XLA_REFERENCE": set()}

    def work(name):
        for _ in range(50):
            with forced(name):
                barrier.wait()
                seen[name].add(chosen())
                seen[name].add(get_global_forced_attn_backend().name)
                barrier.wait()
            seen[name].add((chosen(), "outside"))

    threads = [threading.Thread(target=work, args=(name,)) for name in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == {name: {name, ("XLA", "outside")} for name in seen}


def test_threads_that_trace_at_once_keep_their_own_traces():
    f, x = Traced(), jnp.zeros(())
    barrier = threading.Barrier(2, timeout=20)

    def work(name):
        with forced(name):
            barrier.wait()
            return {f.call(x).item() for _ in range(20)}

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        values = list(pool.map(work, ["XLA_REFERENCE", None]))
    assert len(values[0]) == len(values[1]) == 1
    assert values[0] != values[1]
    assert sorted(f.traces) == ["XLA", "XLA_REFERENCE"]


def test_left_in_another_thread_or_task_it_says_so():
    """As by a fixture that yields inside it, and is closed by another task."""

    def fixture():
        with forced("XLA_REFERENCE"):
            yield

    opened = fixture()
    context = contextvars.copy_context()
    context.run(next, opened)
    with pytest.raises(
        RuntimeError, match=r"is left in another thread or asyncio task than it was"
    ):
        opened.close()
    assert context.run(get_global_forced_attn_backend) is REFERENCE
    assert get_global_forced_attn_backend() is None
    assert chosen() == "XLA"


def test_the_global_setter_reaches_every_thread():
    global_force_attn_backend("XLA_REFERENCE")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(chosen).result() == "XLA_REFERENCE"
        global_force_attn_backend(None)
        assert pool.submit(chosen).result() == "XLA"


def test_tasks_that_interleave_each_see_their_own():
    async def task(name, expected, steps):
        seen = set()
        with forced(name):
            for _ in range(steps):
                await asyncio.sleep(0)
                seen.add(chosen())
        seen.add((chosen(), "outside"))
        assert seen == {expected, ("XLA", "outside")}

    async def everything():
        # of different lengths, so that they leave in another order than they entered
        await asyncio.gather(
            task("XLA_REFERENCE", "XLA_REFERENCE", 3),
            task("XLA", "XLA", 9),
            task(None, "XLA", 5),
            task("XLA_REFERENCE", "XLA_REFERENCE", 7),
        )

    asyncio.run(everything())
    assert get_global_forced_attn_backend() is None
    assert chosen() == "XLA"


def test_a_trace_never_lands_under_another_tasks_key():
    """JAX's context knows threads, not tasks: where the two disagree, tracing refuses."""
    f, x = Traced(), jnp.zeros(())
    refused = []

    async def reference():
        with forced("XLA_REFERENCE"):
            await asyncio.sleep(0)  # now the other task has entered its own
            try:
                f.call(x)
            except RuntimeError as error:
                refused.append(str(error))

    async def automatic():
        with forced("XLA"):
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def everything():
        await asyncio.gather(reference(), automatic())

    asyncio.run(everything())
    assert f.traces == []
    assert "the forced backend is XLA_REFERENCE in this task, but XLA in JAX's" in refused[0]
    with forced("XLA"):
        f.call(x)
    assert f.traces == ["XLA"]


def test_a_call_of_the_selector_mends_the_key_for_the_jitted_call_after_it():
    f, x = Traced(), jnp.zeros(())

    async def task(name):
        with forced(name):
            await asyncio.sleep(0)
            assert chosen() == name  # outside jit: JAX's context is brought into line
            f.call(x)

    async def everything():
        await asyncio.gather(task("XLA_REFERENCE"), task("XLA"))

    asyncio.run(everything())
    assert f.traces == ["XLA_REFERENCE", "XLA"]


def test_a_thread_that_inherits_a_context_sees_it_and_leaves_nothing_behind():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with forced("XLA_REFERENCE"):
            inherited = contextvars.copy_context()
        assert pool.submit(inherited.run, chosen).result() == "XLA_REFERENCE"
        assert pool.submit(chosen).result() == "XLA"
        f, x = Traced(), jnp.zeros(())
        pool.submit(f.call, x).result()
    assert f.traces == ["XLA"]


def test_a_vllm_name_is_kept_as_what_it_means():
    with forced("TORCH_SDPA"):
        assert get_global_forced_attn_backend().name == "XLA"
        assert chosen() == "XLA"
    with forced("FLASH_ATTN"):
        answer = select(AttentionSelectorConfig(*QUESTION))
        assert answer.backend is None
        assert answer.candidates == ("MOSAIC_GPU", "MOSAIC_TPU")


def test_a_retired_suffix_warns_once_where_it_is_forced():
    with pytest.warns(FutureWarning, match=r"suffix _V1 is retired, read as XLA_REFERENCE"):
        global_force_attn_backend("XLA_REFERENCE_V1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "XLA_REFERENCE"
        assert get_global_forced_attn_backend() is REFERENCE
