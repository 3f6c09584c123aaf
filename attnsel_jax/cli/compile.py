"""`attnsel compile`: a backend's op through a chip's real compiler, without the chip."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import typer
from rich.markup import escape
from rich.table import Table

from attnsel_jax.cli.compile_options import (
    abstract_arguments,
    check_options,
    is_on_command_line,
)
from attnsel_jax.cli.mesh_options import (
    BatchAxis,
    ContextAxis,
    Form,
    HeadsAxis,
    MeshShape,
    mesh_axes,
    mesh_call,
)
from attnsel_jax.cli.terminal import (
    CHECK_FAILED,
    NOTHING_SERVES,
    Json,
    callers_mistakes,
    console,
    print_json,
    progress_console,
    si,
)


class Case(NamedTuple):
    """One call to compile: a problem's name or "options", the op, its abstract arguments."""

    name: str
    op: str
    arguments: Mapping[str, Any]
    gradients: bool
    attn_type: str | None = None


class Outcome(NamedTuple):
    """What became of one case on one chip."""

    case: str
    chip: str
    backend: str | None
    verdict: str  # "compiled", "refused by the compiler", "refused by selection"
    report: Any = None
    reasons: str = ""


def _shape(help_text: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel="Shapes, where no --problem is named")


# Longer than 40 lines: its options are the shapes of every op.
def compile_(
    ctx: typer.Context,
    device: Annotated[list[str], typer.Option(help="Chip to compile for; may be repeated.")],
    problem: Annotated[
        list[str] | None,
        typer.Option(help="Named problem, family or set (attnsel compare); may be repeated."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Default: what selection takes on that chip.")
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="The backward pass too (dense).")
    ] = False,
    op: Annotated[str, _shape("dense, paged, mla or sparse_mla.")] = "dense",
    dtype: Annotated[str, _shape("Of q, k and v.")] = "bfloat16",
    kv_cache_dtype: Annotated[str, _shape("auto, bfloat16, fp8, int8, ...")] = "auto",
    batch: Annotated[int, _shape("Sequences.")] = 1,
    q_len: Annotated[int, _shape("New tokens of each.")] = 1024,
    kv_len: Annotated[int | None, _shape("Keys of each; default: q_len.")] = None,
    num_heads: Annotated[int, _shape("Query heads.")] = 8,
    num_kv_heads: Annotated[int | None, _shape("Kv heads; default: num_heads.")] = None,
    head_size: Annotated[int | None, _shape("Default: 128; MLA: 576, of which 64 rotary.")] = None,
    block_size: Annotated[int | None, _shape("Tokens in a page; default: the backend's.")] = None,
    causal: Annotated[bool, _shape("Dense and paged.")] = True,
    sliding_window: Annotated[int | None, _shape("Keys a query sees, its own included.")] = None,
    soft_cap: Annotated[float | None, _shape("On the logits.")] = None,
    topk: Annotated[int, _shape("Positions of each token, for sparse_mla.")] = 2048,
    mesh: MeshShape = None,
    batch_axis: BatchAxis = None,
    heads_axis: HeadsAxis = None,
    context_axis: ContextAxis = None,
    form: Form = "ring",
    json: Json = False,
) -> None:
    """Compiles a backend's op for a chip that is not here.

    Prints memory, cost, and the compiler's own words if it refuses.

    TPUs need libtpu here, NVIDIA chips jax's CUDA plugin; no accelerator is needed.
    """
    options = dict(locals())
    with callers_mistakes():
        check_options(options, [o for o in options if is_on_command_line(ctx, o)])
        cases = list(_cases(options))
        outcomes = list(_outcomes(cases, device, backend, options))
    if json:
        print_json([_as_json(outcome) for outcome in outcomes])
    else:
        _print(outcomes)
    verdicts = {outcome.verdict for outcome in outcomes}
    if "refused by the compiler" in verdicts:
        raise typer.Exit(CHECK_FAILED)
    if verdicts != {"compiled"}:
        raise typer.Exit(NOTHING_SERVES)


