"""What MOSAIC_GPU's kernels do not take together, and what single chips lack of them."""

from collections.abc import Iterator

from attnsel_jax.capabilities import Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.constraints import MultipleOf, OneOf
from attnsel_jax.platforms import Device, DeviceCapability

AMPERE, HOPPER, BLACKWELL = (DeviceCapability(major, 0) for major in (8, 9, 10))
HEAD_SIZES = MultipleOf(8, at_most=256)  # of dense; others than the kernels' are padded to these
AMPERE_GRADIENTS = MultipleOf(8, at_most=128)
BLACKWELL_GRADIENTS = MultipleOf(8, at_most=192)  # at 256 dk and dv fill TMEM

FLOAT8 = ("fp8_e4m3", "fp8_e5m2")
CACHES = OneOf("bfloat16", "float16", *FLOAT8)
PAGED_SIZES = OneOf(64, 80, 96, 128, 192, 256)
# By chip, over a cache of 16 bits and of float8: what is interpreted and compiles without spills.
PAGED_SIZES_OF = {
    AMPERE: (OneOf(64, 96, 128), OneOf(64, 96, 128)),
    HOPPER: (PAGED_SIZES, OneOf(64, 80, 96, 128)),
    BLACKWELL: (OneOf(64, 80, 96, 128), OneOf(64, 80, 96)),
}


def of_dense(config: AttentionSelectorConfig) -> Iterator[Rejection]:
    """What would spill on Hopper beside the gradient of what is added to logits.

    A mask is added, too. Other chips are held to the same.
    """
    size, size_v = config.head_size, config.head_size_v or config.head_size
    added = config.has_bias or config.has_mask or config.has_alibi
    if not (config.needs_grad and added):
        return
    beside = "needs_grad and a bias, mask or ALiBi"
    if max(size, size_v) > 192:
        for name in ("has_soft_cap", "has_segment_ids"):
            if getattr(config, name):
                yield Rejection(name, True, f"False with {beside}, head size above 192")
    elif size_v > 128 and config.has_soft_cap and config.has_segment_ids:
        beside += ", has_segment_ids, head_size_v above 128"
        yield Rejection("has_soft_cap", True, f"False with {beside}")


def of_paged(config: AttentionSelectorConfig, device: Device) -> Iterator[Rejection]:
    """Caches beside the queries' dtype, and head sizes over them, on this chip.

    What no chip takes is refused without them: each argument has one reason, and one set.
    """
    cache, size, chip = str(config.cache_dtype), config.head_size, device.compute_capability
    if chip not in PAGED_SIZES_OF:
        return
    halves = ("float16",) if config.dtype == "float16" else ("bfloat16", "float16")
    caches = OneOf(*halves) if chip == AMPERE else OneOf(*halves, *FLOAT8)
    if cache in CACHES and cache not in caches:
        lost = "bfloat16 would drop three bits of each float16 query"
        why = "compute_capability 8.0 has no float8" if cache in FLOAT8 else lost
        yield Rejection("kv_cache_dtype", cache, caches, why)
    sizes = PAGED_SIZES_OF[chip][cache in FLOAT8]
    if size in PAGED_SIZES and size not in sizes:
        yield Rejection("head_size", size, sizes, f"with compute_capability {chip}, cache {cache}")


def of_chip(config: AttentionSelectorConfig, device: Device) -> Iterator[Rejection]:
    """What this chip has no dense kernel for, of what another has."""
    of_one = {AMPERE: _of_ampere, BLACKWELL: _of_blackwell}.get(device.compute_capability)
    if of_one is not None:
        yield from of_one(config)


def _of_blackwell(config: AttentionSelectorConfig) -> Iterator[Rejection]:
    if config.needs_grad:
        yield from _sizes_within(BLACKWELL_GRADIENTS, config, "needs_grad, compute_capability 10.0")


def _of_ampere(config: AttentionSelectorConfig) -> Iterator[Rejection]:
    if config.needs_grad:
        yield from _sizes_within(AMPERE_GRADIENTS, config, "needs_grad, compute_capability 8.0")


def _sizes_within(
    allowed: MultipleOf, config: AttentionSelectorConfig, beside: str
) -> Iterator[Rejection]:
    """Head sizes that no chip's kernels take are refused without this."""
    for name in ("head_size", "head_size_v"):
        size = getattr(config, name)
        if size is not None and size in HEAD_SIZES and size not in allowed:
            yield Rejection(name, size, allowed, f"with {beside}")
