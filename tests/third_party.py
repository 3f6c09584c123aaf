"""Backends that are not the library's own, for tests of the registry and the selector."""

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backends.xla import XLA_DENSE, XLA_PAGED, XlaBackend


def backend(name: str, **attributes) -> type[AttentionBackend]:
    """A standard backend that does all that XLA does, under another name."""
    declared = {
        "name": name,
        "capabilities": XlaBackend.capabilities,
        "kernels": XlaBackend.kernels,
    }
    return type(f"{name.title()}Backend", (AttentionBackend,), declared | attributes)


class PlainBackend(AttentionBackend):
    """Found by its dotted path; by name only."""

    name = "PLAIN"
    capabilities = {"paged": XLA_PAGED, "dense": XLA_DENSE}
    kernels = XlaBackend.kernels


class EagerBackend(PlainBackend):
    """Joins automatic selection, before XLA."""

    name = "EAGER"
    before = "XLA"


NOT_A_BACKEND = 3
