"""What model code calls: attention that selects its backend by itself, or takes `backend=`.

Each function asks the selector with what its arguments say, and calls the chosen backend's kernel,
jitted. A feature that no backend here honours is refused at selection, never dropped.
"""

from attnsel_jax.ops.cache_writes import copy_pages as copy_pages
from attnsel_jax.ops.cache_writes import write_index_keys as write_index_keys
from attnsel_jax.ops.cache_writes import write_kv_cache as write_kv_cache
from attnsel_jax.ops.cache_writes import write_latent_cache as write_latent_cache
from attnsel_jax.ops.dense import DENSE_RESIDUALS as DENSE_RESIDUALS
from attnsel_jax.ops.dense import dot_product_attention as dot_product_attention
from attnsel_jax.ops.indexer import indexer_scores as indexer_scores
from attnsel_jax.ops.indexer import topk_positions as topk_positions
from attnsel_jax.ops.merging import merge_attention as merge_attention
from attnsel_jax.ops.mla import allocate_latent_cache as allocate_latent_cache
from attnsel_jax.ops.mla import mla_attention as mla_attention
from attnsel_jax.ops.mla import sparse_mla_attention as sparse_mla_attention
from attnsel_jax.ops.paged import allocate_kv_cache as allocate_kv_cache
from attnsel_jax.ops.paged import paged_attention as paged_attention
