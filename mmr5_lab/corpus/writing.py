"""Write a corpus folder: annotations and pages, replaced only when the new files are complete."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmr5_lab.corpus.annotations import name_and_domain, parse_document
from mmr5_lab.corpus.documents import ANNOTATIONS, PAGES
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.files import json_line, replacing

_COLUMNS = ("doc_name", "domain", "passage_id", "image_path", "image_binary", "ocr_text", "vlm_text")
PAGE_SCHEMA = pa.schema([(name, pa.binary() if name == "image_binary" else pa.string()) for name in _COLUMNS])
_ROWS_PER_GROUP = 32  # one page read costs at most so many


def write_corpus(
    out_folder: str | Path,
    annotations: Iterable[dict[str, Any]],
    pages: Iterable[dict[str, Any]],
    *,
    leave_out_empty: bool = False,
) -> None:
    """Write a corpus folder; existing files are replaced only when the new ones are complete.

    annotations: one dict a document, as in MMDocIR's file. `page_indices` may be left out: it is filled in
      from the pages. Extra keys (`split`, or anything JSON can hold) are kept.
    pages: one dict a page, consumed as a stream, each document's pages together and in order. `doc_name` and
      `image_binary` (JPEG or PNG bytes) are needed; `ocr_text`, `vlm_text`, `image_path` are "" where left
      out, `passage_id` is the 0-based page number, `domain` is that of the document's annotation.
    leave_out_empty: annotated documents without pages are left out, not refused.

    Raises CorpusError if a page has no annotated document or a document no pages, if `page_indices`
    contradicts the pages, or if a gold page does not exist. Nothing is replaced in that case.
    """
    folder = Path(out_folder)
    records = [dict(record) for record in annotations]
    domains = dict(name_and_domain(record, f"annotation {n}") for n, record in enumerate(records))
    spans: dict[str, list[int]] = {}  # first and last row of each document's pages
    with replacing(folder / PAGES) as new_pages, replacing(folder / ANNOTATIONS) as new_annotations:
        names = [name for name in PAGE_SCHEMA.names if name != "image_binary"]
        # JPEG bytes neither repeat nor shrink: trying takes longer than rendering.
        compression = dict.fromkeys(names, "zstd") | {"image_binary": "none"}
        with pq.ParquetWriter(new_pages, PAGE_SCHEMA, compression=compression, use_dictionary=names) as writer:
            rows = _rows(pages, domains, spans)
            while batch := list(islice(rows, _ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(batch, schema=PAGE_SCHEMA))
        written = []
        for record in records:
            name = record["doc_name"]
            if name not in spans:
                if leave_out_empty:
                    continue
                raise CorpusError(f"{name!r} is annotated but has no pages")
            if record.setdefault("page_indices", spans[name]) != spans[name]:
                raise CorpusError(
                    f"page_indices of {name!r} is {record['page_indices']}, but its pages are rows {spans[name]}"
                )
            parse_document(record, "annotations")
            written.append(json_line(record))
        new_annotations.write_bytes(b"".join(written))


def _rows(
    pages: Iterable[dict[str, Any]], domains: dict[str, str], spans: dict[str, list[int]]
) -> Iterator[dict[str, Any]]:
    """Yield the pages with all columns, and note the first and last row of each document in `spans`."""
    row = 0
    for name, group in groupby(pages, key=lambda page: page["doc_name"]):
        if name in spans:
            raise CorpusError(f"the pages of {name!r} do not stand together")
        if name not in domains:
            raise CorpusError(f"there are pages of {name!r} but no annotation")
        first = row
        for page in group:
            defaults = {"image_path": "", "ocr_text": "", "vlm_text": ""}
            yield defaults | {"domain": domains[name], "passage_id": str(row - first)} | page
            row += 1
        spans[name] = [first, row - 1]


def regroup_pages(path: str | Path) -> None:
    """Rewrite a page file in small row groups, streaming; needed once where all rows are one huge group.

    path: the parquet file, or the corpus folder that holds it
    Takes as much free disk as the file itself. Raises CorpusError if the file is missing or not parquet.
    """
    path = Path(path) / PAGES if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise CorpusError(f"{path} is missing")
    try:
        # Otherwise pyarrow loads the whole column for the first batch.
        source = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        with replacing(path) as new, pq.ParquetWriter(new, source.schema_arrow) as writer:
            for batch in source.iter_batches(batch_size=_ROWS_PER_GROUP, use_threads=False):
                writer.write_batch(batch, row_group_size=_ROWS_PER_GROUP)
    except pa.ArrowException as error:
        raise CorpusError(f"{path} is not a readable parquet file: {error}") from error
