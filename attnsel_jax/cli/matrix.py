"""`attnsel matrix`: the support matrix, on the terminal, as Markdown, or into the docs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from attnsel_jax.cli.terminal import (
    CHECK_FAILED,
    Json,
    callers_mistakes,
    console,
    fail,
    print_json,
)


def matrix(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the text of docs/backends.md.")
    ] = False,
    write: Annotated[
        Path | None,
        typer.Option(help="Checkout in which to write docs/backends.md and README.md's block."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Checkout to compare with: exit code 1 if stale.")
    ] = None,
    json: Json = False,
) -> None:
    """The support matrix: backends by ops, dtypes, sizes, features and chips.

    It is read off the backends' declarations; on the terminal with plug-ins, in the docs without.
    """
    from attnsel_jax import matrix as library

    if write and check:
        fail("--write and --check are given, must be one: --check looks at what is written")
    if write or check:
        _sync(library, write or check, writes=write is not None, as_json=json)
    elif json:
        print_json(library.to_json())
    elif markdown:
        print(library.docs_page(), end="")
    else:
        _print_tables(library)


def _sync(library: Any, root: Path, *, writes: bool, as_json: bool) -> None:
    """Writes both files, or says which one is stale."""
    readme = root / "README.md"
    if not readme.exists():
        fail(f"{root} has no README.md, must be a checkout of this repository: pass its folder")
    with callers_mistakes():
        wanted = {
            root / library.PAGE: library.docs_page(),
            readme: library.with_block(readme.read_text(), library.readme_block()),
        }
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    names = ", ".join(str(path.relative_to(root)) for path in stale)
    if writes:
        for path in stale:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path])
    if as_json:
        print_json({"written" if writes else "stale": [str(p.relative_to(root)) for p in stale]})
    if stale and not writes:
        fail(f"stale: {names}; write them with `{library.COMMAND}`", CHECK_FAILED)
    if not as_json:
        console().print(f"written: {names}" if stale else "up to date")


def _print_tables(library: Any) -> None:
    """Values, features and chips: a table each."""
    data = library.to_json()
    out = console()
    rows = data["rows"]
    shown = {field: text for field, text in library.VALUES.items() if field != "jax_version"}
    table = Table("backend", "op", *shown.values(), title="Values", title_justify="left")
    for row in rows:
        table.add_row(row["backend"], row["op"], *(row["values"][field] for field in shown))
    out.print(table)
    headings = library.FEATURES.values()
    table = Table("backend", "op", *headings, title="Features", title_justify="left")
    for row in rows:
        cells = (_mark(row["features"][field]) for field in library.FEATURES)
        table.add_row(row["backend"], row["op"], *cells)
    out.print(table)
    chips = list(data["automatic"])
    table = Table("backend", "op", *chips, title="Chips", title_justify="left")
    for row in rows:
        cells = (_mark("yes" if chip in row["chips"] else "no") for chip in chips)
        table.add_row(row["backend"], row["op"], *cells)
    out.print(table)
    for row in {row["backend"]: row for row in rows if row["besides"]}.values():
        out.print(f"{row['backend']}, besides: {row['besides']}")
    if data["without_kernels"]:
        out.print(f"without kernels yet: {', '.join(data['without_kernels'])}")


def _mark(answer: str) -> str:
    return {"yes": "[green]yes[/]", "no": "[dim]-[/]"}.get(answer, answer)
