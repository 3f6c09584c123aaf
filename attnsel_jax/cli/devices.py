"""`attnsel devices`: the devices that are here, and every chip that can be named."""

import dataclasses
from typing import Any

from rich.table import Table

from attnsel_jax.cli.terminal import (
    NOTHING_SERVES,
    Json,
    console,
    fail,
    print_json,
    quiet_device_start,
)


def devices(json: Json = False) -> None:
    """What is here (jax.devices()), and every chip that `--device` understands.

    Peak is dense bfloat16, bandwidth that of the main memory, both of one device by its datasheet.
    """
    from attnsel_jax.platforms import CHIPS

    try:
        here = _here()
    except RuntimeError as error:
        fail(f"jax starts no device here: {' '.join(str(error).split())}", NOTHING_SERVES)
    if json:
        named = {name: _figures(chip) for name, chip in CHIPS.items()}
        print_json({"here": here, "named": named})
        return
    table = _table("id", "platform", "kind", "chip", "TFLOP/s", "GB/s", title="Here")
    for device in here:
        name = f"{device['id']}{' (default)' if device['default'] else ''}"
        table.add_row(name, device["platform"], device["kind"], *_cells(device))
    console().print(table)
    table = _table("--device", "platform", "kind", "chip", "TFLOP/s", "GB/s", title="By name")
    for name, chip in CHIPS.items():
        table.add_row(name, chip.platform, chip.kind, *_cells(_figures(chip)))
    console().print(table)


def _here() -> list[dict[str, Any]]:
    """Every device of jax's, with the figures of its datasheet."""
    with quiet_device_start():
        import jax

        from attnsel_jax.platforms import current_device, device_of

        default = current_device()
        found = jax.devices()
    rows = [{"id": device.id, **_figures(device_of(device))} for device in found]
    for row, device in zip(rows, found, strict=True):
        row["default"] = device_of(device) == default
    return rows


def _figures(device: Any) -> dict[str, Any]:
    figures = dataclasses.asdict(device)
    capability = device.compute_capability
    return figures | {"compute_capability": str(capability) if capability else None}


def _cells(figures: dict[str, Any]) -> list[str]:
    chip = figures["generation"] or figures["compute_capability"]
    peak, bandwidth = figures["peak_flops"], figures["memory_bandwidth"]
    return [
        chip or "-",
        f"{peak / 1e12:.0f}" if peak else "-",
        f"{bandwidth / 1e9:.0f}" if bandwidth else "-",
    ]


def _table(*headings: str, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        justify = "right" if "/s" in heading else "left"
        table.add_column(heading, justify=justify)
    return table
