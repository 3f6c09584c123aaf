"""`python -m benchmarks.tpu_static run | tune | list`: the command line of the instrument."""

import pathlib
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from attnsel_jax.cli.terminal import Json, callers_mistakes, console, print_json, progress_console
from attnsel_jax.kv_cache import stored_dtype
from benchmarks.tpu_static import tuning
from benchmarks.tpu_static.chips import CHIPS, chip_named
from benchmarks.tpu_static.contenders import CONTENDERS, OURS, contender, is_installed
from benchmarks.tpu_static.measuring import MEASURED, Measurement, measure
from benchmarks.tpu_static.page import COLUMNS, cells
from benchmarks.tpu_static.results import FOLDER, current
from benchmarks.tpu_static.running import check_compiler, keep, rows
from benchmarks.tpu_static.works import WORKS
from benchmarks.work import Work, named

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="TPU kernels measured without a TPU."
)
Generation = Annotated[
    list[str] | None, typer.Option(help="Chip; may be repeated. Default: every one.")
]


@app.command(name="list")
def list_() -> None:
    """Prints works, contenders and whether they are installed, and generations."""
    out = console()
    table = Table("work", "what")
    for work in WORKS.values():
        table.add_row(work.name, work.description)
    out.print(table)
    table = Table("contender", "package", "installed")
    for name in CONTENDERS:
        table.add_row(name, contender(name).PACKAGE, "yes" if is_installed(name) else "no")
    out.print(table)
    out.print(f"generations: {', '.join(CHIPS)}")


@app.command()
def run(
    generation: Generation = None,
    work: Annotated[
        list[str] | None, typer.Option(help="Work, or how its name begins; may be repeated.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Contender; may be repeated.")] = None,
    output: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Folder; rows are put into <generation>.json there as they come, and those that "
            "are there already, of the same versions and sources, are kept."
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Keep none of those.")] = False,
    json: Json = False,
) -> None:
    """Compiles and replays every contender at every work; some ten seconds each.

    To renew what the docs say: --output benchmarks/results/tpu_static, then docs/generate.py. A
    run that was stopped goes on where it was when it is started again.
    """
    with callers_mistakes():
        check_compiler()
        generations = [chip_named(name).generation for name in generation or CHIPS]
        works, names = named(WORKS, work or ()), list(only or CONTENDERS)
        for name in names:
            contender(name)
    found: dict[str, list[dict[str, Any]]] = {}
    command = " ".join(["python -m benchmarks.tpu_static", *sys.argv[1:]])
    with progress_console().status("compiling") as status:
        for chip in generations:
            known = {} if output is None or again else current(chip, output)
            asked = [key for key in known if key[0] in {w.name for w in works} and key[1] in names]
            if asked:
                console().print(f"{chip}: {len(asked)} rows of the same versions and sources kept")
            found[chip] = []
            for this in keep(rows(works, names, chip, known), chip, command, output):
                found[chip].append(this)
                status.update(f"{chip}: {this['work']}, {this['contender']} done")
    if json:
        print_json(found)
        return
    for chip, these in found.items():
        _print(chip, these)


def _print(generation: str, these: list[dict[str, Any]]) -> None:
    """A table of one generation, then every reason in full."""
    out, table = console(), Table(*COLUMNS, title=generation)
    for this in these:
        table.add_row(*(escape(cell) for cell in cells(this)))
    out.print(table)
    for this in these:
        if this["verdict"] != MEASURED:
            said = f"{this['work']}, {this['contender']}: {this['verdict']}: {this['reason']}"
            out.print(escape(said), soft_wrap=True)


@app.command()
def tune(
    generation: Generation = None,
    work: Annotated[list[str] | None, typer.Option(help="Work; may be repeated.")] = None,
    most: Annotated[int, typer.Option(help="Candidates to compile for each.")] = 16,
    write: Annotated[bool, typer.Option("--write", help="Put the best into the table.")] = False,
    cache_dtype: Annotated[
        str | None, typer.Option(help="Of a paged cache, in place of the work's.")
    ] = None,
) -> None:
    """Ranks tile sizes of our kernels by their static schedule, then by the bytes they move.

    A work whose cache has no entry of its own in the kernel's table is left out, and named.
    """
    with callers_mistakes():
        check_compiler()
        stored_dtype(cache_dtype, "bfloat16")  # refuses what is no dtype of a cache
        for chip in [chip_named(name).generation for name in generation or CHIPS]:
            for this in named(WORKS, work or ()):
                _tune(this, chip, most, write, cache_dtype)


def _tune(work: Work, generation: str, most: int, write: bool, cache_dtype: str | None) -> None:
    out, tried = console(), []
    try:
        table = tuning.table_of(work, generation, cache_dtype)
    except ValueError as why:
        out.print(escape(f"{generation}, {work.name}: left out: {why}"), soft_wrap=True)
        return
    other = {} if cache_dtype is None else {"cache_dtype": cache_dtype}

    def measured(sizes: tuning.Sizes) -> Measurement:
        return measure(work, OURS, generation, {"tiles": sizes, **other})

    with progress_console().status("compiling") as status:
        for sizes, found in tuning.search(table.sizes, measured, most):
            status.update(f"{generation}, {work.name}: {len(tried) + 1} tried")
            tried.append((sizes, found))
            out.print(" ".join((*map(str, sizes.values()), *_said(found))))  # lest a stop loses it
    best = tuning.ranked(tried)
    shown = Table(*table.sizes, "time µs", "bytes/floor", title=f"{work.name} on {generation}")
    for sizes, found in best:
        shown.add_row(*map(str, sizes.values()), *_said(found))
    out.print(shown)
    if write and tuning.is_sure(best[0][1]) and best[0][0] != table.sizes:
        out.print(f"written: {table.write(best[0][0])}")


def _said(found: Measurement) -> tuple[str, str]:
    """A candidate's time, `?` beside a doubtful one, and bytes; or why there is none."""
    if found.verdict != MEASURED:
        return escape(found.reason[:80]), ""
    doubt = "" if tuning.is_sure(found) else " ?"
    time = f"{found.estimated_us:.1f}{doubt}"
    return time, f"{found.bytes_moved / found.floor_bytes:.2f}"


@app.command(name="results")
def results_() -> None:
    """Prints what is committed."""
    import json as json_module

    for path in sorted(FOLDER.glob("*.json")):
        _print(path.stem, json_module.loads(path.read_text())["rows"])
