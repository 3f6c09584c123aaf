import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from attnsel_jax.aot import NoCompilerError, compile_for, target_for
from attnsel_jax.aot.arguments import described, read_back
from attnsel_jax.aot.child import compiled
from attnsel_jax.aot.targets import GPU_FIGURES, TPU_TOPOLOGIES
from attnsel_jax.compare.expected import gradient_names
from attnsel_jax.platforms import CHIPS
from attnsel_jax.problems import named
from pallas_kernels import tpu_chip

DENSE = "attnsel_jax.xla.dense:dense_attention"
PAGED = "attnsel_jax.xla.paged:paged_attention"


def needs_compiler(chip):
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")


def arguments_of(name):
    (problem,) = named([name])
    return problem.make()


def check(report):
    assert report.compiled, report.refusal
    assert report.memory["arguments"] > 0
    assert report.memory["outputs"] > 0
    assert report.seconds > 0
    json.dumps(report.to_json(), allow_nan=False)


def test_a_cpu_is_compiled_for_everywhere():
    report = compile_for("cpu", DENSE, arguments_of("quick.dense.sinks"), gradients=True)
    check(report)
    assert report.memory["temporaries"] > 0
    assert report.cost["flops"] > 0
    assert report.versions["jax"] == jax.__version__


def test_gradients_are_of_everything_that_has_one():
    arguments = arguments_of("quick.dense.alibi")
    task = {"target": target_for("cpu").to_json(), "kernel": DENSE, "gradients": True,
            "arguments": described(arguments), "mesh": None}  # fmt: skip
    _, (gradients,) = compiled(task).out_info
    assert set(gradients) == set(gradient_names(arguments))


def test_the_cache_is_donated():
    arguments = arguments_of("quick.paged.mixed")
    report = compile_for("cpu", PAGED, arguments)
    check(report)
    assert report.memory["aliased"] >= arguments["kv_pages"].nbytes


@pytest.fixture
def kernels_of_this_file(monkeypatch):
    """Makes this file importable in the process that compiles."""
    here = str(pathlib.Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, sys.path)]))
    return pathlib.Path(__file__).stem


def test_a_refusal_is_the_compiler_s_own_words(kernels_of_this_file):
    arguments = arguments_of("quick.dense.one-query")
    refused = compile_for("cpu", f"{kernels_of_this_file}:refuses", arguments)
    assert not refused.compiled
    assert refused.refusal == "NotImplementedError: no such tile"
    missing = compile_for("cpu", "attnsel_jax.no_such_module:kernel", arguments)
    assert missing.refusal.startswith("ModuleNotFoundError")


def refuses(q, k, v, **_):
    raise NotImplementedError("no such tile")


def test_a_compiler_that_dies_is_a_refusal(kernels_of_this_file):
    arguments = arguments_of("quick.dense.one-query")
    report = compile_for("cpu", f"{kernels_of_this_file}:dies", arguments)
    assert "ended with -6" in report.refusal


def dies(q, k, v, **_):
    os.abort()


def test_a_compiler_that_takes_too_long_is_stopped():
    arguments = arguments_of("quick.dense.one-query")
    report = compile_for("cpu", DENSE, arguments, timeout_s=0.1)
    assert report.refusal == "stopped after 0 s"


@pytest.mark.parametrize("chip", ["v5e", "7x"])
def test_a_tpu_that_is_not_here(chip):
    needs_compiler(chip)
    check(compile_for(chip, DENSE, arguments_of("quick.dense.causal"), gradients=True))


def test_paged_on_a_tpu_that_is_not_here():
    needs_compiler("v6e")
    check(compile_for("v6e", PAGED, arguments_of("quick.paged.mixed")))


def test_a_kernel_knows_the_tpu_that_it_is_compiled_for(kernels_of_this_file):
    needs_compiler("v6e")
    arguments = arguments_of("quick.dense.one-query")
    report = compile_for("v6e", f"{kernels_of_this_file}:names_its_chip", arguments)
    assert report.refusal == "NotImplementedError: for v6e with 134217728 bytes of VMEM"


def names_its_chip(q, k, v, **_):
    chip = tpu_chip.current()
    raise NotImplementedError(f"for {chip.generation} with {chip.vmem_bytes} bytes of VMEM")


def test_a_gpu_that_is_not_here():
    needs_compiler("h200")
    check(compile_for("h200", DENSE, arguments_of("quick.dense.causal")))


def test_every_chip_is_a_target_or_says_what_is():
    for name, chip in CHIPS.items():
        if chip.platform == "rocm":
            with pytest.raises(ValueError, match=f"device is '{name}', must be one of cpu, a100"):
                target_for(name)
        else:
            assert target_for(name).chip == name
    assert target_for("tpu v6e").topology == {"topology_name": TPU_TOPOLOGIES["v6e"]}
    assert {name for name, chip in CHIPS.items() if chip.platform == "cuda"} == set(GPU_FIGURES)
    config = target_for("h200").topology["target_config"]
    assert "core_count: 132" in config
    assert "cuda_compute_capability { major: 9 minor: 0 }" in config


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoCompilerError, match=r"device is 'v5e', whose compiler .* libtpu"):
        compile_for("v5e", DENSE, {})
    with pytest.raises(NoCompilerError, match=f"jax-cuda13-plugin=={jax.__version__}"):
        compile_for("h200", DENSE, {})


def test_arguments_survive_being_written_down():
    arguments = {
        "q": jnp.zeros((1, 2, 3, 4), jnp.bfloat16),
        "kv_pages": jax.ShapeDtypeStruct((5,), jnp.float8_e4m3fn),
        "sliding_window": (3, None),
        "scale": 0.5,
        "causal": True,
        "sinks": None,
    }
    arrays, static = read_back(json.loads(json.dumps(described(arguments))))
    assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
        "q": ((1, 2, 3, 4), jnp.dtype("bfloat16")),
        "kv_pages": ((5,), jnp.dtype("float8_e4m3fn")),
    }
    assert static == {"sliding_window": (3, None), "scale": 0.5, "causal": True, "sinks": None}
