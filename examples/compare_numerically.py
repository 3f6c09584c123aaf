"""Hold backends, and a kernel of your own, against the float64 oracle; see where one is wrong.

python examples/compare_numerically.py [picture.png]
"""

import pathlib
import sys
import tempfile

import numpy as np

from attnsel_jax import AttentionBackendEnum
from attnsel_jax.compare import compare_arrays, plot

# Your own arrays, NumPy's or JAX's. Queries three times as large as usual make attention sharp:
# where all weights are about equal, a wrong mask hides in the average.
rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 2, 80, 4, 64), np.float32)
arguments = {"q": 3 * q, "k": k, "v": v, "causal": True, "sliding_window": 24}


# Your own kernel: any function with the signature of the op's contract. This one has a fault of
# the kind that serving meets: its window holds one key too many.
def off_by_one(q, k, v, *, sliding_window, **others):
    kernel = AttentionBackendEnum.XLA.get_class().get_kernel("dense")
    return kernel(q, k, v, sliding_window=sliding_window + 1, **others)


found = compare_arrays(
    "dense",
    arguments,
    backends={
        "XLA": "XLA",
        "XLA_REFERENCE": "XLA_REFERENCE",
        "CUDNN": "CUDNN",
        "off_by_one": off_by_one,
    },
    gradients=True,
)
print(found)

# The same as data. The first query that sees one key too many is the one at position 24.
wrong = found.row("given", "off_by_one")
out = wrong.deviation("out")
print(f"off_by_one: {out.share_outside:.0%} of out is outside its budget; the worst element is "
      f"{out.worst}")  # fmt: skip
assert not found.passed
assert wrong.failed
assert out.worst.at["query"] >= 24
assert found.row("given", "XLA").verdict == found.row("given", "XLA_REFERENCE").verdict == "pass"

# The same as a picture: tokens downwards, heads to the right, red where the budget is exceeded.
if len(sys.argv) > 1:
    path = pathlib.Path(sys.argv[1])
else:
    path = pathlib.Path(tempfile.mkdtemp()) / "deviations.png"
print(f"picture: {plot(found, path, 'out')}")
