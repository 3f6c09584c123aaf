"""The dense TPU kernels as their tests run them: in the interpreter, on small tiles."""

import pytest
from tpu_interpreter import tpu_interpreter

from attnsel_jax.compare import compare
from attnsel_jax.problems import Problem
from attnsel_jax.problems.dense_inputs import dense_inputs
from pallas_kernels.dense import mosaic_tpu, mosaic_tpu_short, mosaic_tpu_tiles

CUT = mosaic_tpu_tiles.Tiles(128, 128, 128, 256, 256)
SHAPE = {"heads": (2, 1), "head_size": 64, "q_len": 260, "dtype": "float32"}


def use(tiles: mosaic_tpu_tiles.Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the same tiles everywhere in the table, for calls of any length."""
    monkeypatch.setattr(mosaic_tpu_short, "LONGEST", 0)
    for key in mosaic_tpu_tiles.TILES:
        monkeypatch.setitem(mosaic_tpu_tiles.TILES, key, tiles)


def problem(name: str, **options) -> Problem:
    """A dense problem of few tokens, float32 unless it says otherwise."""
    gradients = options.pop("gradients", False)
    return Problem(name, "dense", name, dense_inputs, SHAPE | options, gradients)


def compared(case: Problem, generation: str = "v5e", *, detect_races: bool = False):
    """The kernel's row of the comparison with the oracle."""
    with tpu_interpreter(generation, detect_races=detect_races):
        (row,) = compare([case], {"MOSAIC_TPU": mosaic_tpu.dense_attention}).rows
    return row
