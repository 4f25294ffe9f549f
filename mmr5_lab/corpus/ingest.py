"""A folder of PDFs turned into a corpus folder, in parallel and resumable page by page.

    corpus = build_corpus("my_pdfs", "my_corpus", workers=2)

While it runs, finished pages are kept in `my_corpus/.parts`; `ingest_report.json` says at the end which pages were read
by whom, and which PDFs were left out and why.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmr5_lab.corpus.annotations import annotation_records, is_pair, parse_document
from mmr5_lab.corpus.documents import ANNOTATIONS, PAGES, Corpus, load_corpus
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.pdf import (
    DEFAULT_MAX_PIXELS,
    NO_READER,
    TEXT_LAYER,
    PdfError,
    Rendering,
    as_line,
    choose_ocr,
    finished_page,
    has_words,
    open_pdf,
    write_pages,
)
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.files import replacing, sole_writer

logger = logging.getLogger(__name__)

INGEST_REPORT = "ingest_report.json"
_FEWEST_PAGES, _MOST_PAGES = 8, 64  # of a job, where several processes share them


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
    them. A PDF that cannot be used (corrupt, encrypted, no pages, a page count that contradicts its `page_indices`) is
    skipped with a logged warning. What was done, by whom each page was read (`read_by`), and what was skipped and why
    is in `ingest_report.json`. An interrupted run goes on at the page where it stopped, and a later run redoes only
    PDFs that are new or changed.

    Raises CorpusError if the folder has no PDF, or none that can be used, for an OCR that is not installed, and, before
    anything is rendered, for questions that do not fit their PDF; RuntimeError if a rendering process dies, or another
    process is making this corpus. An earlier corpus stays until the new one is whole.
    """
    folder, out = Path(pdf_folder), Path(out_folder)
    if not folder.is_dir():
        raise CorpusError(f"{folder} is not a folder")
    if max_pixels < 1:
        raise CorpusError(f"max_pixels is {max_pixels}; it must be positive")
    pdfs = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".pdf" and path.is_file())
    if not pdfs:
        raise CorpusError(f"{folder} holds no PDF files")
    parts = out / ".parts"
    if (out / PAGES).exists() and not (out / INGEST_REPORT).exists() and not parts.exists():
        raise CorpusError(f"{out} holds a corpus that was not made from PDFs here; choose another folder")
    with sole_writer(out, parts / ".lock"):
        return _build(folder, pdfs, out, annotations, max_pixels, jpeg_quality, workers, ocr)


