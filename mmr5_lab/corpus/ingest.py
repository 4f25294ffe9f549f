"""A folder of PDFs turned into a corpus folder, in parallel and resumable page by page.

    corpus = build_corpus("my_pdfs", "my_corpus", workers=2)

While it runs, finished pages are kept in `my_corpus/.parts`; `ingest_report.json` says at the end who read which pages,
and what was left out and why.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmr5_lab.corpus.annotations import annotations_lock, is_pair, parse_document
from mmr5_lab.corpus.documents import ANNOTATIONS, PAGES, Corpus, load_corpus
from mmr5_lab.corpus.ids import CorpusError, nearest
from mmr5_lab.corpus.labels import (
    REPLACED,
    SET_ASIDE,
    Label,
    match_labels,
    not_among,
    read_labels,
    without_repeats,
    write_set_aside,
)
from mmr5_lab.corpus.ocr import NO_ENGINE, choose_engine
from mmr5_lab.corpus.page_store import PageStore
from mmr5_lab.corpus.page_text import join_hyphens, vocabulary
from mmr5_lab.corpus.pdf import (
    DEFAULT_MAX_PIXELS,
    POOR_TEXT_LAYER,
    TEXT_LAYER,
    FinishedPage,
    PdfError,
    Rendering,
    page_path,
    read_page_file,
    write_page,
)
from mmr5_lab.corpus.pdf_folder import FolderContents, list_pdfs
from mmr5_lab.corpus.pdf_process import PdfProcesses
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.files import read_object, sole_writer, write_json

logger = logging.getLogger(__name__)

INGEST_REPORT = "ingest_report.json"
PARTS = ".parts"  # folder of finished pages while a run goes on
_PAGES_PER_TASK = 16
_TEXT_VERSION = 2  # how texts are read; other numbers are read anew
_MOST_NAMES = 10  # in a message; the report has all


def build_corpus(
    pdf_folder: str | Path,
    out_folder: str | Path,
    annotations: str | Path | Sequence[dict[str, Any]] | None = None,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    workers: int = 1,
    ocr: str = "auto",
) -> Corpus:
    """Turn the PDFs of a folder and its subfolders into a corpus folder. A document's name is its path in the folder.

    annotations: an MMDocIR annotation file or its records, whose names need not agree in capitals, accents' form,
      folder or `.pdf`. PDFs without annotation become documents without questions, domain "PDF". None: those of an
      earlier run, with the questions that were added since (`add_question`).
    max_pixels: width × height of a page image is as large as possible within this, in the page's aspect.
    workers: processes that render and read, a few pages at a time.
    ocr: who reads pages without a usable text layer: "tesseract", "rapidocr", "none", or "auto", the first that works.

    `ocr_text` is the PDF's text layer with the values of its forms, or what OCR read where there is none, where it is
    garbage or a few words over a scan. A page that cannot be rendered is kept without a picture. A PDF that cannot be
    used (corrupt, encrypted, no pages, a page count that contradicts its `page_indices`, a crash of PDFium) is skipped.
    Questions without a document are set aside in `set_aside.jsonl` and return when their PDF does. The log names all
    of these, and `ingest_report.json` says who read which page (`read_by`). An interrupted run goes on at the page
    where it stopped; a later run redoes only PDFs that are new or changed. An earlier corpus stays until the new one is
    whole.

    Raises CorpusError if the folder has no PDF, or none that can be used, for an OCR that does not work, and, before
    anything is rendered, for `annotations` that do not fit their PDF; RuntimeError if another process makes the corpus.
    """
    folder, out = Path(pdf_folder), Path(out_folder)
    if not folder.is_dir():
        raise CorpusError(f"{folder} is not a folder")
    if max_pixels < 1:
        raise CorpusError(f"max_pixels is {max_pixels}; it must be positive")
    contents = list_pdfs(folder, without=out)
    if not contents.pdfs:
        raise CorpusError(f"{folder} holds no PDF files")
    parts = out / PARTS
    if (out / PAGES).exists() and not (out / INGEST_REPORT).exists() and not parts.exists():
        raise CorpusError(f"{out} holds a corpus that was not made from PDFs here; choose another folder")
    _check_other_folder(folder, out, contents)
    rendering = Rendering(max_pixels, choose_engine(ocr))
    with ExitStack() as stack:
        stack.enter_context(sole_writer(out, parts / ".lock"))
        if (out / ANNOTATIONS).exists():  # questions added while this runs would be lost
            stack.enter_context(annotations_lock(out / ANNOTATIONS))
        earlier = _earlier_run(out)
        digests = _digests(contents)
        labels = read_labels(annotations, out)
        _follow_renamed(labels, digests, earlier[1])
        matched, unmatched = match_labels(labels, list(contents.pdfs))
        with PdfProcesses(workers) as processes:
            documents = _plan(contents, digests, matched, earlier, parts, rendering, processes)
            rows = _rows(documents, contents.unusable, rendering, processes)
            if first := next(rows, None):  # without a single page the earlier corpus stays
                write_set_aside(not_among(labels), out)  # all of them, should this end before the corpus is whole
                records = [document.record for document in documents]
                write_corpus(out, records, chain([first], rows), leave_out_empty=True)
        documents = [document for document in documents if document.name not in contents.unusable]
        aside = _labels_without_place(matched, unmatched, documents)
        _report(folder, out, documents, contents, aside)
        if not documents:
            raise CorpusError(f"none of the {len(matched)} PDFs in {folder} can be used: see {out / INGEST_REPORT}")
        write_set_aside(aside, out)
        readers = read_by(out)
        if ocr == "auto" and (unread := readers.get(NO_ENGINE, 0) + readers.get(POOR_TEXT_LAYER, 0)):
            logger.warning(
                "%d pages have no usable text layer, and there is no OCR to read them: install tesseract, or pip "
                'install "mmr5-lab[ocr]", and run this again',
                unread,
            )
        shutil.rmtree(parts, ignore_errors=True)  # Windows keeps the lock, which is held
    return load_corpus(out)


def read_by(out_folder: str | Path) -> dict[str, int]:
    """Return how many pages of a corpus made by `build_corpus` each reader read, from its report; most first."""
    report = json.loads((Path(out_folder) / INGEST_REPORT).read_text(encoding="utf-8"))
    counts = Counter(reader for entry in report["documents"] for reader in entry["read_by"])
    return dict(counts.most_common())


@dataclass
class _Document:
    """A PDF on its way into the corpus.

    record: its annotation; report: its entry in the ingest report
    parts: the folder of its finished pages, or None where they are taken over from the corpus `earlier`
    """

    name: str
    pdf: Path
    record: dict[str, Any]
    report: dict[str, Any]
    parts: Path | None = None
    earlier: Corpus | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of its pages, finished all, and complete the report. Raises PdfError if all lack a picture."""
        numbers = range(self.report["pages"])
        if self.earlier and self.earlier.store:
            for row in self.earlier.rows(self.name):
                values = {name: self.earlier.store.value(row, name) for name in ("image_binary", "ocr_text")}
                yield {"doc_name": self.name} | values
        if not self.parts:
            return
        # Pictures of a thousand pages need not fit in memory: they are read again, one by one.
        pages = [page._replace(picture=page.picture[:1]) for page in (read_page_file(self.parts, n) for n in numbers)]
        self.report["read_by"] = [page.read_by for page in pages]
        self.report["problems"] = {number: page.problem for number, page in enumerate(pages) if page.problem}
        if not any(page.picture for page in pages):
            raise PdfError(f"no page can be rendered; page 0: {pages[0].problem}")
        words = vocabulary(page.text for page in pages)
        for number in numbers:
            picture = read_page_file(self.parts, number).picture or None
            text = join_hyphens(pages[number].text, words)
            yield {"doc_name": self.name, "image_binary": picture, "ocr_text": text}


