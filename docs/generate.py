"""The parts of the docs that are read off the code: `python docs/generate.py` writes them.

A part stands in its page between `<!-- generated: NAME -->` and `<!-- /generated -->`; `PARTS` says
what each name prints. A test compares, so a page cannot drift from what the code says.
`docs/backends.md` and the README's matrix are `attnsel matrix --write .`'s.
"""

import importlib
import inspect
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- generated: ([\w .]+) -->\n).*?(<!-- /generated -->)", re.DOTALL)


def contracts() -> str:
    """The op contracts, each the docstring of its room in `pallas_kernels`."""
    rooms = ("dense", "paged", "mla", "sparse_mla")
    return "\n\n".join(f"## {room}\n\n{docstring(f'pallas_kernels.{room}')}" for room in rooms)


def docstring(name: str) -> str:
    """A module's or a class's docstring, as a block of text."""
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    found = getattr(found, attribute) if attribute else found
    return f"```text\n{inspect.cleandoc(found.__doc__)}\n```"


def vllm_names() -> str:
    """What vLLM's backend names mean here."""
    from attnsel_jax.backend_names import VLLM_NAMES

    body = [[f"`{name}`", ", ".join(meanings)] for name, meanings in VLLM_NAMES.items()]
    return table(["vLLM's name", "means the first of these that serves"], body)


def chips() -> str:
    """Every chip that can be named."""
    from attnsel_jax.platforms import CHIPS

    body = [
        [
            f"`{name}`",
            chip.platform,
            chip.kind,
            chip.generation or str(chip.compute_capability or "-"),
            f"{chip.peak_flops / 1e12:.0f}" if chip.peak_flops else "-",
            f"{chip.memory_bandwidth / 1e9:.0f}" if chip.memory_bandwidth else "-",
        ]
        for name, chip in CHIPS.items()
    ]
    header = ["name", "platform", "kind, as JAX prints it", "capability, generation"]
    return table([*header, "TFLOP/s (bfloat16)", "GB/s"], body)


def problems() -> str:
    """The problems of `attnsel compare`."""
    from attnsel_jax.problems import DEFAULT

    return table(
        ["problem", "op", "what it is"],
        [[f"`{problem.name}`", problem.op, problem.description] for problem in DEFAULT],
    )


def measurements() -> str:
    """What `attnsel bench` measured, off the committed results."""
    return "\n\n".join(measured(path) for path in results()) or "No results are committed yet."


def results() -> list[pathlib.Path]:
    """The committed results of `attnsel bench`, a folder for each device."""
    return sorted((ROOT / "benchmarks" / "results").rglob("bench.json"))


def measured(path: pathlib.Path) -> str:
    """One run of `attnsel bench`: a table of its cases, with every target and what came out."""
    from attnsel_jax.cli.terminal import si

    run = json.loads(path.read_text())
    device, versions = run["device"], run["versions"]
    body = []
    for case in run["cases"]:
        rows = [f"{row['name']} {si(row['value'], row['unit'])}" for row in case["rows"]]
        targets = [
            f"{said(verdict['reached'])}: {verdict['target']} ({verdict['measured']})"
            for verdict in case["verdicts"]
        ]
        body.append([f"`{case['name']}`", "<br>".join(rows), "<br>".join(targets)])
    roofline = run["roofline"]
    lines = [
        f"### {device['processor'] or device['kind']}, {device['cores']} cores",
        f"`{run['command']}`, {run['date'][:10]}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". From `{path.relative_to(ROOT)}`.",
        table(["case", "medians", "targets"], body),
    ]
    if roofline:
        lines.append(
            f"Roofline: {si(roofline['flops'], 'FLOP/s')}, {si(roofline['bandwidth'], 'B/s')} "
            f"({roofline['source']})."
        )
    return "\n\n".join(lines)


def of_page(module: str, part: str) -> str:
    """A part of a page that a module of `benchmarks` prints."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # benchmarks is no installed package
    return getattr(importlib.import_module(f"benchmarks.{module}.page"), part)()


def meshes() -> str:
    """What `benchmarks/compile_over_meshes.py` read off compiled programs."""
    from attnsel_jax.cli.terminal import si

    run = json.loads((ROOT / "benchmarks" / "meshes.json").read_text())
    parts = ("arguments", "outputs", "temporaries")

    def figures(row: dict) -> list[str]:
        if row["too_much"]:  # the compiler's own words
            return ["-", "-", f"too much: {row['too_much']}", "-"]
        memory = [si(row["memory"][part], "B") for part in parts]
        return [*memory, si(sum(row["sent"].values()), "B")]

    def body(of: tuple[str, bool]) -> list[list[str]]:
        return [
            [
                f"`{row['backend']}`", f"{row['chip']} x {row['devices']}", f"{row['length']:,}",
                f"`{row['form']}`", *figures(row), si(row["formula"], "B"),
            ]
            for row in run["rows"]
            if (row["op"], row["gradients"]) == of
        ]  # fmt: skip

    shape = ", ".join(f"{name} {value}" for name, value in run["shape"].items())
    header = ["backend", "devices", "length", "form", *parts, "sent", "formula"]
    works = {
        "One causal sequence, forward.": ("dense", False),
        "The same with the gradients of q, k and v.": ("dense", True),
        "Decoding: one new token of one sequence, whose pages are spread.": ("paged", False),
        "The same for MLA.": ("mla", False),
    }
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return "\n\n".join(
        [
            f"`{run['command']}`, {run['date']}, {versions}: {shape}; bytes of one device.",
            *(f"{said}\n\n{table(header, body(of))}" for said, of in works.items()),
        ]
    )


def said(reached: bool | None) -> str:
    """A verdict in words."""
    return {True: "reached", False: "not reached", None: "not measured"}[reached]


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


PARTS: dict[str, Callable[[], str]] = {
    "contracts": contracts,
    "vllm names": vllm_names,
    "chips": chips,
    "problems": problems,
    "measurements": measurements,
    "meshes": meshes,
    "question": lambda: docstring("attnsel_jax.config:AttentionSelectorConfig"),
    "environment": lambda: docstring("attnsel_jax.envs"),
    "tpu works": lambda: of_page("tpu_static", "works"),
    "tpu chips": lambda: of_page("tpu_static", "chips"),
    "tpu schedules": lambda: of_page("tpu_static", "sections"),
    "gpu static": lambda: of_page("gpu", "static_sections"),
    "gpu measured": lambda: of_page("gpu", "measured_sections"),
    "budgets": lambda: docstring("attnsel_jax.compare.budgets"),
}


def pages() -> list[pathlib.Path]:
    """README and the pages of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def regenerated(text: str) -> str:
    """A page's text with every marked part as the code says it now.

    Raises:
        ValueError: a part's name is none of `PARTS`.
    """

    def part(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in PARTS:
            raise ValueError(f"generated part is {name!r}, must be one of {', '.join(PARTS)}")
        return f"{begin}\n{PARTS[name]()}\n\n{end}"

    return MARKED.sub(part, text)


def main() -> None:
    """Writes every page whose generated parts are stale."""
    for page in pages():
        text = page.read_text()
        fresh = regenerated(text)
        if fresh != text:
            page.write_text(fresh)
            sys.stdout.write(f"written: {page.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
