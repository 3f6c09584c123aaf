import dataclasses
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from attnsel_jax import matrix as matrix_library
from attnsel_jax.aot import NoCompilerError
from attnsel_jax.cli import app
from attnsel_jax.cli.select import select as select_command
from attnsel_jax.cli.terminal import si
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import CHIPS
from attnsel_jax.registry import BUILT_IN

ROOT = pathlib.Path(__file__).parents[1]
QUESTION = ("--head-size", "128", "--dtype", "bfloat16")
COMMANDS = ("devices", "select", "matrix", "compare", "bench", "compile")


def attnsel(*arguments, code=0):
    """What a command prints on (stdout, stderr), after its exit code is checked."""
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == code, (result.exit_code, result.output)
    return result.stdout, result.stderr


def attnsel_json(*arguments, code=0):
    return json.loads(attnsel(*arguments, "--json", code=code)[0])


def error_of(*arguments, code=2):
    """The one line of an error; nothing on stdout."""
    out, error = attnsel(*arguments, code=code)
    assert out == ""
    (line,) = error.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command):
    text, _ = attnsel(command, "--help")
    assert text.count(f"attnsel {command}") >= 3  # its usage, and two examples at least
    assert "--json" in text


def test_the_help_names_the_exit_codes_and_every_command():
    text, _ = attnsel("--help")
    assert "Exit codes" in text
    assert all(command in text for command in COMMANDS)


# devices


def test_devices_here_and_by_name():
    said = attnsel_json("devices")
    assert [device["platform"] for device in said["here"]][:1] == ["cpu"]
    assert said["here"][0]["default"] is True
    assert set(said["named"]) == set(CHIPS)
    assert said["named"]["h200"]["compute_capability"] == "9.0"
    text, _ = attnsel("devices")
    assert "NVIDIA H200" in text
    assert "989" in text


# select


def test_select_has_an_option_for_every_field_of_the_question():
    options = set(inspect.signature(select_command).parameters) - {"device", "backend", "json"}
    assert options == {field.name for field in dataclasses.fields(AttentionSelectorConfig)}


@pytest.mark.parametrize("chip", CHIPS)
def test_select_answers_for_every_chip(chip):
    said = attnsel_json("select", *QUESTION, "--device", chip)
    assert said["backend"] in BUILT_IN
    assert set(said["backends"]) >= set(BUILT_IN)


def test_select_passes_every_option_on():
    flags = [
        "has_sink", "has_sliding_window", "has_attention_chunk", "has_soft_cap", "has_bias",
        "has_alibi", "has_mask", "has_segment_ids", "has_lens", "has_q_offset", "needs_grad",
        "needs_lse",
    ]  # fmt: skip
    values = {
        "head_size": 96, "dtype": "float32", "kv_cache_dtype": "int8", "block_size": 32,
        "attn_type": "encoder", "op": "dense", "head_size_v": 64, "num_heads": 8, "num_kv_heads": 2,
        "context_axis": "seq",
    }  # fmt: skip
    options = [f"--{flag.replace('_', '-')}" for flag in flags]
    for name, value in values.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    config = attnsel_json("select", *options, "--no-causal", "--device", "cpu")["config"]
    expected = dict.fromkeys(flags, True) | values
    expected |= {"causal": False, "use_mla": False, "use_sparse": False}
    expected |= {"num_index_heads": None, "index_head_dim": None}  # of sparse MLA alone
    assert config == expected
    sparse = attnsel_json(
        "select", "--head-size", "576", "--dtype", "bfloat16", "--use-mla", "--use-sparse",
        "--device", "cpu", "--num-index-heads", "64", "--index-head-dim", "128",
    )["config"]  # fmt: skip
    assert sparse["op"] == "sparse_mla"
    assert (sparse["num_index_heads"], sparse["index_head_dim"]) == (64, 128)


def test_select_prints_reasons_and_a_verdict():
    text, _ = attnsel("select", *QUESTION, "--device", "h200", "--op", "dense")
    assert "chosen" in text
    assert re.fullmatch(r"(MOSAIC_GPU|XLA) serves this", text.strip().splitlines()[-1])
    text, _ = attnsel("select", *QUESTION, "--device", "h200", "--backend", "CUDNN", code=3)
    assert "op is paged, must be dense" in text
    # MOSAIC_GPU wants a newer jax than the oldest that is supported.
    assert re.search(r"does not serve this; these would: (MOSAIC_GPU, )?XLA, XLA_REFERENCE", text)


