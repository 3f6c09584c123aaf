"""`python -m benchmarks.gpu run | list`: one command, with a GPU or without."""

import math
import os
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import typer
from rich.markup import escape
from rich.table import Table

from attnsel_jax.cli.terminal import CHECK_FAILED, callers_mistakes, console, progress_console
from benchmarks.gpu import measured, page, results, steps, tuning, watching
from benchmarks.gpu.contenders import CONTENDERS, contender, reason_against
from benchmarks.gpu.static.measuring import check_compiler, compile_and_read
from benchmarks.gpu.works import WORKS
from benchmarks.work import Work, named
from pallas_kernels import gpu_chip

app = typer.Typer(no_args_is_help=True, add_completion=False, help="GPU kernels, measured or read.")
Works = Annotated[
    list[str] | None, typer.Option(help="Work, or how its name begins; may be repeated.")
]
Only = Annotated[list[str] | None, typer.Option(help="Contender; may be repeated.")]


@app.command(name="list")
def list_() -> None:
    """Prints works and contenders."""
    table = Table("work", "what")
    for work in WORKS.values():
        table.add_row(work.name, work.description)
    console().print(table)
    console().print(f"contenders: {', '.join(CONTENDERS)}; PyTorch where it is installed")


@app.command()
def run(
    work: Works = None,
    only: Only = None,
    output: Annotated[pathlib.Path | None, typer.Option(help="Folder for the JSON file.")] = None,
    chip: Annotated[
        list[str] | None, typer.Option(help="Without a GPU: chips to compile for.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="On a GPU: that the run may take.")] = 560.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the checks; None = another each run.")
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="As without a GPU.")] = False,
) -> None:
    """On a GPU: checks ours, then times everybody. Without one: what the compiler makes of all."""
    with callers_mistakes():
        works, names = named(WORKS, work or ()), list(only or CONTENDERS)
        for name in names:
            contender(name)
        os.environ |= watching.MEMORY | os.environ  # what asks for the GPU takes none of its memory
        if static or jax.default_backend() != "gpu":
            check_compiler()
            ok = _static(works, names, chip or [gpu_chip.DEFAULT], output)
        else:
            ok = _measure(works, names, output, seconds, seed)
    if not ok:
        raise typer.Exit(CHECK_FAILED)


def _measure(works, names, output, seconds: float, seed: int | None) -> bool:
    folder = output or pathlib.Path("gpu_results")
    chosen = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    with progress_console().status("starting") as status:
        data = measured.run(works, names, folder, seconds, chosen, status.update)
    _print("checks", page.CHECK_COLUMNS, page.check_rows(data))
    for row in data["checks"]:
        if row["verdict"] in ("fail", "error"):
            console().print(escape(str(row)))
    _print(data["device"].get("kind", "no device"), page.TIMED_COLUMNS, page.timed_rows(data))
    console().print(
        f"calibration {data['calibration']}; PyTorch {data['torch'].get('calibration')}"
    )
    return not measured.failed(data)


def _static(
    works: Sequence[Work], names: Sequence[str], chips: Sequence[str],
    output: pathlib.Path | None,
) -> bool:  # fmt: skip
    """Compiles everything; keeps and prints it. Whether ours compiled without a fault."""
    ok = True
    for chip in chips:
        rows: list[dict[str, Any]] = []
        data = results.head(chip=chip, rows=rows)
        with progress_console().status("compiling") as status:
            for work in works:
                for name in names:
                    status.update(f"{chip}: {work.name}, {name}")
                    found = _compiled(work, name, chip)
                    rows += [each.to_json() for each in found]
                    if name == "ours":
                        ok = ok and all(f.verdict == "compiled" and not f.faults for f in found)
                if output is not None:
                    results.written(output, chip, data)
        _print(chip, page.STATIC_COLUMNS, page.static_rows(rows))
    return ok


