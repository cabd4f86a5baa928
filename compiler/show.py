"""Text for people: 100 columns, readable without colour. Imports nothing of effc, nor torch."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["amount", "as_text", "counted", "duration", "grid"]

WIDTH = 100


def as_text(parts: Iterable[Any]) -> str:
    """Rich renderables as plain text, no blanks at line ends."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, no_color=True, highlight=False, legacy_windows=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def grid(*columns: str) -> Table:
    """A table without lines; ">" before a title aligns the column right. No titles, no head."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.show_header = any(c.lstrip(">") for c in columns)
    for column in columns:
        right = column.startswith(">")
        justify: Any = "right" if right else "left"
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=right, overflow="fold")
    return table


def amount(value: float | str, unit: str) -> str:
    """(1234567, "B") -> "1.23 MB". Text, a formula in unknown sizes, stays as it is."""
    if isinstance(value, str):
        return f"{value} {unit}"
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} T{unit}"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def counted(n: int, one: str, many: str | None = None) -> str:
    """(2, "node") -> "2 nodes"."""
    return f"{n} {one if n == 1 else many or one + 's'}"
