"""A Llama-style decoder in plain JAX whose attention backend is swapped by name.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; a paged cache for each layer, prompts
read in chunks, then decoded together. The weights are random (a fixed seed), so the text means
nothing; the point is that every backend generates the same tokens, and that a plain forward pass
without any cache does too.

    python examples/swap_backends_in_a_model.py
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import attnsel_jax
from attnsel_jax import AttentionMetadata, AttentionSelectorConfig

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 2, 8, 2, 16
WIDTH, HIDDEN, VOCABULARY = 96, 192, 256  # tokens are bytes
PAGE_SIZE, PAGES_PER_SEQ, CHUNK = 4, 16, 12
PROMPTS = ("The quick brown fox jumps over", "JAX", "Attention is all", "One, two, three, four, f")
NEW_TOKENS = 12


# The model: it is told how to attend, and knows nothing of caches and backends.


def forward(params, tokens, positions, attend):
    """Logits [num_tokens, VOCABULARY]; `attend(layer, q, k, v)` is the layers' attention."""
    x = params["embedding"][tokens]
    for i, layer in enumerate(params["layers"]):
        y = rms_norm(x, layer["attention_norm"])
        q = rotate(heads(y @ layer["wq"], NUM_HEADS), positions)
        k = rotate(heads(y @ layer["wk"], NUM_KV_HEADS), positions)
        v = heads(y @ layer["wv"], NUM_KV_HEADS)
        x = x + attend(i, q, k, v).reshape(x.shape[0], -1) @ layer["wo"]
        y = rms_norm(x, layer["mlp_norm"])
        x = x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
    return rms_norm(x, params["norm"]) @ params["unembedding"]


def rms_norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight


def heads(x, count):
    return x.reshape(x.shape[0], count, HEAD_SIZE)


def rotate(x, positions):
    """Rotary positions: pairs of features turned by an angle that grows with the position."""
    frequencies = 10000.0 ** (-np.arange(0, HEAD_SIZE, 2, dtype=np.float32) / HEAD_SIZE)
    angles = positions[:, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def random_params(seed=1):
    """Random weights; queries four times as large as usual, so that attention is sharp."""
    rng = np.random.default_rng(seed)

    def matrix(rows, columns, gain=1.0):
        return jnp.asarray(rng.normal(0, gain * rows**-0.5, (rows, columns)), jnp.float32)

    def layer():
        return {
            "attention_norm": jnp.ones(WIDTH, jnp.float32),
            "wq": matrix(WIDTH, NUM_HEADS * HEAD_SIZE, gain=4.0),
            "wk": matrix(WIDTH, NUM_KV_HEADS * HEAD_SIZE),
            "wv": matrix(WIDTH, NUM_KV_HEADS * HEAD_SIZE),
            "wo": matrix(NUM_HEADS * HEAD_SIZE, WIDTH, gain=2.0),
            "mlp_norm": jnp.ones(WIDTH, jnp.float32),
            "gate": matrix(WIDTH, HIDDEN),
            "up": matrix(WIDTH, HIDDEN),
            "down": matrix(HIDDEN, WIDTH),
        }

    return {
        "embedding": matrix(VOCABULARY, WIDTH, gain=VOCABULARY**0.5),
        "layers": [layer() for _ in range(NUM_LAYERS)],
        "norm": jnp.ones(WIDTH, jnp.float32),
        "unembedding": matrix(WIDTH, VOCABULARY, gain=4.0),
    }


# Serving: this step's tokens of all sequences in one row, caches donated and updated in place.


@functools.partial(jax.jit, donate_argnames="caches")
def step(params, caches, tokens, positions, metadata):
    """One step of every sequence: (logits of each sequence's last token, caches)."""
    caches = list(caches)

    def attend(i, q, k, v):
        out, caches[i] = attnsel_jax.paged_attention(q, k, v, caches[i], metadata)
        return out

    logits = forward(params, tokens, positions, attend)
    return logits[metadata.cu_q_lens[1:] - 1], caches


@dataclasses.dataclass
class Sequence:
    """A prompt and what was generated after it; `cached` counts the tokens in the cache."""

    tokens: list[int]
    pages: list[int]
    cached: int = 0


def run_step(params, caches, sequences, q_lens, num_tokens):
    """Gives each sequence its next `q_lens[i]` tokens; pads the row of tokens to `num_tokens`."""
    tokens, positions = np.zeros((2, num_tokens), np.int32)
    first = 0
    for sequence, q_len in zip(sequences, q_lens, strict=True):
        new = slice(sequence.cached, sequence.cached + q_len)
        tokens[first : first + q_len] = sequence.tokens[new]
        positions[first : first + q_len] = range(new.start, new.stop)
        sequence.cached += q_len
        first += q_len
    metadata = AttentionMetadata.from_lengths(
        q_lens, [s.cached for s in sequences], [s.pages for s in sequences], PAGE_SIZE,
        num_tokens=num_tokens,
    )  # fmt: skip
    return step(params, caches, tokens, positions, metadata)


def generate(params, prompts, new_tokens=NEW_TOKENS, cache_heads=NUM_KV_HEADS):
    """Greedy continuations [prompts, new_tokens], and the logits that they were chosen by.

    `cache_heads` may be more than the kv heads: each is then held as often (see on_a_mesh.py).
    """
    page_ids = np.random.default_rng(0).permutation(len(prompts) * PAGES_PER_SEQ).tolist()
    sequences = [
        Sequence(list(prompt.encode()), page_ids[i * PAGES_PER_SEQ : (i + 1) * PAGES_PER_SEQ])
        for i, prompt in enumerate(prompts)
    ]
    caches = [
        attnsel_jax.allocate_kv_cache(len(page_ids), PAGE_SIZE, cache_heads, HEAD_SIZE, "float32")
        for _ in range(NUM_LAYERS)
    ]
    chosen_by = []
    while len(chosen_by) < new_tokens:
        missing = [len(s.tokens) - s.cached for s in sequences]
        reading = any(m > 1 for m in missing)  # one token is missing where decoding goes on
        q_lens = [min(m - 1, CHUNK) for m in missing] if reading else missing
        num_tokens = len(sequences) * (CHUNK if reading else 1)
        logits, caches = run_step(params, caches, sequences, q_lens, num_tokens)
        if not reading:
            chosen_by.append(np.asarray(logits))
            for sequence, token in zip(sequences, chosen_by[-1].argmax(axis=-1), strict=True):
                sequence.tokens.append(int(token))
    return np.array([s.tokens[-new_tokens:] for s in sequences]), np.stack(chosen_by, axis=1)


# The same without a cache: all tokens again for every new one, through jax.nn.


@jax.jit
def dense_logits(params, tokens):
    def attend(i, q, k, v):
        return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]

    return forward(params, tokens, jnp.arange(len(tokens)), attend)


