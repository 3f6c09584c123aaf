"""Every example runs as a reader would run it, and fails when what it shows is not so."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

import attnsel_jax
from attnsel_jax.backends.xla import XLA_PAGED
from attnsel_jax.xla import reference

ROOT = pathlib.Path(attnsel_jax.__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SAYS = {  # a line of what each prints, so that an example that shows nothing is noticed
    "compare_numerically.py": "FAILED: 1 of 3 runs deviate: off_by_one on given",
    "force_a_backend.py": "jit inside the context manager: traces again ",
    "on_a_mesh.py": "tokens served on eight devices equal those of one: True",
    "select_and_explain.py": "CUDNN: 'op' asked 'paged', allowed dense",
    "serve_mla.py": "decoding over all cached positions  differs from the whole sequence's rows",
    "swap_backends_in_a_model.py": "XLA_REFERENCE  tokens equal those without a cache: True",
    "train_a_layer.py": "the layer looks back by [3, 3]",
}


def run(script: pathlib.Path, *arguments: str, path: pathlib.Path | None = None) -> str:
    """What a script prints, in a process of its own, away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if "_BACKEND" not in name}
    folders = [str(folder) for folder in (ROOT, path) if folder]
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_expected_here():
    assert {script.name for script in SCRIPTS} == SAYS.keys()


@pytest.mark.once
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_example_runs(script, tmp_path):
    arguments = [str(tmp_path / "picture.png")] if script.stem == "compare_numerically" else []
    assert SAYS[script.name] in run(script, *arguments)
    for picture in arguments:
        assert pathlib.Path(picture).read_bytes().startswith(b"\x89PNG")


def test_third_party_package_is_found_once_installed(tmp_path):
    """By pip, offline, into a folder; then by its entry point, nothing else."""
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "examples" / "third_party_backend", source)  # pip builds inside it
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = run(source / "use_it.py", path=target)
    assert "AttentionBackendEnum.ACME is acme_attention.backend:AcmeBackend" in printed
    assert "ACME refuses: has_soft_cap is True, must be False" in printed
    assert "PASSED: 2 runs" in printed
    assert "ACME" not in {member.name for member in attnsel_jax.AttentionBackendEnum}


@pytest.fixture
def model():
    path = ROOT / "examples" / "swap_backends_in_a_model.py"
    spec = importlib.util.spec_from_file_location("swap_backends_in_a_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def window_of_eight(*arguments, sliding_window=None, **keywords):
    return reference.paged_attention(*arguments, sliding_window=8, **keywords)


def test_model_generates_other_tokens_under_a_wrong_backend(model, monkeypatch):
    """The model's tokens would show a fault: here, a backend that sees the last 8 keys only."""
    monkeypatch.setitem(sys.modules, "a_wrong_backend", sys.modules[__name__])

    class WrongBackend(attnsel_jax.AttentionBackend):
        name = "WRONG"
        capabilities = {"paged": XLA_PAGED}
        kernels = {"paged": "a_wrong_backend:window_of_eight"}

    attnsel_jax.register_backend("WRONG", WrongBackend)
    try:
        params, prompts = model.random_params(), model.PROMPTS[:1]
        right = model.generate_without_cache(params, prompts, 6)
        with attnsel_jax.global_force_attn_backend_context_manager("WRONG"):
            wrong, _ = model.generate(params, prompts, 6)
    finally:
        attnsel_jax.unregister_backend("WRONG")
    assert np.mean(right != wrong) > 0.5
