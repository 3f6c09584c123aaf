"""One quantity of one run held against what is expected: how far, where, and how much of it."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnsel_jax.compare.expected import Expected, numbers_in

MAP_ROWS, MAP_COLUMNS = 1024, 256  # of the picture kept of each quantity
ROW_AXES = ("batch", "query", "key", "token", "page")  # what runs downwards in it


@dataclasses.dataclass(frozen=True)
class Worst:
    """The element that is furthest out of its budget, or nearest to its edge.

    Attributes:
        at: coordinates by axis name.
        got: the backend's value.
        expected: the oracle's.
        budget: how far it may lie from the oracle's.
    """

    at: dict[str, int]
    got: float
    expected: float
    budget: float

    def __str__(self) -> str:
        at = ", ".join(f"{axis} {index}" for axis, index in self.at.items())
        return f"{self.got:.6g} for {self.expected:.6g} ± {self.budget:.2g} at {at}"


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How one quantity deviates.

    Attributes:
        quantity: "out", "lse", "kv_pages", "grad q", ...
        relative_error: norm of the difference over norm of the expectation; inf where one is NaN or
            infinite and the other is not.
        worst: the worst element; None for an empty quantity.
        share_outside: part of the elements that are outside their budget.
        in_budgets: the worst element's error divided by its budget.
        tokens_per_row: of the map; above 1 where it was coarsened.
        map: error in budgets, its largest over axes past the first two that a picture can show:
            [tokens, heads], at most 1024 x 256. Not part of the JSON.
    """

    quantity: str
    relative_error: float
    worst: Worst | None
    share_outside: float
    in_budgets: float
    tokens_per_row: int
    map: NDArray[np.float32] = dataclasses.field(repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether every element is within its budget."""
        return self.share_outside == 0

    def __str__(self) -> str:
        if self.worst is None:
            return f"{self.quantity}: empty"
        return (
            f"{self.quantity}: relative error {self.relative_error:.1e}, "
            f"{self.share_outside:.2%} outside the budget; worst {self.worst}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the map, as JSON's types; numbers that JSON lacks become text."""
        worst = None
        if self.worst is not None:
            worst = {"at": self.worst.at} | {
                name: _number(getattr(self.worst, name)) for name in ("got", "expected", "budget")
            }
        return {
            "quantity": self.quantity,
            "passed": self.passed,
            "relative_error": _number(self.relative_error),
            "share_outside": self.share_outside,
            "error_in_budgets": _number(self.in_budgets),
            "worst": worst,
        }


def deviation(quantity: str, got: NDArray, expected: Expected) -> Deviation:
    """Holds a result against what is expected.

    Raises:
        ValueError: the result's shape is not the expected one.
    """
    if got.shape != expected.values.shape:
        raise ValueError(f"{quantity} has shape {got.shape}, must be {expected.values.shape}")
    if _same_bits(got, expected.values):
        error = np.broadcast_to(0.0, expected.budget.shape)
        relative = 0.0
    else:
        error, relative = _errors(numbers_in(got), numbers_in(expected.values))
    if not error.size:
        return Deviation(quantity, 0.0, None, 0.0, 0.0, 1, np.zeros((0, 0), np.float32))
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(error == 0, 0, error / expected.budget)
    excess[np.isnan(excess)] = np.inf  # a budget that is no number allows nothing
    at = np.unravel_index(np.argmax(excess), excess.shape)
    coordinates = dict(zip(expected.axes, map(int, at), strict=True))
    pair = (_value_at(x, at) for x in (got, expected.values))
    return Deviation(
        quantity,
        relative,
        Worst(coordinates, *pair, float(expected.budget[at])),
        float(np.mean(excess > 1)),
        float(excess[at]),
        *_map(excess, expected.axes),
    )


def _same_bits(a: NDArray, b: NDArray) -> bool:
    """Whether two arrays are the same bytes: NaN in slots that nobody wrote included."""
    return a.dtype == b.dtype and np.array_equal(
        np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
    )


def _errors(
    got: NDArray[np.float64], wanted: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Absolute differences (0 between equals, NaN and infinities too), and their relative norm."""
    with np.errstate(invalid="ignore"):
        error = np.abs(got - wanted)
    error[(got == wanted) | (np.isnan(got) & np.isnan(wanted))] = 0
    error[np.isnan(error)] = np.inf
    norm = np.linalg.norm(wanted[np.isfinite(wanted)])
    total = np.linalg.norm(error)
    return error, 0.0 if total == 0 else float(total / norm) if norm else float("inf")


def _value_at(values: NDArray, at: tuple[Any, ...]) -> float:
    """One element as a number; of bytes, the number that they stand for."""
    if values.dtype == np.uint8:
        return float(numbers_in(values[at[:-1]])[at[-1]])
    return float(values[at])


def _map(excess: NDArray, axes: tuple[str, ...]) -> tuple[int, NDArray[np.float32]]:
    """Tokens per row, and [tokens, heads] of the largest errors, batch and query folded."""
    if excess.ndim == 1:
        picture = excess[:, None]
    else:
        head = next((i for i, axis in enumerate(axes) if "head" in axis), len(axes) - 1)
        rows = [i for i, axis in enumerate(axes) if axis in ROW_AXES and i != head]
        kept = np.moveaxis(excess, (*rows, head), range(len(rows) + 1))
        length = int(np.prod(kept.shape[: len(rows)]))
        picture = kept.reshape(length, kept.shape[len(rows)], -1).max(axis=2)
    step = -(-picture.shape[0] // MAP_ROWS)
    for axis, limit in ((0, MAP_ROWS), (1, MAP_COLUMNS)):
        picture = _coarsened(picture, axis, limit)
    return max(step, 1), picture.astype(np.float32)


def _coarsened(picture: NDArray, axis: int, limit: int) -> NDArray:
    """The largest of each run, so that no more than `limit` remain along the axis."""
    size = picture.shape[axis]
    if size <= limit:
        return picture
    starts = np.arange(0, size, -(-size // limit))
    return np.maximum.reduceat(picture, starts, axis=axis)


def _number(value: float) -> float | str:
    """Value, as text if it is NaN or infinite: JSON has no word for these."""
    return value if np.isfinite(value) else str(value)