def _cases(options: dict[str, Any]) -> Iterator[Case]:
    """The named problems, or the one that the options describe."""
    if not options["problem"]:
        yield Case("options", options["op"], options, options["gradients"])
        return
    from attnsel_jax.problems import named

    for problem in named(options["problem"]):
        wanted = options["gradients"] and problem.op == "dense"
        yield Case(problem.name, problem.op, problem.make(), wanted, problem.attn_type)


def _outcomes(
    cases: list[Case], chips: list[str], backend: str | None, options: Mapping[str, Any]
) -> Iterator[Outcome]:
    """Each case on each chip: selection, then the compiler."""
    from attnsel_jax.aot import target_for

    targets = [target_for(chip) for chip in chips]
    with progress_console().status("compiling") as status:
        for case in cases:
            for target in targets:
                status.update(f"compiling {case.name} for {target.chip}")
                yield _outcome(case, target, backend, options)


def _outcome(case: Case, target: Any, backend: str | None, options: Mapping[str, Any]) -> Outcome:
    from attnsel_jax.aot import NoCompilerError, compile_for
    from attnsel_jax.cache_layouts import in_layouts
    from attnsel_jax.platforms import CHIPS
    from attnsel_jax.problems import question
    from attnsel_jax.selector import select

    chip = CHIPS[target.chip]
    arguments = case.arguments
    if case.name == "options":
        arguments = abstract_arguments(arguments, chip, backend)
    config = question(case.op, arguments, attn_type=case.attn_type, needs_grad=case.gradients)
    axes = mesh_axes(options)
    if axes is not None and axes.context and (axes.form == "ring" or case.op != "dense"):
        config = dataclasses.replace(config, context_axis=axes.context)
    selection = select(config, chip, backend)
    if selection.backend is None:
        reasons = str(selection)
        return Outcome(case.name, target.chip, None, "refused by selection", None, reasons)
    layouts = selection.backend.layout, selection.backend.latent_layout
    arguments = in_layouts(arguments, *layouts)
    kernels = selection.backend.kernels
    if case.op not in kernels:
        reasons = f"op is {case.op}, must be one of {', '.join(kernels)}"
        name = selection.backend.name
        return Outcome(case.name, target.chip, name, "refused by selection", None, reasons)
    try:
        report = compile_for(
            target.chip, kernels[case.op], arguments, gradients=case.gradients,
            over=mesh_call(options, selection.backend, case.op),
        )  # fmt: skip
    except NoCompilerError as error:
        return Outcome(
            case.name, target.chip, selection.backend.name, "no compiler here", None, str(error)
        )
    verdict = "compiled" if report.compiled else "refused by the compiler"
    return Outcome(
        case.name, target.chip, selection.backend.name, verdict, report, report.refusal or ""
    )


def _as_json(outcome: Outcome) -> dict[str, Any]:
    report = outcome.report.to_json() if outcome.report else None
    return outcome._asdict() | {"report": report}


def _print(outcomes: list[Outcome]) -> None:
    """A table of memory and cost, then every refusal in full."""
    out = console()
    table = Table("case", "device", "backend", "verdict")
    for heading in (
        "arguments",
        "outputs",
        "in place",
        "temporaries",
        "flops",
        "bytes",
        "sent",
        "seconds",
    ):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        style = "green" if outcome.verdict == "compiled" else "bold red"
        said = [outcome.case, outcome.chip, outcome.backend or "-"]
        table.add_row(*said, f"[{style}]{outcome.verdict}[/]", *_figures(outcome.report))
    out.print(table)
    for outcome in outcomes:
        if outcome.reasons:
            where = f"{outcome.case} for {outcome.chip}"
            out.print(f"[bold]{escape(where)}[/]\n{escape(outcome.reasons)}", soft_wrap=True)


def _figures(report: Any) -> list[str]:
    if report is None:
        return ["-"] * 8
    if not report.compiled:
        return ["-"] * 7 + [f"{report.seconds:.1f}" if report.seconds else "-"]
    memory = [
        si(report.memory[name], "B") for name in ("arguments", "outputs", "aliased", "temporaries")
    ]
    return [
        *memory,
        si(report.cost["flops"]),
        si(report.cost["bytes"], "B"),
        si(sum(report.sent.values()), "B") if report.sent else "-",
        f"{report.seconds:.1f}",
    ]
