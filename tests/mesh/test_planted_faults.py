"""Each of these faults makes a test of this folder's kind fail: the checks can see them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from meshes import mesh
from test_context import DENSE, LATENT, PAGED
from test_context import check as check_context
from test_heads_and_batch import check
from test_indexer_over_mesh import close, placed, problem

import attnsel_jax
from attnsel_jax.cache_layouts import layout_named
from attnsel_jax.mesh import groups, over_mesh, spread_pages
from attnsel_jax.mesh.dimensions import page_counts
from attnsel_jax.mesh.merging import Partial, nothing
from attnsel_jax.mesh.positions import pieces
from attnsel_jax.mesh.ring import _of_logits
from attnsel_jax.mesh.spread_pages import _whole_pages
from attnsel_jax.mesh.zigzag import to_zigzag
from attnsel_jax.problems import Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from attnsel_jax.problems.mla_inputs import mla_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs


@pytest.fixture(autouse=True)
def _traced_afresh():
    over_mesh._jitted.cache_clear()
    yield
    over_mesh._jitted.cache_clear()


def few_kv_heads():
    options = DENSE | {"heads": (8, 2), "q_len": 9}
    check(Problem("p", "dense", "", dense_inputs, options), ["XLA_REFERENCE"], mesh(model=4),
          heads="model", kv_heads=None)  # fmt: skip


def around(form="ring", gradients=False, **options):
    problem = Problem("p", "dense", "", dense_inputs, DENSE | options, gradients=gradients)
    check_context(problem, mesh(seq=4), form, "XLA_REFERENCE", q_len="seq", kv_len="seq")


def spread():
    problem = Problem("p", "mla", "", mla_inputs, LATENT)
    check_context(problem, mesh(seq=2), name="XLA_MLA", pages="seq")


def spread_keys(**options):
    problem = Problem("p", "paged", "", paged_inputs, PAGED | options)
    check_context(problem, mesh(seq=2), name="XLA_REFERENCE", pages="seq")


def indexer(groups, **cuts):
    call, want = problem(groups)
    arguments = placed(call, mesh(**dict.fromkeys(cuts, 2)), **cuts)
    close(attnsel_jax.indexer_scores(*arguments), want)


def spread_indexer():
    call, want = problem()
    close(attnsel_jax.indexer_scores(*placed(call, mesh(seq=2), pages="seq")), want)


def scores_by_rank(kernel, arrays, counts):
    """The scores of what lies here, first page first, wherever in the sequence that page is."""
    seen = spread_pages._seen(arrays, causal=True)
    mine, _ = spread_pages._own_pages(arrays, seen, counts)
    return kernel({n: a for n, a in arrays.items() if n != "num_seqs"} | mine)


def zeros_elsewhere(kernel, arrays, counts):
    (scores,) = spread_pages.spread_scores(kernel, arrays, counts)
    return (jnp.where(jnp.isneginf(scores), 0, scores),)


def not_put_together(kernel, op, arrays, plan, layout):
    arrays = groups.with_own_pages(op, arrays, plan, layout)
    counts = page_counts(op, arrays["index_pages"], layout)
    return groups.attend(
        functools.partial(spread_pages.spread_scores, kernel, counts=counts), op, arrays
    )


def not_summed(kernel, op, arrays, plan, layout):
    return groups.attend(kernel, op, groups.with_own_pages(op, arrays, plan, layout))


def of_first_keys(x, rows, keys):
    return _of_logits(x, rows, keys._replace(start=0))


def with_even_shares(device, n, length, zigzag):
    return [p._replace(start=p.start // length * (length // 2 * 2))
            for p in pieces(device, n, length, zigzag)]  # fmt: skip


class Unturned:
    """A layout whose pages are split into what no turn changes: each slot is the page's first."""

    def __init__(self, name):
        self.join = layout_named(name).join
        self.split = lambda pages: [x[:, :1].repeat(4, 1) for x in layout_named(name).split(pages)]


