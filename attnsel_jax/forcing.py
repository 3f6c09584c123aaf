"""Which backend somebody insists on, for everybody or for the inside of a `with`.

Forcing goes through JAX's own user context, which is part of `jax.jit`'s key: entering retraces a
jitted function, leaving finds the earlier trace again.

The context manager is local to its thread and to its asyncio task. JAX's context is local to the
thread only, so where several tasks of one thread interleave inside such a `with`, tracing refuses
rather than keep a trace of one task's backend under another task's key. What JAX does not let us
see is a call that finds a trace ready: after an `await` inside the `with`, a function that another
task has traced under its own backend would run that trace. Any call of the selector or of an op
outside `jit` brings JAX's context into line again; an `await` inside the `with` is better avoided.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from attnsel_jax.backend_names import canonical_name, parse_backend_name
from attnsel_jax.jax_versions import is_tracing
from attnsel_jax.registry import AttentionBackendEnum

# What is forced: a name as `parse_backend_name` reads it; None = nothing, selection is automatic.
_jax_context = jax.make_user_context(default_value=None)
_UNSAID = "said by no context manager of this task"
_task = contextvars.ContextVar("attnsel_jax_forced_backend", default=_UNSAID)

# Entered and left while the thread's value is unset: leaving it again, in any thread, unsets that
# thread's value, whatever other tasks of the thread have left there.
_unset_in_thread = _jax_context(None)
with _unset_in_thread:
    pass


def global_force_attn_backend(attn_backend: AttentionBackendEnum | str | None) -> None:
    """Forces a backend everywhere, until changed; jitted functions retrace.

    Args:
        attn_backend: a member or its name; None or "auto" = automatic again.

    Raises:
        ValueError: an unknown name.
    """
    _jax_context.set_global(_checked_name(attn_backend))


@contextlib.contextmanager
def global_force_attn_backend_context_manager(
    attn_backend: AttentionBackendEnum | str | None,
) -> Iterator[None]:
    """Forces a backend inside a `with`, in this thread and task only; nests.

    Args:
        attn_backend: a member or its name; None or "auto" = automatic, whatever is forced outside.

    Raises:
        ValueError: an unknown name.
        RuntimeError: it is left in another thread or task than it was entered in.
    """
    token = _task.set(_checked_name(attn_backend))
    _tell_jax()
    try:
        yield
    finally:
        _restore(token)


def _restore(token: contextvars.Token) -> None:
    """What this task said before; a generator may be closed by another task, or thread."""
    try:
        _task.reset(token)
    except ValueError as error:
        raise RuntimeError(
            "global_force_attn_backend_context_manager is left in another thread or asyncio task "
            "than it was entered in, must be left in the same, whose backend stays forced: a "
            "generator that yields inside it (a fixture, say) is closed elsewhere; enter it around "
            "the calls instead"
        ) from error
    _tell_jax()


def forced_name() -> str | None:
    """The name that is forced for this task, if any.

    Raises:
        RuntimeError: JAX is tracing under another task's forced backend.
    """
    said = _task.get()
    name = _jax_context.get_global() if said is _UNSAID else said
    if name != _jax_context.value:
        if is_tracing():
            raise RuntimeError(
                f"the forced backend is {name} in this task, but {_jax_context.value} in JAX's "
                f"context of this thread, by which jit keeps its traces: another asyncio task "
                f"entered global_force_attn_backend_context_manager and awaited inside it, or this "
                f"thread inherited the context. Enter the context manager right around the jitted "
                f"call, in the thread that calls it, with no await between"
            )
        _tell_jax()
    return name


def get_global_forced_attn_backend() -> AttentionBackendEnum | None:
    """The backend that is forced now; of one of vLLM's names, the first that it may mean."""
    name = forced_name()
    names = parse_backend_name(name, _known()) if name else None
    return AttentionBackendEnum[names[0]] if names else None


def _tell_jax() -> None:
    """Makes JAX's value of this thread what this task says."""
    said = _task.get()
    if said is _UNSAID:
        _unset_in_thread.__exit__(None, None, None)
    else:
        _jax_context(said).__enter__()


def _checked_name(attn_backend: AttentionBackendEnum | str | None) -> str | None:
    if attn_backend is None:
        return None
    text = attn_backend.name if isinstance(attn_backend, AttentionBackendEnum) else attn_backend
    if not isinstance(text, str):
        raise ValueError(
            f"attn_backend is {attn_backend!r}, must be a member of AttentionBackendEnum, a name, "
            f"or None"
        )
    return canonical_name(text, _known(), "attn_backend")


def _known() -> list[str]:
    return [member.name for member in AttentionBackendEnum]
