"""Label questions of your own on a corpus's pages, in MMDocIR's annotation format.

    Annotator("my_corpus")                                                       # in JupyterLab
    add_question("my_corpus", "report.pdf", "What was the revenue in 2015?", [3], answer="4.2 million")

Questions are added to the corpus folder's own annotation file: `load_corpus` reads them from there, and `mmr5 ingest`
keeps them if it is run again without `--annotations`.
"""

from collections.abc import Sequence
from pathlib import Path

import ipywidgets as w

from mmr5_lab.corpus.annotations import annotation_records, annotations_lock, parse_document
from mmr5_lab.corpus.documents import ANNOTATIONS, load_corpus
from mmr5_lab.corpus.ids import CorpusError, question_id
from mmr5_lab.files import write_lines
from mmr5_lab.html import escape_html

TYPES = ("Pure-text (Plain-text)", "Table", "Chart", "Figure", "Generalized-text (Layout)")  # MMDocIR's


def add_question(
    folder: str | Path, doc_name: str, question: str, pages: Sequence[int], answer: str = "", types: Sequence[str] = ()
) -> str:
    """Add a question about a document to a corpus folder's annotations; returns its id.

    pages: 0-based pages that answer it, at least one; types: where the answer stands, of `TYPES`

    The file is replaced as a whole, by one process at a time. Raises CorpusError for an unknown document, an empty
    question, or pages that are missing or that the document does not have; the file is then left as it was.
    """
    path = Path(folder) / ANNOTATIONS
    if not question.strip():
        raise CorpusError("the question is empty: write what a reader would ask")
    if not pages:
        raise CorpusError("no page is marked: mark at least one that answers the question")
    with annotations_lock(path):
        records = [record for _, record in annotation_records(path)]
        record = next((record for record in records if record["doc_name"] == doc_name), None)
        if record is None:
            raise CorpusError(f"{folder} has no document {doc_name!r}")
        entry = {
            "Q": question.strip(), "A": answer.strip(), "page_id": sorted(set(map(int, pages))),
            "type": str(list(types)), "layout_mapping": [],
        }  # fmt: skip
        record["questions"] = [*record["questions"], entry]
        parse_document(record, str(path))  # raises what `load_corpus` would
        write_lines(path, records)
    return question_id(doc_name, len(record["questions"]) - 1)


class Annotator(w.HBox):
    """Look through a document's pages, mark those that answer a question, and save it (`add_question`)."""

    def __init__(self, folder: str | Path):
        if not Path(folder).is_dir():
            raise CorpusError(f"{folder} is not one corpus folder: open the one that questions are to be added to")
        self.folder, self.corpus, self.marked = Path(folder), load_corpus(folder), set[int]()
        names = self.corpus.documents["doc_name"].tolist()
        if not names:
            raise CorpusError(f"{folder} has no documents to ask about")
        wide, narrow = w.Layout(width="auto"), w.Layout(width="2.6rem")
        self.document = w.Dropdown(options=names, description="Document", layout=wide)
        self.page = w.BoundedIntText(min=1, description="Page", layout=w.Layout(width="11rem"))
        self.back = w.Button(icon="chevron-left", tooltip="previous page", layout=narrow)
        self.on = w.Button(icon="chevron-right", tooltip="next page", layout=narrow)
        self.mark = w.ToggleButton(description="This page answers", icon="star", layout=w.Layout(width="12rem"))
        self.image = w.Image(layout=w.Layout(width="98%", border="1px solid #999", object_fit="contain"))
        self.image.add_class("mmr5-annotated")
        self.question = w.Textarea(placeholder="What would a reader ask?", description="Question", layout=wide)
        self.answer = w.Text(placeholder="as the document states it", description="Answer", layout=wide)
        self.types = w.SelectMultiple(options=TYPES, rows=len(TYPES), description="Stands in", layout=wide)
        self.save = w.Button(
            description="Save the question", button_style="primary", icon="check", layout=w.Layout(width="14rem")
        )
        self.count, self.pages, self.status, self.saved = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        turn = w.HBox([self.back, self.page, self.on, self.count, self.mark], layout=w.Layout(flex_flow="row wrap"))
        look = w.VBox([self.document, turn, self.image], layout=w.Layout(flex="3 1 20rem", min_width="18rem"))
        form = [self.question, self.answer, self.types, self.pages, self.save, self.status, self.saved]
        super().__init__(
            [look, w.VBox(form, layout=w.Layout(flex="2 1 18rem", min_width="16rem"))],
            layout=w.Layout(flex_flow="row wrap", grid_gap="1rem"),
        )
        self.document.observe(lambda _: self._open(), "value")
        self.page.observe(lambda _: self._show(), "value")
        self.mark.observe(self._toggle, "value")
        self.back.on_click(lambda _: self._step(-1))
        self.on.on_click(lambda _: self._step(1))
        self.save.on_click(lambda _: self._add())
        self._open()

    def _open(self) -> None:
        self.marked = set()
        self.page.max = self.corpus.num_pages(self.document.value)
        self.page.value = 1
        self.count.value = f"of {self.page.max}"
        self._show()

    def _step(self, by: int) -> None:
        self.page.value = min(self.page.max, max(1, self.page.value + by))

    def _show(self) -> None:
        """Show the page and what is known of the document's questions; a page that cannot be shown is named."""
        page = self.page.value - 1
        self.mark.value = page in self.marked
        self.status.value = ""
        try:
            self.image.value, self.image.format = self.corpus.page_file(self.document.value, page)
        except CorpusError as error:
            self.image.value = b""
            self.status.value = f"<p role='alert'>{escape_html(str(error))}</p>"
        self._list()

    def _toggle(self, change: dict) -> None:
        (self.marked.add if change["new"] else self.marked.discard)(self.page.value - 1)
        self._list()

    def _add(self) -> None:
        name, pages = self.document.value, sorted(self.marked)
        try:
            number = add_question(self.folder, name, self.question.value, pages, self.answer.value, self.types.value)
        except (CorpusError, OSError) as error:
            self.status.value = f"<p role='alert'>✗ not saved: {escape_html(str(error))}</p>"
            return
        self.corpus = load_corpus(self.folder)
        self.question.value, self.answer.value, self.types.value = "", "", ()
        self.marked = set()
        self._show()
        self.status.value = f"<p role='status'>✓ saved as {escape_html(number)}</p>"

    def _list(self) -> None:
        numbers = ", ".join(str(page + 1) for page in sorted(self.marked)) or "none yet"
        self.pages.value = f"<p>★ Pages that answer: <b>{numbers}</b></p>"
        own = self.corpus.questions[self.corpus.questions["doc_name"] == self.document.value]
        items = "".join(
            f"<li>{escape_html(question)} <i>(page {', '.join(str(page + 1) for page in gold)})</i></li>"
            for question, gold in zip(own["question"][::-1], own["gold_pages"][::-1], strict=True)
        )
        self.saved.value = (
            f"<b>{len(own)} questions about this document</b>"
            f"<ol reversed style='line-height: 1.4; max-height: 14rem; overflow: auto'>{items}</ol>"
        )
