"""Every backend's time and memory on named cases, against rivals in the same run.

    report = run(["dense_causal_4096"], Settings(rounds=7))

A case states its target; the report says reached or not reached. Times are medians over interleaved
rounds, on fresh random data, with compilation left out; the answer of every contender is compared,
so that nothing wins by being wrong.
"""

from attnsel_jax.bench.cases import CASES, named, run
from attnsel_jax.bench.results import CaseResult, Row, Settings, Verdict

__all__ = ["CASES", "CaseResult", "Row", "Settings", "Verdict", "named", "run"]