def generate_without_cache(params, prompts, new_tokens=NEW_TOKENS):
    generated = []
    for prompt in prompts:
        tokens = list(prompt.encode())
        for _ in range(new_tokens):
            padded = np.zeros(PAGES_PER_SEQ * PAGE_SIZE, np.int32)  # causal: nobody sees the rest
            padded[: len(tokens)] = tokens
            tokens.append(int(dense_logits(params, padded)[len(tokens) - 1].argmax()))
        generated.append(tokens[-new_tokens:])
    return np.array(generated)


def backends_here():
    """The names of the backends that serve this model on this machine, best first."""
    question = AttentionSelectorConfig(
        HEAD_SIZE, "float32", "auto", PAGE_SIZE, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS
    )
    return [name for name, reasons in attnsel_jax.select(question).reasons.items() if not reasons]


def main():
    params = random_params()
    expected = generate_without_cache(params, PROMPTS)
    tokens, logits = {}, {}
    for name in backends_here():
        with attnsel_jax.global_force_attn_backend_context_manager(name):
            tokens[name], logits[name] = generate(params, PROMPTS)
    first = next(iter(logits.values()))
    off = {name: np.abs(logits[name] - first).max() for name in logits}
    for name in tokens:
        same = bool((tokens[name] == expected).all())
        print(f"{name:<14} tokens equal those without a cache: {same}; "
              f"logits off the first's by {off[name]:.0e}")  # fmt: skip
        assert same

    # The tokens are no matter of luck: the best logit leads by far more than backends differ.
    best = np.sort(first, axis=-1)
    lead = (best[..., -1] - best[..., -2]).min()
    print(f"the chosen token's logit leads by {lead:.1e} or more\n")
    assert lead > 100 * max(off.values())
    for prompt, generated in zip(PROMPTS, expected, strict=True):
        print(f"{prompt!r:<34} -> {generated.tolist()}")


if __name__ == "__main__":
    main()
