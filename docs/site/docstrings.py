"""Docstrings here are plain text for a terminal; this makes Markdown of them, for the site's reference.

Lines `name: what it is` become a list, a list that follows its sentence gets the blank line that Markdown wants, and
tags such as <think> stay text.
"""

import re
from typing import Any

import griffe

FENCE = "```\n"
ITEM = re.compile(r" {0,2}(\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*): (.*)")


class Docstrings(griffe.Extension):
    """Called by griffe with each object that it has read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Markdown that looks like a docstring's plain text.

    >>> print(as_markdown("Sums.\\n\\na: one\\nb: another,\\n  <tag>\\n\\n    1 + 1"))
    Sums.
    <BLANKLINE>
    - `a`: one
    - `b`: another,
        &lt;tag>
    <BLANKLINE>
    ```
    1 + 1
    ```
    """
    lines: list[str] = []
    in_list = in_code = False
    for line in [*text.splitlines(), ""]:
        before = lines[-1] if lines else ""
        item = ITEM.fullmatch(line)
        if not line.strip():
            line = FENCE * in_code
            in_list = in_code = False
        elif in_code:
            line = line[4:]
        elif line.startswith("    ") and not before.strip():
            lines.append(FENCE.strip())  # by indentation alone it would be a part of the list before it
            line, in_code = line[4:], True
        elif item and (in_list or not before.strip()):
            line, in_list = f"- `{item[1]}`: {_escaped(item[2])}", True
        elif line.startswith("- "):
            if before.strip() and not in_list:
                lines.append("")
            line, in_list = _escaped(line), True
        else:
            line = "    " * (in_list and line.startswith(" ")) + _escaped(line.strip())
        lines.append(line)
    return "\n".join(lines).rstrip("\n")


def _escaped(text: str) -> str:
    """Tags outside of code as text."""
    return re.sub(r"(`[^`]*`)|<", lambda match: match[1] or "&lt;", text)
