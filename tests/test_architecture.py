"""The rules of the house, as tests: layers, sizes, names, signatures, one declaration a file."""

import ast
import dataclasses
import inspect
import pathlib
import re

import pytest

import attnsel_jax
from attnsel_jax.backend import FAMILIES
from attnsel_jax.capabilities import Capabilities
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.registry import BUILT_IN, AttentionBackendEnum
from attnsel_jax.selector import FurtherQuestions, get_attn_backend

ROOT = pathlib.Path(attnsel_jax.__file__).parents[1]
PACKAGES = ("attnsel_jax", "pallas_kernels")
SOURCES = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.is_file()
)
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]
every_source = pytest.mark.parametrize("path", SOURCES, ids=IDS)

# First match wins; a module may import its own layer and lower ones.
LAYERS = {
    r"pallas_kernels": 0,
    r"attnsel_jax\.(config|constraints|platforms|envs|jax_versions|qualnames|static_arguments)": 1,
    r"attnsel_jax\.pytrees": 1,
    r"attnsel_jax\.(capabilities|cache_layouts|kv_cache|metadata|vllm_metadata|backend_names)": 2,
    r"attnsel_jax\.mosaic_(gpu|tpu)_limits": 2,
    r"attnsel_jax\.(backend|xla)": 3,
    r"attnsel_jax\.(impls|backends|jitted_kernels|kernel_results|symbolic_sizes|mesh)": 4,
    r"attnsel_jax\.(registry|forcing|plugins|registered_layouts)": 5,
    r"attnsel_jax\.(selection|selector)": 6,
    r"attnsel_jax\.(ops|value_checks)": 7,
    r"attnsel_jax\.(compare|bench|aot|matrix|roofline)": 8,
    r"attnsel_jax\.(cli|__main__)": 9,
}
# Beside the layers: they know the contracts and the question, and nothing of backends.
BESIDE = {
    r"attnsel_jax\.oracle": (),
    r"attnsel_jax\.problems": (r"attnsel_jax\.(oracle|config|platforms|kv_cache)",),
}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: pathlib.Path) -> list[str]:
    """The project's own modules that a file imports, at its top or inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, must be absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] in PACKAGES]


def layer(module: str) -> int | None:
    for pattern, number in LAYERS.items():
        if re.match(rf"{pattern}(\.|$)", module):
            return number
    return None


def is_beside(module: str) -> tuple[str, ...] | None:
    for pattern, allowed in BESIDE.items():
        if re.match(rf"{pattern}(\.|$)", module):
            return (pattern, *allowed)
    return None


@every_source
def test_imports_go_down_the_layers(path):
    module = module_name(path)
    if module == "attnsel_jax":
        assert imports(path) == [], "the package's own file imports lazily"
        return
    allowed = is_beside(module)
    for name in imports(path):
        if allowed is not None:
            fits = any(re.match(rf"{pattern}(\.|$)", name) for pattern in allowed)
            assert fits, f"{module} imports {name}, which it must not know"
        else:
            assert layer(module) is not None, f"{module} has no layer: put it into LAYERS"
            theirs = layer(name)
            if theirs is None:
                assert is_beside(name), f"{name} has no layer: put it into LAYERS"
                assert layer(module) >= 8, f"{module} imports {name}, a layer above it"
            else:
                assert theirs <= layer(module), f"{module} imports {name}, a layer above it"


def functions(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def code_lines(node: ast.FunctionDef) -> int:
    """Lines of a function's body without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@every_source
def test_files_and_functions_keep_to_their_sizes(path):
    is_kernel = path.is_relative_to(ROOT / "pallas_kernels")
    is_backend = path.parent.name == "backends"
    limit = 500 if is_kernel else 60 if is_backend else 300
    assert len(path.read_text().splitlines()) <= limit
    lowers = is_kernel or path.parent.name == "xla"
    for node in functions(path):
        assert code_lines(node) <= (120 if lowers else 40), f"{node.name} in {path}"


