"""The lightning indexer of sparse MLA: scores of cached positions, and the best of them."""

import jax
import jax.numpy as jnp

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.mesh import MeshAxes, kernel_over_mesh, plan_call
from attnsel_jax.metadata import AttentionMetadata
from attnsel_jax.ops.calls import as_array, asked_device, head_counts
from attnsel_jax.ops.ragged_arguments import check_indexer
from attnsel_jax.registry import AttentionBackendEnum
from attnsel_jax.selector import BackendLike, DeviceLike, get_attn_backend
from attnsel_jax.static_arguments import count

# The question is asked for the attention that the positions are for, which no argument shows.
DEEPSEEK_LATENT = 576  # kv_lora_rank 512 + rope_dim 64


def indexer_scores(
    q_index: jax.Array,
    weights: jax.Array,
    index_pages: jax.Array,
    metadata: AttentionMetadata,
    *,
    backend: BackendLike = None,
    device: DeviceLike = None,
    mesh_axes: MeshAxes | None = None,
) -> jax.Array:
    """Scores of every cached position for every token, for `topk_positions` to choose from.

    Over a mesh, tokens, sequences and pages are cut by groups without communication. Heads cut:
    each device sums its own, and one all-reduce of the scores sums the rest.

    Args:
        q_index: [num_tokens, num_index_heads, index_head_dim].
        weights: float32 [num_tokens, num_index_heads], every scale folded in.
        index_pages: [num_pages, page_size, index_head_dim], this step's keys written already.
        metadata: the batch; slot_mapping is not read.
        backend: whose indexer; None = that of the backend which serves sparse MLA on latents of
            DeepSeek's size here, XLA_MLA_SPARSE's where it has none.
        device, mesh_axes: as in `paged_attention`.

    Returns:
        float32 [num_tokens, pages_per_seq * page_size], -inf where the token sees no such position.

    Raises:
        TypeError: an argument that is no array, or a batch of another class.
        ValueError: arguments that do not fit together, or a backend without an indexer.
        NoAttentionBackendError: the backend asked for does not serve sparse MLA here.
    """
    check_indexer(q_index, weights, index_pages, metadata)
    arrays = {"q_index": q_index, "weights": weights, "index_pages": index_pages}
    arrays |= {name: x for name, x in metadata.arrays().items() if name != "slot_mapping"}
    plan = plan_call("indexer_scores", arrays, mesh_axes)
    chosen = get_attn_backend(
        DEEPSEEK_LATENT, q_index.dtype, index_pages.dtype, index_pages.shape[1], True,
        use_sparse=True, backend=backend, device=asked_device(device, index_pages, q_index),
        index_head_dim=q_index.shape[2],
        num_index_heads=head_counts(plan, q_index.shape[1], 1)["num_heads"],
    )  # fmt: skip
    chosen = _with_kernel(chosen, "indexer_scores", insisted=backend is not None)
    if q_index.shape[0] == 0:
        width = metadata.page_table.shape[1] * index_pages.shape[1]
        return jnp.zeros((0, width), jnp.float32)
    (scores,) = kernel_over_mesh(chosen, "indexer_scores", plan)(**arrays)
    return scores


def topk_positions(
    scores: jax.Array,
    topk: int,
    *,
    backend: BackendLike = None,
    device: DeviceLike = None,
    mesh_axes: MeshAxes | None = None,
) -> jax.Array:
    """The positions of the largest scores of each token: `topk_indices` of sparse MLA.

    Args:
        scores: float32 [num_tokens, positions], -inf where a position is not seen; a mesh may cut
            the tokens.
        topk: how many to name.
        backend: whose top-k; None = as in `indexer_scores`.
        device, mesh_axes: as in `paged_attention`.

    Returns:
        int32 [num_tokens, topk]: best first, ties to the lower position, -1 where fewer are seen.

    Raises:
        TypeError: scores are no array.
        ValueError: topk is below 1, scores that are not float32 of two dimensions, or a backend
            without a top-k.
        NoAttentionBackendError: the backend asked for does not serve sparse MLA here.
    """
    arrays = {"scores": as_array("scores", scores)}
    topk = count("topk", topk, optional=False)
    if arrays["scores"].ndim != 2:
        raise ValueError(
            f"scores has {arrays['scores'].ndim} dimensions {arrays['scores'].shape}, must have 2: "
            f"[num_tokens, positions]"
        )
    plan = plan_call("topk_positions", arrays, mesh_axes)
    chosen = get_attn_backend(
        DEEPSEEK_LATENT, jnp.bfloat16, "auto", None, True, use_sparse=True, backend=backend,
        device=asked_device(device, arrays["scores"]),
    )  # fmt: skip
    chosen = _with_kernel(chosen, "topk_positions", insisted=backend is not None)
    (positions,) = _results(kernel_over_mesh(chosen, "topk_positions", plan)(**arrays, topk=topk))
    return positions


def _with_kernel(chosen: type[AttentionBackend], op: str, insisted: bool) -> type[AttentionBackend]:
    """The chosen backend, or XLA's where nobody insisted on one that has no such kernel."""
    if op in chosen.kernels:
        return chosen
    if insisted:
        raise ValueError(
            f"backend is {chosen.name}, must be one that has {op!r} among its kernels: use "
            f"backend='XLA_MLA_SPARSE', or none"
        )
    return AttentionBackendEnum.XLA_MLA_SPARSE.get_class()


def _results(results: jax.Array | tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return results if isinstance(results, tuple) else (results,)