def test_select_exits_with_3_when_nothing_serves():
    said = attnsel_json("select", *QUESTION, "--device", "cpu", "--needs-grad", code=3)
    assert said["backend"] is None
    reasons = said["backends"]["XLA"]["reasons"]
    assert [reason["argument"] for reason in reasons] == ["needs_grad"]
    text, _ = attnsel("select", *QUESTION, "--device", "cpu", "--needs-grad", code=3)
    assert "nothing serves this; nearest: XLA, if needs_grad is True, must be False" in text


def test_select_honours_the_environment_variable(monkeypatch):
    monkeypatch.setenv("ATTNSEL_BACKEND", "xla_reference")
    assert attnsel_json("select", *QUESTION)["backend"] == "XLA_REFERENCE"
    assert attnsel_json("select", *QUESTION, "--backend", "auto")["backend"] == "XLA"
    monkeypatch.setenv("ATTNSEL_BACKEND", "nonsense")
    assert "ATTNSEL_BACKEND is 'nonsense'" in error_of("select", *QUESTION)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "h2000"), "device is 'h2000', must be one of cpu, "),
        (("--backend", "XLAA"), "backend is 'XLAA' (did you mean XLA"),
        (("--dtype", "int7"), "dtype is 'int7', must be a floating dtype"),
        (("--head-size", "0"), "head_size is 0, must be an integer of at least 1"),
        (("--use-sparse",), "use_sparse is True and use_mla is False"),
        (("--kv-cache-dtype", "fp4"), "kv_cache_dtype is 'fp4', must be one of auto"),
    ],
)
def test_mistakes_are_one_line(options, said):
    assert said in error_of("select", *QUESTION, *options)


def test_a_missing_option_is_a_usage_error():
    _, error = attnsel("select", code=2)
    assert "--head-size" in error


# matrix


def test_matrix_prints_and_is_json():
    text, _ = attnsel("matrix")
    assert all(title in text for title in ("Values", "Features", "Chips"))
    assert attnsel_json("matrix") == json.loads(json.dumps(matrix_library.to_json()))
    assert attnsel("matrix", "--markdown")[0] == matrix_library.docs_page()


def test_matrix_writes_then_checks(tmp_path):
    readme = tmp_path / "README.md"
    assert "has no README.md" in error_of("matrix", "--write", str(tmp_path))
    readme.write_text("no markers\n")
    assert "must have one of each" in error_of("matrix", "--write", str(tmp_path))
    readme.write_text(f"before\n{matrix_library.BEGIN}\n{matrix_library.END}\nafter\n")
    stale = error_of("matrix", "--check", str(tmp_path), code=1)
    assert "stale: docs/backends.md, README.md" in stale
    attnsel("matrix", "--write", str(tmp_path))
    attnsel("matrix", "--check", str(tmp_path))
    assert attnsel_json("matrix", "--check", str(tmp_path)) == {"stale": []}
    assert "must be one" in error_of("matrix", "--check", "x", "--write", "y")
    page = tmp_path / matrix_library.PAGE
    page.write_text(page.read_text().replace("yes", "no", 1))
    assert "stale: docs/backends.md;" in error_of("matrix", "--check", str(tmp_path), code=1)


# compare


def test_compare_passes_and_shows_refusals(tmp_path):
    picture = tmp_path / "deviations.png"
    text, _ = attnsel(
        "compare", "--problem", "quick.dense.one-query", "--backend", "xla", "--backend", "CUDNN",
        "--plot", str(picture),
    )  # fmt: skip
    assert "CUDNN refused quick.dense.one-query: platform is cpu, must be cuda" in text
    assert text.strip().splitlines()[-1].startswith("PASSED: 1 runs")
    assert picture.stat().st_size > 1000


def test_compare_as_json():
    said = attnsel_json("compare", "--problem", "quick.dense.one-query", "--backend", "XLA")
    assert said["passed"] is True
    assert said["rows"][0]["problem"] == "quick.dense.one-query"


def test_compare_is_red_when_a_backend_deviates(monkeypatch):
    from attnsel_jax.backends.xla import XlaBackend

    monkeypatch.setattr(XlaBackend, "kernels", {"dense": f"{__name__}:attends_to_nothing"})
    text, _ = attnsel("compare", "--problem", "quick.dense.one-query", "--backend", "XLA", code=1)
    assert "FAILED" in text.strip().splitlines()[-1]


def attends_to_nothing(q, k, v, **_):
    from attnsel_jax.xla.dense import dense_attention

    out, lse = dense_attention(q, k, v)
    return 0 * out, lse


