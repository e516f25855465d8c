"""Numbers with units that fit their size."""

from typing import NamedTuple


class Unit(NamedTuple):
    """A unit's name and how much of the basic one it is."""

    name: str
    size: float


BYTES = (Unit("GiB", 2**30), Unit("MiB", 2**20), Unit("KiB", 2**10), Unit("B", 1))
SECONDS = (Unit("s", 1), Unit("ms", 1e-3), Unit("µs", 1e-6))


def unit_for(value: float, units: tuple[Unit, ...]) -> Unit:
    """The largest unit of which there is at least one, or the smallest."""
    return next((unit for unit in units if value >= unit.size), units[-1])


def text_of(value: float, units: tuple[Unit, ...]) -> str:
    """`12.5 KiB`: three digits or more."""
    unit = unit_for(value, units)
    scaled = value / unit.size
    return f"{scaled:,.0f} {unit.name}" if scaled >= 100 else f"{scaled:.3g} {unit.name}"
