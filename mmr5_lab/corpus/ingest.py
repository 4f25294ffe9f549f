"""A folder of PDFs turned into a corpus folder, in parallel and resumable page by page.

    corpus = build_corpus("my_pdfs", "my_corpus", workers=2)

While it runs, finished pages are kept in `my_corpus/.parts`; `ingest_report.json` says at the end who read which pages,
and which PDFs were left out and why.
"""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmr5_lab.corpus.annotations import annotation_records, is_pair, parse_document
from mmr5_lab.corpus.documents import ANNOTATIONS, PAGES, Corpus, load_corpus
from mmr5_lab.corpus.ids import CorpusError, has_words
from mmr5_lab.corpus.ocr import NO_ENGINE, choose_engine
from mmr5_lab.corpus.page_store import PageStore
from mmr5_lab.corpus.pdf import (
    DEFAULT_MAX_PIXELS,
    TEXT_LAYER,
    PdfError,
    Rendering,
    page_path,
    read_page_file,
)
from mmr5_lab.corpus.pdf_process import PdfProcesses
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.files import read_object, sole_writer, write_json

logger = logging.getLogger(__name__)

INGEST_REPORT = "ingest_report.json"
PARTS = ".parts"  # folder of finished pages while a run goes on
_PAGES_PER_TASK = 16


def build_corpus(
    pdf_folder: str | Path,
    out_folder: str | Path,
    annotations: str | Path | Sequence[dict[str, Any]] | None = None,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    jpeg_quality: int = 90,
    workers: int = 1,
    ocr: str = "auto",
) -> Corpus:
    """Turn the PDFs of a folder (not of its subfolders) into a corpus folder.

    annotations: an MMDocIR annotation file or its records. Documents that are not in the folder are left out;
      PDFs without annotation become documents without questions, domain "PDF". None: those of an earlier run, with
      the questions that were added since (`annotate`).
    max_pixels: width × height of a page image is as large as possible within this, in the page's aspect.
    workers: processes that render and read, a few pages at a time.
    ocr: who reads pages without a text layer: "tesseract", "rapidocr", "none", or "auto", the first that is there.

    `ocr_text` is the PDF's text layer, else what the OCR read; pages without words are kept, and `Corpus.pages` flags
    them. A PDF that cannot be used (corrupt, encrypted, no pages, a page count that contradicts its `page_indices`, a
    crash of PDFium) is skipped with a logged warning. `ingest_report.json` says who read which page (`read_by`), and
    what was skipped and why. An interrupted run goes on at the page where it stopped, and a later run redoes only PDFs
    that are new or changed. An earlier corpus stays until the new one is whole.

    Raises CorpusError if the folder has no PDF, or none that can be used, for an OCR that is not installed, and, before
    anything is rendered, for questions that do not fit their PDF; RuntimeError if another process makes this corpus.
    """
    folder, out = Path(pdf_folder), Path(out_folder)
    if not folder.is_dir():
        raise CorpusError(f"{folder} is not a folder")
    if max_pixels < 1:
        raise CorpusError(f"max_pixels is {max_pixels}; it must be positive")
    pdfs = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".pdf" and path.is_file())
    if not pdfs:
        raise CorpusError(f"{folder} holds no PDF files")
    parts = out / PARTS
    if (out / PAGES).exists() and not (out / INGEST_REPORT).exists() and not parts.exists():
        raise CorpusError(f"{out} holds a corpus that was not made from PDFs here; choose another folder")
    rendering = Rendering(max_pixels, jpeg_quality, choose_engine(ocr))
    with sole_writer(out, parts / ".lock"), PdfProcesses(workers) as processes:
        records = annotation_records(annotations)
        if annotations is None and (out / ANNOTATIONS).is_file():  # questions labelled in the corpus itself stay
            records = annotation_records(out / ANNOTATIONS)
            for record in records.values():
                record.pop("page_indices")  # of an earlier PDF, which may have had other pages
        documents, skipped = _plan(pdfs, out, records, rendering, processes)
        rows = _rows(documents, skipped, rendering, processes)
        if first := next(rows, None):  # without a single page the earlier corpus stays
            write_corpus(out, [document.record for document in documents], chain([first], rows), leave_out_empty=True)
        documents = [document for document in documents if document.name not in skipped]
        absent = set(records) - {path.name for path in pdfs}
        _report(folder, out, documents, skipped, len(absent), advise_ocr=ocr == "auto")
        if not documents:
            raise CorpusError(f"none of the {len(pdfs)} PDFs in {folder} can be used; {out / INGEST_REPORT} says why")
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
    parts: Path | None
    earlier: Corpus | None

    def tasks(self) -> list[range]:
        """Return the pages to be made, in shares for one process each, which opens the PDF anew."""
        pages = range(self.report["pages"] if self.parts else 0)
        return [pages[start : start + _PAGES_PER_TASK] for start in pages[::_PAGES_PER_TASK]]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of its pages, finished all; who read them is noted in the report."""
        for page in range(self.report["pages"]):
            if self.parts:
                picture, text, reader = read_page_file(self.parts, page)
                self.report["read_by"].append(reader)
                if not has_words(text):
                    self.report["pages_without_text"].append(page)
            else:
                assert self.earlier is not None
                picture, text = self.earlier.page_bytes(self.name, page), self.earlier.page_text(self.name, page)
            yield {"doc_name": self.name, "image_binary": picture, "ocr_text": text}


def _plan(
    pdfs: list[Path], out: Path, records: dict[str, dict[str, Any]], rendering: Rendering, processes: PdfProcesses
) -> tuple[list[_Document], dict[str, str]]:
    """Return the documents, and by name why other PDFs cannot be used."""
    earlier, reports = _earlier_run(out)
    documents, skipped = [], {}
    for pdf in pdfs:
        name = pdf.name
        with pdf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # What the rows of a document depend on, beside the OCR: with an equal recipe they need not be made again.
        recipe = {"sha256": digest, "max_pixels": rendering.max_pixels, "jpeg_quality": rendering.jpeg_quality}
        report = reports.get(name, {})
        readers = set(report.get("read_by", [None]))
        reused = report.items() >= recipe.items() and readers <= {TEXT_LAYER, rendering.engine}
        record = records.get(name, {"doc_name": name, "domain": "PDF", "questions": []})
        try:
            num_pages = report["pages"] if reused else next(processes.map(processes.num_pages, [pdf]))
            rows: Any = record.get("page_indices")
            if is_pair(rows) and (annotated := rows[1] - rows[0] + 1) != num_pages:
                raise PdfError(f"it has {num_pages} pages but page_indices of its annotation says {annotated}")
        except PdfError as error:
            skipped[name] = str(error)
            continue
        # Row ranges are those of the new page file, not those of the file that the annotations were made for.
        record = {key: value for key, value in record.items() if key not in ("page_indices", "layout_indices")}
        parse_document(record | {"page_indices": [0, num_pages - 1]}, "annotations")
        parts = None
        if not reused:
            key = json.dumps([name, recipe, rendering.engine]).encode()
            parts = out / PARTS / hashlib.sha256(key).hexdigest()[:16]
            parts.mkdir(exist_ok=True)
            report = recipe | {"pages": num_pages, "pages_without_text": [], "read_by": []}
        documents.append(_Document(name, pdf, record, report, parts, earlier))
    return documents, skipped


def _earlier_run(out: Path) -> tuple[Corpus | None, dict[str, dict[str, Any]]]:
    """Return the corpus of an earlier ingest, and the report's entry of each document; none if they do not fit."""
    report, _ = read_object(out / INGEST_REPORT)
    try:
        reports = {entry.pop("file"): entry for entry in (report or {})["documents"]}
        corpus = load_corpus(out)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, {}
    # A run that ended between its corpus and its report left a report that speaks of other files.
    if corpus.store is None or (report or {}).get("page_file") != corpus.store.fingerprint:
        return None, {}
    return corpus, reports


