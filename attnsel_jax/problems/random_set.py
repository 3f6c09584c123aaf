"""Problems drawn at random from the contracts: what no list of cases thought of.

`random.17` is the same problem everywhere: its number is the seed that draws its shapes, dtypes and
features, whose pools hold what kernels have edges at. Sizes are small: kernels of large tiles meet
their inner edges only where a test makes the tiles small, too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from attnsel_jax.problems.dense_inputs import dense_inputs
from attnsel_jax.problems.indexer_inputs import indexer_inputs, topk_inputs
from attnsel_jax.problems.materialized_inputs import materialized_inputs
from attnsel_jax.problems.mla_inputs import FP8_DS_MLA, mla_inputs
from attnsel_jax.problems.paged_inputs import paged_inputs
from attnsel_jax.problems.problem import Problem

FAMILY = "random"
NUMBERS_A_SEED = 10**6
MOST_MISSED = 200  # one after the other, before it is taken that nothing accepts what is drawn
HEADS = ((1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (5, 1), (6, 2), (8, 1), (8, 4), (8, 8), (12, 4),
         (16, 2), (20, 1), (24, 8), (36, 2), (64, 8))  # fmt: skip
DTYPES = ("bfloat16", "bfloat16", "float16", "float32")
HEAD_SIZES = (64, 64, 128, 128, 80, 96, 112, 256, 192, 40)
QUANTISED = ("float8_e4m3fn", "float8_e5m2", "int8")
LENGTHS = (1, 2, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 257, 300)
PAGE_SIZES = (16, 16, 64, 64, 8, 32, 128, 256, 1)
MOST_TOKENS = 80  # of a ragged batch
MOST_LISTS = (
    24  # of sparse MLA's tokens: each is a list of rows, which interpreters copy one by one
)


class _Draw:
    """Draws from pools."""

    def __init__(self, number: int):
        self.rng = np.random.default_rng(number)

    def one(self, pool: Any) -> Any:
        """One of a sequence's entries."""
        return pool[int(self.rng.integers(len(pool)))]

    def below(self, most: int) -> int:
        """1 .. most, small ones more often."""
        return 1 + int(most * self.rng.random() ** 2)

    def chance(self, share: float) -> bool:
        """True in that share of draws."""
        return bool(self.rng.random() < share)

    def features(self, share: float, **values: Callable[[], Any]) -> dict[str, Any]:
        """Those features that are drawn, each with its value."""
        return {name: value() for name, value in values.items() if self.chance(share)}


def _window(draw: _Draw, length: int, causal: bool) -> int | tuple[int, int]:
    width = draw.below(length)
    return width if causal else (width, draw.below(length) - 1)


def _dense(draw: _Draw) -> dict[str, Any]:
    batch, q_len = draw.one((1, 1, 2, 3)), draw.one(LENGTHS)
    kv_len = q_len if draw.chance(0.6) else draw.one(LENGTHS)
    heads, causal, size = draw.one(HEADS), draw.chance(0.6), draw.one(HEAD_SIZES)
    share = draw.one((0.1, 0.2, 0.4))
    options = draw.features(
        share,
        sliding_window=lambda: _window(draw, kv_len, causal),
        attention_chunk_size=lambda: draw.below(kv_len),
        soft_cap=lambda: draw.one((4.0, 8.0, 50.0)),
        sinks=lambda: True,
        alibi=lambda: True,
        masked=lambda: True,
        scale=lambda: draw.one((1.0, 0.05, 0.2)),
        bias=lambda: tuple(draw.chance(0.7) for _ in range(4)),
        q_lens=lambda: tuple(draw.below(q_len + 1) - 1 for _ in range(batch)),
        kv_lens=lambda: tuple(draw.below(kv_len + 1) - 1 for _ in range(batch)),
        q_offset=lambda: draw.one((kv_len - q_len, tuple(range(-1, 3 * batch - 1, 3)))),
    )
    if min(q_len, kv_len) > 1 and draw.chance(share):
        options["segments"] = draw.one((1, 2, 5))
    if size == 192:
        options["head_size_v"] = draw.one((128, 192))
    shape = {"batch": batch, "q_len": q_len, "kv_len": kv_len, "heads": heads, "head_size": size}
    return shape | {"dtype": draw.one(DTYPES), "causal": causal} | options


def _lengths(draw: _Draw, most_tokens: int = MOST_TOKENS) -> dict[str, Any]:
    """Decodes, drafts, chunks, prompts and sequences without a new token."""
    q_lens, kv_lens, tokens = [], [], 0
    for _ in range(draw.one((1, 2, 3, 5, 9))):
        kv_len = draw.one(LENGTHS) + draw.one((0, 0, 0, 1))
        q_len = draw.one((1, 1, 1, 0, draw.below(5), draw.below(40), kv_len))
        q_len = min(q_len, kv_len, most_tokens - tokens)
        tokens += q_len
        q_lens.append(q_len)
        kv_lens.append(kv_len)
    return {"q_lens": tuple(q_lens), "kv_lens": tuple(kv_lens), "pad_tokens": draw.one((0, 0, 3)),
            "page_size": draw.one(PAGE_SIZES)}  # fmt: skip


