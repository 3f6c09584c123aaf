"""XLA_REFERENCE: attention written plainly, in highest precision; does what any backend does."""

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.backends.xla import XLA_DENSE, XLA_PAGED


class XlaReferenceBackend(AttentionBackend):
    """Builds every logit; memory grows with the square of the length."""

    name = "XLA_REFERENCE"
    capabilities = {"paged": XLA_PAGED, "dense": XLA_DENSE}
    kernels = {
        "paged": "attnsel_jax.xla.reference:paged_attention",
        "dense": "attnsel_jax.xla.reference:dense_attention",
    }
