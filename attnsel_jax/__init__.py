"""An attention backend selector for JAX: one interface, every accelerator, nothing hidden.

Ask (`get_attn_backend`, `select`), run (`dot_product_attention`, `paged_attention`,
`mla_attention`, `sparse_mla_attention`), compare (`attnsel_jax.compare`). Importing this package
touches no device and imports no kernel.
"""

import importlib
from typing import Any

# Where each public name lives; imported at first use, so that importing the package is fast.
_HOMES = {
    "attnsel_jax.backend": ("AttentionBackend", "AttentionImpl", "MLAAttentionImpl"),
    "attnsel_jax.capabilities": ("Capabilities", "Rejection"),
    "attnsel_jax.config": (
        "AttentionSelectorConfig",
        "AttentionType",
        "CacheDType",
        "is_quantized_kv_cache",
    ),
    "attnsel_jax.constraints": ("ANYTHING", "AtLeast", "MultipleOf", "OneOf"),
    "attnsel_jax.forcing": (
        "get_global_forced_attn_backend",
        "global_force_attn_backend",
        "global_force_attn_backend_context_manager",
    ),
    "attnsel_jax.kv_cache": ("KVCache", "LatentCache", "stored_dtype"),
    "attnsel_jax.mesh": ("MeshAxes", "use_mesh_axes"),
    "attnsel_jax.metadata": ("AttentionMetadata",),
    "attnsel_jax.ops": (
        "DENSE_RESIDUALS",
        "allocate_kv_cache",
        "allocate_latent_cache",
        "copy_pages",
        "dot_product_attention",
        "indexer_scores",
        "merge_attention",
        "mla_attention",
        "paged_attention",
        "sparse_mla_attention",
        "topk_positions",
        "write_index_keys",
        "write_kv_cache",
        "write_latent_cache",
    ),
    "attnsel_jax.platforms": ("Device", "DeviceCapability", "current_device"),
    "attnsel_jax.registered_layouts": ("register_cache_layout", "unregister_cache_layout"),
    "attnsel_jax.registry": (
        "AttentionBackendEnum",
        "register_backend",
        "resolve_obj_by_qualname",
        "unregister_backend",
    ),
    "attnsel_jax.selection": ("NoAttentionBackendError", "Selection"),
    "attnsel_jax.selector": (
        "get_attn_backend",
        "_cached_get_attn_backend",
        "get_env_variable_attn_backend",
        "select",
    ),
    "attnsel_jax.vllm_metadata": ("AttentionMetadataBuilder", "CommonAttentionMetadata"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(name for name in _HOME_OF if not name.startswith("_"))
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
