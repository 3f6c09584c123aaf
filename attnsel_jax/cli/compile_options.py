"""The shapes that `attnsel compile` is asked for by options: checked, and made into arguments."""

from collections.abc import Mapping
from typing import Any

import typer

# Options that not every op has an argument for.
_ONLY = {
    "causal": ("dense", "paged"),
    "num_kv_heads": ("dense", "paged"),
    "kv_cache_dtype": ("paged", "mla", "sparse_mla"),
    "block_size": ("paged", "mla", "sparse_mla"),
    "topk": ("sparse_mla",),
}
_SETTINGS = (
    "device", "problem", "backend", "gradients", "json",
    "mesh", "batch_axis", "heads_axis", "context_axis", "form",
)  # fmt: skip


def check_options(options: dict[str, Any], said: list[str]) -> None:
    """Refuses shapes that no array has, and options that would not be looked at."""
    from attnsel_jax.config import OPS, dtype_name
    from attnsel_jax.static_arguments import count, number

    op = options["op"]
    if op not in OPS:
        raise ValueError(f"op is {op!r}, must be one of {', '.join(OPS)}")
    for name in said:
        flag = f"--{name.replace('_', '-')}"
        if options["problem"] and name not in _SETTINGS:
            raise ValueError(f"{flag} is given, must be left out with --problem: it has its shapes")
        if op not in _ONLY.get(name, OPS):
            raise ValueError(f"{flag} is given, must be left out with op {op}: it has no such")
    for name in ("batch", "q_len", "num_heads", "topk"):
        count(name, options[name], optional=False)
    for name in ("kv_len", "num_kv_heads", "head_size", "block_size", "sliding_window"):
        count(name, options[name])
    number("soft_cap", options["soft_cap"], positive=True)
    dtype_name(options["dtype"])
    if op in ("mla", "sparse_mla") and (options["head_size"] or 576) <= 64:
        raise ValueError(
            f"head_size is {options['head_size']}, must be above 64 with op {op}: 64 are rotary"
        )


def is_on_command_line(ctx: typer.Context, name: str) -> bool:
    """Whether the option was given, and not left at its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def abstract_arguments(options: Mapping[str, Any], chip: Any, backend: str | None) -> Any:
    """The arguments that the shape options describe; the cache in its logical layout."""
    from attnsel_jax.aot.arguments import dense_arguments, mla_arguments, paged_arguments
    from attnsel_jax.config import AttentionSelectorConfig
    from attnsel_jax.kv_cache import stored_dtype
    from attnsel_jax.selector import select
    from pallas_kernels import fp8_ds_mla

    op, is_mla = options["op"], options["op"] in ("mla", "sparse_mla")
    head_size = options["head_size"] or (576 if is_mla else 128)
    sizes = {name: options[name] for name in ("batch", "q_len", "num_heads", "dtype")}
    sizes["kv_len"] = options["kv_len"] or options["q_len"]
    static = {name: options[name] for name in ("sliding_window", "soft_cap") if options[name]}
    heads = {"num_kv_heads": options["num_kv_heads"] or options["num_heads"]}
    if op == "dense":
        static["causal"] = options["causal"]
        return dense_arguments(**sizes, **heads, head_size=head_size, **static)
    config = AttentionSelectorConfig(
        head_size, options["dtype"], options["kv_cache_dtype"], options["block_size"], is_mla,
        use_sparse=op == "sparse_mla", op=op,
    )  # fmt: skip
    serving = select(config, chip, backend).required()
    page_size = options["block_size"] or serving.get_preferred_block_size()
    pages = options["batch"] * -(-sizes["kv_len"] // page_size)
    cache_dtype = config.kv_cache_dtype
    cache = {
        "page_size": page_size,
        "cache_dtype": stored_dtype(cache_dtype, options["dtype"]),
        "cache_shape": (2, pages, page_size, heads["num_kv_heads"], head_size),
    }
    if not is_mla:
        static["causal"] = options["causal"]
        return paged_arguments(**sizes, **heads, **cache, head_size=head_size, **static)
    cache["cache_shape"] = pages, page_size, head_size
    if cache_dtype == fp8_ds_mla.NAME:
        static["kv_cache_dtype"] = cache_dtype
        cache["cache_shape"] = pages, page_size, fp8_ds_mla.ROW_BYTES
    latent = {"kv_lora_rank": head_size - 64, "rope_dim": 64, "scale": (head_size // 3) ** -0.5}
    topk = options["topk"] if op == "sparse_mla" else None
    return mla_arguments(**sizes, **cache, **latent, topk=topk, **static)
