"""Uses the backend of this package by name, and holds it against the float64 oracle.

pip install ./examples/third_party_backend
python examples/third_party_backend/use_it.py
"""

import numpy as np

import attnsel_jax
from attnsel_jax import AttentionSelectorConfig, NoAttentionBackendError
from attnsel_jax.compare import compare

# The package was found by its entry point: nothing of it is imported here.
member = attnsel_jax.AttentionBackendEnum["ACME"]
print(f"{member!r} is {member.get_path()}\n")

question = AttentionSelectorConfig(64, "float32", op="dense", needs_lse=True)
answer = attnsel_jax.select(question)
print(f"ACME: {answer.status('ACME')}; automatic selection takes {answer.backend.name}\n")
assert answer.status("ACME") == "by name only"

q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 4, 64), np.float32)
out = attnsel_jax.dot_product_attention(q, k, v, is_causal=True, backend="ACME")
print(f"dot_product_attention(..., backend='ACME') -> {out.shape}, {out.dtype}\n")

# What the backend does not declare is refused; it is not dropped.
try:
    attnsel_jax.dot_product_attention(q, k, v, soft_cap=30.0, backend="ACME")
except NoAttentionBackendError:
    for reason in attnsel_jax.select(
        AttentionSelectorConfig(64, "float32", op="dense", has_soft_cap=True), backend="ACME"
    ).reasons["ACME"]:
        print(f"ACME refuses: {reason}\n")

# What it declares is compared with float64 NumPy, on the problems that it accepts.
found = compare(["quick.dense.causal", "quick.dense.encoder", "quick.dense.sinks"], ["ACME"])
print(found)
assert found.passed
