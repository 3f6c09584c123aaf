"""A million tokens over meshes that are not here: memory of one device, and what it sends.

Compiles attention with libtpu for each chip, mesh and form, each in a process of its own, holds the
bytes sent against the form's formula, and writes `benchmarks/meshes.json`, which docs/meshes.md
prints. Rows that are there, made by the same versions, are not made again, so a run that was
stopped goes on.

    python benchmarks/compile_over_meshes.py
"""

import datetime
import importlib.metadata
import json
import pathlib
import re
import sys

from attnsel_jax.aot import MeshCall, compile_for
from attnsel_jax.aot.arguments import dense_arguments, mla_arguments, paged_arguments
from attnsel_jax.cache_layouts import latent_layout_named, layout_named
from attnsel_jax.qualnames import resolve_obj_by_qualname

OUTPUT = pathlib.Path(__file__).with_name("meshes.json")
BACKENDS = {
    "XLA": "attnsel_jax.backends.xla:XlaBackend",
    "XLA_MLA": "attnsel_jax.backends.xla_mla:XlaMlaBackend",
    "MOSAIC_TPU": "attnsel_jax.backends.mosaic_tpu:MosaicTpuBackend",
    "MOSAIC_TPU_MLA": "attnsel_jax.backends.mosaic_tpu_mla:MosaicTpuMlaBackend",
}
HEADS, KV_HEADS, SIZE, BYTES = 16, 4, 128, 2
RANK, ROPE, PAGE = 512, 64, 64
COMPILERS = ("jax", "jaxlib", "libtpu")
FORMS = ("ring", "all_gather", "all_to_all")
MILLION = 2**20
# What a compiler says whose chip has too little memory.
TOO_MUCH = re.compile(r"temporaries \((\S+)\) exceeds available HBM \((\S+)\)")
NAMES = ("op", "backend", "chip", "devices", "length", "form", "gradients")


