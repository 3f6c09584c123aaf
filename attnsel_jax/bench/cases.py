"""The named cases, and a run of some of them."""

import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator

from attnsel_jax.bench.attention_cases import dense_causal, paged_decode
from attnsel_jax.bench.memory_case import memory_at
from attnsel_jax.bench.race import Race
from attnsel_jax.bench.results import CaseResult, Settings
from attnsel_jax.bench.roofline import roofline_of
from attnsel_jax.bench.selector_cases import import_time, selector_call

Case = Callable[[Settings], CaseResult]


def _race(make: Callable[..., Race], **options: object) -> Case:
    def case(settings: Settings) -> CaseResult:
        return make(**options).run(settings, roofline_of)

    return functools.wraps(make)(case)


CASES: dict[str, Case] = {
    "dense_causal_4096": _race(dense_causal),
    "dense_causal_4096_grad": _race(dense_causal, gradients=True),
    "paged_decode_32x2048_page16": _race(paged_decode, page_size=16),
    "paged_decode_32x2048_page64": _race(paged_decode, page_size=64),
    "memory_32768": memory_at,
    "selector_call": selector_call,
    "import": import_time,
}


def named(names: Iterable[str]) -> tuple[str, ...]:
    """The cases that names, beginnings of names or patterns such as "dense*" mean; none = all.

    Raises:
        ValueError: a name means none.
    """
    found: dict[str, None] = {}
    for name in names:
        exact = [name] if name in CASES else []
        matches = exact or [c for c in CASES if c.startswith(name) or fnmatch.fnmatch(c, name)]
        if not matches:
            raise ValueError(f"case is {name!r}, must be one of {', '.join(CASES)}, or a pattern")
        found |= dict.fromkeys(matches)
    return tuple(found or CASES)


def run(names: Iterable[str] = (), settings: Settings | None = None) -> Iterator[CaseResult]:
    """Runs cases one after another, each yielded as soon as it is measured.

    Args:
        names: as `named` takes them; none = all.
        settings: how to measure.
    """
    for name in named(names):
        yield CASES[name](settings or Settings())