def _build(
    folder: Path,
    pdfs: list[Path],
    out: Path,
    annotations: str | Path | Sequence[dict[str, Any]] | None,
    max_pixels: int,
    jpeg_quality: int,
    workers: int,
    ocr: str,
) -> Corpus:
    try:
        reader = choose_ocr(ocr)
    except PdfError as error:
        raise CorpusError(str(error)) from error
    records = annotation_records(annotations)
    if annotations is None and (out / ANNOTATIONS).is_file():  # questions labelled in the corpus itself stay
        records = {
            name: {key: value for key, value in record.items() if key not in ("page_indices", "layout_indices")}
            for name, record in annotation_records(out / ANNOTATIONS).items()
        }
    parts = out / ".parts"
    earlier = _finished(out)
    kept: dict[str, dict[str, Any]] = {}  # annotations, by document
    reports: dict[str, dict[str, Any]] = {}
    rows: dict[str, Iterator[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    jobs: list[Rendering] = []
    for path in pdfs:
        name, recipe = path.name, _recipe(path, max_pixels, jpeg_quality)
        report = earlier[1].get(name, {}) if earlier else {}
        reused = earlier is not None and report.items() >= recipe.items() and _read_as(report, reader)
        try:
            num_pages = report["pages"] if reused else _count_pages(path)
            expected = _annotated_pages(records.get(name))
            if expected not in (None, num_pages):
                raise PdfError(f"it has {num_pages} pages but page_indices of its annotation says {expected}")
        except PdfError as error:
            skipped[name] = str(error)
            continue
        # Row ranges are those of the new page file, not those of the file that the annotations were made for.
        record = records.get(name, {"doc_name": name, "domain": "PDF", "questions": []})
        kept[name] = {k: v for k, v in record.items() if k not in ("page_indices", "layout_indices")}
        parse_document(kept[name] | {"page_indices": [0, num_pages - 1]}, "annotations")
        if reused and earlier is not None:
            reports[name], rows[name] = report, _corpus_rows(earlier[0], name)
            continue
        part = parts / hashlib.sha256(json.dumps([name, recipe, reader]).encode()).hexdigest()[:16]
        part.mkdir(exist_ok=True)
        reports[name] = recipe | {"pages": num_pages, "pages_without_text": [], "read_by": []}
        rows[name] = _part_rows(name, part, reports[name])
        jobs.append(Rendering(path, part, range(num_pages), max_pixels, jpeg_quality, reader))
    if workers > 1:
        jobs = list(_cut(jobs, workers))

    def finished_rows() -> Generator[dict[str, Any]]:
        """Document by document, so that the first are written while others are rendered."""
        counts = Counter(job.pdf.name for job in jobs)
        with closing(_run(jobs, workers)) as reasons:
            for name in kept:
                if failures := [reason for reason in islice(reasons, counts[name]) if reason]:
                    skipped[name] = failures[0]
                else:
                    yield from rows[name]
        # Should the run end before the new report is written, the old one would speak of other files.
        (out / INGEST_REPORT).unlink(missing_ok=True)

    with closing(finished_rows()) as finished:
        if first := next(finished, None):
            write_corpus(out, kept.values(), chain([first], finished), leave_out_empty=True)
    for name, reason in sorted(skipped.items()):
        logger.warning("%s is skipped: %s", folder / name, reason)
    names = [name for name in kept if name not in skipped]
    absent = sorted(set(records) - {path.name for path in pdfs})
    if absent:
        logger.warning("%d annotated documents are not in %s and are left out", len(absent), folder)
    summary = {
        "documents": [{"file": name} | reports[name] for name in names],
        "skipped": [{"file": name, "reason": reason} for name, reason in sorted(skipped.items())],
        "annotated_but_absent": len(absent),
    }
    if not names:
        _write_report(out, summary)
        raise CorpusError(f"none of the {len(pdfs)} PDFs in {folder} can be used; {out / INGEST_REPORT} says why")
    unread = sum(reports[name]["read_by"].count(NO_READER) for name in names)
    if unread and ocr == "auto":
        logger.warning(
            '%d pages have no text layer, and no OCR is installed to read them: pip install "mmr5-lab[ocr]", or '
            "install tesseract, and run this again",
            unread,
        )
    _write_report(out, summary)
    shutil.rmtree(parts, ignore_errors=True)  # Windows keeps the lock, which is held
    return load_corpus(out)


def read_by(out_folder: str | Path) -> dict[str, int]:
    """How many pages of a corpus made by `build_corpus` each reader read, from its report; most first."""
    report = json.loads((Path(out_folder) / INGEST_REPORT).read_text(encoding="utf-8"))
    counts = Counter(reader for entry in report["documents"] for reader in entry["read_by"])
    return dict(counts.most_common())


def _recipe(path: Path, max_pixels: int, jpeg_quality: int) -> dict[str, Any]:
    """What the rows of a document depend on, beside the OCR: with an equal recipe they need not be made again."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "max_pixels": max_pixels, "jpeg_quality": jpeg_quality}


def _read_as(report: dict[str, Any], reader: str) -> bool:
    """Were the pages without a text layer read by this reader, if there are any?"""
    return set(report.get("read_by", [None])) <= {TEXT_LAYER, reader}


def _count_pages(path: Path) -> int:
    document = open_pdf(path)
    try:
        return len(document)
    finally:
        document.close()


def _annotated_pages(record: dict[str, Any] | None) -> int | None:
    if record is None or not is_pair(record.get("page_indices")):
        return None
    first, last = record["page_indices"]
    return last - first + 1


def _finished(out: Path) -> tuple[Corpus, dict[str, dict[str, Any]]] | None:
    """An earlier ingest of the same folder: its corpus and its report of each document."""
    try:
        report = json.loads((out / INGEST_REPORT).read_text(encoding="utf-8"))
        documents = {entry.pop("file"): entry for entry in report["documents"]}
        corpus = load_corpus(out)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if corpus.store is None or set(documents) != set(corpus.documents["doc_name"]):
        return None
    return corpus, documents


def _write_report(out: Path, report: dict[str, Any]) -> None:
    with replacing(out / INGEST_REPORT) as new:
        new.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _corpus_rows(corpus: Corpus, name: str) -> Iterator[dict[str, Any]]:
    for page in range(corpus.num_pages(name)):
        row: dict[str, Any] = {"doc_name": name, "image_binary": corpus.page_bytes(name, page)}
        yield row | {"ocr_text": corpus.page_text(name, page)}


def _part_rows(name: str, part: Path, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The finished pages of a document; who read them is noted in its report."""
    for number in range(report["pages"]):
        picture, text, read_by = finished_page(part, number)
        report["read_by"].append(read_by)
        if not has_words(text):
            report["pages_without_text"].append(number)
        yield {"doc_name": name, "image_binary": picture, "ocr_text": text}


def _cut(jobs: list[Rendering], workers: int) -> Iterator[Rendering]:
    """The jobs in parts: large ones, as each opens its PDF anew, and at the end small ones, which end together."""
    left = sum(len(job.pages) for job in jobs)
    for job in jobs:
        pages = job.pages
        while pages:
            size = min(_MOST_PAGES, max(_FEWEST_PAGES, left // (2 * workers)))
            yield replace(job, pages=pages[:size])
            left -= len(pages[:size])
            pages = pages[size:]


def _run(jobs: list[Rendering], workers: int) -> Generator[str | None]:
    """Do the jobs; of each, in their order, why a page of it cannot be rendered, or None."""
    with tqdm(total=sum(len(job.pages) for job in jobs), desc="pages", unit="page", disable=not jobs) as progress:
        if workers <= 1:
            for job in jobs:
                reason = None
                try:
                    for _ in write_pages(job):
                        progress.update()
                except PdfError as error:
                    reason = str(error)
                yield reason
            return
        processes: list[subprocess.Popen[str]] = []
        own = threading.local()

        def ask(job: Rendering) -> str | None:
            if not hasattr(own, "process"):
                own.process = _start()
                processes.append(own.process)
            try:
                own.process.stdin.write(as_line(job))
                own.process.stdin.flush()
                for line in own.process.stdout:
                    if line != "page\n":
                        return json.loads(line)
                    progress.update()
            except OSError:  # it died before this job
                pass
            raise RuntimeError(
                f"the process that rendered pages {job.pages[0]} to {job.pages[-1]} of {job.pdf} died (no memory left, "
                "or the PDF crashes PDFium); start again to go on, without that PDF if it happens again"
            )

        # PDFium is not safe among threads, so each thread has a process. They are not multiprocessing's: those would
        # import the caller's script once more, and all that it imports.
        try:
            with ThreadPoolExecutor(workers) as pool:
                try:
                    yield from pool.map(ask, jobs)
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
                    for process in processes:
                        process.kill()
        finally:
            for process in processes:
                with suppress(OSError), process:  # closes its pipes and waits for it
                    pass


def _start() -> subprocess.Popen[str]:
    """A process that does jobs, from the package that runs here."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "mmr5_lab.corpus.pdf"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment, bufsize=1
    )