@every_source
def test_every_file_says_what_it_answers(path):
    if path.read_text().strip():
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, "no docstring"
        assert docstring.split("\n\n")[0].rstrip().endswith((".", ";", ":")), docstring[:80]


# Where others' kernels run: Mosaic's, MLIR's and a plug-in's errors have no narrower base.
CATCHES_ALL = ["attnsel_jax/compare/comparing.py"]


@every_source
def test_words_the_house_avoids(path):
    assert not re.search(r"(^|_)(utils|common|misc|helpers|v2)$", path.stem)
    text = path.read_text()
    refused = "" if str(path.relative_to(ROOT)) in CATCHES_ALL else "except Exception|"
    assert not re.search(rf"{refused}except:|except BaseException", text)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b(?! \(issue \d+\))", text)
    for word in ("block_table\\b", "seq_lens\\b", "query_start_loc", "sm_scale"):
        if path.name != "vllm_metadata.py" and re.search(rf"(?<!_)\b{word}", text):
            pytest.fail(f"{word} is one of vLLM's words: vllm_metadata.py alone translates them")


@every_source
def test_only_envs_reads_the_environment(path):
    # aot and the command line hand a changed environment to a process of their own.
    may = module_name(path) == "attnsel_jax.envs" or layer(module_name(path)) in (8, 9)
    assert may or not re.search(r"\bos\.(environ|getenv)", path.read_text())


@every_source
def test_the_library_does_not_print(path):
    if layer(module_name(path)) == 9:
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]


def test_a_backend_is_one_file_named_as_in_the_registry():
    folder = ROOT / "attnsel_jax" / "backends"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {name.lower() for name in BUILT_IN}
    for name in BUILT_IN:
        backend = AttentionBackendEnum[name].get_class()
        assert backend.name == name
        assert backend.__module__ == f"attnsel_jax.backends.{name.lower()}"


def test_the_enum_is_the_registry_s_table():
    assert [member.name for member in AttentionBackendEnum][: len(BUILT_IN)] == list(BUILT_IN)


def test_question_and_answer_have_the_same_fields():
    machine = {"platform", "compute_capability", "generation", "jax_version"}
    # Answered by the family, by the op's own entry, and by needs_lse.
    derived = {"use_mla", "use_sparse", "op", "context_axis"}
    asked = {field.name for field in dataclasses.fields(AttentionSelectorConfig)}
    answered = {field.name for field in dataclasses.fields(Capabilities)}
    assert answered - machine == asked - derived


def test_get_attn_backend_takes_every_question():
    named = set(inspect.signature(get_attn_backend).parameters) - {"further", "device", "backend"}
    asked = {field.name for field in dataclasses.fields(AttentionSelectorConfig)}
    assert named | set(FurtherQuestions.__annotations__) == asked


@pytest.mark.parametrize("op", [op for ops in FAMILIES.values() for op in ops])
def test_lowerings_of_an_op_have_equal_signatures(op):
    signatures = {}
    for member in AttentionBackendEnum:
        backend = member.get_class()
        if member.name in BUILT_IN and op in backend.kernels:
            parameters = inspect.signature(backend.get_kernel(op)).parameters.values()
            signatures[member.name] = [(p.name, p.kind, p.default) for p in parameters]
    assert signatures
    first = next(iter(signatures.values()))
    assert all(signature == first for signature in signatures.values()), signatures


@pytest.mark.parametrize("op", [op for ops in FAMILIES.values() for op in ops])
def test_signatures_are_the_ones_the_contract_prints(op):
    contract = ast.get_docstring(
        ast.parse((ROOT / "pallas_kernels" / op / "__init__.py").read_text())
    )
    name = "dense_attention" if op == "dense" else f"{op}_attention"
    printed = re.search(rf"{name}\((.*?)\)\s*->", contract, re.DOTALL).group(1)
    printed = [word.strip() for word in printed.replace("\n", " ").split(",")]
    backend = next(m.get_class() for m in AttentionBackendEnum if op in m.get_class().capabilities)
    parameters = inspect.signature(backend.get_kernel(op)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    ]
    assert printed == [*positional, "*", *keyword]
