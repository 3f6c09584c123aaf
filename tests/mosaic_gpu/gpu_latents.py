"""What tests of the latent kernels share: one problem, interpreted as a Hopper, by the oracle."""

import dataclasses

from gpu_interpreter import gpu_interpreter

from attnsel_jax.compare import compare
from attnsel_jax.problems import Problem
from attnsel_jax.problems.mla_inputs import mla_inputs
from pallas_kernels import gpu_chip
from pallas_kernels.mla import mosaic_gpu_slots

# Small, and with every edge: one query, several tiles of queries, none, more queries than a tile;
# keys in one block, in several pairs, on a block's border.
SHAPE = {"num_heads": 3, "rank": 128, "rope_dim": 64, "qk_nope_head_dim": 16, "page_size": 64,
         "dtype": "bfloat16", "q_lens": (1, 9, 0, 4), "kv_lens": (300, 71, 7, 4),
         "pad_tokens": 2}  # fmt: skip


def with_cores(monkeypatch, cores):
    """A Hopper of fewer cores: they decide how often sequences are split."""
    chip = dataclasses.replace(gpu_chip.CHIPS["h200"], num_cores=cores)
    monkeypatch.setitem(gpu_chip.CHIPS, "h200", chip)


def row_of(kernel, *, seed=0, **options):
    """The comparison's row of one problem; options are those of `mla_inputs`."""
    op = "sparse_mla" if "topk" in options else "mla"
    problem = Problem("interpreted", op, "", mla_inputs, SHAPE | options)
    with gpu_interpreter("h200"):
        (row,) = compare([problem], {"kernel": kernel}, seed=seed).rows
    return row


def with_raw_rows_apart(monkeypatch):
    """Raw rows and keys of a slot in memory of their own: the interpreter has room, and asks it."""
    monkeypatch.setattr(mosaic_gpu_slots, "one_memory", lambda raw, kv: (raw, kv))
