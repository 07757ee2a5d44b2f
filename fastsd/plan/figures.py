"""Predicted figures as text."""

from __future__ import annotations

from collections.abc import Sequence


def range_text(pair: Sequence[float]) -> str:
    """Format a range with two or more significant digits."""
    return "-".join(f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in pair)


def duration_text(fewest: float, most: float) -> str:
    """Format a range of seconds in the unit of the longer one."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if most >= size:
            return f"{fewest / size:.1f}-{most / size:.1f} {unit}"
    return f"{fewest:.0f}-{most:.0f} s"
