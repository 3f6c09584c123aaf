"""What a backend is: a class of declarations, never instantiated; and what an impl is.

A backend says its name, its family, what it accepts for each op, and the dotted paths of its
kernels. Everything that vLLM's interface asks of a backend is read off these declarations.
"""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax

from attnsel_jax.cache_layouts import latent_layout_named, layout_named
from attnsel_jax.capabilities import Capabilities, Rejection
from attnsel_jax.config import CACHE_DTYPES, AttentionSelectorConfig, attention_type, dtype_name
from attnsel_jax.config import kv_cache_dtype_name as cache_name
from attnsel_jax.constraints import MultipleOf, OneOf, every_value
from attnsel_jax.kv_cache import checked_sizes, latent_shape
from attnsel_jax.metadata import AttentionMetadata
from attnsel_jax.platforms import Device, DeviceCapability, current_device
from attnsel_jax.qualnames import resolve_obj_by_qualname
from attnsel_jax.static_arguments import count, is_integer
from attnsel_jax.vllm_metadata import AttentionMetadataBuilder

FAMILIES: dict[str, tuple[str, ...]] = {
    "standard": ("paged", "dense"),
    "mla": ("mla",),
    "sparse_mla": ("sparse_mla",),
}


class AttentionBackend(abc.ABC):
    """One lowering of one family of attention ops, as a declaration.

    Attributes:
        name: its name in the registry, upper case.
        family: "standard" (ops paged and dense), "mla" or "sparse_mla".
        capabilities: op -> what it accepts. An op that is not here is not served.
        kernels: op -> dotted path of a function with the signature of the op's contract; further
            functions of the family (the indexer, ...) may stand beside the ops.
        impl: dotted path of the `AttentionImpl` that calls the kernels.
        layout: how its paged cache lies in memory: a name in `attnsel_jax.cache_layouts.LAYOUTS`.
        latent_layout: likewise of an MLA backend's cache: a name in `LATENT_LAYOUTS` there.
        preferred_block_size: tokens in a page, where the caller leaves it open.
        before: the backend that it precedes in automatic selection; for plug-ins, which are only
            ever used by name where this is None.
    """

    name: ClassVar[str]
    family: ClassVar[str] = "standard"
    capabilities: ClassVar[Mapping[str, Capabilities]] = {}
    kernels: ClassVar[Mapping[str, str]] = {}
    impl: ClassVar[str] = "attnsel_jax.impls.standard:StandardImpl"
    layout: ClassVar[str] = "stacked"
    latent_layout: ClassVar[str] = "rows"
    preferred_block_size: ClassVar[int] = 16
    before: ClassVar[str | None] = None

    def __new__(cls):
        """Refuses: a backend is a declaration."""
        raise TypeError(f"{cls.__name__} is a declaration, never instantiated: use the class")

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if cls.family not in FAMILIES:
            raise ValueError(
                f"{cls.__name__}.family is {cls.family!r}, must be one of {', '.join(FAMILIES)}"
            )
        for op in cls.capabilities:
            if op not in FAMILIES[cls.family]:
                raise ValueError(
                    f"{cls.__name__}.capabilities has op {op!r}, must be of family {cls.family}: "
                    f"{', '.join(FAMILIES[cls.family])}"
                )
            if op not in cls.kernels:
                raise ValueError(f"{cls.__name__}.kernels has no {op!r}, which it declares")

    @classmethod
    def get_name(cls) -> str:
        """Its name in the registry."""
        return cls.name

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """(module, qualified name) of the class."""
        return cls.__module__, cls.__qualname__

    @classmethod
    def is_mla(cls) -> bool:
        """Whether it serves multi-head latent attention."""
        return cls.family != "standard"

    @classmethod
    def is_sparse(cls) -> bool:
        """Whether it serves sparse MLA."""
        return cls.family == "sparse_mla"

    # What it runs.

    @classmethod
    def get_kernel(cls, op: str) -> Callable[..., Any]:
        """The function that lowers the op; imports it.

        Raises:
            ValueError: it has none for this op.
            ImportError, OSError: what the kernel needs is not installed here.
        """
        if op not in cls.kernels:
            known = ", ".join(cls.kernels) or "nothing: it has no kernels yet"
            raise ValueError(f"op is {op!r}, must be one of {known}: {cls.name} lowers no other")
        return resolve_obj_by_qualname(cls.kernels[op])

    @classmethod
    def get_impl_cls(cls) -> type["AttentionImpl"]:
        """The impl class, bound to this backend."""
        return _bound_impl(cls)

    @classmethod
    def get_metadata_cls(cls) -> type[AttentionMetadata]:
        """The class of the batch that its impl takes."""
        return AttentionMetadata

    @classmethod
    def get_builder_cls(cls) -> type[AttentionMetadataBuilder]:
        """The class that builds the batch from vLLM's words."""
        return AttentionMetadataBuilder

    # Its cache.

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """The shape of the cache's array; its dtype is `kv_cache.stored_dtype(cache_dtype_str)`.

        "auto" is bfloat16 where the bytes of a number matter (layout "tiled").

        Raises:
            ValueError: a size below 1, a dtype that it does not take, or what
                `kv_cache.latent_shape` refuses.
        """
        sizes = checked_sizes(num_blocks, block_size, num_kv_heads, head_size)
        if cls.is_mla():
            return latent_shape(cls.latent_layout, *sizes, cache_dtype_str)
        if not cls.supports_kv_cache_dtype(cache_dtype_str):
            allowed = OneOf(*filter(cls.supports_kv_cache_dtype, CACHE_DTYPES))
            raise ValueError(f"cache_dtype_str is {cache_dtype_str}, must be {allowed}")
        return layout_named(cls.layout).shape(*sizes)

    @classmethod
    def get_kv_cache_stride_order(cls) -> tuple[int, ...]:
        """The order in which the dimensions of the cache's shape lie in memory."""
        if not cls.is_mla():
            return layout_named(cls.layout).stride_order
        return tuple(range(latent_layout_named(cls.latent_layout).ndim))

    @classmethod
    def get_required_kv_cache_layout(cls) -> str | None:
        """The name of the cache's layout; None for MLA backends that take plain rows."""
        if cls.is_mla():
            return None if cls.latent_layout == "rows" else cls.latent_layout
        return cls.layout

    @classmethod
    def get_preferred_block_size(cls, default: int | None = None) -> int:
        """The page size to use where the caller left it open: `default`, if it is supported."""
        if count("default", default) is not None and cls.supports_block_size(default):
            return default
        return cls.preferred_block_size

    # What it accepts, field by field.

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """The head sizes that some op takes, where there is an end to them; else an empty list."""
        sizes: set[int] = set()
        for capabilities in cls.capabilities.values():
            named = every_value(capabilities.head_size)
            if named is None:
                return []
            sizes.update(named)
        return sorted(sizes)

    @classmethod
    def get_supported_kernel_block_sizes(cls) -> list[int | MultipleOf]:
        """The page sizes it takes: numbers, or `MultipleOf`."""
        paged = [c.block_size for op, c in cls.capabilities.items() if op != "dense"]
        sizes: list[int | MultipleOf] = []
        for allowed in paged:
            other = allowed if isinstance(allowed, MultipleOf) else MultipleOf(1)
            sizes += allowed.values if isinstance(allowed, OneOf) else [other]
        return sizes

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether some op takes it."""
        return is_integer(head_size) and cls._allows("head_size", head_size)

    @classmethod
    def supports_dtype(cls, dtype: Any) -> bool:
        """Whether some op takes q, k and v of it."""
        return cls._allows("dtype", dtype_name(dtype))

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """Whether some op takes a cache of it; "auto" and None (the dtype of k and v) always do."""
        name = cache_name(kv_cache_dtype)
        return name == "auto" or cls._allows("kv_cache_dtype", name, of_cache=True)

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Whether some op takes pages of so many tokens; None always does."""
        allows = is_integer(block_size) and cls._allows("block_size", block_size, of_cache=True)
        return block_size is None or allows

    @classmethod
    def supports_sink(cls) -> bool:
        """Whether some op honours sinks."""
        return cls._allows("has_sink", True)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Whether some op serves this `AttentionType`."""
        return cls._allows("attn_type", attention_type(attn_type))

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Whether some op runs on a CUDA chip of it."""
        return cls._allows("compute_capability", capability) and cls._allows("platform", "cuda")

    @classmethod
    def supports_combination(
        cls, config: AttentionSelectorConfig, device: Device
    ) -> Sequence[Rejection]:
        """Reasons that no single field shows (fp8 only with head size 128, ...); mostly none."""
        return ()

    @classmethod
    def validate_configuration(
        cls, config: AttentionSelectorConfig, device: Device | None = None
    ) -> list[Rejection]:
        """Every reason why it does not serve the question; none means that it does.

        Args:
            config: the question.
            device: the chip to run on; None = JAX's default device here.
        """
        family = [
            Rejection(field, asked, OneOf(answer))
            for field, asked, answer in (
                ("use_mla", config.use_mla, cls.is_mla()),
                ("use_sparse", config.use_sparse, cls.is_sparse()),
            )
            if asked != answer
        ]
        if family:
            return family
        if config.op not in cls.capabilities:
            none_yet = "another backend's: this one has no kernels yet"
            allowed = OneOf(*cls.capabilities) if cls.capabilities else none_yet
            return [Rejection("op", config.op, allowed)]
        device = device or current_device()
        rejections = list(cls.capabilities[config.op].compare(config, device))
        return rejections + list(cls.supports_combination(config, device))

    @classmethod
    def _allows(cls, field: str, value: Any, *, of_cache: bool = False) -> bool:
        """Whether some op (some op that has a cache) takes the value."""
        return any(
            value in getattr(capabilities, field)
            for op, capabilities in cls.capabilities.items()
            if not (of_cache and op == "dense")
        )


@functools.cache
def _bound_impl(backend: type[AttentionBackend]) -> type["AttentionImpl"]:
    """The backend's impl class with `backend` set."""
    impl = resolve_obj_by_qualname(backend.impl)
    return type(f"{impl.__name__}[{backend.name}]", (impl,), {"backend": backend})


class AttentionImpl(abc.ABC):
    """Execution: holds a layer's static facts, and calls the backend's kernel at each step."""

    backend: ClassVar[type[AttentionBackend]]

    @abc.abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        """Attends, and returns (output, the cache with this step written)."""


class MLAAttentionImpl(AttentionImpl):
    """Execution for MLA: queries absorbed, one latent cache for all heads."""
