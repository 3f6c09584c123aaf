"""How many heads of a cache MOSAIC_TPU's paged kernel takes: as many as VMEM has room for."""

from collections.abc import Iterator

from attnsel_jax.capabilities import Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device

LANES = 128
# Of a token's keys in bfloat16, one a MiB of VMEM: 24 do not compile for v4, 128 not for 7x. Of
# float32 half as many.
MOST_REGISTERS = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "7x": 64}


def of_vmem(config: AttentionSelectorConfig, device: Device) -> Iterator[Rejection]:
    """Yields why a cache of many heads does not fit."""
    registers = MOST_REGISTERS.get(device.generation)
    if config.op != "paged" or registers is None or config.num_kv_heads is None:
        return
    wide = config.cache_dtype == "float32"
    most = registers // (-(-config.head_size // LANES) << wide)
    if config.num_kv_heads > most:
        beside = f"head_size {config.head_size}, cache {config.cache_dtype}, {device.generation}"
        yield Rejection("num_kv_heads", config.num_kv_heads, f"at most {most} with {beside}")
