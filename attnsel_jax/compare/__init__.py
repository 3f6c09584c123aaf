"""Every backend against the float64 oracle: on named problems, or on a caller's own arrays.

print(compare())                                        # every problem, every backend
print(compare(problems=["llama3"], backends=["XLA"]))
print(compare_arrays("dense", {"q": q, "k": k, "v": v, "causal": True}))
print(compare_arrays("dense", arguments, backends={"mine": my_attention}))
"""

from attnsel_jax.compare.comparing import accepting, compare, compare_arrays
from attnsel_jax.compare.comparison import Comparison, Row
from attnsel_jax.compare.deviations import Deviation, Worst
from attnsel_jax.compare.picture import plot

__all__ = ["Comparison", "Deviation", "Row", "Worst", "accepting", "compare", "compare_arrays",
           "plot"]  # fmt: skip
