"""What tests of the latent kernels share: one problem, interpreted as a TPU, against the oracle."""

import functools

from tpu_interpreter import tpu_interpreter

from attnsel_jax.cache_layouts import LATENT_LAYOUTS
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import FAIL
from attnsel_jax.problems import Problem
from attnsel_jax.problems.mla_inputs import mla_inputs

# Small, and with every edge: one query, several tiles of queries, none, more queries than a tile;
# keys in one block, in several, on a block's border.
SHAPE = {"num_heads": 3, "rank": 128, "rope_dim": 64, "qk_nope_head_dim": 16, "page_size": 64,
         "dtype": "float32", "q_lens": (1, 9, 0, 4), "kv_lens": (300, 71, 7, 4),
         "pad_tokens": 2}  # fmt: skip


def on_rows(kernel, layout):
    """The kernel with its cache in plain rows, as problems have it."""

    @functools.wraps(kernel)
    def wrapped(**arguments):
        rope_dim = arguments["q_pe"].shape[-1]
        stored = LATENT_LAYOUTS[layout]
        pages = stored.from_rows(arguments.pop("latent_pages"), rope_dim)
        out, lse, pages = kernel(latent_pages=pages, **arguments)
        return out, lse, stored.to_rows(pages, rope_dim)

    return wrapped


def row_of(kernel, layout="striped", *, generation="v5e", seed=0, **options):
    """The comparison's row of one problem; options are those of `mla_inputs`."""
    op = "sparse_mla" if "topk" in options else "mla"
    problem = Problem("interpreted", op, "", mla_inputs, SHAPE | options)
    with tpu_interpreter(generation, seed=seed):
        (row,) = compare([problem], {"kernel": on_rows(kernel, layout)}, seed=seed).rows
    return row


def found_faulty(interpret) -> None:
    """Asserts that the oracle disagrees, or the interpreter sees a race or a full semaphore.

    interpret: gives the row of a comparison.
    """
    try:
        row = interpret()
    except (AssertionError, RuntimeError) as error:
        said = str(error)
    else:
        if row.verdict == FAIL:
            return
        said = str(row)
    assert "race" in said.lower() or "semaphore" in said.lower(), said
