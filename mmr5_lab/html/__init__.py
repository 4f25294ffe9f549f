"""Pages and tables in HTML and LaTeX with one style sheet. Text that others wrote is shown as text, never obeyed."""

import base64
import html
from pathlib import Path
from typing import Any

import pandas as pd

STYLE = Path(__file__).with_name("style.css")
GOLD_MARK = "★"
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "−": "$-$", "–": "--", "·": r"$\cdot$", "÷": r"$\div$", "≥": r"$\ge$", "≤": r"$\le$", "Δ": r"$\Delta$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def visible(text: str) -> str:
    """Return text with control and direction characters as escapes: it cannot redraw a terminal or reverse a line."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escape_html(text: str) -> str:
    """Return text for HTML content and for attributes in either kind of quotes."""
    return html.escape(visible(text))


def escape_latex(text: str) -> str:
    """Return text for LaTeX in which no character is a command; line breaks become spaces."""
    return "".join(_LATEX.get(character, character) for character in visible(text.replace("\n", " ")))


def data_url(image: bytes, kind: str) -> str:
    """Return an image file ("png", "jpeg") as a URL that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def html_page(title: str, body: str, head: str = "", kind: str = "mmr5-page") -> str:
    """Return a self-contained HTML page with the one style sheet.

    title: is escaped, and is the page's heading too, unless the body brings its own <h1>; body, head: HTML
    kind: "mmr5-page" to read from top to bottom, "mmr5-window" for what fills the window
    """
    if kind == "mmr5-page" and "<h1" not in body:
        body = f"<h1>{escape_html(title)}</h1>\n{body}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape_html(title)}</title>'
        f'{head}{style_element()}</head><body class="{kind}"><main>{body}</main></body></html>\n'
    )


def style_element() -> str:
    """Return the style sheet as a <style> element; all its rules are about elements within classes of ours."""
    return f"<style>{STYLE.read_text(encoding='utf-8')}</style>"


def html_table(frame: pd.DataFrame, caption: str = "", digits: int = 4, texts: bool = False) -> str:
    """Return a frame as an HTML table; names, texts and caption are escaped, numbers rounded, absent ones "–".

    texts: most columns are texts, and stand on the left
    """
    columns = "".join(
        f'<th scope="col">{escape_html(str(name))}</th>' if name else "<td></td>"
        for name in (frame.index.name, *frame.columns)
    )
    lines = zip(frame.index, *(frame[name] for name in frame.columns), strict=True)
    rows = ([escape_html(_shown(value, digits)) for value in line] for line in lines)
    body = "\n".join(f'<tr><th scope="row">{name}</th><td>{"</td><td>".join(cells)}</td></tr>' for name, *cells in rows)
    above = f"<caption>{escape_html(caption)}</caption>" if caption else ""
    kind = ' class="texts"' if texts else ""
    return f"<table{kind}>{above}\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"


def latex_table(frame: pd.DataFrame, caption: str = "", digits: int = 4) -> str:
    """Return a frame as a LaTeX table (package booktabs); names, texts and caption are escaped, absent numbers "–"."""

    def shown(value: Any) -> str:
        return escape_latex(_shown(value, digits))

    cells = frame.reset_index(names=frame.index.name or "").style.hide(axis="index")
    return cells.format(shown).format_index(shown, axis="columns").to_latex(
        hrules=True, column_format="l" + "r" * len(frame.columns), position_float="centering",
        caption=escape_latex(caption) or None,
    )  # fmt: skip


def _shown(value: Any, digits: int) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−") if isinstance(value, float) else str(value)
