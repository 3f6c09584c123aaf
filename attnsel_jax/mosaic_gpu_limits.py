"""What MOSAIC_GPU's kernels do not take together, and what single chips lack of them."""

from collections.abc import Iterator

from attnsel_jax.capabilities import Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.constraints import OneOf
from attnsel_jax.platforms import Device, DeviceCapability

AMPERE, HOPPER, BLACKWELL = (DeviceCapability(major, 0) for major in (8, 9, 10))
HEAD_SIZES = OneOf(64, 80, 96, 128, 192, 256)
HEAD_SIZES_V = {192: (128, 192)}  # others: as head_size
FLOAT8_SIZES = OneOf(64, 80, 96, 128)
# Interpreted and compiled; the kernels take others too.
AMPERE_SIZES = {"dense": OneOf(64, 80, 96, 128), "paged": OneOf(64, 96, 128)}
BLACKWELL_PAGED_SIZES = OneOf(64, 80, 96, 128)  # at 192 the kernels spill
BLACKWELL_FLOAT8_SIZES = OneOf(64, 80, 96)  # at 128 decode spills


def of_dense(config: AttentionSelectorConfig) -> Iterator[Rejection]:
    """The sizes of v; what would spill beside a bias's gradient."""
    size, size_v = config.head_size, config.head_size_v
    sizes = OneOf(*HEAD_SIZES_V.get(size, (size,)))
    if size_v is not None and size in HEAD_SIZES and size_v not in sizes:
        yield Rejection("head_size_v", size_v, f"{sizes} with head_size {size}")
    if not (config.needs_grad and (config.has_bias or config.has_alibi)):
        return
    if size == 256:
        for name in ("has_soft_cap", "has_segment_ids"):
            if getattr(config, name):
                yield Rejection(name, True, "False with needs_grad, bias, head_size 256")
    if size == 192 and size_v != 128 and config.has_soft_cap and config.has_segment_ids:
        beside = "needs_grad, bias, has_segment_ids, head_size 192, head_size_v 192"
        yield Rejection("has_soft_cap", True, f"False with {beside}")


def of_cache(config: AttentionSelectorConfig) -> Iterator[Rejection]:
    """Dtypes of a cache beside the queries' dtype and the head size."""
    cache = str(config.cache_dtype)
    if cache == "bfloat16" and config.dtype == "float16":
        lost = "bfloat16 would drop three bits of each float16 query"
        yield Rejection("kv_cache_dtype", cache, OneOf("float16", "fp8_e4m3", "fp8_e5m2"), lost)
    elif cache.startswith("fp8") and config.head_size not in FLOAT8_SIZES:
        yield Rejection("head_size", config.head_size, FLOAT8_SIZES, f"with a cache of {cache}")


def of_chip(config: AttentionSelectorConfig, device: Device) -> Iterator[Rejection]:
    """What this chip has no kernel for, of what another has."""
    of_one = {AMPERE: _of_ampere, BLACKWELL: _of_blackwell}.get(device.compute_capability)
    if of_one is not None:
        yield from of_one(config)


def _of_blackwell(config: AttentionSelectorConfig) -> Iterator[Rejection]:
    if config.needs_grad:
        yield Rejection("needs_grad", True, "False with compute_capability 10.0")
    cache, size, why = str(config.cache_dtype), config.head_size, "with compute_capability 10.0"
    if config.op == "paged" and size not in BLACKWELL_PAGED_SIZES:
        yield Rejection("head_size", size, BLACKWELL_PAGED_SIZES, why)
    elif config.op == "paged" and cache.startswith("fp8") and size not in BLACKWELL_FLOAT8_SIZES:
        yield Rejection("head_size", size, BLACKWELL_FLOAT8_SIZES, f"{why} and a cache of {cache}")


def _of_ampere(config: AttentionSelectorConfig) -> Iterator[Rejection]:
    if config.head_size not in (sizes := AMPERE_SIZES[config.op]):
        yield Rejection("head_size", config.head_size, sizes, "with compute_capability 8.0")
    cache = str(config.cache_dtype)
    if config.op == "paged" and cache.startswith("fp8"):
        halves = OneOf("bfloat16", "float16")
        yield Rejection("kv_cache_dtype", cache, halves, "compute_capability 8.0 has no float8")
