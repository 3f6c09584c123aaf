"""A million tokens over meshes that are not here: memory of one device, and what it sends.

Compiles causal attention with libtpu for each chip, mesh and form, holds the bytes sent against the
form's formula, and writes `benchmarks/meshes.json`, which docs/meshes.md prints.

    python benchmarks/compile_over_meshes.py
"""

import datetime
import json
import pathlib
import sys

from attnsel_jax.aot import MeshCall, compile_for
from attnsel_jax.aot.arguments import dense_arguments

OUTPUT = pathlib.Path(__file__).with_name("meshes.json")
BACKEND, KERNEL = "attnsel_jax.backends.xla:XlaBackend", "attnsel_jax.xla.dense:dense_attention"
HEADS, KV_HEADS, SIZE, BYTES = 16, 4, 128, 2
FORMS = ("ring", "all_gather", "all_to_all")
MILLION = 2**20
# (chip, devices, length, gradients)
CASES = [
    *[("v5e", n, MILLION, False) for n in (4, 8, 16)],
    *[("v6e", 16, MILLION, False), ("7x", 16, MILLION, False)],
    *[("v5e", 16, MILLION // 8, False)],
]


def formula(form, length, n):
    """Bytes that one device sends, forward.

    Of one device: q and out are as large; k and v together are kv; lse is float32, and is sent
    where something uses it. Ring: kv goes on n - 1 times; and zig-zag order is an exchange of q,
    kv, out. All-gather: kv reaches n - 1 devices. All-to-all: an n-th of q, kv and out stays.
    """
    q = length // n * HEADS * SIZE * BYTES
    kv = 2 * length // n * KV_HEADS * SIZE * BYTES
    if form == "ring":
        lse = length // n * HEADS * 4
        return (n - 1) * kv + 2 * q + kv + lse
    if form == "all_gather":
        return (n - 1) * kv
    copies = 1 if KV_HEADS % n == 0 else n // KV_HEADS
    lse = length // n * HEADS * 4
    return (2 * q + kv * copies + lse) * (n - 1) // n


def measured(chip, n, length, gradients, form):
    arguments = dense_arguments(
        batch=1, q_len=length, kv_len=length, num_heads=HEADS, num_kv_heads=KV_HEADS,
        head_size=SIZE, dtype="bfloat16", causal=True,
    )  # fmt: skip
    over = MeshCall(BACKEND, "dense", {"seq": n}, context="seq", form=form)
    report = compile_for(chip, KERNEL, arguments, gradients=gradients, over=over)
    if not report.compiled:
        raise SystemExit(f"{chip} x {n}, {form}: {report.refusal}")
    return report


def main():
    rows, versions = [], {}
    for chip, n, length, gradients in CASES:
        for form in FORMS:
            report = measured(chip, n, length, gradients, form)
            versions = report.versions
            row = {
                "chip": chip, "devices": n, "length": length, "form": form,
                "memory": report.memory, "sent": report.sent,
                "formula": formula(form, length, n), "seconds": report.seconds,
            }  # fmt: skip
            rows.append(row)
            total = sum(report.sent.values())
            sys.stdout.write(
                f"{chip} x {n:<3} {length:>8} {form:<11} sent {total / 1e6:8.1f} MB, formula "
                f"{row['formula'] / 1e6:8.1f} MB, temporaries "
                f"{report.memory['temporaries'] / 1e6:8.1f} MB\n"
            )
            sys.stdout.flush()
    shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": SIZE, "dtype": "bfloat16"}
    result = {
        "command": "python benchmarks/compile_over_meshes.py",
        "date": datetime.date.today().isoformat(),
        "backend": "XLA", "shape": shape, "versions": versions, "rows": rows,
    }  # fmt: skip
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
