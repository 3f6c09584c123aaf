"""MOSAIC_GPU: attention (dense and paged) by Pallas kernels, Mosaic GPU."""

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Capabilities, Rejection
from attnsel_jax.config import AttentionType
from attnsel_jax.constraints import EITHER, AtLeast, OneOf
from attnsel_jax.platforms import DeviceCapability

HEAD_SIZES_V = {192: (128, 192)}  # others: as head_size
DENSE = Capabilities(
    platform=OneOf("cuda"),
    compute_capability=OneOf(DeviceCapability(9, 0)),
    jax_version=AtLeast((0, 11)),
    dtype=OneOf("bfloat16", "float16"),
    head_size=OneOf(64, 80, 96, 128, 192, 256),
    head_size_v=OneOf(64, 80, 96, 128, 192, 256),
    attn_type=OneOf(*AttentionType),
    causal=EITHER,
    has_sink=EITHER,
    has_sliding_window=EITHER,
    has_attention_chunk=EITHER,
    has_soft_cap=EITHER,
    has_bias=EITHER,
    has_alibi=EITHER,
    has_segment_ids=EITHER,
    has_lens=EITHER,
    has_q_offset=EITHER,
    needs_grad=EITHER,
    needs_lse=EITHER,
)


class MosaicGpuBackend(AttentionBackend):
    """Declares what its kernels honour, and what compiles for these chips."""

    name = "MOSAIC_GPU"
    family = "standard"
    capabilities = {"dense": DENSE}
    kernels = {"dense": "pallas_kernels.dense.mosaic_gpu:dense_attention"}

    @classmethod
    def supports_combination(cls, config, device):
        """Refuses gradients with a bias or slopes, and values of a size that goes with no key."""
        if config.op != "dense":
            return ()
        added = ("has_bias", "has_alibi") if config.needs_grad else ()
        reasons = [
            Rejection(name, True, "False with needs_grad") for name in added
            if getattr(config, name)
        ]  # fmt: skip
        size, size_v = config.head_size, config.head_size_v
        allowed = HEAD_SIZES_V.get(size, (size,))
        if size_v is not None and size in DENSE.head_size and size_v not in allowed:
            must_be = f"{OneOf(*allowed)} with head_size {size}"
            reasons.append(Rejection("head_size_v", size_v, must_be))
        return tuple(reasons)