def with_edges(arrays, seen, counts):
    return _whole_pages(arrays, seen._replace(start=seen.start // 4 * 4), counts)


FAULTS = {
    "the first kv head for all": (
        "attnsel_jax.mesh.over_mesh", "with_own_kv_heads",
        lambda arrays, *_: arrays | {n: arrays[n][:, :, :1] for n in "kv"}, few_kv_heads,
    ),
    "parts averaged, not weighed": (
        "attnsel_jax.mesh.ring", "merged",
        lambda a, b: Partial((a.out + b.out) / 2, jnp.logaddexp(a.lse, b.lse)), around,
    ),
    "the last part exchanged wrongly": (
        "attnsel_jax.mesh.zigzag", "_owner", lambda part, n: part % n, around,
    ),
    "gradients of unweighed parts": (
        "attnsel_jax.mesh.ring", "share_of", lambda part, whole: jnp.ones_like(part.lse),
        lambda: around(gradients=True),
    ),
    "a bias of the first keys, whichever are here": (
        "attnsel_jax.mesh.ring", "_of_logits", of_first_keys,
        lambda: around(bias=(False, False, False, True), causal=False),
    ),
    "rows of a bias in their natural order": (
        "attnsel_jax.mesh.ring", "to_zigzag",
        lambda x, *args, axis=1: x if axis == 2 else to_zigzag(x, *args),
        lambda: around(bias=(False, False, True, False)),
    ),
    "a bias of the first heads": (
        "attnsel_jax.mesh.whole_keys", "LOGITS", (),
        lambda: around("all_to_all", bias=(False, True, False, True)),
    ),
    "chunks that are torn": (
        "attnsel_jax.mesh.ring", "in_zigzag", lambda *_: True,
        lambda: around(attention_chunk_size=2),
    ),
    "odd shares counted as even ones": (
        "attnsel_jax.mesh.ring", "pieces", with_even_shares, lambda: around(q_len=20),
    ),
    "queries of every device at 0": (
        "attnsel_jax.mesh.whole_keys", "met", lambda *_: {}, lambda: around("all_gather"),
    ),
    "pages counted from the cache's first": (
        "attnsel_jax.mesh.groups", "with_own_pages", lambda op, arrays, *_: arrays, spread,
    ),
    "partial results not merged": (
        "attnsel_jax.mesh.spread_pages", "merged_over", lambda part, axis: part, spread,
    ),
    "windows begin with a page": (
        "attnsel_jax.mesh.spread_pages", "_edge_pages",
        lambda kernel, arrays, *_: nothing(arrays["q"].shape[:2], arrays["q"].shape[2]),
        lambda: spread_keys(sliding_window=7),
    ),
    "the edge page from its first slot": (
        "attnsel_jax.mesh.spread_pages", "layout_named", Unturned,
        lambda: spread_keys(sliding_window=7),
    ),
    "windows reach whole pages back": (
        "attnsel_jax.mesh.spread_pages", "_whole_pages", with_edges,
        lambda: spread_keys(sliding_window=7),
    ),
    "distances between pages that lie here": (
        "attnsel_jax.mesh.spread_pages", "_from_afar", lambda lse, *_: lse,
        lambda: spread_keys(alibi=True),
    ),
    "scores of one device's heads": (
        "attnsel_jax.mesh.over_mesh", "score_ragged", not_summed,
        lambda: indexer(1, model="model"),
    ),
    "index pages counted from the cache's first": (
        "attnsel_jax.mesh.groups", "with_own_pages", lambda op, arrays, *_: arrays,
        lambda: indexer(2, data="data"),
    ),
    "scores where a page lies, not where it belongs": (
        "attnsel_jax.mesh.forms", "spread_scores", scores_by_rank, spread_indexer,
    ),
    "positions elsewhere score 0": (
        "attnsel_jax.mesh.forms", "spread_scores", zeros_elsewhere, spread_indexer,
    ),
    "one device's scores for all": (
        "attnsel_jax.mesh.over_mesh", "score_ragged", not_put_together, spread_indexer,
    ),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    module, name, wrong, run = FAULTS[fault]
    monkeypatch.setattr(f"{module}.{name}", wrong)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        run()
