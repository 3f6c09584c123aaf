"""Sets of allowed values: they answer `in`, and print as the end of "must be ...".

96 in OneOf(64, 128)         -> False
str(OneOf(64, 128))          -> "one of 64, 128"
str(MultipleOf(8, at_most=256))  -> "a multiple of 8, at most 256"
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol


class Constraint(Protocol):
    """What every set of allowed values offers."""

    def __contains__(self, value: Any) -> bool:
        """Whether the value is allowed."""

    def samples(self) -> Iterable[Any]:
        """The finite values it names, each of which a test must exercise."""


@dataclasses.dataclass(frozen=True, init=False)
class OneOf:
    """The listed values and no others; an empty list allows nothing."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        if not self.values:
            return "nothing"
        if len(self.values) == 1:
            return str(self.values[0])
        return "one of " + ", ".join(map(str, self.values))

    def samples(self) -> Iterable[Any]:
        """Every listed value."""
        return self.values


@dataclasses.dataclass(frozen=True)
class MultipleOf:
    """Positive multiples of `base`, up to `at_most` if given."""

    base: int
    at_most: int | None = None

    def __contains__(self, value: Any) -> bool:
        within = self.at_most is None or value <= self.at_most
        return value > 0 and value % self.base == 0 and within

    def __str__(self) -> str:
        limit = f", at most {self.at_most}" if self.at_most is not None else ""
        if self.base == 1 and limit:
            return limit.removeprefix(", ")
        return f"a multiple of {self.base}{limit}"

    def samples(self) -> Iterable[Any]:
        """The smallest, and the largest if there is one."""
        return (self.base,) if self.at_most is None else (self.base, self.at_most)


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Values not below `least`: numbers, versions, compute capabilities."""

    least: Any

    def __contains__(self, value: Any) -> bool:
        return value >= self.least

    def __str__(self) -> str:
        return f"at least {written(self.least)}"

    def samples(self) -> Iterable[Any]:
        """The bound itself."""
        return (self.least,)


@dataclasses.dataclass(frozen=True)
class Anything:
    """No restriction."""

    def __contains__(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return "anything"

    def samples(self) -> Iterable[Any]:
        """None: nothing finite is named."""
        return ()


def written(value: Any) -> str:
    """The value as text; numbers of a version, (0, 11), with dots."""
    return ".".join(map(str, value)) if type(value) is tuple else str(value)


def every_value(allowed: Constraint) -> list[Any] | None:
    """Every value that is allowed; None where there is no end to them."""
    if isinstance(allowed, OneOf):
        return list(allowed.values)
    if isinstance(allowed, MultipleOf) and allowed.at_most is not None:
        return list(range(allowed.base, allowed.at_most + 1, allowed.base))
    return None


ANYTHING = Anything()
EITHER = OneOf(False, True)
NEVER = OneOf(False)
