"""What a caller says of a mesh: which axes share out batch, heads and keys, and in which form.

It need not be said where arrays show their shardings: under explicit axes (`jax.make_mesh` makes
such), and outside `jit`. Under `jit` with automatic axes nothing shows, so it must be.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax

Axes = tuple[str, ...]
FORMS = ("ring", "all_gather", "all_to_all")


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Which axes of a mesh share out what.

    Attributes:
        batch: axes that share out the batch (dense), or the groups of a ragged batch with their
            pages; a name, several, or None.
        heads: axes that share out the heads; likewise.
        context: the axis that shares out the positions of each sequence, or a sequence's pages.
        form: how keys meet queries along `context` in dense attention: "ring" (keys and values go
            round), "all_gather" (every device gets them all), "all_to_all" (heads for positions).
        mesh: the mesh; None = the arrays', or that of `jax.set_mesh`.

    Raises:
        ValueError: an unknown form, or an axis named twice.
    """

    batch: str | Axes | None = ()
    heads: str | Axes | None = ()
    context: str | None = None
    form: str = "ring"
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None

    def __post_init__(self):
        for name in ("batch", "heads"):
            said = getattr(self, name)
            axes = () if said is None else (said,) if isinstance(said, str) else tuple(said)
            object.__setattr__(self, name, axes)
        if self.form not in FORMS:
            raise ValueError(
                f"form is {self.form!r}, must be one of {', '.join(FORMS)}: use 'ring', or "
                f"'all_gather' where something needs all keys at once"
            )
        twice = [axis for axis in self.named if self.named.count(axis) > 1]
        if twice:
            times = self.named.count(twice[0])
            raise ValueError(
                f"mesh axis {twice[0]!r} is named {times} times, must be named at "
                f"most once among batch {self.batch}, heads {self.heads}, context {self.context}: "
                f"leave it to one of them"
            )

    @property
    def named(self) -> Axes:
        """Every axis that it names."""
        return (*self.batch, *self.heads, *([self.context] if self.context else []))

    @property
    def says_axes(self) -> bool:
        """Whether it names any axis."""
        return bool(self.named)


# Part of `jax.jit`'s key: a function that was traced under other axes is traced again.
_in_use = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def use_mesh_axes(mesh_axes: MeshAxes | None) -> Iterator[None]:
    """Says it for every op and impl called inside a `with`, in this thread; nests.

    Args:
        mesh_axes: what to say; None = nothing, whatever is said outside.

    Raises:
        ValueError: no `MeshAxes`.
    """
    with _in_use(_checked(mesh_axes)):
        yield


def said_by(mesh_axes: MeshAxes | None) -> MeshAxes:
    """What an argument says, else what is in use; says nothing where there is neither.

    Raises:
        ValueError: the argument is no `MeshAxes`.
    """
    return _checked(mesh_axes) or _in_use.value or MeshAxes()


def _checked(mesh_axes: MeshAxes | None) -> MeshAxes | None:
    if mesh_axes is not None and not isinstance(mesh_axes, MeshAxes):
        raise ValueError(
            f"mesh_axes is {mesh_axes!r}, must be a MeshAxes, or None: say "
            f"MeshAxes(batch=..., heads=..., context=...)"
        )
    return mesh_axes
