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


def bare_pdf(path, trailer: bytes = b"") -> None:
    """A PDF without pages, written out by hand."""
    body = b"%PDF-1.4\n"
    offsets = []
    for number, content in enumerate(
        (b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [] /Count 0 >>"), 1
    ):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"xref\n0 3\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = b"trailer\n<< /Size 3 /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (trailer, len(body))
    path.write_bytes(body + table + end)


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
