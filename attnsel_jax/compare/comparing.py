"""Runs problems on backends: who accepts, who refuses and why, and who is right."""

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Rejection
from attnsel_jax.compare.comparison import ERROR, FAIL, PASS, REFUSED, Comparison, Row
from attnsel_jax.compare.deviations import deviation
from attnsel_jax.compare.expected import Expected, expected
from attnsel_jax.compare.kernel_runs import RESULTS, run
from attnsel_jax.compare.own_arrays import as_arguments
from attnsel_jax.compare.picture import edges
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.constraints import OneOf
from attnsel_jax.platforms import Device, current_device, device_of
from attnsel_jax.problems import DEFAULT, Problem, given, named
from attnsel_jax.qualnames import FAILURES
from attnsel_jax.registry import AttentionBackendEnum

Kernel = Callable[..., Any]
Backend = str | AttentionBackendEnum | type[AttentionBackend]
Backends = Iterable[Backend] | Mapping[str, Kernel | Backend] | Backend | None
Progress = Callable[[int, int, str], None]


def compare(
    problems: Iterable[Problem | str] = DEFAULT,
    backends: Backends = None,
    device: jax.Device | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    workers: int = 1,
) -> Comparison:
    """Runs every problem on every backend that accepts it, and holds the results to the oracle.

    Args:
        problems: problems, or their names, families or sets (`attnsel_jax.problems.named`).
        backends: names, members of `AttentionBackendEnum` or backend classes; or a mapping from a
            name of the caller's to one of these or to a function with the op's signature. None =
            every registered backend.
        device: where to run; None = JAX's default device.
        seed: of the problems' arrays.
        progress: called with (steps done, steps in all, what comes next).
        workers: threads that compile and run at once. jax contexts that the caller is in (strict
            promotion, x64, ...) hold in its own thread only: keep 1 there.

    Raises:
        ValueError: an unknown problem or backend.
    """
    chosen = [p for x in problems for p in (named([x]) if isinstance(x, str) else (x,))]
    lowerings = _lowerings(backends)
    chip = current_device() if device is None else device_of(device)
    report = progress or (lambda done, total, text: None)
    steps = [(problem, name) for problem in chosen for name in lowerings]
    cases = {problem: _Case(problem, seed) for problem in chosen}

    def step(problem: Problem, name: str) -> Row:
        where = contextlib.nullcontext() if device is None else jax.default_device(device)
        with where:
            row = _row(cases[problem], name, lowerings[name], chip)
        if name == last:
            cases[problem].forget()
        return row

    last = next(reversed(lowerings), None)
    rows: list[Row] = []
    with _in_order(workers) as run_all:
        report(0, len(steps), _text(steps[0]) if steps else "")
        for row in run_all(step, steps):
            rows.append(row)
            report(len(rows), len(steps), _text(steps[len(rows)]) if steps[len(rows) :] else "")
    return Comparison(str(chip), tuple(rows))


def _text(step: tuple[Problem, str]) -> str:
    """What a step does, for progress."""
    return f"{step[0].name} on {step[1]}"


@contextlib.contextmanager
def _in_order(workers: int) -> Iterator[Callable[..., Iterator[Row]]]:
    """A map over steps whose results come in order; in this thread if there is one worker."""
    if workers == 1:
        yield lambda step, steps: (step(*each) for each in steps)
        return
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        yield lambda step, steps: pool.map(lambda each: step(*each), steps)


def compare_arrays(
    op: str,
    arguments: Mapping[str, Any],
    backends: Backends = None,
    *,
    gradients: bool = False,
    device: jax.Device | None = None,
) -> Comparison:
    """The same for a caller's own arrays.

    Args:
        op: "dense", "paged", "mla", "sparse_mla", "indexer_scores" or "topk_positions".
        arguments: the op's, by name, as its contract has them (`pallas_kernels`); a paged cache in
            the "stacked" layout. What is static may be an array of no dimensions, as `numpy.load`
            gives it.
        backends: as in `compare`.
        gradients: whether to compare gradients too (dense).
        device: as in `compare`.

    Raises:
        TypeError: a list where an array is meant.
        ValueError: an unknown op or backend, or arguments that are not the contract's.
    """
    arrays = as_arguments(op, arguments, gradients=gradients)
    return compare([given(op, arrays, gradients=gradients)], backends, device)


def accepting(
    backends: Backends = None, device: jax.Device | None = None
) -> Callable[[Problem], bool]:
    """A function of a problem: whether one of these backends accepts it; nothing runs.

    Args:
        backends: as in `compare`; a caller's function accepts whatever comes.
        device: as in `compare`.

    Raises:
        ValueError: an unknown backend.
    """
    lowerings = _lowerings(backends).values()
    chip = current_device() if device is None else device_of(device)

    def accepts(problem: Problem) -> bool:
        return any(
            not isinstance(lowering, type)
            or not _refusal(lowering, problem.op, problem.config, chip)
            for lowering in lowerings
        )

    return accepts


