"""A race: one computation, done by backends and by rivals on the same inputs, timed side by side.

The backends are those that the selector would take for the question on this device; the one it
chooses is the one that targets speak of. Before anything is timed, every contender's answer is
held against the first rival's.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.bench.results import CaseResult, Settings, Verdict, at_least
from attnsel_jax.bench.roofline import Roofline, Work
from attnsel_jax.bench.timing import Call, finished, interleaved, row_of
from attnsel_jax.cache_layouts import in_layouts
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device, current_device
from attnsel_jax.selector import select

Inputs = Mapping[str, np.ndarray]
NUM_SETS = 3
# Contenders agree when no element differs by more than this share of the largest; float32 sums in
# another order differ by some 1e-6.
AGREEMENT = 1e-4


@dataclasses.dataclass(frozen=True)
class Rival:
    """Somebody else's way to the same result.

    Attributes:
        name: such as "jax.nn".
        prepare: input sets -> a call by the number of the set.
        missing: device -> why it cannot be timed here; None = it can.
    """

    name: str
    prepare: Callable[[Sequence[Inputs]], Call]
    missing: Callable[[Device], str | None] = lambda device: None


class Target(NamedTuple):
    """The chosen backend must be at least `ratio` times as fast as a rival."""

    rival: str
    ratio: float


@dataclasses.dataclass(frozen=True)
class Race:
    """One computation with its contenders.

    Attributes:
        name, description: of the case.
        config: the question that the selector is asked.
        make_inputs: (rng, how many sets) -> input sets; sets may share arrays.
        of_backend: backend -> a function of the inputs, to be jitted.
        rivals: the first is the one that answers are held against.
        work: what the computation needs at least.
        targets: for the chosen backend.
    """

    name: str
    description: str
    config: AttentionSelectorConfig
    make_inputs: Callable[[np.random.Generator, int], Sequence[Inputs]]
    of_backend: Callable[[type[AttentionBackend]], Callable[..., Any]]
    rivals: tuple[Rival, ...]
    work: Work
    targets: tuple[Target, ...]

    def run(self, settings: Settings, roofline: Callable[[Device], Roofline | None]) -> CaseResult:
        """Times everybody."""
        device = current_device()
        selection = select(self.config, device, settings.backends and settings.backends[0])
        chosen = selection.required()
        sets = self.make_inputs(np.random.default_rng(settings.seed), NUM_SETS)
        contenders, notes = self._contenders(selection, sets, settings, device)
        verdicts = [_agreement(contenders, judge=self.rivals[0].name)]
        samples = interleaved(
            contenders, rounds=settings.rounds, budget_s=settings.budget_s, num_sets=len(sets)
        )
        roof = roofline(device)
        limit = roof.limit(self.work) if roof else None
        rows = tuple(row_of(name, seconds, limit) for name, seconds in samples.items())
        medians = {row.name: row.value for row in rows}
        verdicts += [_verdict(chosen.name, target, medians) for target in self.targets]
        return CaseResult(self.name, self.description, rows, tuple(verdicts), tuple(notes), limit)

    def _contenders(self, selection, sets, settings, device) -> tuple[dict[str, Call], list[str]]:
        """Everybody who can be timed here, and a note on everybody who cannot."""
        contenders: dict[str, Call] = {}
        notes = []
        names = settings.backends or selection.candidates
        for name in names:
            reasons = selection.reasons[name]
            if not reasons and (settings.backends or name != "XLA_REFERENCE"):
                contenders[name] = self._backend_call(name, sets)
            elif settings.backends:
                notes.append(f"{name} refuses: {'; '.join(map(str, reasons))}")
        if not settings.backends and "XLA_REFERENCE" in names:
            notes.append("XLA_REFERENCE builds every logit: timed only when named")
        for rival in self.rivals:
            reason = rival.missing(device)
            if reason is None:
                contenders[rival.name] = rival.prepare(sets)
            else:
                notes.append(f"{rival.name} is not timed: {reason}")
        return contenders, notes

    def _backend_call(self, name: str, sets: Sequence[Inputs]) -> Call:
        from attnsel_jax.registry import AttentionBackendEnum

        backend = AttentionBackendEnum[name].get_class()
        return jitted_call(self.of_backend(backend), _in_its_layout(backend, sets))


def _in_its_layout(backend: type[AttentionBackend], sets: Sequence[Inputs]) -> list[Inputs]:
    """The input sets with the cache, which they share, as the backend stores it."""
    first = in_layouts(sets[0], backend.layout)
    shared = {"kv_pages": first["kv_pages"]} if "kv_pages" in first else {}
    return [{**inputs, **shared} for inputs in sets]


def jitted_call(function: Callable[..., Any], sets: Sequence[Inputs]) -> Call:
    """A jitted function of the inputs, as a call by the number of the set; inputs on the device."""
    jitted = jax.jit(function)
    on_device: dict[int, jax.Array] = {}

    def put(array: np.ndarray) -> jax.Array:
        if id(array) not in on_device:  # sets share what is large
            on_device[id(array)] = jnp.asarray(array)
        return on_device[id(array)]

    placed = [{name: put(array) for name, array in inputs.items()} for inputs in sets]
    finished(placed)
    return lambda number: jitted(**placed[number])


def _agreement(contenders: Mapping[str, Call], judge: str) -> Verdict:
    """Whether everybody's answer to the first set is the judge's; compiles, warms up."""
    answers = {name: _arrays(call(0)) for name, call in contenders.items()}
    worst, worst_name = 0.0, judge
    for name in answers:
        for mine, theirs in zip(answers[name], answers[judge], strict=True):
            off = float(np.max(np.abs(mine - theirs)) / np.max(np.abs(theirs)))
            if not off <= worst:  # NaN is worst
                worst, worst_name = off, name
    target = f"every contender's answer is {judge}'s, within {AGREEMENT:g} of the largest element"
    return Verdict(target, f"{worst:.1e}, {worst_name}", worst <= AGREEMENT)


def _arrays(outputs: Any) -> list[np.ndarray]:
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return [np.asarray(output, np.float32) for output in outputs]


def _verdict(chosen: str, target: Target, medians: Mapping[str, float]) -> Verdict:
    what = f"{chosen} against {target.rival}, speed"
    if target.rival not in medians:
        return Verdict(f"{what}: at least {target.ratio:g}x", f"{target.rival} not here", None)
    return at_least(what, medians[target.rival] / medians[chosen], target.ratio)