def _paged(draw: _Draw) -> dict[str, Any]:
    options = _lengths(draw) | {"heads": draw.one(HEADS), "head_size": draw.one(HEAD_SIZES)}
    options |= {"dtype": draw.one(DTYPES), "causal": draw.chance(0.9)}
    longest = max(options["kv_lens"])
    options |= draw.features(
        0.2,
        sliding_window=lambda: _window(draw, longest, options["causal"]),
        attention_chunk_size=lambda: draw.below(longest),
        soft_cap=lambda: draw.one((4.0, 8.0, 50.0)),
        sinks=lambda: True,
        alibi=lambda: True,
        scale=lambda: draw.one((1.0, 0.05, 0.2)),
        writes=lambda: False,
        pad_seqs=lambda: draw.one((0, 4)),
        cache_dtype=lambda: draw.one(DTYPES),
    )
    if draw.chance(0.3):
        cache_dtype = draw.one(QUANTISED)
        kinds = ("tensor", "head") if cache_dtype == "int8" else ("tensor", "head", None)
        options |= {"cache_dtype": cache_dtype, "scales": draw.one(kinds)}
    return options


def _latent(draw: _Draw, most_tokens: int) -> dict[str, Any]:
    options = _lengths(draw, most_tokens) | {"num_heads": draw.one((1, 3, 8, 16, 16, 20, 64, 128))}
    if draw.chance(0.2):
        options |= {"rank": 32, "rope_dim": 8, "qk_nope_head_dim": 16}
    options |= {"dtype": draw.one(DTYPES)}
    return options | draw.features(0.15, soft_cap=lambda: 5.0, pad_seqs=lambda: draw.one((0, 4)))


def _mla(draw: _Draw, most_tokens: int = MOST_TOKENS) -> dict[str, Any]:
    options = _latent(draw, most_tokens) | draw.features(0.2, writes=lambda: False)
    if draw.chance(0.1) and "rank" not in options:
        return options | {"cache_dtype": FP8_DS_MLA}
    if draw.chance(0.3):
        return options | {"cache_dtype": draw.one(QUANTISED[:2]), "scaled": draw.chance(0.7)}
    return options | draw.features(0.2, cache_dtype=lambda: draw.one(DTYPES))


def _sparse_mla(draw: _Draw) -> dict[str, Any]:
    options = _mla(draw, MOST_LISTS) | {"topk": draw.one((1, 8, 16, 64, 100, 128, 256))}
    if "rank" not in options and draw.chance(0.2):
        options |= {"cache_dtype": FP8_DS_MLA, "scaled": False}
    return options


def _materialized(draw: _Draw) -> dict[str, Any]:
    options = _mla(draw) | {"num_heads": draw.one((1, 3, 8)), "v_dim": draw.one((24, 64, 128))}
    if options.get("cache_dtype") == FP8_DS_MLA:
        del options["cache_dtype"]
    return {name: value for name, value in options.items() if name != "soft_cap"}


def _indexer(draw: _Draw) -> dict[str, Any]:
    shape = {"num_index_heads": draw.one((4, 16, 32, 64)), "index_head_dim": draw.one((64, 128))}
    return _lengths(draw) | shape | {"dtype": draw.one(DTYPES)}


def _topk(draw: _Draw) -> dict[str, Any]:
    topk = draw.one((1, 16, 100, 128, 256))
    return {"num_tokens": draw.below(40), "num_positions": topk * draw.below(4), "topk": topk}


# What a number draws, by turns: op, inputs, options.
TURNS = (
    ("dense", dense_inputs, _dense),
    ("paged", paged_inputs, _paged),
    ("mla", mla_inputs, _mla),
    ("sparse_mla", mla_inputs, _sparse_mla),
    ("dense", dense_inputs, _dense),
    ("paged", paged_inputs, _paged),
    ("indexer_scores", indexer_inputs, _indexer),
    ("topk_positions", topk_inputs, _topk),
    ("mla_materialized", materialized_inputs, _materialized),
)


def random_problem(number: int) -> Problem:
    """The problem of a number: its shapes, dtypes and features.

    Raises:
        ValueError: a number below 0.
    """
    if number < 0:
        raise ValueError(f"number is {number}, must be at least 0")
    op, inputs, drawn = TURNS[number % len(TURNS)]
    draw = _Draw(number)
    options = drawn(draw)
    text = ", ".join(f"{name} {value}" for name, value in options.items())
    gradients = op == "dense" and draw.chance(0.5)
    text += ", with gradients" if gradients else ""
    return Problem(f"{FAMILY}.{number}", op, text, inputs, options, gradients)


def random_problems(
    count: int, seed: int = 0, accepts: Callable[[Problem], bool] = lambda problem: True
) -> tuple[Problem, ...]:
    """Problems that a seed numbers.

    Args:
        count: how many, at least 1.
        seed: the first number is a million times it.
        accepts: leaves out those for which it is False.

    Raises:
        ValueError: a count below 1, a seed below 0, or `accepts` leaves out one after the other.
    """
    for name, value, least in (("count", count, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")
    found: list[Problem] = []
    number, missed = seed * NUMBERS_A_SEED, 0
    while len(found) < count:
        problem = random_problem(number)
        taken = accepts(problem)
        found += [problem] * taken
        number, missed = number + 1, 0 if taken else missed + 1
        if missed == MOST_MISSED:
            raise ValueError(
                f"accepts is False for {missed} problems one after the other, must be True for "
                f"some: `attnsel matrix` says what each backend serves, and on which chip"
            )
    return tuple(found)
