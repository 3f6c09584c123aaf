"""What MOSAIC_TPU's paged kernel takes of v4, whose VMEM is 16 MiB, a quarter of 7x's."""

from collections.abc import Iterator

from attnsel_jax.capabilities import Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device

LANES = 128
MOST_REGISTERS = 16  # of a token's keys in bfloat16: 24 do not compile; of float32 half as many


def of_v4(config: AttentionSelectorConfig, device: Device) -> Iterator[Rejection]:
    """Yields why a cache of many heads does not fit."""
    if (config.op, device.generation) != ("paged", "v4") or config.num_kv_heads is None:
        return
    wide = config.cache_dtype == "float32"
    most = MOST_REGISTERS // (-(-config.head_size // LANES) << wide)
    if config.num_kv_heads > most:
        beside = f"at most {most} with head_size {config.head_size}, cache {config.cache_dtype}, v4"
        yield Rejection("num_kv_heads", config.num_kv_heads, beside)
