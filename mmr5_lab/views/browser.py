"""A list to browse with filters, and the details of the row that is selected: in JupyterLab, or as one HTML file.

`widgets` says what the rows are. A row's HTML is rendered when the row is selected; page images stand in it as
`<img data-page="…">` (`corpus.page_id`) and are sent beside it, each thumbnail made once.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.corpus.ids import CorpusError, parse_page_id
from mmr5_lab.files import write_text
from mmr5_lab.html import STYLE, data_url, escape_html, html_page, visible
from mmr5_lab.views.thumbnails import thumbnails

SCRIPT = Path(__file__).with_name("browser.js")
STATIC_PAGE = (560, 720)  # pixels at most: in a static export a thumbnail is also the enlarged page


@dataclass(frozen=True)
class Row:
    """A row of the list; all texts are plain, whoever wrote them.

    mark: "good", "bad" or "even", shown as ✓, ✗ or • with `word`; label, note: its two lines
    find: the text that is searched; values: one list for each filter, of what the row is found under
    """

    mark: str
    word: str
    label: str
    note: str
    find: str
    values: list[list[str]]


class Browser(anywidget.AnyWidget):
    """The live widget. `selected` is the number of the row that is shown, and may be set.

    facets: names of the filters; render: number of a row -> its HTML, with every text of others escaped
    corpus: where page images come from; heading: HTML above the list
    """

    _esm = SCRIPT
    _css = STYLE
    title = traitlets.Unicode().tag(sync=True)
    heading = traitlets.Unicode().tag(sync=True)
    facets = traitlets.List(traitlets.Unicode()).tag(sync=True)
    rows = traitlets.List(traitlets.Dict()).tag(sync=True)
    selected = traitlets.Int(0).tag(sync=True)
    detail = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        title: str,
        facets: Sequence[str],
        rows: Sequence[Row],
        render: Callable[[int], str],
        corpus: Corpus | None = None,
        heading: str = "",
    ):
        self._render, self.corpus = render, corpus
        self._thumbnail = thumbnails(corpus) if corpus else None
        plain = [
            {name: visible(value) for name, value in vars(row).items() if name != "values"}
            | {"values": [list(map(visible, values)) for values in row.values]}
            for row in rows
        ]
        super().__init__(title=visible(title), heading=heading, facets=list(map(visible, facets)), rows=plain)
        self.detail = self._detail(0, self._thumbnail) if rows else {"row": -1}
        self.observe(self._show, "selected")
        self.on_msg(self._answer)

    @traitlets.validate("selected")
    def _known(self, proposal: Any) -> int:
        if not 0 <= proposal["value"] < max(1, len(self.rows)):
            raise traitlets.TraitError(f"there is no row {proposal['value']}: the list has {len(self.rows)} rows")
        return proposal["value"]

    def close(self) -> None:
        """Close the widget and its layout, which ipywidgets would keep."""
        self.layout.close()
        super().close()

    def _show(self, _change: Any) -> None:
        self.detail = self._detail(self.selected, self._thumbnail)

    def _detail(self, row: int, thumbnail: Callable[[str], str] | None) -> dict[str, Any]:
        html = self._render(row)
        pages = dict.fromkeys(re.findall(r'data-page="([^"]*)"', html)) if thumbnail else {}
        return {"row": row, "html": html, "images": {page: thumbnail(page) for page in pages} if thumbnail else {}}

    def _answer(self, _widget: Any, content: Any, _buffers: Any) -> None:
        """Send the page that was clicked, in full size."""
        if self.corpus is None or not isinstance(content, dict) or "page" not in content:
            return
        try:
            answer = {"src": data_url(*self.corpus.page_file(*parse_page_id(str(content["page"]))))}
        except CorpusError as error:
            answer = {"problem": visible(str(error))}
        self.send({"page": content["page"], **answer})

    def static_export(self, most: int = 60) -> "StaticExport":
        """Return the same as one HTML page without a kernel: all rows, or `most` of them, evenly chosen (0: all)."""
        total = len(self.rows)
        count = min(total, most or total)
        chosen = [k * total // count for k in range(count)]
        thumbnail = thumbnails(self.corpus, STATIC_PAGE) if self.corpus else None
        details = [self._detail(row, thumbnail) for row in chosen]
        title = self.title + (f" ({count} of {total} rows)" if count < total else "")
        return StaticExport(title, {
            "title": title, "heading": self.heading, "facets": self.facets, "rows": [self.rows[k] for k in chosen],
            "details": [detail["html"] for detail in details],
            "images": {page: url for detail in details for page, url in detail["images"].items()},
        })  # fmt: skip


@dataclass(frozen=True, repr=False)
class StaticExport:
    """A browser in one HTML file that needs neither kernel nor network; notebooks show it in a frame."""

    title: str
    data: dict[str, Any]

    @property
    def html(self) -> str:
        """The file's text."""
        data = json.dumps(self.data).replace("<", "\\u003c")  # so that no text can end the element it stands in
        script = (
            f"{SCRIPT.read_text(encoding='utf-8')}\n"
            'mount(document.getElementById("browser"), JSON.parse(document.getElementById("data").textContent));\n'
        )
        # Nothing but this one script may run, and nothing may be loaded.
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        body = (
            f'<div id="browser"></div><script type="application/json" id="data">{data}</script>'
            f'<script type="module">{script}</script>'
        )
        head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        return html_page(self.title, body, head, "mmr5-window")

    def save(self, path: str | Path) -> Path:
        """Write the file; returns its path."""
        return write_text(path, self.html)

    def _repr_html_(self) -> str:
        # A frame of its own: neither its style nor whatever a text might do reaches the notebook.
        return (
            f'<iframe srcdoc="{escape_html(self.html)}" title="{escape_html(self.title)}" sandbox="allow-scripts"'
            ' style="width: 100%; height: 46rem; border: 0"></iframe>'
        )