def _digests(contents: FolderContents) -> dict[str, str]:
    """Return the SHA-256 of each PDF; those that cannot be opened become unusable."""
    digests = {}
    for name, pdf in contents.pdfs.items():
        try:
            with pdf.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            contents.unusable[name] = f"it cannot be opened: {error.strerror}"
    return digests


def _follow_renamed(labels: list[Label], digests: dict[str, str], reports: dict[str, dict[str, Any]]) -> None:
    """Give labels of a PDF that is gone to a new one with the same content."""
    new = {digest: name for name, digest in digests.items() if name not in reports}
    renamed = {old: new.get(report.get("sha256", "")) for old, report in reports.items() if old not in digests}
    for label in labels:
        old = label.record["doc_name"]
        if name := renamed.get(old):
            logger.warning("%s is %s now: its %d questions go with it", old, name, len(label.record["questions"]))
            label.record["doc_name"] = name


def _plan(
    contents: FolderContents,
    digests: dict[str, str],
    labels: dict[str, list[Label]],
    earlier_run: tuple[Corpus | None, dict[str, dict[str, Any]]],
    parts: Path,
    rendering: Rendering,
    processes: PdfProcesses,
) -> list[_Document]:
    """Return the documents to be; PDFs that cannot be used join `contents.unusable`."""
    earlier, reports = earlier_run
    documents = []
    for name, digest in digests.items():
        pdf, report = contents.pdfs[name], reports.get(name, {})
        # What the rows of a document depend on, beside the OCR: with an equal recipe they need not be made again.
        recipe = {"sha256": digest, "text_version": _TEXT_VERSION, "max_pixels": rendering.max_pixels}
        readers = set(report.get("read_by", [None]))
        reused = report.items() >= recipe.items() and readers <= {TEXT_LAYER, rendering.engine}
        try:
            num_pages = report["pages"] if reused else next(processes.map(processes.num_pages, [pdf]))
            record = _fitting_record(labels[name], name, num_pages)
        except PdfError as error:
            contents.unusable[name] = str(error)
            continue
        if record["questions"] and report.get("sha256", digest) != digest:
            logger.warning("%s has changed: look whether its %d questions still fit", pdf, len(record["questions"]))
        if reused:
            documents.append(_Document(name, pdf, record, report, earlier=earlier))
        else:
            key = json.dumps([name, recipe, rendering.engine, FinishedPage._fields]).encode()
            folder = parts / hashlib.sha256(key).hexdigest()[:16]
            folder.mkdir(exist_ok=True)
            documents.append(_Document(name, pdf, record, recipe | {"pages": num_pages}, parts=folder))
    return documents


