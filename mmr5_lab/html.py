"""Text that others wrote, and tables with it, for a terminal, HTML and LaTeX: shown as text, never obeyed."""

import base64
import html
from collections.abc import Callable
from typing import Any

import pandas as pd

GOLD_MARK = "★"
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "−": "$-$", "–": "--", "·": r"$\cdot$", "÷": r"$\div$", "≥": r"$\ge$", "≤": r"$\le$", "Δ": r"$\Delta$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def visible(text: str) -> str:
    """Control and direction characters as escapes, so that text cannot redraw a terminal or reverse a line."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escape_html(text: str) -> str:
    """Text for HTML content and attributes in either quotes."""
    return html.escape(visible(text))


def escape_latex(text: str) -> str:
    """Text for LaTeX, where none of its characters is a command; line breaks become spaces."""
    return "".join(_LATEX.get(character, character) for character in visible(text.replace("\n", " ")))


def data_url(image: bytes, kind: str) -> str:
    """An image file ("png", "jpeg") as a URL that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def html_page(title: str, style: str, body: str, head: str = "") -> str:
    """A self-contained HTML page; `title` is escaped, `body` and what else is in the `head` are HTML already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape_html(title)}</title>'
        f"{head}<style>{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def html_table(frame: pd.DataFrame, caption: str = "", digits: int = 4) -> str:
    """A frame as an HTML table; names, texts and caption are escaped, numbers rounded, absent ones "–"."""
    head, body = _cells(frame, escape_html, digits)
    rows = "\n".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for name, *cells in body
    )
    columns = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in head)
    told = f"<caption>{escape_html(caption)}</caption>" if caption else ""
    return f"<table>{told}\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n"


def latex_table(frame: pd.DataFrame, caption: str = "", digits: int = 4) -> str:
    """A frame as a LaTeX table with booktabs' rules; names, texts and caption are escaped."""
    head, body = _cells(frame, escape_latex, digits)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *(" & ".join(cells) + r" \\" for cells in body),
        r"\bottomrule",
        r"\end{tabular}",
        *([rf"\caption{{{escape_latex(caption)}}}"] if caption else []),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cells(frame: pd.DataFrame, escape: Callable[[str], str], digits: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of escaped cells, the index first."""
    head = [escape(str(name)) for name in (frame.index.name or "", *frame.columns)]
    rows = zip(frame.index, *(frame[name] for name in frame.columns), strict=True)
    return head, [[escape(_shown(value, digits)) for value in row] for row in rows]


def _shown(value: Any, digits: int) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−") if isinstance(value, float) else str(value)
