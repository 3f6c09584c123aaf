"""How the command line speaks: exit codes, errors in one line, JSON alone on stdout, tables."""

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

CHECK_FAILED, USAGE, NOTHING_SERVES = 1, 2, 3
EXIT_CODES = (
    "Exit codes: 0 fine; 1 a check failed (compare is red, bench --check missed a target, a page "
    "is stale, a compiler refused); 2 usage; 3 nothing here serves what was asked."
)
PIPED_WIDTH = 160  # columns of tables where stdout is no terminal and COLUMNS is not set

Json = Annotated[bool, typer.Option("--json", help="Plain JSON on stdout, and nothing else there.")]


def examples(*lines: str) -> str:
    """The epilog of a command: its example command lines."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  {line}" for line in lines)])


def print_json(value: Any) -> None:
    """Prints a value as JSON, two spaces deep."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def console() -> Console:
    """Where tables go: stdout, wide where it is no terminal (unless COLUMNS says otherwise)."""
    width = None if sys.stdout.isatty() else shutil.get_terminal_size((PIPED_WIDTH, 50)).columns
    return Console(width=width, highlight=False)


def si(value: float | None, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: 1234567, "B" -> "1.23 MB"."""
    if value is None:
        return "not said"
    if 0 < abs(value) < 1 and unit == "s":
        return si(value * 1e6, "us") if abs(value) < 1e-3 else si(value * 1e3, "ms")
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    return f"{value:.3g} P{unit}"


def progress_console() -> Console:
    """Where progress goes: stderr, so that stdout holds the answer only."""
    return Console(stderr=True, highlight=False)


def fail(message: str, code: int = USAGE) -> NoReturn:
    """Prints one line on stderr and ends with an exit code."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"[bold red]error:[/bold red] {escape(message)}"
    )
    raise typer.Exit(code)


def check_writable(option: str, path: Path | None) -> None:
    """Refuses before minutes of work a file that could not be written after them; None passes."""
    if path is None:
        return
    if path.is_dir():
        fail(f"{option} is {path}, a folder, must be a file: add its name")
    folder = path.resolve().parent
    if not folder.is_dir():
        fail(f"{option} is {path}, must be in a folder that exists: make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        fail(f"{option} is {path}, must be where you may write: name another place")


def check_drawable(option: str, path: Path | None) -> None:
    """The same of a picture: matplotlib must be here, and know the format."""
    if path is None:
        return
    check_writable(option, path)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        fail(f"{option} needs matplotlib, which is not installed: pip install 'attnsel-jax[plot]'")
    formats = sorted(FigureCanvasBase.filetypes)
    if path.suffix.removeprefix(".").lower() not in formats:
        fail(f"{option} is {path}, must end in one of .{', .'.join(formats)}")


@contextlib.contextmanager
def callers_mistakes() -> Iterator[None]:
    """Turns a ValueError into one line and exit code 2; stands around calls that check input."""
    try:
        yield
    except ValueError as error:
        fail(str(error))


@contextlib.contextmanager
def quiet_device_start() -> Iterator[None]:
    """Holds back what accelerator libraries write to stderr while jax starts them.

    libtpu on a machine without a TPU logs half a page that means nothing. It writes to the file
    descriptor, so that is where it is caught; if the start fails, everything comes out.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, contextlib.ExitStack() as stack:
        saved = os.dup(2)
        stack.callback(os.close, saved)
        os.dup2(held.fileno(), 2)
        started = False
        try:
            yield
            started = True
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            if not started:
                held.seek(0)
                os.write(2, held.read())


@contextlib.contextmanager
def whole_output() -> Iterator[None]:
    """Ends with one line where the disk is full; a stdout that was closed takes everything.

    A pipe that nobody reads any more ends the command without a word. What does not fit is often
    noticed only when the rest is flushed, so that happens here too.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (open until the end)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (else what is left is flushed again)
        full = f"error: the output cannot be written: {error.strerror}; free some space there"
        sys.exit(CHECK_FAILED if error.errno == errno.EPIPE else full)


def one_line_warnings() -> None:
    """Prints warnings as `warning: text`, without the line of code that raised them."""
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {message}\n"
