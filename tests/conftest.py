"""What every test starts from: nothing forced, no variable set, no plug-in left behind."""

import gc
import os

# The tests compile some thousand tiny programs and run each once: XLA's own passes all run, LLVM's
# optimisations are left out (measured: 16 s in place of 27). Set XLA_FLAGS for other flags;
# `attnsel compare` and `attnsel bench` run fully optimised code. The CPU stands for eight devices,
# for what tests/mesh shares out; everything else runs on the first.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8",
)

import jax
import pytest

from attnsel_jax import AttentionBackendEnum, global_force_attn_backend, unregister_backend
from attnsel_jax.envs import BACKEND_VARIABLES


def pytest_collection_finish():
    """jaxprs are many small objects, and live as long as a test: looked through less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def _nothing_is_insisted_on(monkeypatch):
    for variable in BACKEND_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    before = list(AttentionBackendEnum)
    yield
    global_force_attn_backend(None)
    for member in AttentionBackendEnum:
        if member not in before:
            unregister_backend(member.name)
        elif member.is_overridden():
            member.clear_override()


def pytest_collection_modifyitems(items):
    """On older jax: no planted faults, and of slow kernels one of each kind of problem."""
    if jax.__version_info__ < (0, 11):
        for item in items:
            if item.get_closest_marker("once"):
                item.add_marker(pytest.mark.skip(reason="once is enough: on jax 0.11 and later"))
