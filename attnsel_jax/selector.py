"""Which backend serves a question on a device, and why not the others.

`select` answers with a `Selection`, which prints as a table of every backend and every reason.
`get_attn_backend` answers with the class, cached; a warm call costs some microseconds. What is
insisted on (an argument, a forced backend, an environment variable, in this order) is validated,
then used or refused: it is never replaced.
"""

import functools
import logging
from typing import Any, TypedDict, Unpack

import jax

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backend_names import parse_backend_name
from attnsel_jax.capabilities import Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.envs import backend_text
from attnsel_jax.forcing import (
    forced_name,
    get_global_forced_attn_backend,
    global_force_attn_backend,
    global_force_attn_backend_context_manager,
)
from attnsel_jax.platforms import Device, current_device, device_of
from attnsel_jax.registry import AttentionBackendEnum, automatic_backends, generation
from attnsel_jax.selection import Insistence, Selection

# What vLLM's module of this name offers, and `select`.
__all__ = [
    "FurtherQuestions",
    "_cached_get_attn_backend",
    "as_device",
    "get_attn_backend",
    "get_env_variable_attn_backend",
    "get_global_forced_attn_backend",
    "global_force_attn_backend",
    "global_force_attn_backend_context_manager",
    "select",
]

logger = logging.getLogger(__name__)

BackendLike = AttentionBackendEnum | type[AttentionBackend] | str | None
DeviceLike = Device | jax.Device | str | None


class FurtherQuestions(TypedDict, total=False):
    """The questions that vLLM's selector does not know: keywords of `get_attn_backend`."""

    op: str
    head_size_v: int | None
    num_heads: int | None
    num_kv_heads: int | None
    num_index_heads: int | None
    index_head_dim: int | None
    causal: bool | None
    has_sliding_window: bool
    has_attention_chunk: bool
    has_soft_cap: bool
    has_bias: bool
    has_alibi: bool
    has_mask: bool
    has_segment_ids: bool
    has_lens: bool
    has_q_offset: bool
    needs_grad: bool
    needs_lse: bool
    context_axis: str | None


def get_attn_backend(
    head_size: int,
    dtype: Any,
    kv_cache_dtype: Any,
    block_size: int | None,
    use_mla: bool = False,
    has_sink: bool = False,
    use_sparse: bool = False,
    attn_type: str | None = None,
    *,
    device: DeviceLike = None,
    backend: BackendLike = None,
    **further: Unpack[FurtherQuestions],
) -> type[AttentionBackend]:
    """The backend that serves the question: forced, else by the environment, else the best.

    Args:
        head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, attn_type:
            the question in vLLM's words; see `AttentionSelectorConfig`.
        device: the chip: a `Device`, a `jax.Device`, a name ("h200"); None = JAX's default device.
        backend: insist on this one, whatever is forced: a member, a class, or a name.
        **further: the questions that vLLM's selector does not know (`FurtherQuestions`).

    Returns:
        The backend's class; cached by everything that the answer depends on.

    Raises:
        NoAttentionBackendError: nothing serves it, or what was insisted on does not.
        TypeError: a keyword that is none of these.
        ValueError: a value that no backend could accept, or an unknown backend name.
    """
    try:
        return _cached_get_attn_backend(
            head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, attn_type,
            current_device() if device is None else device, _insistence(backend), generation(),
            **further,
        )  # fmt: skip
    except TypeError as error:
        _refuse_unknown(further)
        if "unhashable" not in str(error):
            raise
        question = (head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse)
        config = AttentionSelectorConfig(*question, attn_type, **further)  # says which, if it can
        return select(config, device, backend).required()


def _refuse_unknown(further: FurtherQuestions) -> None:
    """Refuses keywords that are no question."""
    known = FurtherQuestions.__annotations__
    for name in further:
        if name not in known:
            raise TypeError(
                f"get_attn_backend got the keyword {name}={further[name]!r}, must be one of vLLM's "
                f"arguments, device, backend, {', '.join(known)}"
            )


@functools.lru_cache(maxsize=4096, typed=True)
def _cached_get_attn_backend(
    head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, attn_type,
    device, insistence, registry_generation, **further,
) -> type[AttentionBackend]:  # fmt: skip
    """The cached part: everything that the answer depends on is an argument."""
    config = AttentionSelectorConfig(
        head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, attn_type,
        **further,
    )  # fmt: skip
    selection = _select(config, as_device(device), insistence)
    backend = selection.required()
    _log_once(backend, selection.insistence, config, selection.device)
    return backend


@functools.lru_cache(maxsize=4096)
def _log_once(
    backend: type[AttentionBackend],
    insistence: Insistence | None,
    config: AttentionSelectorConfig,
    device: Device,
) -> None:
    """One line for each distinct selection, however its question was spelled."""
    why = f"{insistence.name}, by {insistence.source}" if insistence else "automatic"
    logger.info("attention backend %s (%s) for %s on %s", backend.name, why, config, device)


