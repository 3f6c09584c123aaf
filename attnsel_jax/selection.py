"""The answer to a question: what was chosen, and each backend's reasons; prints as a table."""

import dataclasses
from typing import Any, NamedTuple

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.capabilities import Rejection
from attnsel_jax.config import AttentionSelectorConfig
from attnsel_jax.platforms import Device

# What makes a backend far from serving a question: these cannot be changed by asking otherwise.
_MACHINE = ("platform", "compute_capability", "generation", "jax_version", "import")
_FAMILY = ("use_mla", "use_sparse", "op")


class NoAttentionBackendError(ValueError):
    """Nothing serves the question, or what was insisted on does not; says why, and what would."""


class Insistence(NamedTuple):
    """A backend that somebody asked for by name.

    Attributes:
        source: who: "argument backend", "forced", or an environment variable.
        backend: what they asked for: a name, or a class that need not be registered.
    """

    source: str
    backend: str | type[AttentionBackend]

    @property
    def name(self) -> str:
        """The backend's name, as it was written."""
        return self.backend if isinstance(self.backend, str) else self.backend.name


@dataclasses.dataclass(frozen=True)
class Selection:
    """The answer to a question: what was chosen, and each backend's reasons.

    Attributes:
        config: the question.
        device: the chip it was asked for.
        backend: the chosen class; None where nothing serves.
        insistence: who asked for a backend by name; None = automatic.
        reasons: every backend's name -> its rejections; empty where it would serve.
        candidates: the names that might have been chosen, best first: those insisted on, or all
            of automatic selection's.
        automatic: the names of automatic selection.
    """

    config: AttentionSelectorConfig
    device: Device
    backend: type[AttentionBackend] | None
    insistence: Insistence | None
    reasons: dict[str, tuple[Rejection, ...]]
    candidates: tuple[str, ...]
    automatic: tuple[str, ...] = ()

    def status(self, name: str) -> str:
        """What became of it: "chosen", "eligible", "by name only" or "refused"."""
        if self.reasons[name]:
            return "refused"
        if name == self.chosen():
            return "chosen"
        return "eligible" if name in self.automatic else "by name only"

    @property
    def eligible(self) -> list[str]:
        """The names of all that would serve, the chosen one included, in order of priority."""
        return [name for name, reasons in self.reasons.items() if not reasons]

    def chosen(self) -> str | None:
        """The registry's name of what was chosen: an overriding class may call itself otherwise."""
        return next((name for name in self.candidates if not self.reasons[name]), None)

    def nearest(self) -> str | None:
        """The refused backend that the least has to change for; None where none could serve."""

        def distance(name: str) -> tuple[int, int]:
            machine = sum(r.argument in _MACHINE for r in self.reasons[name])
            return machine, len(self.reasons[name])

        same_family = [
            name
            for name, reasons in self.reasons.items()
            if reasons and not any(r.argument in _FAMILY for r in reasons)
        ]
        return min(same_family, key=distance, default=None)

    def __str__(self) -> str:
        width = max(map(len, self.reasons), default=0)
        lines = [f"{self.config}", f"on {self.device}{self._asked_by()}"]
        for name in self.reasons:
            if name in self.other_families:
                continue
            status = self.status(name)
            reasons = "; ".join(map(str, self.reasons[name]))
            lines.append(f"  {name:<{width}}  {status:<12}  {reasons}".rstrip())
        families: dict[str, list[str]] = {}
        for name in self.other_families:
            families.setdefault("; ".join(map(str, self.reasons[name])), []).append(name)
        lines += [f"  refused, {why}: {', '.join(names)}" for why, names in families.items()]
        return "\n".join(lines)

    @property
    def other_families(self) -> list[str]:
        """The names of backends that serve other ops altogether (use_mla, use_sparse)."""
        return [
            name
            for name, reasons in self.reasons.items()
            if any(r.argument in ("use_mla", "use_sparse") for r in reasons)
        ]

    def _asked_by(self) -> str:
        if self.insistence is None:
            return ""
        return f", {self.insistence.name} asked for by {self.insistence.source}"

    def to_json(self) -> dict[str, Any]:
        """The selection as plain data."""
        return {
            "config": dataclasses.asdict(self.config),
            "device": str(self.device),
            "backend": self.chosen(),
            "insistence": {"source": self.insistence.source, "name": self.insistence.name}
            if self.insistence
            else None,
            "backends": {
                name: {"status": self.status(name), "reasons": [r.to_json() for r in reasons]}
                for name, reasons in self.reasons.items()
            },
        }

    def required(self) -> type[AttentionBackend]:
        """The chosen backend.

        Raises:
            NoAttentionBackendError: there is none; with every reason of every backend, the nearest
                backend, and what to change.
        """
        if self.backend is not None:
            return self.backend
        insisted = self.insistence
        what = f"{insisted.name}, asked for by {insisted.source}," if insisted else "no backend"
        verb = "does not serve" if insisted else "serves"
        message = f"{what} {verb} this question: {self}"
        nearest = self.nearest()
        if nearest is not None:
            changes = "; ".join(map(str, self.reasons[nearest]))
            message += f"\nnearest: {nearest}, if {changes}"
        if self.eligible:
            message += f"\nthese would serve it: {', '.join(self.eligible)}"
        causes = [r.cause for reasons in self.reasons.values() for r in reasons if r.cause]
        raise NoAttentionBackendError(message) from next(iter(causes), None)
