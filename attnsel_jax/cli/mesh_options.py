"""The options that say over which mesh a call is compiled: `--mesh data=2,model=4`, ..."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

PANEL = "Over a mesh"
MeshShape = Annotated[
    str | None,
    typer.Option("--mesh", help="Axes and sizes: data=2,model=4.", rich_help_panel=PANEL),
]
BatchAxis = Annotated[
    str | None,
    typer.Option(help="Axes that share out the batch: data, or a,b.", rich_help_panel=PANEL),
]
HeadsAxis = Annotated[
    str | None, typer.Option(help="Axes that share out the heads.", rich_help_panel=PANEL)
]
ContextAxis = Annotated[
    str | None,
    typer.Option(help="Axis that shares out positions, or pages.", rich_help_panel=PANEL),
]
Form = Annotated[
    str, typer.Option(help="ring, all_gather or all_to_all (dense).", rich_help_panel=PANEL)
]


def mesh_call(options: Mapping[str, Any], backend: type, op: str) -> Any:
    """The `MeshCall` that the options describe for a backend's op; None = one device.

    Raises:
        ValueError: a mesh that is no list of axes and sizes, or an axis that it has not.
    """
    from attnsel_jax.aot import MeshCall

    axes = mesh_axes(options)
    if axes is None:
        return None
    module, name = backend.full_cls_name()
    return MeshCall(f"{module}:{name}", op, sizes(options["mesh"]), axes.batch, axes.heads,
                    axes.context, axes.form)  # fmt: skip


def mesh_axes(options: Mapping[str, Any]) -> Any:
    """The `MeshAxes` that the options describe, without a mesh; None = one device.

    Raises:
        ValueError: an axis that the mesh has not, or axes without a mesh.
    """
    from attnsel_jax.mesh import MeshAxes

    said = {n: options[f"{n}_axis"] for n in ("batch", "heads", "context") if options[f"{n}_axis"]}
    if options["mesh"] is None and said:
        name = next(iter(said))
        raise ValueError(f"--{name}-axis is {said[name]}, must come with --mesh {said[name]}=SIZE")
    if options["mesh"] is None:
        return None
    known = sizes(options["mesh"])
    for name, text in said.items():
        for axis in text.split(","):
            if axis not in known:
                raise ValueError(f"--{name}-axis is {axis}, must be one of {', '.join(known)}")
    batch, heads = (tuple(said[n].split(",")) if n in said else () for n in ("batch", "heads"))
    return MeshAxes(batch, heads, said.get("context"), options["form"])


def sizes(text: str) -> dict[str, int]:
    """Axes and their sizes, of a text like data=2,model=4.

    Raises:
        ValueError: anything else.
    """
    found = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not axis.isidentifier() or not size.isdigit() or int(size) < 1 or axis in found:
            raise ValueError(f"--mesh is {text}, must be axes and sizes, such as data=2,model=4")
        found[axis] = int(size)
    return found
