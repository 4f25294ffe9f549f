"""One page of a PDF: picture, text layer, OCR."""

import io
import os
import zlib

import pypdfium2
import pytest
from helpers.pdfs import FONT, lines_pdf, pages_pdf, program, stream
from PIL import Image, ImageDraw, ImageFont

from mmr5_lab.corpus import ocr, pdf
from mmr5_lab.corpus.ids import CorpusError
from mmr5_lab.corpus.ocr import choose_engine
from mmr5_lab.corpus.page_text import HYPHEN
from mmr5_lab.corpus.pdf import Rendering, make_page, open_pdf


@pytest.fixture
def scan(tmp_path):
    """A page that is a picture of three words, and a page that is a picture of nothing."""
    written = Image.new("RGB", (600, 300), "white")
    ImageDraw.Draw(written).text((40, 100), "Revenue grew twice", "black", ImageFont.load_default(48))
    written.save(tmp_path / "scan.pdf", save_all=True, append_images=[Image.new("RGB", (600, 300), "white")])
    document = open_pdf(tmp_path / "scan.pdf")
    yield document
    document.close()


def installed(engine: str) -> bool:
    try:
        return choose_engine(engine) == engine
    except CorpusError:
        return False


@pytest.mark.parametrize("engine", ocr.ENGINES)
def test_ocr_reads_a_picture_of_words(scan, engine):
    if not installed(engine):
        pytest.skip(f"{engine} is not installed")
    page = make_page(scan, 0, Rendering(engine=engine))
    assert page.read_by == engine
    assert page.text.split() == ["Revenue", "grew", "twice"]
    page = make_page(scan, 1, Rendering(engine=engine))
    assert (page.text, page.read_by) == ("", engine)  # read, and nothing found


