"""The environment variables: which is read first, and that a missing one is found quickly."""

import os

from attnsel_jax import envs


def test_the_library_s_own_variable_goes_before_vllm_s(monkeypatch):
    assert envs.backend_text() is None
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "TORCH_SDPA")
    assert envs.backend_text() == ("VLLM_ATTENTION_BACKEND", "TORCH_SDPA")
    monkeypatch.setenv("ATTNSEL_BACKEND", "xla")
    assert envs.backend_text() == ("ATTNSEL_BACKEND", "xla")
    monkeypatch.setenv("ATTNSEL_BACKEND", "  ")
    assert envs.backend_text() == ("VLLM_ATTENTION_BACKEND", "TORCH_SDPA")


def test_python_has_the_table_that_the_quick_look_reads(monkeypatch):
    variable = envs.BACKEND_VARIABLES[0]
    assert not envs._may_be_set(variable)
    monkeypatch.setenv(variable, "x")
    assert os.environ.encodekey(variable) in os.environ._data
    assert envs._may_be_set(variable)


def test_an_environment_without_the_table_is_read_all_the_same(monkeypatch):
    monkeypatch.setattr(os, "environ", {"ATTNSEL_BACKEND": "XLA"})
    assert envs.backend_text() == ("ATTNSEL_BACKEND", "XLA")
