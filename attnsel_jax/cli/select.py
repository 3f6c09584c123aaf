"""`attnsel select`: the question as options, the answer as a table of every backend's reasons."""

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from attnsel_jax.cli.terminal import (
    NOTHING_SERVES,
    Json,
    callers_mistakes,
    console,
    print_json,
    quiet_device_start,
)

STYLES = {"chosen": "bold green", "eligible": "green", "by name only": "cyan", "refused": "dim"}


def _feature(flag: str, help_text: str) -> Any:
    """A flag without its `--no-` twin."""
    return typer.Option(flag, help=help_text, rich_help_panel="Features that the calls will use")


# Longer than 40 lines: it is the question, one option for each of its fields.
def select(
    head_size: Annotated[int, typer.Option(help="Size of a head of q and k; MLA: 576.")],
    dtype: Annotated[str, typer.Option(help="Of q, k, v: bfloat16, float16, float32.")],
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, bfloat16, fp8, int8, ...")] = "auto",
    block_size: Annotated[int | None, typer.Option(help="Tokens in a page.")] = None,
    use_mla: Annotated[bool, typer.Option("--use-mla", help="Latent attention.")] = False,
    has_sink: Annotated[bool, _feature("--has-sink", "One more logit per head.")] = False,
    use_sparse: Annotated[
        bool, typer.Option("--use-sparse", help="Top-k positions; needs --use-mla.")
    ] = False,
    attn_type: Annotated[
        str, typer.Option(help="decoder, encoder, encoder_only, encoder_decoder.")
    ] = "decoder",
    op: Annotated[
        str | None, typer.Option(help="paged (the default), dense; mla, sparse_mla.")
    ] = None,
    head_size_v: Annotated[int | None, typer.Option(help="Of v, where it differs.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    num_kv_heads: Annotated[int | None, typer.Option(help="Kv heads.")] = None,
    num_index_heads: Annotated[
        int | None, typer.Option(help="Of the indexer, if that is asked for.")
    ] = None,
    index_head_dim: Annotated[
        int | None, typer.Option(help="With it; cache and page are then those of its keys.")
    ] = None,
    causal: Annotated[bool | None, typer.Option(help="Default: as attn_type says.")] = None,
    has_sliding_window: Annotated[bool, _feature("--has-sliding-window", "A window.")] = False,
    has_attention_chunk: Annotated[
        bool, _feature("--has-attention-chunk", "Chunked-local attention.")
    ] = False,
    has_soft_cap: Annotated[bool, _feature("--has-soft-cap", "Soft cap on the logits.")] = False,
    has_bias: Annotated[bool, _feature("--has-bias", "A bias array.")] = False,
    has_alibi: Annotated[bool, _feature("--has-alibi", "ALiBi slopes.")] = False,
    has_mask: Annotated[bool, _feature("--has-mask", "A boolean mask.")] = False,
    has_segment_ids: Annotated[bool, _feature("--has-segment-ids", "Segment ids.")] = False,
    has_lens: Annotated[bool, _feature("--has-lens", "Query and key lengths.")] = False,
    has_q_offset: Annotated[bool, _feature("--has-q-offset", "A position for query 0.")] = False,
    needs_grad: Annotated[bool, _feature("--needs-grad", "Gradients.")] = False,
    needs_lse: Annotated[bool, _feature("--needs-lse", "The log-sum-exp.")] = False,
    context_axis: Annotated[
        str | None, typer.Option(help="Mesh axis that spreads a sequence's keys.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Any chip (attnsel devices); default: the one here.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Insist on this one; auto = on none, whatever is set.")
    ] = None,
    json: Json = False,
) -> None:
    """Which backend serves a question on a chip, here or not, and why not the others.

    The question has vLLM's words (attnsel_jax.AttentionSelectorConfig).

    Without --backend, the environment variable ATTNSEL_BACKEND is honoured.

    Exit code 3 when nothing serves.
    """
    question = dict(locals())
    device, backend, json = (question.pop(name) for name in ("device", "backend", "json"))
    selection = _selected(question, device, backend)
    if json:
        print_json(selection.to_json())
    else:
        print_selection(selection)
    if selection.backend is None:
        raise typer.Exit(NOTHING_SERVES)


def _selected(question: dict[str, Any], device: str | None, backend: str | None) -> Any:
    """The library's `Selection`; starts a device only where no chip is named."""
    from attnsel_jax.config import AttentionSelectorConfig
    from attnsel_jax.platforms import Device, current_device
    from attnsel_jax.selector import select as library_select

    with callers_mistakes():
        config = AttentionSelectorConfig(**question)
        if device is None:
            with quiet_device_start():
                chip = current_device()
        else:
            chip = Device.named(device)
        return library_select(config, chip, backend)


def print_selection(selection: Any) -> None:
    """The question, a table of every backend's reasons, and a verdict."""
    out = console()
    out.print(escape(f"{selection.config}"))
    out.print(escape(f"on {selection.device}"))
    table = Table("backend", "status", "reasons")
    for name, reasons in selection.reasons.items():
        status = selection.status(name)
        said = escape("\n".join(map(str, reasons)))
        table.add_row(name, f"[{STYLES[status]}]{status}[/]", said)
    out.print(table)
    out.print(_verdict(selection), soft_wrap=True)


def _verdict(selection: Any) -> str:
    asked = selection.insistence
    by = f", asked for by {escape(asked.source)}" if asked else ""
    if selection.backend is not None:
        return f"[bold green]{selection.backend.name}[/] serves this{by}"
    what = f"{escape(asked.name)}{by}, does not serve this" if asked else "nothing serves this"
    eligible = [name for name, reasons in selection.reasons.items() if not reasons]
    if eligible:
        return f"[bold red]{what}[/]; these would: {', '.join(eligible)}"
    nearest = selection.nearest()
    if nearest is None:
        return f"[bold red]{what}[/]"
    changes = escape("; ".join(map(str, selection.reasons[nearest])))
    return f"[bold red]{what}[/]; nearest: {nearest}, if {changes}"