def test_without_ocr_a_picture_has_no_words(scan):
    page = make_page(scan, 0, Rendering())
    assert (page.text, page.read_by, page.problem) == ("", "none", "")


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Put a program of a line of shell before all others."""

    def put(name: str, shell: str) -> None:
        program(tmp_path / "bin" / name, shell)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    return put


def test_an_engine_that_fails_leaves_the_page_unread_and_says_why(scan, on_path):
    on_path("tesseract", "echo 'Error, could not\ninitialize' >&2; exit 1")
    page = make_page(scan, 0, Rendering(engine="tesseract"))
    assert (page.text, page.read_by) == ("", "tesseract failed")
    assert page.problem == "tesseract failed: Error, could not initialize"
    assert len(page.picture) > 1000


def test_auto_takes_what_works(on_path, monkeypatch, caplog):
    """As with tesseract from a distribution that puts its language data into another package."""
    on_path("tesseract", "cat > /dev/null; echo hello")
    assert choose_engine("auto") == choose_engine("tesseract") == "tesseract"
    on_path("tesseract", "echo 'Error opening data file eng.traineddata' >&2; exit 1")
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: object())
    assert choose_engine("auto") == "rapidocr"
    assert "tesseract does not work: Error opening data file eng.traineddata" in caplog.text
    with pytest.raises(CorpusError, match=r"tesseract does not work: Error opening data file eng\.traineddata"):
        choose_engine("tesseract")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(ocr.importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto") == choose_engine("none") == "none"
    with pytest.raises(CorpusError, match=r'rapidocr is not installed: pip install "mmr5-lab\[ocr\]"'):
        choose_engine("rapidocr")
    with pytest.raises(CorpusError, match="tesseract is not installed: apt-get install tesseract-ocr"):
        choose_engine("tesseract")
    with pytest.raises(CorpusError, match="unknown OCR 'eyes'; there is: auto, tesseract, rapidocr, none"):
        choose_engine("eyes")


def test_rotated_pages_and_forms_are_rendered_as_they_are_seen(tmp_path):
    with pypdfium2.PdfDocument.new() as new:
        new.new_page(200, 100).set_rotation(90)
        new.save(tmp_path / "turned.pdf")
    document = open_pdf(tmp_path / "turned.pdf")
    assert pdf.render_page(document[0], 20_000).size == (100, 200)
    document.close()


def page(path, number: int = 0, engine: str = "none") -> pdf.FinishedPage:
    document = open_pdf(path)
    try:
        return make_page(document, number, Rendering(max_pixels=50_000, engine=engine))
    finally:
        document.close()


def test_a_hyphen_at_a_line_s_end_is_told_from_other_signs(tmp_path):
    """In the second file the font calls "~" U+0002, which is how PDFium writes a hyphen, too."""
    lines_pdf(tmp_path / "a.pdf", ["A study of photo-", "synthesis in well-", "known plants"])
    assert page(tmp_path / "a.pdf").text == f"A study of photo{HYPHEN}synthesis in well{HYPHEN}known plants"
    names = b"1 begincodespacerange <00> <FF> endcodespacerange 1 beginbfchar <7E> <0002> endbfchar"
    to_unicode = stream(b"begincmap /CMapName /X def /CMapType 2 def %s endcmap" % names)
    font = FONT[:-2] + b"/ToUnicode 4 0 R >>"
    lines_pdf(tmp_path / "b.pdf", ["one~two~three photo-", "synthesis"], font=font, more=(to_unicode,))
    assert page(tmp_path / "b.pdf").text == f"one two three photo{HYPHEN}synthesis"


def test_words_off_the_page_are_not_read_and_lines_not_glued(tmp_path):
    """The page is turned and shows a part of what is drawn; superscripts stand on lines of their own."""
    content = stream(
        b"BT /F1 12 Tf 110 150 Td (seen) Tj ET BT /F1 12 Tf 110 20 Td (hidden) Tj ET "
        b"BT /F1 12 Tf 110 250 Td (note) Tj /F1 6 Tf 0 6 Td (1) Tj /F1 12 Tf 8 -6 Td (says) Tj ET"
    )
    entries = b"/MediaBox [0 0 400 400] /CropBox [100 100 300 300] /Rotate 90 /Contents 4 0 R"
    pages_pdf(tmp_path / "a.pdf", [entries + b" /Resources << /Font << /F1 3 0 R >> >>"], FONT, content)
    assert "seen" in page(tmp_path / "a.pdf").text
    assert "hidden" not in page(tmp_path / "a.pdf").text
    assert page(tmp_path / "a.pdf").text.split()[-2:] != ["note1says"]


def widget(entries: bytes, y: int, flags: int = 4) -> bytes:
    box = b"/Rect [50 %d 400 %d] /F %d /DA (/F1 12 Tf 0 g)" % (y, y + 20, flags)
    return b"<< /Type /Annot /Subtype /Widget %s %s >>" % (entries, box)


def test_values_of_form_fields_are_read_as_they_are_seen(tmp_path):
    """Hidden fields and passwords are not; a note typed onto the page is."""
    fields = [
        widget(b"/FT /Tx /T (name) /V (Ada Lovelace)", 600),
        widget(b"/FT /Tx /T (hidden) /V (secret)", 560, flags=2),
        widget(b"/FT /Ch /Ff 131072 /T (country) /Opt [(Norway) (Peru)] /V (Peru)", 520),
        widget(b"/FT /Tx /Ff 8192 /T (pw) /V (hunter2)", 480),
        widget(b"/FT /Tx /Ff 4096 /T (lines) /V (First line\\rsecond line)", 420),
        b"<< /Type /Annot /Subtype /FreeText /Contents (typed here) /Rect [50 300 400 330] /F 4 /DA (/F1 12 Tf 0 g) >>",
    ]
    numbers = b" ".join(b"%d 0 R" % number for number in range(5, 5 + len(fields)))
    entries = b"/MediaBox [0 0 595 842] /Contents 4 0 R /Annots [%s] /Resources << /Font << /F1 3 0 R >> >>" % numbers
    form = b"/AcroForm << /Fields [%s] /DR << /Font << /F1 3 0 R >> >> /NeedAppearances true >>" % numbers[:-6]
    content = stream(b"BT /F1 12 Tf 50 700 Td (Name and country:) Tj ET")
    pages_pdf(tmp_path / "form.pdf", [entries], FONT, content, *fields, catalogue=form)
    words = page(tmp_path / "form.pdf").text.split()
    assert words[:3] == ["Name", "and", "country:"]
    assert {"Ada", "Lovelace", "Peru", "First", "second", "typed"} <= set(words)
    assert not {"secret", "hunter2", "Norway"} & set(words)


def scan_pdf(path, size: tuple[int, int], lines: list[str], stamp: bytes = b"") -> None:
    """A picture of some lines that fills a page of some points, and below it a line of text."""
    width, height = size
    picture = Image.new("L", (width * 2, height * 2), "white")
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((40, 60 + number * (height * 2 - 120) // len(lines)), line, "black", ImageFont.load_default(36))
    entries = b"/Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceGray /BitsPerComponent 8"
    image = stream(zlib.compress(picture.tobytes()), entries % picture.size + b" /Filter /FlateDecode")
    content = stream(b"q %d 0 0 %d 0 0 cm /I Do Q BT /F1 8 Tf 20 20 Td (%s) Tj ET" % (width, height, stamp))
    resources = b"/Resources << /Font << /F1 3 0 R >> /XObject << /I 4 0 R >> >>"
    pages_pdf(path, [b"/MediaBox [0 0 %d %d] /Contents 5 0 R %s" % (*size, resources)], FONT, image, content)


needs_tesseract = pytest.mark.skipif(not installed("tesseract"), reason="tesseract is not installed")


@needs_tesseract
def test_a_stamp_over_a_scan_is_not_the_page_s_text(tmp_path):
    lines = ["Revenue grew twice", "in the northern region"]
    scan_pdf(tmp_path / "a.pdf", (400, 500), lines, stamp=b"Downloaded from a library")
    assert page(tmp_path / "a.pdf").read_by == "poor text layer"
    read = page(tmp_path / "a.pdf", engine="tesseract")
    assert read.read_by == "tesseract"
    assert read.text.split()[:7] == ["Revenue", "grew", "twice", "in", "the", "northern", "region"]
    # a title over a photograph stays as the layer has it
    scan_pdf(tmp_path / "b.pdf", (400, 500), [], stamp=b"A cover")
    assert page(tmp_path / "b.pdf", engine="tesseract").read_by == "text layer"


@needs_tesseract
def test_a_garbage_layer_is_read_by_ocr(tmp_path):
    """The page shows digits, and its font calls them private characters."""
    names = b"1 begincodespacerange <00> <FF> endcodespacerange 1 beginbfrange <20> <7F> <E020> endbfrange"
    to_unicode = stream(b"begincmap /CMapName /X def /CMapType 2 def %s endcmap" % names)
    font = FONT[:-2] + b"/ToUnicode 4 0 R >>"
    lines_pdf(tmp_path / "a.pdf", ["Revenue grew by 1234"], size=(300, 120), font=font, more=(to_unicode,))
    assert page(tmp_path / "a.pdf").read_by in ("none", "poor text layer")
    read = page(tmp_path / "a.pdf", engine="tesseract")
    assert (read.read_by, read.text.split()) == ("tesseract", ["Revenue", "grew", "by", "1234"])


@needs_tesseract
def test_a_long_page_is_read_in_strips(tmp_path):
    """A receipt of 200 × 3,000 points, which as one picture within the budget of OCR would be too coarse."""
    lines = [f"{name} {number}.50" for number, name in enumerate(["Bread", "Milk", "Cheese", "Apples"] * 8, 10)]
    scan_pdf(tmp_path / "a.pdf", (200, 3000), lines)
    words = page(tmp_path / "a.pdf", engine="tesseract").text.split()
    wanted = [word for line in lines for word in line.split()]
    assert len(set(wanted) & set(words)) >= 0.95 * len(set(wanted))
    assert words[0] == "Bread"


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (0.01, 0.02), (14_400, 14_400)])
def test_odd_sizes_keep_to_the_budget(tmp_path, size):
    pages_pdf(tmp_path / "a.pdf", [b"/MediaBox [0 0 %r %r]" % size])
    made = page(tmp_path / "a.pdf")
    picture = Image.open(io.BytesIO(made.picture))
    assert picture.width * picture.height <= 50_000
    assert max(picture.size) <= 65_000


@pytest.mark.parametrize("size", [(595, 2147483648), (0, 100), (100, 1e30)])
def test_impossible_sizes_are_named(tmp_path, size):
    pages_pdf(tmp_path / "a.pdf", [b"/MediaBox [0 0 %.1f %.1f]" % size])
    made = page(tmp_path / "a.pdf")
    assert made.picture == b"" or 0 in size  # PDFium takes a page without area for one of Letter's size
    assert "points; at most 100,000 can be rendered" in made.problem or 0 in size
