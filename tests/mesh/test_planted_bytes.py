"""Each of these faults sends what should not be sent, or not what should: the byte tests see it."""

import os
import pathlib

import pytest
import test_pallas_kernels as dense_and_paged
import test_pallas_latents as latents

HERE = pathlib.Path(__file__).parent
SEEN_BY = {
    "keys averaged over shards of heads": [
        dense_and_paged.test_dense_heads_and_batch_send_nothing_with_gradients,
        dense_and_paged.test_paged_heads_and_groups_send_nothing,
    ],
    "keys gathered in a ring": [
        dense_and_paged.test_a_ring_sends_keys_on_and_halves_for_zigzag_order
    ],
    "each key exchanged twice": [dense_and_paged.test_all_to_all_sends_heads_for_positions],
    "queries gathered too": [dense_and_paged.test_all_gather_sends_keys_to_all],
    "parts not merged": [dense_and_paged.test_spread_pages_send_partial_results_only],
    "parts gathered": [
        dense_and_paged.test_spread_pages_send_partial_results_only,
        lambda: latents.check("v5e", "sparse_mla", "pages and heads", 8),
    ],
    "scores not summed": [lambda: latents.check("v5e", "indexer_scores", "pages and heads", 8)],
}
CASES = [(fault, run) for fault, runs in SEEN_BY.items() for run in runs]


@pytest.mark.parametrize(
    ("fault", "run"),
    [
        pytest.param(*case, id=f"{case[0]}-{i}", marks=[pytest.mark.sweep] * (i > 0))
        for i, case in enumerate(CASES)
    ],
)
def test_a_planted_fault_is_seen_in_the_bytes(fault, run, monkeypatch):
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("PLANTED_FAULT", fault)
    monkeypatch.setattr(dense_and_paged, "BACKEND", "faulty_mesh:MosaicTpuBackend")
    monkeypatch.setattr(latents, "SPARSE", "faulty_mesh:MosaicTpuMlaSparseBackend")
    with pytest.raises(AssertionError, match=r"assert \{"):
        run()
