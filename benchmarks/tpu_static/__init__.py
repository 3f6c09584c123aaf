"""TPU kernels measured without a TPU: the compiler's schedule, read, replayed, and set on floors.

    python -m benchmarks.tpu_static run --generation v6e --work paged_decode_page64

Each contender (our backends' kernels, and the kernels of jax, tokamax and tpu-inference where they
are installed) is compiled by libtpu for a chip that is not here, in a process of its own. Three
kinds of figures come out, and they are never mixed:

MEASURED, off the compiler's final VLIW schedule: bundles (one is one core clock when nothing
stalls; the stalls the compiler knows of are bundles too), slots of every unit, spills, VMEM.

REPLAYED: the schedule's scalar code (arithmetic, branches, SMEM, DMAs) is executed in Python, so
that every bundle's count, the bytes moved and the waits for DMAs are known. A DMA ends at
`max(issue + latency, pipe free) + bytes / pipe`, with one pipe for everything between HBM and the
core; latency and pipe are those of libtpu's own model (`chips`). Not in it: bank conflicts, DMA
descriptors' own cost, refresh, clocks that change.

ESTIMATED: time = max(replayed cycles / clock, necessary bytes / datasheet bandwidth); shares of the
chip's peak and bandwidth are of the datasheet's, of necessary work over that time.

How: `works` says what is computed, `contenders` who computes it, `child` compiles, `stand_ins` puts
the batch's lengths into the kernel, `dump` reads the compiler's files, `schedule` the bundles,
`scalar_code` and `replay` execute them, `measuring` puts it together, `results` and `page` keep it.
"""
