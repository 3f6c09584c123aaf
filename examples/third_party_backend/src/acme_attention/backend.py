"""ACME: dense attention, one query head at a time; runs on every platform."""

from attnsel_jax import AttentionBackend, AttentionType, Capabilities, MultipleOf, OneOf


class AcmeBackend(AttentionBackend):
    """Says what the kernel accepts; whatever is not said here is refused with that reason."""

    name = "ACME"
    capabilities = {
        "dense": Capabilities(
            dtype=OneOf("float32", "bfloat16"),
            head_size=MultipleOf(8, at_most=256),
            attn_type=OneOf(*AttentionType),
            causal=OneOf(False, True),
            needs_lse=OneOf(False, True),
            needs_grad=OneOf(False, True),
        )
    }
    kernels = {"dense": "acme_attention.kernel:dense_attention"}
    # before = "XLA" would let automatic selection prefer it to XLA. Without it the backend runs
    # only where somebody names it, so that installing the package changes nobody's results.