def _fitting_record(labels: list[Label], name: str, num_pages: int) -> dict[str, Any]:
    """Return the annotation of a document. Raises PdfError if it is for another number of pages.

    Raises CorpusError, naming file and line, for an annotation that was passed and does not fit. Of questions that the
    corpus itself held or set aside, all are taken whose pages the PDF has.
    """
    where, record, passed = labels[0] if labels else Label(name, {"domain": "PDF", "questions": []}, passed=False)
    rows: Any = record.get("page_indices")
    if is_pair(rows) and (annotated := rows[1] - rows[0] + 1) != num_pages:
        cause = f"; the end is inclusive: write {[rows[0], rows[1] - 1]}" if annotated == num_pages + 1 else ""
        raise PdfError(
            f"it has {num_pages} pages but page_indices of its annotation says {annotated} ({where}: {rows}){cause}"
        )
    # Row ranges are those of the new page file, not those of the file that the annotations were made for.
    record = {key: value for key, value in record.items() if key not in ("page_indices", "layout_indices")}
    record["doc_name"] = name
    if not passed:
        questions = without_repeats(question for label in labels for question in label.record["questions"])
        record["questions"] = [q for q in questions if REPLACED not in q and max(q["page_id"]) < num_pages]
    parse_document(record | {"page_indices": [0, num_pages - 1]}, where)
    return record


def _labels_without_place(
    matched: dict[str, list[Label]], unmatched: list[Label], documents: list[_Document]
) -> list[dict[str, Any]]:
    """Return, as records, the questions that the corpus does not hold: of no PDF, or replaced by passed ones."""
    kept = {document.name: document.record["questions"] for document in documents}
    homeless = [label for name, labels in matched.items() if name not in kept for label in labels]
    records = not_among([*unmatched, *homeless])
    for name, questions in kept.items():
        for record in not_among(matched[name], questions):
            if matched[name][0].passed:
                record["questions"] = [question | {REPLACED: True} for question in record["questions"]]
            records.append(record)
    return records


def _check_other_folder(folder: Path, out: Path, contents: FolderContents) -> None:
    """Raise CorpusError where `out` is the corpus of other PDFs, whose labels would all be set aside."""
    report, _ = read_object(out / INGEST_REPORT)
    report = report or {}
    names = {entry["file"] for entry in report.get("documents", ())}
    if (
        names
        and report.get("folder", str(folder.resolve())) != str(folder.resolve())
        and not names & set(contents.pdfs)
    ):
        raise CorpusError(
            f"{out} is the corpus of {report['folder']}, and {folder} has none of its documents: choose another folder"
            f" for this corpus (for notebook 01, rename {folder})"
        )


