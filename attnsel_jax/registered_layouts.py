"""How third parties add cache layouts of their own to those of `attnsel_jax.cache_layouts`."""

from attnsel_jax.cache_layouts import LATENT_LAYOUTS, LAYOUTS, LatentLayout, Layout

_BUILT_IN = frozenset({*LAYOUTS, *LATENT_LAYOUTS})


def register_cache_layout(name: str, layout: Layout | LatentLayout) -> None:
    """Adds a layout under a name that a backend's `layout` or `latent_layout` may then give.

    Args:
        name: of neither kind of layout yet, or of a registered one, which it replaces.
        layout: of keys and values, or of a latent cache.

    Raises:
        TypeError: layout is neither kind.
        ValueError: the name is a built-in layout's, or one's of the other kind.
    """
    if not isinstance(layout, Layout | LatentLayout):
        raise TypeError(f"layout is {layout!r}, must be a Layout or a LatentLayout")
    mine, other = LAYOUTS, LATENT_LAYOUTS
    if isinstance(layout, LatentLayout):
        mine, other = other, mine
    if name in _BUILT_IN or name in other:
        taken = "a built-in layout" if name in _BUILT_IN else "a layout of the other kind"
        raise ValueError(f"name is {name!r}, which is {taken}: choose another")
    mine[name] = layout


def unregister_cache_layout(name: str) -> None:
    """Takes a registered layout away.

    Raises:
        ValueError: the name is a built-in layout's, or nobody's.
    """
    if name in _BUILT_IN or name not in LAYOUTS | LATENT_LAYOUTS:
        registered = sorted({*LAYOUTS, *LATENT_LAYOUTS} - _BUILT_IN)
        allowed = ", ".join(registered) or "that of a registered layout, and there is none"
        raise ValueError(f"name is {name!r}, must be {allowed}")
    LAYOUTS.pop(name, None)
    LATENT_LAYOUTS.pop(name, None)