def cases():
    """What is compiled: rows of `NAMES`."""
    sizes = (4, 8, 16)
    elsewhere = [("v6e", 16, MILLION), ("7x", 16, MILLION), ("v5e", 16, MILLION // 8)]
    forward = [*[("v5e", n, MILLION) for n in sizes], *elsewhere]
    yield from (("dense", "XLA", *where, form, False) for where in forward for form in FORMS)
    for n in sizes:
        yield "paged", "XLA", "v5e", n, MILLION, "spread pages", False
        yield "mla", "XLA_MLA", "v5e", n, MILLION, "spread pages", False
    yield "paged", "MOSAIC_TPU", "v5e", 16, MILLION, "spread pages", False
    yield "mla", "MOSAIC_TPU_MLA", "v5e", 16, MILLION, "spread pages", False
    yield from (("dense", "XLA", "v6e", n, MILLION, form, True) for form in FORMS for n in sizes)
    yield from (("dense", "MOSAIC_TPU", "v5e", n, MILLION, "ring", False) for n in sizes)


def formula(op, length, devices, form, gradients, **_):
    """Bytes that one device sends.

    Of one device: q, out and dout are as large; k and v together are kv; lse is float32, and is
    sent forward, where something uses it. Ring: kv goes on n - 1 times; zig-zag order is an
    exchange of q, kv, out. Backward kv goes on n times, the last for nothing, with the gradients of
    both, float32; dout, dq, dk and dv are exchanged. All-gather: kv reaches n - 1 devices; back,
    their gradients are reduced and scattered; on 16 devices XLA all-reduces them, which is twice
    as much. All-to-all: an n-th of q, kv and out stays; back, of their gradients. Spread pages:
    out, its weight and the maximum of a token's heads are all-reduced.
    """
    n = devices
    if form == "spread pages":
        width = RANK if op == "mla" else SIZE
        return 2 * (n - 1) * HEADS * (width + 2) * 4 // n
    q = length // n * HEADS * SIZE * BYTES
    kv = 2 * length // n * KV_HEADS * SIZE * BYTES
    lse = 0 if gradients else length // n * HEADS * 4
    if form == "ring":
        forward = (n - 1) * kv + 2 * q + kv + lse
        return forward + gradients * (n * kv + n * 2 * kv + 2 * q + kv)
    if form == "all_gather":
        return (1 + gradients * (1 if n <= 8 else 2)) * (n - 1) * kv
    copies = 1 if KV_HEADS % n == 0 else n // KV_HEADS
    return ((1 + gradients) * (2 * q + kv * copies) + lse) * (n - 1) // n


def arguments_of(op, backend, length):
    """The contract's arguments: one causal sequence, or one new token of it."""
    of = resolve_obj_by_qualname(BACKENDS[backend])
    shape = {"num_heads": HEADS, "dtype": "bfloat16"}
    if op == "dense":
        return dense_arguments(
            batch=1, q_len=length, kv_len=length, num_kv_heads=KV_HEADS, head_size=SIZE,
            causal=True, **shape,
        )  # fmt: skip
    decode = {"batch": 1, "q_len": 1, "kv_len": length, "page_size": PAGE}
    shape |= {"cache_dtype": "bfloat16", "scale": 0.1}
    if op == "paged":
        cache = layout_named(of.layout).shape(length // PAGE, PAGE, KV_HEADS, SIZE)
        return paged_arguments(
            num_kv_heads=KV_HEADS, head_size=SIZE, cache_shape=cache, **decode, **shape
        )
    layout = latent_layout_named(of.latent_layout)
    cache = layout.shape(length // PAGE, PAGE, RANK + ROPE, BYTES)
    return mla_arguments(kv_lora_rank=RANK, rope_dim=ROPE, cache_shape=cache, **decode, **shape)


def compiled(case):
    """The row of a case."""
    op, backend, chip, n, length, form, gradients = case
    over = MeshCall(
        BACKENDS[backend], op, {"seq": n}, context="seq", form=form if op == "dense" else "ring"
    )
    kernel = resolve_obj_by_qualname(BACKENDS[backend]).kernels[op]
    arguments = arguments_of(op, backend, length)
    report = compile_for(chip, kernel, arguments, gradients=gradients, over=over)
    too_much = TOO_MUCH.search(report.refusal or "")
    if report.refusal and not too_much:
        raise SystemExit(f"{case}: {report.refusal}")
    row = dict(zip(NAMES, case, strict=True))
    row |= {"memory": report.memory, "sent": report.sent, "formula": formula(**row)}
    row |= {"too_much": too_much and f"{too_much[1]} of {too_much[2]}"}
    return row | {"seconds": report.seconds}, report.versions


def committed():
    """The rows that are there, by case, if the versions here made them."""
    run = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"rows": [], "versions": {}}
    versions = {name: importlib.metadata.version(name) for name in COMPILERS}
    rows = run["rows"] if versions == run["versions"] else []
    return {tuple(row.get(name) for name in NAMES): row for row in rows}


def main():
    known, wanted, rows = committed(), list(cases()), []
    for case in wanted:
        if case in known:
            rows.append(known[case])
            continue
        row, versions = compiled(case)
        rows.append(row)
        total, temporaries = sum(row["sent"].values()) / 1e6, row["memory"].get("temporaries", 0)
        sys.stdout.write(
            f"{' '.join(map(str, case))}: sent {total:.3f} MB, formula {row['formula'] / 1e6:.3f} "
            f"MB, temporaries {temporaries / 1e6:.1f} MB {row['too_much'] or ''}\n"
        )
        sys.stdout.flush()
        shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": SIZE,
                 "kv_lora_rank": RANK, "rope_dim": ROPE, "page_size": PAGE,
                 "dtype": "bfloat16"}  # fmt: skip
        result = {
            "command": "python benchmarks/compile_over_meshes.py",
            "date": datetime.date.today().isoformat(),
            "shape": shape, "versions": {name: versions[name] for name in COMPILERS},
            "rows": rows + [known[c] for c in wanted[len(rows) :] if c in known],
        }  # fmt: skip
        OUTPUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
