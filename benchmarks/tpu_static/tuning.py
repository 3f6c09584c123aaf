"""Finds tile sizes for our kernels by their static schedules, and writes them into their tables.

A kernel's table is `TILES` in `pallas_kernels/<op>/mosaic_tpu_tiles.py`: from a key (generation,
dtype of the cache, shape class), or a generation alone, to a named tuple or dataclass of integers.
The search goes one field at a time: twice and half of it (one more and one less of buffers), as
long as that helps; a field that a work does not depend on (queries of a tile, for decode) is tried
once. A candidate that the compiler refuses, or whose replay is doubtful, is never
chosen. Tiles change speed, never numbers: the kernels' own tests hold after tuning as before.
"""

import ast
import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from attnsel_jax.kv_cache import stored_dtype
from benchmarks.tpu_static.measuring import MEASURED, Measurement
from benchmarks.work import Work

Sizes = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Table:
    """One kernel's table of tile sizes.

    Attributes:
        module: where it is.
        key: of the work's entry.
        sizes: of that entry, by field.
    """

    module: Any
    key: Hashable
    sizes: Sizes

    def use(self, sizes: Sizes) -> None:
        """Puts other sizes in the entry's place, in this process."""
        self.module.TILES[self.key] = type(self.module.TILES[self.key])(**sizes)

    def write(self, sizes: Sizes) -> pathlib.Path:
        """Puts other sizes in the entry's place, in the source."""
        path = pathlib.Path(self.module.__file__)
        path.write_text(rewritten(path.read_text(), self.key, sizes))
        return path


def table_of(work: Work, generation: str, cache_dtype: str | None = None) -> Table:
    """The table of our kernel for a work, at the entry of its cache's dtype.

    Where it has none, the kernel may take another dtype's tiles, which are not this work's to tune.

    Args:
        work: whose tiles.
        generation: the chip.
        cache_dtype: in place of the work's.

    Raises:
        ValueError: the kernel has no table, or no such entry.
    """
    name = f"pallas_kernels.{work.op}.mosaic_tpu_tiles"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        module = None
    tiles = getattr(module, "TILES", None)
    if tiles is None:
        raise ValueError(f"{name} has no TILES, must have: there is nothing to tune for {work.op}")
    for_halves = [f"{shape_class(work)}_64"] if work.head_size <= 64 else []
    classes = [*for_halves, shape_class(work)]
    dtype = stored_dtype(cache_dtype or work.cache_dtype, "bfloat16").name
    for key in (*((generation, dtype, of_class) for of_class in classes), generation):
        if key in tiles:
            return Table(module, key, _sizes(tiles[key]))
    keys = ", ".join(map(repr, tiles))
    wanted = generation, dtype, classes[-1]
    raise ValueError(
        f"{name}.TILES has keys {keys}, must have {wanted!r}, the entry of {work.name} with that "
        f"cache: put one there to begin with"
    )


def shape_class(work: Work) -> str:
    """The last part of a work's key: what its kernel is called with, or which dense kernel."""
    if work.op != "dense":
        return work.shape_class
    which = "backward" if work.backward else "forward"
    return which + ("_wide" if max(work.head_size, work.head_size_v) > 128 else "")


def _sizes(entry: Any) -> Sizes:
    return dict(entry._asdict() if hasattr(entry, "_asdict") else dataclasses.asdict(entry))


def search(
    sizes: Sizes, measure: Callable[[Sizes], Measurement], most: int
) -> Iterator[tuple[Sizes, Measurement]]:
    """Every candidate that is tried, in order.

    Args:
        sizes: to begin with.
        measure: compiles and replays one candidate.
        most: candidates.
    """
    tried: dict[tuple[int, ...], float] = {}
    idle: set[str] = set()

    def time_of(found: Measurement) -> float:
        return found.estimated_us if is_sure(found) else float("inf")

    found = measure(sizes)
    best, best_time = sizes, time_of(found)
    tried[tuple(sizes.values())] = best_time
    yield sizes, found
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            (field,) = (name for name in candidate if candidate[name] != best[name])
            if field in idle or tuple(candidate.values()) in tried:
                continue
            if len(tried) >= most:
                return
            found = measure(candidate)
            tried[tuple(candidate.values())] = time_of(found)
            yield candidate, found
            if time_of(found) == best_time < float("inf"):
                idle.add(field)
            if time_of(found) < best_time:
                best, best_time, improved = candidate, time_of(found), True
                break


def neighbours(sizes: Sizes) -> list[Sizes]:
    """The sizes with one doubled or halved; of buffers one more or one less; a choice the other."""
    found = []
    for field, size in sizes.items():
        if isinstance(size, bool):
            found.append(sizes | {field: not size})
            continue
        others = (size + 1, size - 1) if "buffers" in field else (size * 2, size // 2)
        found += [sizes | {field: other} for other in others if other > 0]
    return found


def is_sure(found: Measurement) -> bool:
    """Whether it was measured, and the replay understood all of it."""
    return found.verdict == MEASURED and not any(kernel.doubts for kernel in found.kernels)


def ranked(tried: list[tuple[Sizes, Measurement]]) -> list[tuple[Sizes, Measurement]]:
    """Candidates by time, then by bytes moved; what is doubtful or was refused comes last."""
    return sorted(
        tried, key=lambda pair: (not is_sure(pair[1]), pair[1].verdict != MEASURED,
                                 pair[1].estimated_us, pair[1].bytes_moved)
    )  # fmt: skip


def rewritten(source: str, key: Hashable, sizes: Sizes) -> str:
    """A table's source with another entry under a key.

    Raises:
        ValueError: the source has no `TILES` with that key.
    """
    for node in ast.walk(ast.parse(source)):
        value = getattr(node, "value", None)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        is_table = any(getattr(target, "id", None) == "TILES" for target in targets)
        if not (is_table and isinstance(value, ast.Dict)):
            continue
        for found, entry in zip(value.keys, value.values, strict=True):
            if isinstance(entry, ast.Call) and ast.literal_eval(found) == key:
                old = ast.get_source_segment(source, entry)
                named = ", ".join(f"{field}={size}" for field, size in sizes.items())
                given = ", ".join(map(str, sizes.values())) if entry.args else named
                lines = source.splitlines(keepends=True)
                at = sum(map(len, lines[: entry.lineno - 1])) + entry.col_offset
                new = f"{ast.unparse(entry.func)}({given})"
                return source[:at] + new + source[at + len(old) :]
    raise ValueError(f"key is {key!r}, must be one of TILES, whose entries are calls")