class _Case:
    """One problem's arrays, and the oracle's answer, made when first needed and once."""

    def __init__(self, problem: Problem, seed: int):
        self.problem, self.seed = problem, seed
        self._lock = threading.RLock()
        self._arguments: dict[str, Any] | None = None
        self._answers: dict[bool, dict[str, Expected]] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """The op's arguments."""
        with self._lock:
            if self._arguments is None:
                self._arguments = self.problem.make(self.seed)
            return self._arguments

    def cotangents(self, through_lse: bool) -> tuple[NDArray, NDArray] | None:
        """Seeds of the pull-back, dout and dlse (0 unless `through_lse`), where it is asked for."""
        if not self.problem.gradients:
            return None
        rng = np.random.default_rng(self.seed + 1)
        q, v = self.arguments["q"], self.arguments["v"]
        dout = rng.standard_normal((*q.shape[:3], v.shape[-1]), dtype=np.float32).astype(q.dtype)
        return dout, through_lse * rng.standard_normal(q.shape[:3], dtype=np.float32)

    def expected(self, through_lse: bool) -> dict[str, Expected]:
        """The oracle's answer, its gradients those of the same cotangents."""
        key = through_lse or not self.problem.gradients
        with self._lock:
            if key not in self._answers:
                seeds = self.cotangents(through_lse)
                self._answers[key] = expected(self.problem.op, self.arguments, seeds)
            return self._answers[key]

    def forget(self) -> None:
        """Frees the arrays; they are made again if asked for."""
        with self._lock:
            self._arguments = None
            self._answers.clear()


def _lowerings(backends: Backends) -> dict[str, Kernel | type[AttentionBackend]]:
    """Name -> backend class, or the caller's function."""
    if backends is None:
        backends = list(AttentionBackendEnum)
    if isinstance(backends, str | AttentionBackendEnum | type):
        backends = [backends]
    if not isinstance(backends, Mapping):
        backends = {_name_of(backend): backend for backend in backends}
    return {name: _lowering(backend) for name, backend in backends.items()}


def _name_of(backend: Backend) -> str:
    if isinstance(backend, str):
        return AttentionBackendEnum[backend.upper()].name
    return backend.name


def _lowering(backend: Kernel | Backend) -> Kernel | type[AttentionBackend]:
    if isinstance(backend, str):
        backend = AttentionBackendEnum[backend.upper()]
    return backend.get_class() if isinstance(backend, AttentionBackendEnum) else backend


def _row(case: _Case, name: str, lowering: Kernel | type[AttentionBackend], chip: Device) -> Row:
    """One backend on one problem."""
    problem = case.problem
    head = (problem.name, problem.op, name)
    kernel, layout, left_out = lowering, "stacked", {}
    if isinstance(lowering, type):
        reasons = _refusal(lowering, problem.op, problem.config, chip)
        if reasons:
            return Row(*head, REFUSED, reasons=tuple(reasons))
        try:
            kernel = lowering.get_kernel(problem.op)
            layout = lowering.latent_layout if lowering.is_mla() else lowering.layout
        except (ImportError, OSError, *FAILURES) as error:
            way_out = f"{type(error).__name__}: {error}"
            missing = Rejection("kernel", lowering.kernels[problem.op], "importable", way_out)
            return Row(*head, REFUSED, reasons=(missing,))
        left_out = _left_out(lowering, problem, chip)
    through_lse = "lse" not in left_out
    started = time.perf_counter()
    try:
        seeds = case.cotangents(through_lse)
        results = run(kernel, problem.op, case.arguments, seeds, layout=layout, without=left_out)
        seconds = time.perf_counter() - started
        answer = case.expected(through_lse)
        deviations = tuple(deviation(x, results[x], answer[x]) for x in answer if x in results)
    except Exception as error:  # an accepted call that raises is a finding, not the end of the run
        text = f"{type(error).__name__}: {error}"
        return Row(*head, ERROR, error=text, left_out=left_out)
    verdict = PASS if all(d.passed for d in deviations) else FAIL
    return Row(
        *head, verdict, deviations, left_out=left_out, seconds=seconds, edges=edges(case.arguments)
    )


def _refusal(
    backend: type[AttentionBackend], op: str, config: AttentionSelectorConfig, chip: Device
) -> list[Rejection]:
    """Why a backend does not serve a problem."""
    reasons = list(backend.validate_configuration(config, chip))
    if not reasons and op not in backend.kernels:
        reasons = [Rejection("op", op, OneOf(*backend.kernels))]
    return reasons


def _left_out(
    backend: type[AttentionBackend], problem: Problem, chip: Device
) -> dict[str, tuple[Rejection, ...]]:
    """Parts of the problem that the backend does not declare."""
    asked = {"lse": {"needs_lse": True}} if "lse" in RESULTS[problem.op] else {}
    if problem.gradients:
        asked["gradients"] = {"needs_grad": True}
    found = {}
    for part, question in asked.items():
        config = dataclasses.replace(problem.config, **question)
        reasons = backend.validate_configuration(config, chip)
        if reasons:
            found[part] = tuple(reasons)
    return found