def _rows(
    documents: list[_Document], skipped: dict[str, str], rendering: Rendering, processes: PdfProcesses
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the page file, document by document, so that the first are written while others are rendered.

    A document with a page that cannot be rendered has no rows, and its reason in `skipped`.
    """
    tasks = [(document, pages) for document in documents for pages in document.tasks()]
    with tqdm(total=sum(len(pages) for _, pages in tasks), desc="pages", unit="page", disable=not tasks) as progress:

        def write(task: tuple[_Document, range]) -> None:
            document, pages = task
            for page in pages:
                if document.parts and not page_path(document.parts, page).exists() and document.name not in skipped:
                    try:
                        processes.write_page(document.pdf, page, document.parts, rendering)
                    except PdfError as error:
                        skipped[document.name] = str(error)
                progress.update()

        finished = processes.map(write, tasks)
        for document in documents:
            for _ in document.tasks():
                next(finished)
            if document.name not in skipped:
                yield from document.rows()


def _report(
    folder: Path, out: Path, documents: list[_Document], skipped: dict[str, str], absent: int, advise_ocr: bool
) -> None:
    """Write the ingest report, and warn of what a user should look at."""
    for name, reason in sorted(skipped.items()):
        logger.warning("%s is skipped: %s", folder / name, reason)
    if absent:
        logger.warning("%d annotated documents are not in %s and are left out", absent, folder)
    unread = sum(document.report["read_by"].count(NO_ENGINE) for document in documents)
    if unread and advise_ocr:
        logger.warning(
            '%d pages have no text layer, and no OCR is installed to read them: pip install "mmr5-lab[ocr]", or '
            "install tesseract, and run this again",
            unread,
        )
    report = {
        "documents": [{"file": document.name} | document.report for document in documents],
        "skipped": [{"file": name, "reason": reason} for name, reason in sorted(skipped.items())],
        "annotated_but_absent": absent,
        "page_file": PageStore(out / PAGES).fingerprint if documents else None,
    }
    write_json(out / INGEST_REPORT, report, indent=1)
