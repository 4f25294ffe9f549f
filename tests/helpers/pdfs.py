"""PDFs made for tests."""

import pypdfium2
from PIL import Image


def picture_pdf(path, pages: int = 1) -> None:
    """Pages without a text layer."""
    first, *rest = [Image.new("RGB", (60, 80), (200, 30 * n, 0)) for n in range(pages)]
    first.save(path, save_all=True, append_images=rest)


def text_pdf(path, *texts: str) -> None:
    """A page of 4 × 3 inches for each text."""
    from matplotlib import pyplot as plt
    from matplotlib.backends.backend_pdf import PdfPages

    with PdfPages(path) as pdf:
        for text in texts:
            figure = plt.figure(figsize=(4, 3))
            figure.text(0.1, 0.5, text)
            pdf.savefig(figure)
            plt.close(figure)


def write_pdf(path, objects: list[bytes], trailer: bytes = b"") -> None:
    """A PDF written out by hand, from the contents of its objects 1, 2, …; the first is the catalogue."""
    body = b"%PDF-1.4\n"
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    size = len(objects) + 1
    table = b"xref\n0 %d\n0000000000 65535 f \n" % size + b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, len(body))
    path.write_bytes(body + table + end)


def bare_pdf(path, trailer: bytes = b"") -> None:
    """A PDF without pages."""
    write_pdf(path, [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [] /Count 0 >>"], trailer)


def pages_pdf(path, pages: list[bytes], *more: bytes, catalogue: bytes = b"") -> None:
    """Pages from the entries of their dictionaries; `more` are the objects 3, 4, …, before those of the pages."""
    first = 3 + len(more)
    kids = b" ".join(b"%d 0 R" % number for number in range(first, first + len(pages)))
    objects = [b"<< /Type /Catalog /Pages 2 0 R %s >>" % catalogue]
    objects += [b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(pages)), *more]
    write_pdf(path, objects + [(page and b"<< /Type /Page /Parent 2 0 R %s >>" % page) or b"null" for page in pages])


def boxes_pdf(path, *sizes: tuple[float, float] | None) -> None:
    """Empty pages of some sizes in points; None is a page that the file does not hold."""
    pages_pdf(path, [b"" if size is None else b"/MediaBox [0 0 %r %r]" % size for size in sizes])


def stream(content: bytes, entries: bytes = b"") -> bytes:
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), entries, content)


FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"


def lines_pdf(path, *pages: list[str], size=(595, 842), font: bytes = FONT, more: tuple[bytes, ...] = ()) -> None:
    """A page for each list of lines, in Helvetica. `more` are the objects 4, 5, … that the font may refer to."""
    contents = []
    for lines in pages:
        shown = b" T* ".join(b"(%s) Tj" % line.encode("cp1252") for line in lines)
        contents.append(stream(b"BT /F1 12 Tf 14 TL 50 %d Td %s ET" % (size[1] - 60, shown)))
    first = 4 + len(more)
    entries = [
        b"/MediaBox [0 0 %d %d] /Contents %d 0 R /Resources << /Font << /F1 3 0 R >> >>" % (*size, first + number)
        for number in range(len(pages))
    ]
    pages_pdf(path, entries, font, *more, *contents)


def encrypted_pdf(path) -> None:
    key = b"<" + b"00" * 32 + b">"
    bare_pdf(
        path,
        trailer=b"/ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O %s /U %s >>" % (key, key),
    )


def blank_pdf(path, pages: int) -> None:
    with pypdfium2.PdfDocument.new() as new:
        for _ in range(pages):
            new.new_page(200, 300).close()
        new.save(path)


def program(path, shell: str) -> None:
    """A program that runs a line of shell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{shell}\n")
    path.chmod(0o755)