def test_compare_with_nothing_that_runs():
    problem = ("--problem", "quick.dense.one-query")
    text, _ = attnsel("compare", *problem, "--backend", "CUDNN", code=3)
    assert "NOTHING RAN" in text


def test_compare_chooses_problems():
    names = [problem["name"] for problem in attnsel_json("compare", "--list")]
    assert "llama3.decode" in names
    quick = [problem["name"] for problem in attnsel_json("compare", "--list", "--quick")]
    assert all(name.startswith("quick.") for name in quick)
    llamas = attnsel_json("compare", "--list", "--problem", "llama*.decode")
    assert {problem["name"] for problem in llamas} == {"llama3.decode", "llama4.decode"}
    few = attnsel_json("compare", "--list", "--quick", "--problem", "*window")
    assert {problem["name"].split(".")[0] for problem in few} == {"quick"}
    assert "pattern that fits no name" in error_of("compare", "--problem", "zz*")
    assert "problem is 'zz', must be" in error_of("compare", "--problem", "zz")
    assert "with --quick" in error_of("compare", "--quick", "--problem", "llama3.decode")


def test_compare_draws_problems():
    drawn = attnsel_json("compare", "--random", "2", "--seed", "7", "--list", "--backend", "XLA")
    assert [problem["name"] for problem in drawn] == ["random.7000002", "random.7000003"]
    assert {problem["op"] for problem in drawn} <= {"dense", "paged"}
    assert attnsel_json("compare", "--list", "--problem", drawn[0]["name"]) == drawn[:1]
    said = error_of("compare", "--random", "2", "--problem", "llama3")
    assert "--random is 2, must be without --problem" in said
    said = error_of("compare", "--random", "1", "--backend", "MOSAIC_TPU")
    assert "backend is MOSAIC_TPU, on this device: accepts is False for 200 problems" in said
    unknown = error_of("compare", "--random", "1", "--backend", "XLAA")
    assert "backend is 'XLAA'" in unknown
    assert "on this device" not in unknown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "tpu:9"), "device is 'tpu:9', must be one that is here: cpu:0"),
        (("--backend", "XLAA"), "backend is 'XLAA'"),
        (("--plot", "no/such/folder/picture.png"), "must be in a folder that exists"),
        (("--plot", "picture.xyz"), "--plot is picture.xyz, must end in one of ."),
    ],
)
def test_compare_s_mistakes(options, said):
    assert said in error_of("compare", "--problem", "quick.dense.one-query", *options)


# bench and compile: what they measure and compile is in test_bench.py and test_aot.py


def test_bench_lists_and_runs(tmp_path):
    assert "dense_causal_4096" in attnsel("bench", "--list")[0].splitlines()
    assert attnsel_json("bench", "--list", "--case", "memory") == ["memory_32768"]
    output, picture = tmp_path / "results.json", tmp_path / "results.png"
    text, _ = attnsel(
        "bench", "--case", "selector_call", "--output", str(output), "--plot", str(picture)
    )
    assert "targets" in text.strip().splitlines()[-1]
    said = json.loads(output.read_text())
    assert said["cases"][0]["name"] == "selector_call"
    assert {"command", "date", "versions", "device"} <= set(said)
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--case", "nonsense"), "case is 'nonsense', must be one of dense_causal_4096"),
        (("--backend", "XLAA"), "backend is 'XLAA'"),
        (("--rounds", "0"), "rounds is 0, must be at least 1"),
        (("--budget", "nan"), "budget is nan, must be at least 0 seconds"),
        (("--seed", "-1"), "seed is -1, must be at least 0"),
        (("--output", "no/such/folder/results.json"), "folder that exists"),
        (("--output", "."), "--output is ., a folder, must be a file: add its name"),
        (("--plot", "picture"), "--plot is picture, must end in one of ."),
    ],
)
def test_bench_s_mistakes(options, said):
    assert said in error_of("bench", *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "mi300x"), "device is 'mi300x', must be one of cpu, a100"),
        (("--device", "cpu", "--problem", "zz"), "problem is 'zz', must be"),
        (("--device", "cpu", "--backend", "XLAA"), "backend is 'XLAA'"),
        (("--device", "cpu", "--op", "sparse"), "op is 'sparse', must be one of dense"),
        (("--device", "cpu", "--dtype", "foo"), "dtype is 'foo', must be a floating dtype"),
        (("--device", "cpu", "--q-len", "0"), "q_len is 0, must be an integer of at least 1"),
        (("--device", "cpu", "--batch", "-1"), "batch is -1, must be an integer of at least 1"),
        (("--device", "cpu", "--kv-len", "0"), "kv_len is 0, must be an integer of at least 1"),
        (("--device", "cpu", "--sliding-window", "0"), "sliding_window is 0, must be an integer"),
        (("--device", "cpu", "--soft-cap", "0"), "soft_cap is 0.0, must be a finite number above"),
        (("--device", "cpu", "--op", "mla", "--head-size", "64"), "head_size is 64, must be above"),
        (("--device", "cpu", "--op", "mla", "--no-causal"), "--causal is given, must be left out"),
        (("--device", "cpu", "--topk", "8"), "--topk is given, must be left out with op dense"),
        (
            ("--device", "cpu", "--problem", "llama3.decode", "--q-len", "8"),
            "--q-len is given, must be left out with --problem",
        ),
    ],
)
def test_compile_s_mistakes(options, said):
    assert said in error_of("compile", *options)


