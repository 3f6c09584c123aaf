"""`attnsel compare`: every backend that runs here, on named problems, against the oracle."""

import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attnsel_jax.cli.terminal import (
    CHECK_FAILED,
    NOTHING_SERVES,
    Json,
    callers_mistakes,
    check_drawable,
    console,
    print_json,
    progress_console,
    quiet_device_start,
)

WORKERS = 2  # one compiles while another runs or waits for the oracle


def compare(
    problem: Annotated[
        list[str] | None,
        typer.Option(help="Problem, family, set, or pattern; may be repeated. Default: all."),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="May be repeated. Default: every one.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny problems that reach every feature.")
    ] = False,
    random: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="That many small problems drawn at random, of those that a backend accepts; "
            "another --seed draws others.",
        ),
    ] = None,
    list_problems: Annotated[
        bool, typer.Option("--list", help="Print the problems' names and what they are.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="A device that is here: cpu, gpu, tpu:1. Default: jax's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the problems' arrays.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of where backends deviate.")
    ] = None,
    json: Json = False,
) -> None:
    """Runs every backend on real problems, and holds it to the float64 oracle.

    Prints errors, the worst element, what was refused and why, and a verdict.

    Exit code 0: all within their budgets; 1: one deviates; 3: nothing ran.
    """
    with callers_mistakes():
        if random is None:
            problems = _problems(problem, quick)
        else:
            problems = _random_problems(random, seed, backend, device, problem, quick)
    if list_problems:
        _print_problems(problems, json)
        return
    check_drawable("--plot", plot)
    with callers_mistakes():
        comparison = _compared(problems, backend, _device(device), seed)
    if plot is not None:
        _plot(comparison, plot)
    if json:
        print_json(comparison.to_json())
    else:
        console().print(comparison)
    if not comparison.passed:
        ran = any(row.ran or row.failed for row in comparison)
        raise typer.Exit(CHECK_FAILED if ran else NOTHING_SERVES)


def _problems(names: list[str] | None, quick: bool) -> list[Any]:
    """The problems that the options name; --quick leaves the tiny ones of them."""
    from attnsel_jax.problems import DEFAULT, QUICK, named

    if not names:
        return list(QUICK if quick else DEFAULT)
    known = [problem.name for problem in (*DEFAULT, *QUICK)]
    wanted: list[str] = []
    for name in names:
        matches = fnmatch.filter(known, name) if set(name) & set("*?[") else [name]
        if not matches:
            raise ValueError(
                f"problem is {name!r}, a pattern that fits no name: `attnsel compare --list` and "
                f"`attnsel compare --list --quick` print the names"
            )
        wanted += matches
    found = [problem for problem in named(wanted) if problem in QUICK or not quick]
    if not found:
        raise ValueError(
            f"problem is {', '.join(names)}, must be of the quick set with --quick: leave it out"
        )
    return found


def _random_problems(
    count: int,
    seed: int,
    backends: list[str] | None,
    device: str | None,
    names: list[str] | None,
    quick: bool,
) -> list[Any]:
    """Problems that one of the backends accepts there, of the numbers of a seed."""
    from attnsel_jax.compare import accepting
    from attnsel_jax.problems import random_problems

    if names or quick:
        given = "--problem" if names else "--quick"
        raise ValueError(f"--random is {count}, must be without {given}: leave out one of them")
    chip = _device(device)
    accepts = accepting(backends, chip)
    try:
        return list(random_problems(count, seed, accepts))
    except ValueError as error:
        asked = ", ".join(backends or ["every one"])
        raise ValueError(f"backend is {asked}, on {chip or 'this device'}: {error}") from error


def _print_problems(problems: list[Any], as_json: bool) -> None:
    if as_json:
        print_json([{"name": p.name, "op": p.op, "description": p.description} for p in problems])
        return
    width = max(len(problem.name) for problem in problems)
    for problem in problems:
        console().print(f"{problem.name:<{width}}  {problem.description}", markup=False)


def _device(text: str | None) -> Any:
    """The device of that platform (and number) here; None = jax's default."""
    with quiet_device_start():
        import jax

        if text is None:
            jax.devices()
            return None
        platform, _, number = text.lower().partition(":")
        try:
            return jax.devices(platform)[int(number or 0)]
        except (RuntimeError, IndexError, ValueError) as error:
            here = ", ".join(f"{device.platform}:{device.id}" for device in jax.devices())
            raise ValueError(
                f"device is {text!r}, must be one that is here: {here}; for a chip that is not, "
                f"ask `attnsel select` and `attnsel compile`"
            ) from error


def _compared(problems: list[Any], backends: list[str] | None, chip: Any, seed: int) -> Any:
    """The library's `Comparison`, with progress on the terminal."""
    from attnsel_jax.compare import compare as library_compare

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=progress_console(), transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        return library_compare(
            problems, backends, chip, seed=seed, progress=report, workers=WORKERS
        )


def _plot(comparison: Any, path: Path) -> None:
    from attnsel_jax.compare import plot

    if any(row.ran for row in comparison):
        with callers_mistakes():
            plot(comparison, path)
