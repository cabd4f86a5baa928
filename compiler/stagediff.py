"""What a pass changed, as a unified diff that does not drown in renumbered names.

Values are numbered in program order, so dropping one node renames all that follow. The names of the
first text are therefore replaced by those of the second wherever a line plainly stands for the same
node; what is left are the lines that really differ.
"""

from __future__ import annotations

import difflib
import re

__all__ = ["graph_diff"]

_NAME = re.compile(r"\b[wy]\d+\b")
_DEFINED = re.compile(r"\s*([wy]\d+):")


def graph_diff(before: str, after: str, title_before: str, title_after: str) -> str:
    """Unified diff of two graph texts; empty when they are equal. Gone names end in a prime."""
    if before == after:
        return ""
    old, new = before.splitlines(), after.splitlines()
    renamed = _rename(old, _same_names(old, new))
    rows = difflib.unified_diff(renamed, new, title_before, title_after, lineterm="", n=2)
    return "\n".join(rows)


def _same_names(old: list[str], new: list[str]) -> dict[str, str]:
    """Old name -> new name of values on lines that are equal but for names.

    Of lines that gave way to others, the last old and the last new value stand for each other:
    that is what the lines after them read.
    """
    shapes = [[_NAME.sub("%", line) for line in lines] for lines in (old, new)]
    # the search is quadratic in lines that repeat; past this length frequent ones are set aside
    long = max(len(old), len(new)) > 3000
    matcher = difflib.SequenceMatcher(None, shapes[0], shapes[1], autojunk=long)
    found: dict[str, str] = {}
    for tag, a, a_end, b, b_end in matcher.get_opcodes():
        pairs = zip(old[a:a_end], new[b:b_end])
        if tag == "replace":
            pairs = zip(old[a_end - 1 : a_end], new[b_end - 1 : b_end])
        for was, now in pairs:
            before, after = _DEFINED.match(was), _DEFINED.match(now)
            if before and after:
                found[before[1]] = after[1]
    return found


def _rename(lines: list[str], names: dict[str, str]) -> list[str]:
    def renamed(match: re.Match[str]) -> str:
        return names.get(match[0], f"{match[0]}'")

    return [_NAME.sub(renamed, line) for line in lines]