@app.command()
def tune(
    op: Annotated[str, typer.Option(help="dense, paged, mla or sparse_mla.")] = "dense",
    head_dim: Annotated[int, typer.Option(help="Head size; dense works of it are taken.")] = 128,
    backward: Annotated[bool, typer.Option("--backward", help="Of dense.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Of paged; else prompts.")] = False,
    cache_dtype: Annotated[str, typer.Option(help="Of a paged or latent cache.")] = "bfloat16",
    chip: Annotated[str, typer.Option(help="To compile for.")] = gpu_chip.DEFAULT,
    most: Annotated[int, typer.Option(help="Candidates to compile.")] = 48,
    measure: Annotated[bool, typer.Option("--measure", help="Rank by time, on this GPU.")] = False,
) -> None:
    """Ranks sizes of our kernels by what the compiler makes of them; prints the table's row."""
    phase = "decode" if decode else "prefill"
    with callers_mistakes():
        work = tuning.work_of(op, head_dim, backward=backward, cache_dtype=cache_dtype)
        target = tuning.target_of(work, phase=phase, chip=chip)
        check_tunable(target, measure=measure)
        candidates = list(target.candidates(gpu_chip.CHIPS[chip]))[:most]
    with progress_console().status("compiling") as status:
        tried = _tried(target, work, candidates, chip, phase, status.update)
        if measure:
            todo = steps.tuning_steps(work, [c.sizes for c in tried if not c.faults], phase)
            found = watching.taken(todo, lambda step: math.inf, status.update)
            tried = tuning.timed(tried, (value for _, value in found))
    best = tuning.ranked(tried, waits_for_bytes=decode)
    table = Table(*target.domain, "tensor cores, at most", "KiB in flight", "µs", "faults")
    for c in best:
        share = f"{100 * c.overlapped:.0f} % to {100 * c.alone:.0f} %"
        time = "" if c.seconds is None else f"{c.seconds * 1e6:.1f}"
        said = (share, f"{c.in_flight / 1024:.0f}", time, escape(", ".join(c.faults)[:100]))
        table.add_row(*map(str, c.sizes.values()), *said)
    console().print(table)
    if not best or best[0].faults:
        raise typer.Exit(CHECK_FAILED)
    console().print(escape(tuning.row(target, best[0].sizes)), soft_wrap=True)


def check_tunable(target: tuning.Target, *, measure: bool) -> None:
    """Refuses what cannot be ranked here.

    Raises:
        ValueError: no compiler, no GPU to measure on, or nothing that a compiler says.
    """
    os.environ |= watching.MEMORY | os.environ
    if measure and jax.default_backend() != "gpu":
        raise ValueError(f"measure is True, must be False on {jax.default_backend()}: no GPU here")
    if target.says:
        check_compiler()
    elif not measure:
        raise ValueError(
            f"op is {target.kernel}, must be dense or paged where nothing is measured: its sizes "
            f"change no kernel; use --measure on a GPU"
        )


def _tried(
    target: tuning.Target, work: Work, candidates: Sequence[tuning.Sizes], chip: str, phase: str,
    say: Callable[[str], None],
) -> list[tuning.Candidate]:  # fmt: skip
    """What the compiler makes of each; nothing is said of those that are the same to it."""
    options, tried = {"phase": phase} if work.op == "paged" else {}, []
    for sizes in candidates:
        say(f"{work.name}: {len(tried)} of {len(candidates)}")
        if not target.says:
            tried.append(tuning.Candidate(sizes, (), 0.0, 0.0, 0))
            continue
        found = compile_and_read(work, "ours", chip, {"tiles": sizes, **options})
        tried.append(tuning.judged(target, sizes, found))
    return tried


def _compiled(work: Work, name: str, chip: str) -> list[Any]:
    """Every choice of a contender; nothing where it does not serve the work."""
    if reason_against(name, work) is not None:
        return []
    triton = name == "jax paged (triton)"
    return [
        compile_and_read(work, name, chip, options, xla_kernels=triton)
        for options in contender(name).choices(work)
    ]


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)
