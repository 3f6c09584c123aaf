"""CUDNN: dense attention by cuDNN's fused kernels, through `jax.nn.dot_product_attention`."""

from collections.abc import Sequence

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities, Rejection
from attnsel_jax.config import AttentionSelectorConfig, AttentionType
from attnsel_jax.constraints import EITHER, NEVER, AtLeast, MultipleOf, OneOf
from attnsel_jax.platforms import Device, DeviceCapability

AMPERE, HOPPER = DeviceCapability(8, 0), DeviceCapability(9, 0)


class CudnnBackend(AttentionBackend):
    """Declares what cuDNN honours through `jax.nn`, and keeps to this library's contract.

    Left out, because what comes back is not what the contract says: lse (jax.nn rounds it to the
    keys' dtype), boolean masks (a row with every key masked returns the mean of v).
    """

    name = "CUDNN"
    capabilities = {
        "dense": Capabilities(
            platform=OneOf("cuda"),
            compute_capability=AtLeast(AMPERE),
            dtype=OneOf("bfloat16", "float16"),
            head_size=MultipleOf(8, at_most=256),
            attn_type=OneOf(*AttentionType),
            causal=EITHER,
            has_sliding_window=EITHER,
            has_bias=EITHER,
            has_lens=EITHER,
            needs_grad=EITHER,
        )
    }
    kernels = {"dense": "attnsel_jax.xla.cudnn:dense_attention"}

    @classmethod
    def supports_combination(
        cls, config: AttentionSelectorConfig, device: Device
    ) -> Sequence[Rejection]:
        """Large heads need Hopper; windows need causal; gradients with a bias need even lengths."""
        reasons = []
        capability = device.compute_capability
        if config.head_size > 128 and capability is not None and capability < HOPPER:
            limit = MultipleOf(8, at_most=128)
            why = f"compute capability {capability}; up to 256 from {HOPPER} on"
            reasons.append(Rejection("head_size", config.head_size, limit, why))
        if config.has_sliding_window and not config.causal:
            reasons.append(Rejection("has_sliding_window", True, NEVER, "or ask for causal=True"))
        if config.has_bias and config.needs_grad:
            why = "cuDNN takes a bias' gradient for even lengths only, and selection knows none"
            reasons.append(Rejection("needs_grad", True, NEVER, why))
        return reasons
