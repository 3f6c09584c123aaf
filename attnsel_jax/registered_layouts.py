"""How third parties add cache layouts of their own to those of `attnsel_jax.cache_layouts`."""

from attnsel_jax.cache_layouts import LATENT_LAYOUTS, LAYOUTS, LatentLayout, Layout

BUILT_IN = frozenset({*LAYOUTS, *LATENT_LAYOUTS})


def register_cache_layout(name: str, layout: Layout | LatentLayout) -> None:
    """Adds a layout under a name that a backend's `layout` or `latent_layout` may then give.

    Args:
        name: one that no layout has.
        layout: of keys and values, or of a latent cache.

    Raises:
        TypeError: the name is no string, or layout is neither kind.
        ValueError: another layout has the name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, must be a string")
    if not isinstance(layout, Layout | LatentLayout):
        raise TypeError(f"layout is {layout!r}, must be a Layout or a LatentLayout")
    if name in {*LAYOUTS, *LATENT_LAYOUTS}:
        way_out = "choose another" if name in BUILT_IN else "choose another, or unregister it first"
        raise ValueError(f"name is {name!r}, which a layout has already: {way_out}")
    (LAYOUTS if isinstance(layout, Layout) else LATENT_LAYOUTS)[name] = layout


def unregister_cache_layout(name: str) -> None:
    """Takes a registered layout away; what was compiled with it goes on as it is.

    Raises:
        ValueError: the name is a built-in layout's, or nobody's.
    """
    if name in BUILT_IN:
        raise ValueError(f"name is {name!r}, must be a registered layout's: built-in ones stay")
    registered = [known for known in (*LAYOUTS, *LATENT_LAYOUTS) if known not in BUILT_IN]
    if name not in registered:
        allowed = f"one of {', '.join(registered)}" if registered else "registered first"
        raise ValueError(f"name is {name!r}, must be {allowed}")
    LAYOUTS.pop(name, None)
    LATENT_LAYOUTS.pop(name, None)
