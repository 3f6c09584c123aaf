"""Named problems: the shapes that serving and training meet, on inputs that bite.

`DEFAULT` has the head counts and head sizes of well-known models, and lengths that a laptop can
bear; `QUICK` has tiny shapes that reach every feature, for the tests.
"""

from collections.abc import Iterable

from attnsel_jax.problems.default_set import DEFAULT
from attnsel_jax.problems.problem import Problem, given
from attnsel_jax.problems.question import question
from attnsel_jax.problems.quick_set import QUICK

SETS = {"default": DEFAULT, "quick": QUICK}

__all__ = ["DEFAULT", "QUICK", "SETS", "Problem", "given", "named", "question"]


def named(names: Iterable[str]) -> tuple[Problem, ...]:
    """The problems of these names: of a set, of one problem, or of a family such as "llama3".

    Raises:
        ValueError: a name is none of these.
    """
    everything = {problem.name: problem for problem in (*DEFAULT, *QUICK)}
    found: dict[str, Problem] = {}
    for name in names:
        matches = [p for p in SETS.get(name, ()) or everything.values()
                   if name in SETS or p.name == name or p.name.startswith(f"{name}.")]  # fmt: skip
        if not matches:
            raise ValueError(
                f"problem is {name!r}, must be a set ({', '.join(SETS)}), a family or one of "
                f"{', '.join(everything)}"
            )
        found |= {problem.name: problem for problem in matches}
    return tuple(found.values())
