"""Named problems: the shapes that serving and training meet, on inputs that bite.

`DEFAULT` has the head counts and head sizes of well-known models, and lengths that a laptop can
bear; `QUICK` has tiny shapes that reach every feature, for the tests; `random_problem(17)` and its
like are drawn from the contracts.
"""

from collections.abc import Iterable

from attnsel_jax.problems.default_set import DEFAULT
from attnsel_jax.problems.problem import Problem, given
from attnsel_jax.problems.question import question
from attnsel_jax.problems.quick_set import QUICK
from attnsel_jax.problems.random_set import FAMILY, random_problem, random_problems

SETS = {"default": DEFAULT, "quick": QUICK}

__all__ = ["DEFAULT", "QUICK", "SETS", "Problem", "given", "named", "question", "random_problem",
           "random_problems"]  # fmt: skip


def named(names: Iterable[str]) -> tuple[Problem, ...]:
    """The problems of these names: of a set, of one problem, or of a family such as "llama3".

    `random.17` is number 17, from 0, of those that are drawn.

    Raises:
        ValueError: a name is none of these.
    """
    everything = {problem.name: problem for problem in (*DEFAULT, *QUICK)}
    found: dict[str, Problem] = {}
    for name in names:
        family, _, number = name.partition(".")
        if family == FAMILY and number.isdecimal():
            problem = random_problem(int(number))
            found[problem.name] = problem
            continue
        matches = [p for p in SETS.get(name, ()) or everything.values()
                   if name in SETS or p.name == name or p.name.startswith(f"{name}.")]  # fmt: skip
        if not matches:
            raise ValueError(
                f"problem is {name!r}, must be a set ({', '.join(SETS)}), a family, "
                f"{FAMILY}.NUMBER or one of {', '.join(everything)}"
            )
        found |= {problem.name: problem for problem in matches}
    return tuple(found.values())
