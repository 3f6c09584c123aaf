"""GPU kernels, ours and others': checked and timed on a GPU, read as machine code without one.

    python -m benchmarks.gpu run --output benchmarks/results/h200     # on a GPU: checks, then times
    python -m benchmarks.gpu run --output benchmarks/results/gpu_static          # without: statics
    python -m benchmarks.gpu list

| file | question |
| --- | --- |
| `works.py` | what is computed? |
| `contenders.py`, `ours.py`, `peers/` | by whom? |
| `static/` | what did the compiler make of it (registers, spills, loop), with no GPU? |
| `checks.py` | are our kernels right on this GPU? |
| `steps.py`, `watching.py`, `turns.py` | which process does what, and when? |
| `clock.py`, `racing.py`, `torch_child.py` | how long does it take there, beside its rivals? |
| `results.py`, `page.py` | what came out? |
"""
