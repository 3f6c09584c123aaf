"""The impl of the sparse MLA family: as MLA's, with each token's top-k positions."""

import jax

from attnsel_jax.impls.mla import MLAImpl
from attnsel_jax.kv_cache import LatentCache
from attnsel_jax.metadata import AttentionMetadata


class SparseMLAImpl(MLAImpl):
    """Holds what a sparse MLA layer knows when it is built; see `MLAImpl`."""

    op = "sparse_mla"

    def forward(
        self,
        ql_nope: jax.Array,
        q_pe: jax.Array,
        kv_c: jax.Array | None,
        k_pe: jax.Array | None,
        kv_cache: LatentCache | jax.Array,
        metadata: AttentionMetadata,
        topk_indices: jax.Array | None = None,
    ) -> tuple[jax.Array, LatentCache | jax.Array]:
        """Writes this step's latents, attends to `topk_indices`, and returns (output, cache).

        Args:
            ql_nope, q_pe, kv_c, k_pe, kv_cache, metadata: as in `MLAImpl.forward`.
            topk_indices: int32 [num_tokens, topk], positions, -1 padded.

        Raises:
            ValueError: topk_indices is None.
        """
        if topk_indices is None:
            raise ValueError("topk_indices is None, must be int32 [num_tokens, topk] positions")
        chosen = {"topk_indices": topk_indices}
        return self._attend((ql_nope, q_pe, kv_c, k_pe), chosen, kv_cache, metadata)