@pytest.mark.parametrize("op", ["paged", "mla"])
def test_compile_asks_for_the_logical_cache_and_compiles_the_backends_own(op, monkeypatch):
    given = {}

    def compile_for(chip, kernel, arguments, **_):
        given[kernel.split(":")[0]] = arguments
        raise NoCompilerError("none in this test")

    monkeypatch.setattr("attnsel_jax.aot.compile_for", compile_for)
    heads = ("--num-heads", "8") + (("--num-kv-heads", "2") if op == "paged" else ())
    attnsel("compile", "--device", "v6e", "--op", op, *heads, "--block-size", "64", code=3)
    ((kernel, arguments),) = given.items()
    assert kernel == f"pallas_kernels.{op}.mosaic_tpu"
    if op == "paged":
        assert arguments["kv_pages"].shape == (16, 2, 2, 64, 128)  # side by side
    else:
        assert arguments["latent_pages"].shape == (16, 9, 32, 128)  # striped


def test_compile_takes_a_mesh_beside_a_problem():
    mesh = ("--mesh", "data=2", "--batch-axis", "data")
    case = ("--device", "v5e", "--problem", "llama3.decode", "--backend", "CUDNN")
    (outcome,) = attnsel_json("compile", *case, *mesh, code=3)
    assert outcome["verdict"] == "refused by selection"


def test_compile_shows_selection_s_refusal():
    text, _ = attnsel("compile", "--device", "v5e", "--backend", "CUDNN", code=3)
    assert "platform is tpu, must be cuda" in text
    said = attnsel_json("compile", "--device", "v5e", "--backend", "CUDNN", code=3)
    assert said[0]["verdict"] == "refused by selection"


# in processes of their own


def process(*command):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_python_m_prints_json_and_nothing_else():
    done = process("-m", "attnsel_jax", "select", *QUESTION, "--device", "7x", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["device"] == "tpu (TPU7x, 7x)"
    assert done.stderr == ""
    done = process("-m", "attnsel_jax", "select", *QUESTION, "--device", "nonsense")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line_and_a_closed_stdout_is_nothing():
    command = f"{sys.executable} -m attnsel_jax --help"
    full, closed = (
        subprocess.run(
            f"{command} {into}", shell=True, capture_output=True, text=True, cwd=ROOT, check=False
        )
        for into in ("> /dev/full", ">&-")
    )
    assert full.returncode == 1
    assert full.stderr == (
        "error: the output cannot be written: No space left on device; free some space there\n"
    )
    assert (closed.returncode, closed.stderr) == (0, "")


def test_commands_import_and_start_only_what_they_need():
    script = """
import sys
from typer.testing import CliRunner
from attnsel_jax.cli import app
assert "jax" not in sys.modules
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
assert "jax" not in sys.modules
for command in (["select", "--head-size", "128", "--dtype", "bfloat16", "--device", "h200"],
                ["matrix", "--json"]):
    assert CliRunner().invoke(app, command).exit_code == 0
import jax._src.xla_bridge
assert not jax._src.xla_bridge._backends, "a device was started"
assert not {"matplotlib", "torch", "attnsel_jax.oracle"} & set(sys.modules)
"""
    done = process("-c", script)
    assert done.returncode == 0, done.stderr


def test_numbers_read_well():
    assert [si(x, "B") for x in (0, 999, 1234567, 5.2e9)] == ["0 B", "999 B", "1.23 MB", "5.2 GB"]
    assert [si(x, "s") for x in (4.4e-6, 0.0123, 2.0)] == ["4.4 us", "12.3 ms", "2 s"]
    assert si(None) == "not said"
