"""A thousand PDFs, good, odd and broken, through the ingest: each is read or named with its reason, nothing crashes.

    python benchmarks/pdfs.py [--files 1000] [--seed 0] [--keep FOLDER]

The files are made here, so that nobody's documents are needed, and then damaged: page boxes, rotations, encryption,
broken references, forms, scripts, huge and tiny pages, odd names. One and two workers must give the same bytes.
"""

import argparse
import json
import os
import random
import re
import shutil
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

from mmr5_lab.corpus.ingest import INGEST_REPORT, build_corpus

FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"
SIDES = (0, 0.001, 1, 72, 595, 842, 14_400, 100_000, 2147483648, 1e30, -595)
NAMES = ("report", "Ärger", "報告書", "отчёт", "a b", "x'y\"z", "100%", "réunion", "🙂", "-rf", "con", "q" * 120)


def write_pdf(path: Path, objects: list[bytes], trailer: bytes = b"") -> None:
    """Write objects 1, 2, … as a PDF; the first is the catalogue."""
    body, offsets = b"%PDF-1.5\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    table += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, len(body))
    path.write_bytes(body + table + end)


def stream(content: bytes) -> bytes:
    return b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content)


def objects_of(draw: random.Random, kind: str) -> list[bytes]:
    """Return the objects of a PDF with up to five pages of a few lines, and what its kind has."""
    pages = draw.randint(1, 5)
    first = 6  # 1 catalogue, 2 page tree, 3 font, 4 content, 5 form field
    words = [draw.choice(["photo-", "synthesis", "revenue", "2015", "(cid\\)", "\x02\x03\x1b"]) for _ in range(12)]
    content = b"BT /F1 10 Tf 12 TL 20 300 Td %s ET" % b" ".join(b"(%s) Tj T*" % word.encode() for word in words)
    field = (
        b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (f) /V (value) /Rect [20 20 200 40] /F 4 /DA (/F1 9 Tf 0 g) >>"
    )
    form = b"/AcroForm << /Fields [5 0 R] /NeedAppearances true /DR << /Font << /F1 3 0 R >> >> >>"
    kids = [first + number for number in range(pages)]
    if kind == "references":
        kids = [draw.choice([*kids, 1, 2, 99, 0]) for _ in kids]
        content = draw.choice([content, b"q " * 5000, b"/X Do", b"BI /W 9 /H 9 ID xx EI", b"1 0 0 1 0 0 cm [ <<"])
    entries = []
    for _ in range(pages):
        box = (
            (0, 0, 400, 500)
            if kind != "boxes"
            else (draw.choice((0, 0, 100, -100)), 0, draw.choice(SIDES), draw.choice(SIDES))
        )
        more = b"/Annots [5 0 R]" if kind == "forms" else b""
        if kind in ("boxes", "rotations"):
            more += b"/Rotate %d /CropBox [%d %d %d %d]" % (
                draw.choice((0, 90, 180, 270, 45, -90)),
                *draw.sample(range(-50, 500), 4),
            )
        if kind == "boxes" and draw.random() < 0.2:
            more += b"/UserUnit %d" % draw.choice((0, 1, 1000))
        entries.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [%.3f %.3f %.3f %.3f] /Contents 4 0 R %s"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % (*box, more)
        )
    font = FONT
    if kind == "scripts":
        cmap = b"begincmap 1 begincodespacerange <00> <FF> endcodespacerange "
        cmap += b"1 beginbfrange <20> <7A> <%04X> endbfrange endcmap"
        entries.append(stream(cmap % draw.choice((0x0E01, 0x0915, 0x05D0, 0x0627, 0x4E00, 0xE000, 0xD800, 0x0001))))
        font = FONT[:-2] + b"/ToUnicode %d 0 R >>" % (first + pages)
    tree = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(b"%d 0 R" % kid for kid in kids), pages)
    return [
        b"<< /Type /Catalog /Pages 2 0 R %s >>" % (form if kind == "forms" else b""),
        tree,
        font,
        stream(content),
        field,
        *entries,
    ]


def damage(draw: random.Random, data: bytes) -> bytes:
    """Return the bytes of a file cut, with some bytes changed, a part twice, or numbers replaced."""
    way, place = draw.randrange(4), draw.randrange(len(data))
    if way == 0:
        return data[:place]
    if way == 1:
        changed = bytearray(data)
        for _ in range(draw.randint(1, 30)):
            changed[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(changed)
    if way == 2:
        return data[:place] + data[max(0, place - 200) :]
    return data.replace(
        draw.choice((b"0 R", b"500", b"/Count", b"endobj", b"/Length")), draw.choice((b"9 R", b"-7", b"/Kids", b"")), 3
    )


KINDS = ("good", "boxes", "rotations", "encryption", "references", "forms", "scripts", "damage", "links", "empty")


def make_files(folder: Path, count: int, seed: int) -> dict[str, list[Path]]:
    """Write the files, by kind."""
    draw = random.Random(seed)
    made: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        name = unicodedata.normalize(draw.choice(("NFC", "NFD")), f"{draw.choice(NAMES)} {number}")
        path = folder / draw.choice((".", "sub", "sub/deeper")) / (name + draw.choice((".pdf", ".pdf", ".PDF", "")))
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "links":
            path.symlink_to(draw.choice(("nowhere.pdf", "../missing", path.name)))
        elif kind == "empty":
            path.with_suffix(".pdf").write_bytes(draw.choice((b"", b"%PDF-1.4", b"\0" * 500, b"no PDF at all")))
        else:
            key = b"<" + draw.randbytes(32).hex().encode() + b">"
            encryption = b"/ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O %s /U %s >>" % (key, key)
            write_pdf(path, objects_of(draw, kind), encryption if kind == "encryption" else b"")
            if kind == "damage":
                path.write_bytes(damage(draw, path.read_bytes()))
        if draw.random() < 0.02 and kind == "good":  # a name that is not UTF-8
            os.rename(path, os.fsencode(path.parent) + b"/\xe9 %d.pdf" % number)
        made[kind].append(path)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files and the corpora there")
    options = parser.parse_args()
    root = options.keep or Path(tempfile.mkdtemp())
    make_files(root / "pdfs", options.files, options.seed)
    files = [Path(top) / name for top, _, names in os.walk(root / "pdfs") for name in names]
    reports, seconds = {}, {}
    for workers in (1, 2):
        out = root / f"out{workers}"
        started = time.perf_counter()
        corpus = build_corpus(root / "pdfs", out, max_pixels=5000, ocr="none", workers=workers)
        seconds[workers] = time.perf_counter() - started
        reports[workers] = (out / INGEST_REPORT).read_bytes(), (out / "MMDocIR_pages.parquet").read_bytes()
    report = json.loads(reports[1][0])
    read, skipped, others = len(report["documents"]), len(report["skipped"]), len(report["not_pdf"])
    reasons = Counter(re.split(r" to |[:(]", entry["reason"])[0] for entry in report["skipped"])
    flagged = sum(len(entry["problems"]) for entry in report["documents"])
    print(f"{len(files)} files: {read} read, {skipped} skipped, {others} no PDFs")
    print(f"{len(corpus.pages)} pages, {flagged} of them with a problem")
    print(f"{seconds[1]:.0f} s with 1 worker, {seconds[2]:.0f} s with 2; same bytes: {reports[1] == reports[2]}")
    for reason, number in reasons.most_common():
        print(f"{number:5}  {reason}")
    assert read + skipped + others == len(files), "a file is neither read nor named"
    assert reports[1] == reports[2], "one and two workers gave different corpora"
    if not options.keep:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