def select(
    config: AttentionSelectorConfig, device: DeviceLike = None, backend: BackendLike = None
) -> Selection:
    """Every backend held against the question; prints as a table.

    Args:
        config: the question.
        device: the chip, here or not; None = JAX's default device here.
        backend: insist on this one: a member, a class, or a name. None = what is forced, else what
            the environment asks for, else automatic.

    Returns:
        The selection; its `backend` is None where nothing serves (`required()` raises then).

    Raises:
        TypeError: the question is no `AttentionSelectorConfig`.
        ValueError: an unknown backend or device name.
    """
    if not isinstance(config, AttentionSelectorConfig):
        raise TypeError(
            f"config is {config!r}, must be an AttentionSelectorConfig: build one, or ask "
            f"get_attn_backend, which takes vLLM's arguments"
        )
    return _select(config, as_device(device), _insistence(backend))


def get_env_variable_attn_backend() -> AttentionBackendEnum | None:
    """What the environment variable asks for; of one of vLLM's names, the first it may mean.

    Raises:
        ValueError: the variable holds an unknown name.
    """
    said = backend_text()
    names = parse_backend_name(said[1], _known(), said[0]) if said else None
    return AttentionBackendEnum[names[0]] if names else None


def as_device(device: DeviceLike) -> Device:
    """The `Device` that a device, a `jax.Device`, a chip's name, or None (the default) means."""
    if device is None:
        return current_device()
    if isinstance(device, str):
        return Device.named(device)
    if isinstance(device, Device):
        return device
    if isinstance(device, jax.Device):
        return device_of(device)
    raise ValueError(
        f"device is {device!r}, must be a Device, a jax.Device, a chip's name such as 'h200', "
        f"or None"
    )


def _insistence(backend: BackendLike = None) -> Insistence | None:
    """Who asks for a backend now: the caller, else what is forced, else the environment."""
    if backend is not None:
        if isinstance(backend, AttentionBackendEnum):
            backend = backend.name
        is_class = isinstance(backend, type) and issubclass(backend, AttentionBackend)
        if not (isinstance(backend, str) or (is_class and hasattr(backend, "name"))):
            raise ValueError(
                f"backend is {backend!r}, must be a name, a member of AttentionBackendEnum, or a "
                f"subclass of AttentionBackend that has a name"
            )
        return Insistence("argument backend", backend)
    name = forced_name()
    if name is not None:
        return Insistence("forced", name)
    said = backend_text()
    return Insistence(*said) if said else None


def _select(
    config: AttentionSelectorConfig, device: Device, insistence: Insistence | None
) -> Selection:
    if insistence and isinstance(insistence.backend, type):
        return _select_class(config, device, insistence)
    automatic = tuple(member.name for member in automatic_backends())
    names = None
    if insistence:
        names = parse_backend_name(insistence.backend, _known(), insistence.source)
    if names is None:
        insistence, names = None, automatic
    reasons: dict[str, tuple[Rejection, ...]] = {}
    for member in AttentionBackendEnum:
        try:
            reasons[member.name] = tuple(member.get_class().validate_configuration(config, device))
        except (ImportError, OSError) as error:
            reasons[member.name] = (_import_rejection(error),)
    chosen = None
    for name in names:
        if reasons[name]:
            continue
        backend = AttentionBackendEnum[name].get_class()
        rejection = _kernel_rejection(backend, config.op)
        if rejection is None:
            chosen = backend
            break
        reasons[name] = (rejection,)
    return Selection(config, device, chosen, insistence, reasons, names, automatic)


def _select_class(
    config: AttentionSelectorConfig, device: Device, insistence: Insistence
) -> Selection:
    """A selection for a class that need not be registered."""
    backend = insistence.backend
    reasons = tuple(backend.validate_configuration(config, device))
    if not reasons:
        rejection = _kernel_rejection(backend, config.op)
        reasons = (rejection,) if rejection else ()
    chosen = None if reasons else backend
    return Selection(config, device, chosen, insistence, {backend.name: reasons}, (backend.name,))


def _kernel_rejection(backend: type[AttentionBackend], op: str) -> Rejection | None:
    """Why its kernel does not import here, if so."""
    try:
        backend.get_kernel(op)
    except (ImportError, OSError) as error:
        return _import_rejection(error)
    return None


def _import_rejection(error: Exception) -> Rejection:
    asked = f"failing ({type(error).__name__}: {error})"
    return Rejection("import", asked, "possible here", cause=error)


def _known() -> list[str]:
    return [member.name for member in AttentionBackendEnum]
