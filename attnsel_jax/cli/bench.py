"""`attnsel bench`: named cases against rivals, the device's roofline, targets reached or not."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from attnsel_jax.cli.terminal import (
    CHECK_FAILED,
    Json,
    callers_mistakes,
    check_drawable,
    check_writable,
    console,
    print_json,
    progress_console,
    quiet_device_start,
    si,
)


def bench(
    case: Annotated[
        list[str] | None,
        typer.Option(help="Case, its beginning, or a pattern; may be repeated. Default: all."),
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Print the cases' names.")] = False,
    backend: Annotated[
        list[str] | None, typer.Option(help="Time this backend; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each contender.")] = 9,
    budget: Annotated[
        float, typer.Option(help="Seconds for one case's rounds; at least 3 rounds run.")
    ] = 25.0,
    seed: Annotated[int, typer.Option(help="Of the random data.")] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 1 when a target is missed.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON there too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG, SVG, PDF).")] = None,
    json: Json = False,
) -> None:
    """Times every backend against rivals, on the default device; about four minutes for all.

    Times are medians of interleaved rounds on fresh random data; answers are compared too.
    """
    from attnsel_jax import bench as library
    from attnsel_jax.bench.plot import plot as draw
    from attnsel_jax.platforms import current_device

    with callers_mistakes():
        names = library.named(case or ())
        backends = tuple(_registered(name) for name in backend) if backend else None
        settings = library.Settings(rounds, budget, backends, seed)
    if list_cases:
        _print_names(names, json)
        return
    check_writable("--output", output)
    check_drawable("--plot", plot)
    with quiet_device_start():
        current_device()
    results = _run(library, names, settings, json)
    data = _as_data(results, settings)
    if output:
        output.write_text(json_module.dumps(data, indent=2) + "\n")
    if plot:
        draw(results, plot)
    if json:
        print_json(data)
    else:
        _print_end(data)
    if check and data["missed"]:
        raise typer.Exit(CHECK_FAILED)


def _print_names(names: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        print_json(list(names))
    else:
        console().print("\n".join(names))


def _run(library: Any, names: tuple[str, ...], settings: Any, as_json: bool) -> list[Any]:
    """Runs the cases, printing each as soon as it is measured."""
    results = []
    with progress_console().status("measuring") as status:
        for number, name in enumerate(names, 1):
            status.update(f"measuring {name} ({number} of {len(names)})")
            with callers_mistakes():
                results += library.run([name], settings)
            if not as_json:
                status.stop()
                _print_result(results[-1])
                status.start()
    return results


def _as_data(results: list[Any], settings: Any) -> dict[str, Any]:
    from attnsel_jax.bench.report import to_json
    from attnsel_jax.bench.roofline import roofline_of
    from attnsel_jax.platforms import current_device

    device = current_device()
    needs_roofline = any(result.limit for result in results)
    roofline = roofline_of(device) if needs_roofline else None
    command = ["attnsel", *sys.argv[1:]]
    return to_json(results, settings, device, roofline, command)


def _print_result(result: Any) -> None:
    """The case's rows, its targets, its notes."""
    out = console()
    out.print(f"[bold]{result.name}[/]: {escape(result.description)}")
    table = Table("", box=None, pad_edge=False)
    for heading in ("median", "quartiles", "times", "of the roofline"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        quartiles = f"{si(row.low, row.unit)} to {si(row.high, row.unit)}" if row.low else "-"
        share = f"{row.share:.0%}" if row.share else "-"
        table.add_row(row.name, si(row.value, row.unit), quartiles, str(row.samples), share)
    out.print(table)
    styles = {True: "green", False: "bold red", None: "yellow"}
    for verdict in result.verdicts:
        out.print(f"[{styles[verdict.reached]}]{escape(str(verdict))}[/]")
    for note in result.notes:
        out.print(f"[dim]{escape(note)}[/]")
    out.print()


def _print_end(data: dict[str, Any]) -> None:
    """The device's limits, and the verdict on the whole run."""
    out = console()
    roofline = data["roofline"]
    if roofline:
        flops, bandwidth = si(roofline["flops"], "FLOP/s"), si(roofline["bandwidth"], "B/s")
        out.print(escape(f"roofline: {flops}, {bandwidth} ({roofline['source']})"))
    count = sum(v["reached"] is not None for case in data["cases"] for v in case["verdicts"])
    if data["missed"]:
        out.print(f"[bold red]{len(data['missed'])} of {count} targets not reached[/]")
    else:
        out.print(f"[bold green]all {count} targets reached[/]")


def _registered(name: str) -> str:
    from attnsel_jax.registry import AttentionBackendEnum

    return AttentionBackendEnum[name.upper()].name
