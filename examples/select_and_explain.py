"""Ask which attention backend serves a question on any chip, and why not the others.

Nothing runs here but the selector: no chip of those named is needed, no kernel is imported.

    python examples/select_and_explain.py
"""

import attnsel_jax
from attnsel_jax import AttentionSelectorConfig, NoAttentionBackendError, select

# 1. A decoder layer of Llama 3 over a paged cache, on an H200. The answer prints as a table.
question = AttentionSelectorConfig(
    head_size=128, dtype="bfloat16", block_size=16, num_heads=32, num_kv_heads=8
)
answer = select(question, "h200")
print(answer, end="\n\n")
assert answer.backend.get_name() in ("MOSAIC_GPU", "XLA")  # the former from jax 0.11 on

# 2. The same answer as data: each reason has the argument, the value asked, the values allowed.
for reason in answer.reasons["CUDNN"]:
    print(f"CUDNN: {reason.argument!r} asked {reason.asked!r}, allowed {reason.allowed!s}")
print()

# 3. Training: contiguous keys, gradients, a soft cap. cuDNN has none, and says so.
training = AttentionSelectorConfig(
    head_size=256, dtype="bfloat16", op="dense", has_soft_cap=True, needs_grad=True
)
print(select(training, "h200"), end="\n\n")

# 4. One question, several chips.
for chip in ("cpu", "a100", "h200", "mi300x", "tpu v6e"):
    latent = AttentionSelectorConfig(576, "bfloat16", "fp8", 64, use_mla=True)
    print(f"{chip:<8} standard: {select(question, chip).backend.name:<6} "
          f"MLA: {select(latent, chip).backend.name}")  # fmt: skip
print()

# 5. Nothing serves it: the error has every reason of every backend, the nearest, what to change.
try:
    attnsel_jax.get_attn_backend(576, "bfloat16", "int8", 64, use_mla=True, device="h200")
except NoAttentionBackendError as error:
    print(error)
else:
    raise AssertionError("an int8 latent cache was accepted")