def _earlier_run(out: Path) -> tuple[Corpus | None, dict[str, dict[str, Any]]]:
    """Return the corpus of an earlier ingest, and the report's entry of each document; none if they do not fit."""
    report, _ = read_object(out / INGEST_REPORT)
    try:
        corpus = load_corpus(out)
    except CorpusError:
        return None, {}
    # A run that ended between its corpus and its report left a report that speaks of other files.
    if report is None or corpus.store is None or report.get("page_file") != corpus.store.fingerprint:
        return None, {}
    return corpus, {entry.pop("file"): entry for entry in report["documents"]}


def _rows(
    documents: list[_Document], unusable: dict[str, str], rendering: Rendering, processes: PdfProcesses
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the page file, document by document, so that the first are written while others are rendered.

    A document without a single picture has no rows, and its reason in `unusable`.
    """
    # A process opens the PDF anew for each task.
    tasks = [
        (document.pdf, document.parts, range(start, min(start + _PAGES_PER_TASK, document.report["pages"])))
        for document in documents
        if document.parts
        for start in range(0, document.report["pages"], _PAGES_PER_TASK)
    ]
    with tqdm(total=sum(len(pages) for *_, pages in tasks), desc="pages", unit="page", disable=not tasks) as progress:

        def make(task: tuple[Path, Path, range]) -> None:
            pdf, parts, pages = task
            for page in pages:
                if not page_path(parts, page).exists():
                    try:
                        processes.make_page(pdf, page, parts, rendering)
                    except PdfError as error:
                        write_page(parts, page, FinishedPage("", NO_ENGINE, problem=str(error)))
                progress.update()

        finished = processes.map(make, tasks)
        for document in documents:
            if document.parts:
                for _ in range(0, document.report["pages"], _PAGES_PER_TASK):
                    next(finished)
            try:
                yield from document.rows()
            except PdfError as error:
                unusable[document.name] = str(error)


def _report(
    folder: Path, out: Path, documents: list[_Document], contents: FolderContents, aside: list[dict[str, Any]]
) -> None:
    """Write the ingest report, and warn of what a user should look at."""
    report: dict[str, Any] = {
        "folder": str(folder.resolve()),
        "documents": [{"file": document.name} | document.report for document in documents],
        "skipped": [{"file": name, "reason": reason} for name, reason in sorted(contents.unusable.items())],
        "not_pdf": contents.others,
        "set_aside": [{"doc_name": record["doc_name"], "questions": len(record["questions"])} for record in aside],
        "page_file": PageStore(out / PAGES).fingerprint if documents else None,
    }
    write_json(out / INGEST_REPORT, report, indent=1)
    for entry in report["skipped"]:
        logger.warning("%s is skipped: %s", folder / entry["file"], entry["reason"])
    if contents.others:
        logger.warning("%d files are no PDFs and are left out: %s", len(contents.others), _listed(contents.others))
    if aside:
        names = [f"{entry['doc_name']} ({entry['questions']})" for entry in report["set_aside"]]
        for number, record in enumerate(aside[:_MOST_NAMES]):  # to compare all names with all would take minutes
            names[number] += nearest(record["doc_name"], contents.pdfs)
        logger.warning("questions without a place here are set aside in %s: %s", out / SET_ASIDE, _listed(names))
    problems = [
        f"{document.name} page {page} ({problem})"
        for document in documents
        if document.parts  # those taken over were named before
        for page, problem in document.report["problems"].items()
    ]
    if problems:
        logger.warning("%d pages are not as they should be: %s", len(problems), _listed(problems))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more, see {INGEST_REPORT}" if more > 0 else "")


def ingest_text(out: str, workers: int | None, **options: Any) -> str:
    """`mmr5 ingest`: `build_corpus` with a process a core by default; says what has been read, and by what."""
    corpus = build_corpus(out_folder=out, workers=workers or os.cpu_count() or 1, **options)
    readers = ", ".join(f"{count} by {reader}" for reader, count in read_by(out).items())
    pages, wordless = len(corpus.pages), int((~corpus.pages["has_text"]).sum())
    return (
        f"{out}: {len(corpus.documents)} documents, {pages} pages (read: {readers}; {wordless} without words), "
        f"{len(corpus.questions)} questions"
    )
