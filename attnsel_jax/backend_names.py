"""What a backend name that a person wrote means; the one table of vLLM's names.

Names are read in any case. Empty means unset, `auto` automatic. The suffixes `_VLLM_V1` and `_V1`
are dropped with a warning. A name of vLLM's means "the family's best kernel here of that sort";
one that has no meaning here is unknown, and so is every other: the error lists the names, close
ones first.
"""

import difflib
import warnings
from collections.abc import Iterable

_KERNELS = ("MOSAIC_GPU", "MOSAIC_TPU")
_MLA_KERNELS = ("MOSAIC_GPU_MLA", "MOSAIC_TPU_MLA")
_SPARSE_KERNELS = ("MOSAIC_GPU_MLA_SPARSE", "MOSAIC_TPU_MLA_SPARSE")
_XLA = ("XLA", "XLA_MLA", "XLA_MLA_SPARSE")

# vLLM's name -> the backends that it may mean here, best first; the first that serves the question
# is used.
VLLM_NAMES: dict[str, tuple[str, ...]] = {
    "PALLAS": _KERNELS + _MLA_KERNELS + _SPARSE_KERNELS,
    "FLASH_ATTN": _KERNELS,
    "FLASHINFER": _KERNELS,
    "TRITON_ATTN": _KERNELS,
    "ROCM_ATTN": ("XLA",),
    "CPU_ATTN": _XLA,
    "TORCH_SDPA": ("XLA",),
    "FLEX_ATTENTION": ("XLA",),
    "FLASH_ATTN_MLA": _MLA_KERNELS,
    "FLASHMLA": _MLA_KERNELS,
    "FLASHINFER_MLA": _MLA_KERNELS,
    "CUTLASS_MLA": _MLA_KERNELS,
    "TRITON_MLA": _MLA_KERNELS,
    "FLASHMLA_SPARSE": _SPARSE_KERNELS,
}
AUTOMATIC = "AUTO"
RESERVED = dict.fromkeys(VLLM_NAMES, "vLLM's name, understood as one of these here") | {
    AUTOMATIC: "it means automatic selection"
}
_SUFFIXES = ("_VLLM_V1", "_V1")


class UnknownBackendError(ValueError, KeyError):
    """A backend name that means nothing here."""

    def __str__(self) -> str:
        return str(self.args[0])


def unknown_backend(
    name: str, known: Iterable[str], argument: str = "backend"
) -> UnknownBackendError:
    """The error for names that mean nothing: close matches, then the list."""
    known = list(known)
    return UnknownBackendError(
        f"{argument} is {name!r}{_hint(name, [*known, *VLLM_NAMES])}, must be one of "
        f"{', '.join(known)}; or auto; or one of vLLM's names: {', '.join(VLLM_NAMES)}"
    )


def unregistered(name: str, known: Iterable[str], argument: str = "backend") -> UnknownBackendError:
    """The error for names that the registry does not have, vLLM's among them."""
    known = list(known)
    meant = VLLM_NAMES.get(str(name).upper(), ())
    hint = "" if meant else _hint(name, known)
    ending = f"; of vLLM's name use one that it may mean: {' or '.join(meant)}" if meant else ""
    return UnknownBackendError(
        f"{argument} is {name!r}{hint}, must be one of {', '.join(known)}{ending}"
    )


def _hint(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(str(name).upper(), names, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def parse_backend_name(
    text: str, known: Iterable[str], argument: str = "backend"
) -> tuple[str, ...] | None:
    """The backends that a name may mean, best first; None = automatic.

    Args:
        text: what somebody wrote.
        known: the registered names.
        argument: where it was written, for the error.

    Raises:
        UnknownBackendError: it means nothing here.
    """
    known = list(known)
    name = canonical_name(text, known, argument)
    if name is None:
        return None
    return (name,) if name in known else VLLM_NAMES[name]


def canonical_name(text: str, known: Iterable[str], argument: str = "backend") -> str | None:
    """The name in upper case, a retired suffix dropped with a warning; None = automatic.

    Raises:
        UnknownBackendError: it means nothing here.
    """
    known = list(known)
    if not isinstance(text, str):
        raise unknown_backend(text, known, argument)
    name = text.strip().upper()
    if name in ("", AUTOMATIC):
        return None
    for suffix in _SUFFIXES:
        stem = name.removesuffix(suffix)
        if name not in known and stem != name and (stem in known or stem in VLLM_NAMES):
            warnings.warn(
                f"{argument} is {text!r}: the suffix {suffix} is retired, read as {stem}",
                FutureWarning,
                stacklevel=3,
            )
            name = stem
    if name in known or name in VLLM_NAMES:
        return name
    raise unknown_backend(text, known, argument)
