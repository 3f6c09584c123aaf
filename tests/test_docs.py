"""What the docs say is executed: code blocks, their output, command lines, tables and links."""

import contextlib
import functools
import importlib.util
import io
import itertools
import os
import pathlib
import re
import shlex
import sys
import tomllib
import types

import pytest

import attnsel_jax
from attnsel_jax import matrix

ROOT = pathlib.Path(attnsel_jax.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "examples").rglob("README.md"))]  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: pathlib.Path) -> list[tuple[str, str, str, str]]:
    """(language, text, language of the block right after it, its text) of every fenced block."""
    text = page.read_text()
    found = list(FENCE.finditer(text))
    after = []
    for this, following in itertools.zip_longest(found, found[1:]):
        adjacent = following and text[this.end() : following.start()].strip() == ""
        after.append((following[1], following[2]) if adjacent else ("", ""))
    return [(m[1], m[2], *next_one) for m, next_one in zip(found, after, strict=True)]


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.fixture
def untouched(monkeypatch):
    """What a page's code changes for the whole process is put back, and noticed."""
    for variable in ("ATTNSEL_BACKEND", "VLLM_ATTENTION_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    members = {member.name for member in attnsel_jax.AttentionBackendEnum}
    yield
    forced = attnsel_jax.get_global_forced_attn_backend()
    attnsel_jax.global_force_attn_backend(None)
    registered = {member.name for member in attnsel_jax.AttentionBackendEnum} - members
    for name in registered:
        attnsel_jax.unregister_backend(name)
    variables = [v for v in ("ATTNSEL_BACKEND", "VLLM_ATTENTION_BACKEND") if v in os.environ]
    assert (forced, registered, variables) == (None, set(), []), "the page leaves these behind"


@every_page
def test_python_blocks_run_and_print_what_follows_them(page, untouched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"page_{page.stem}")  # a page's kernels are named by dotted path
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for language, code, next_language, output in blocks(page):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), vars(module))
        if next_language == "text":
            assert lines(printed.getvalue()) == lines(output), code


def command_lines(page: pathlib.Path) -> list[list[str]]:
    """Every command of the page's shell blocks, as words; `&&` separates commands."""
    found = []
    for language, text, _, _ in blocks(page):
        if language in ("bash", "console", "sh"):
            for line in re.split(r"&&|\n", text.replace("\\\n", " ")):
                words = shlex.split(line.partition(" > ")[0], comments=True)
                if words:
                    found.append(words)
    return found


@functools.cache
def cli():
    import typer

    from attnsel_jax.cli import app

    return typer.main.get_command(app)


@every_page
def test_command_lines_are_ones_that_exist(page):
    for words in command_lines(page):
        while "=" in words[0]:
            words = words[1:]  # VARIABLE=value before a command
        program = pathlib.Path(words[0]).name
        if program == "attnsel":
            command = cli().get_command(None, words[1])
            assert command is not None, f"attnsel has no command {words[1]}"
            command.make_context(f"attnsel {words[1]}", words[2:])  # raises for a wrong option
        elif program.startswith("python"):
            script = next((w for w in words[1:] if w.endswith(".py")), None)
            assert script is None or (ROOT / script).exists()
        elif program == "pip":
            check_pip(words)
        else:
            assert program in ("git", "cd", "pytest"), f"what is {words}? Say here how to check it"


def check_pip(words: list[str]) -> None:
    """Every extra that is installed exists, and every folder has a pyproject."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        found = re.fullmatch(r"([\w./]+?)(?:\[([\w,]+)\])?", word)
        if found and found[1].startswith("."):
            assert (ROOT / found[1] / "pyproject.toml").exists(), word
            extras = set((found[2] or "").split(",")) - {""}
            assert extras <= set(project["optional-dependencies"]), word


@every_page
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(
        r"`((?:docs|examples|benchmarks|attnsel_jax|pallas_kernels|tests)/[\w./]+)`", text
    ):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@every_page
def test_dotted_names_exist(page):
    """Every `attnsel_jax.something` in running text is there."""
    text = FENCE.sub("", page.read_text())
    for name in re.findall(r"`((?:attnsel_jax|pallas_kernels)(?:\.\w+)+)`", text):
        assert resolves(name), f"{page.name} names {name}"


def resolves(name: str) -> bool:
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@every_page
def test_generated_parts_are_fresh(page):
    text = page.read_text()
    assert generator().regenerated(text) == text, "stale: run `python docs/generate.py`"


def test_every_generated_part_stands_in_a_page():
    text = "".join(page.read_text() for page in PAGES)
    for name in generator().PARTS:
        assert f"<!-- generated: {name} -->" in text, f"{name} is generated and stands nowhere"


def test_the_matrix_is_fresh():
    readme = (ROOT / "README.md").read_text()
    assert matrix.with_block(readme, matrix.readme_block()) == readme, (
        "run `attnsel matrix --write .`"
    )
    assert (ROOT / matrix.PAGE).read_text() == matrix.docs_page(), "run `attnsel matrix --write .`"


def test_readme_links_every_page():
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, f"README.md does not link {page.name}"
    for example in (ROOT / "examples").glob("*.py"):
        assert f"(examples/{example.name})" in readme, f"README.md does not link {example.name}"


def test_readme_has_the_two_commands():
    """`.ci/run` reads both from here."""
    readme = (ROOT / "README.md").read_text()
    for name in ("main job", "tests"):
        found = re.search(
            rf"<!-- {name} -->\n```bash\n(.+?)```\n<!-- /{name} -->", readme, re.DOTALL
        )
        assert found, name
        assert found[1].startswith("python3 -m venv .venv && .venv/bin/pip install"), found[1]
