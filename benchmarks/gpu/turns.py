"""Whose turn it is on the GPU: steps compile side by side, but what is measured runs alone."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

FILE = "ATTNSEL_GPU_TURNS"  # a path; unset = nobody else is there


@contextlib.contextmanager
def turn(*, alone: bool) -> Iterator[None]:
    """Waits for the GPU, and has it inside.

    Args:
        alone: measures; else computes only, beside others that do.
    """
    path = os.environ.get(FILE)
    if path is None:
        yield
        return
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
