"""A page looks the same however it is given, and on every path on which it is opened."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.writing import write_corpus
from mmr5_lab.images import MAX_PIXELS, MAX_SIDE, open_page, page_size, plain_file
from mmr5_lab.models.chat import page_url
from mmr5_lab.prompting.prompts import PROMPT_VERSION
from mmr5_lab.reranking.pages import Pages
from mmr5_lab.traces.construction import Candidates, rl_dataset, sft_dataset
from mmr5_lab.views.thumbnails import thumbnail_url

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
TURNED = {  # EXIF orientation -> how an upright page is stored, by https://exiftool.org/TagNames/EXIF.html
    1: lambda page: page,
    2: lambda page: page[:, ::-1],
    3: lambda page: page[::-1, ::-1],
    4: lambda page: page[::-1],
    5: lambda page: page.transpose(1, 0, 2),
    6: lambda page: np.rot90(page),
    7: lambda page: np.rot90(page, 2).transpose(1, 0, 2),
    8: lambda page: np.rot90(page, -1),
}


def upright() -> np.ndarray:
    """A white page of 40 × 56 pixels with a red corner at the upper left and a green one at the upper right."""
    page = np.full((56, 40, 3), 255, np.uint8)
    page[:16, :16], page[:16, -16:] = RED, GREEN
    return page


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    return encoded(Image.fromarray(TURNED[orientation](upright()).copy()), kind, exif=exif, **options)


def grey_ramp(dtype: type, white: float) -> np.ndarray:
    return (np.linspace(0, 1, 40 * 56).reshape(56, 40) * white).astype(dtype)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def declared(width: int, height: int) -> bytes:
    """A PNG that says it is so large, with pixels of one row."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_notes(where: str) -> bytes:
    """A PNG with 3 MB of text or colour profile, before or behind its pixels."""
    image, notes, big = Image.fromarray(upright()), PngInfo(), "a" * 3_000_000
    if where == "colour profile":
        return encoded(image, "PNG", icc_profile=big.encode())
    notes.add_text("Comment", big, zip=True)
    data = encoded(image, "PNG", pnginfo=notes)
    if where == "text":
        return data
    plain = encoded(image, "PNG")
    return plain[:-12] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(big.encode())) + plain[-12:]


def see_through(mode: str) -> Image.Image:
    """Black ink on nothing."""
    ink = Image.fromarray(grey_ramp(np.uint8, 255))
    image = Image.new("RGB", ink.size).convert(mode)
    image.putalpha(ink.point(lambda value: 255 - value))
    return image


PALETTE = Image.fromarray(upright()).quantize(4)
FILES = {
    **{f"{kind} turned {n}": stored(n, kind) for kind in ("JPEG", "PNG", "TIFF", "WEBP") for n in TURNED},
    "16-bit grey": encoded(Image.fromarray(grey_ramp(np.uint16, 65535)), "PNG"),
    "palette": encoded(PALETTE, "PNG"),
    "palette with a clear colour": encoded(PALETTE, "PNG", transparency=0),
    "CMYK": encoded(Image.fromarray(upright()).convert("CMYK"), "JPEG", quality=95),
    "LA": encoded(see_through("LA"), "PNG"),
    "RGBA": encoded(see_through("RGBA"), "PNG"),
    "1 bit": encoded(Image.fromarray(upright()).convert("1"), "PNG"),
    "GIF": encoded(Image.fromarray(upright()), "GIF"),
    "animated GIF": encoded(
        Image.fromarray(upright()), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 56), BLUE)]
    ),
    "float TIFF": encoded(Image.fromarray(grey_ramp(np.float32, 1)), "TIFF"),
    "1 × 1": encoded(Image.new("RGB", (1, 1), RED), "PNG"),
    "5000 × 5000": encoded(Image.new("L", (5000, 5000), 200), "PNG"),
    **{where: with_notes(where) for where in ("text", "text behind the pixels", "colour profile")},
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_turns_a_page_upright(kind, orientation):
    image = open_page(stored(orientation, kind))
    assert np.abs(np.asarray(image).astype(int) - upright()).max() <= (12 if kind == "JPEG" else 0)
    assert open_page(image).tobytes() == image.tobytes(), "it is turned once"


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", TURNED)
def test_the_size_of_a_page_is_known_without_decoding_it(kind, orientation):
    data = stored(orientation, kind)
    assert page_size(data) == open_page(data).size
    assert page_size(open_page(data)) == open_page(data).size
    if kind in ("PNG", "JPEG"):
        assert page_size(data[:-40]) == open_page(data).size, "its pixels are cut off"


def test_an_image_that_was_opened_elsewhere_is_turned_too_and_left_as_it_was():
    theirs = Image.open(io.BytesIO(stored(6)))
    assert open_page(theirs).tobytes() == upright().tobytes()
    assert (theirs.size, theirs.getexif()[0x0112]) == ((56, 40), 6)


@pytest.mark.parametrize(
    ("values", "white"), [(np.uint16, 65535), (np.int32, 65535), (np.float32, 1), (np.float32, 255), (np.uint16, 255)]
)
def test_wide_greys_are_scaled_to_eight_bits(values, white):
    expected = grey_ramp(np.float64, 255)
    for source in (grey_ramp(values, white), Image.fromarray(grey_ramp(values, white))):
        shown = np.asarray(open_page(source))
        assert shown.shape == (56, 40, 3)
        assert np.abs(shown[:, :, 0] - expected).max() <= 1


@pytest.mark.parametrize("name", ["LA", "RGBA"])
def test_what_is_transparent_shows_white_paper(name):
    shown = np.asarray(open_page(FILES[name]))[:, :, 0].astype(int)
    assert np.abs(shown - grey_ramp(np.uint8, 255)).max() <= 1


def test_a_clear_palette_colour_is_white_and_an_animation_shows_its_first_picture():
    clear = np.asarray(open_page(FILES["palette with a clear colour"]))
    colour = np.asarray(open_page(PALETTE))[np.asarray(PALETTE) == 0][0]
    assert (clear[np.asarray(PALETTE) == 0] == WHITE).all()
    assert tuple(colour) in (RED, GREEN, WHITE)
    assert open_page(FILES["animated GIF"]).getpixel((20, 40)) == WHITE


def test_every_form_of_source_gives_the_same_pixels(tmp_path, monkeypatch):
    data, page = stored(6), upright()
    path = tmp_path / "a page#1.png"
    path.write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    at_its_end = io.BytesIO(data)
    at_its_end.read()
    with path.open("rb") as file:
        sources = [
            path, str(path), "~/a page#1.png", path.as_uri(), f"file://localhost{path.as_uri()[7:]}",
            data, bytearray(data), memoryview(data), io.BytesIO(data), at_its_end, file,
            {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"path": str(path)},
            Image.open(path), page, page / 255, np.dstack([page, np.full(page.shape[:2], 255, "u1")]),
        ]  # fmt: skip
        assert [open_page(source).tobytes() == page.tobytes() for source in sources] == [True] * len(sources)
    assert open_page(page[:, :, 0] > 0).getpixel((30, 0)) == BLACK
    assert open_page(page[:, :, :1]).getpixel((30, 0)) == BLACK


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", r"^the page \(given as bytes\) is empty \(0 bytes\)"),
        (b"%PDF-1.7\n...", r"no known format \(they begin with b'%PDF-1.7"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n", "is an EPS file"),
        ("nowhere.png", "^nowhere.png does not exist"),
        ("~/nowhere.png", "^~/nowhere.png does not exist"),
        ("file:///nowhere.png", "^file:///nowhere.png does not exist"),
        ("https://example.org/a.png", "cannot be read: it is a https address; save the image"),
        ("data:image/png;base64,AAAA", "it is a data address"),
        (Path("."), r"^\. cannot be read: Is a directory"),
        ({"bytes": None, "path": None}, "is empty"),
        (None, "given as NoneType.* is a NoneType; expected a path, image bytes, a PIL image or an array"),
        (io.StringIO("text"), "is a str; expected a path"),
        (np.zeros((3, 40, 50)), r"is an array of float64 of shape \(3, 40, 50\); expected numbers of shape \(height"),
        (np.array([["a"]]), "is an array of <U1"),
        (np.zeros((0, 5)), "has no pixels"),
        (Image.new("RGB", (0, 5)), r"has no pixels \(0 × 5\)"),
        (declared(100_000, 100_000), "is not a readable image: Image size"),
        (declared(2**31 - 1, 1), "is not a readable image: Image size"),
        (declared(MAX_SIDE + 1, 10), rf"is too large \({MAX_SIDE + 1} × 10 pixels\)"),
        (declared(5000, 5000), "is truncated or corrupt"),
        (stored(1)[:-40], "is truncated or corrupt"),
        (stored(1, "JPEG")[:-300], "is truncated or corrupt"),
        (stored(1, "WEBP")[:60], "corrupt|not a readable image"),
        (stored(1, "TIFF")[:200], "corrupt|not a readable image"),
        (stored(1, "JPEG")[:2], "is not a readable image"),
    ],
)
def test_what_cannot_be_opened_is_named(source, message):
    for open_it in (
        (open_page, plain_file) if not isinstance(source, bytes) or "corrupt" not in message else (open_page,)
    ):
        with pytest.raises(ValueError, match=message):
            open_it(source)


def test_the_bound_holds_where_pillow_has_none(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(ValueError, match=f"page 7 is too large \\({side} × {side} pixels"):
        open_page(declared(side, side), "page 7")


def test_broken_exif_costs_no_page():
    data = encoded(Image.fromarray(upright()), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk")
    assert open_page(data).tobytes() == upright().tobytes()


@pytest.mark.parametrize("name", FILES)
def test_plain_files_show_the_same_in_a_program_that_ignores_exif_and_transparency(name):
    data, kind = plain_file(FILES[name])
    theirs = Image.open(io.BytesIO(data))
    assert (theirs.format, theirs.getexif().get(0x0112, 1)) == (kind.upper(), 1)
    assert theirs.mode in ("1", "L", "P", "RGB")
    assert theirs.convert("RGB").tobytes() == open_page(FILES[name]).tobytes()


@pytest.mark.parametrize("name", ["JPEG turned 1", "palette", "1 bit", "5000 × 5000"])
def test_files_that_are_plain_stay_as_they_are(name):
    assert plain_file(FILES[name])[0] == FILES[name]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("pages")
    question = {"Q": "What is shown?", "A": "", "page_id": [0], "type": "Figure", "layout_mapping": []}
    pages = [{"doc_name": "all.pdf", "image_binary": data} for data in FILES.values()]
    write_corpus(folder, [{"doc_name": "all.pdf", "domain": "News", "questions": [question]}], pages)
    return load_corpus(folder)


def test_every_path_shows_the_same_pixels(corpus, tmp_path):
    numbers = list(range(len(FILES)))
    wanted = [open_page(data) for data in FILES.values()]
    files = [corpus.page_bytes("all.pdf", number) for number in numbers]

    reranker = Pages([("?", files)])
    shown = {"corpus": [corpus.page_image("all.pdf", number) for number in numbers]}
    shown["reranker"] = [reranker.image(key) for key in reranker.keys[0]]
    shown["server"] = [
        Image.open(io.BytesIO(base64.b64decode(page_url(data).split(",")[1]))).convert("RGB") for data in files
    ]
    candidates = Candidates(corpus.questions.iloc[0], numbers, [1])
    shown["RL"] = rl_dataset(corpus, [candidates])[0]["images"]
    names = []
    for number, data in enumerate(files):  # as an imported trace may have them: the files as they were
        names.append(f"{number}.image")
        (tmp_path / names[-1]).write_bytes(data)
    trace = {
        "messages": [{"role": "assistant", "content": "<think>…</think><answer>[1]</answer>"}], "images": names,
        "query_id": "q", "query": "What?", "candidates": numbers, "prompt_version": PROMPT_VERSION,
    }  # fmt: skip
    (tmp_path / "traces.jsonl").write_text(json.dumps(trace) + "\n")
    shown["SFT"] = sft_dataset(tmp_path / "traces.jsonl")[0]["images"]
    for path, images in shown.items():
        for name, image, page in zip(FILES, images, wanted, strict=True):
            assert (image.mode, image.size) == ("RGB", page.size), (path, name)
            assert image.tobytes() == page.tobytes(), (path, name)


@pytest.mark.parametrize("number", [*range(8), *range(32, len(FILES))])
def test_thumbnails_are_upright_and_look_alike(corpus, number):
    page = corpus.page_image("all.pdf", number)
    made = open_page(base64.b64decode(thumbnail_url(corpus, "all.pdf", number, (20, 28)).split(",")[1]))
    page.thumbnail((20, 28))
    assert made.size == page.size
    assert np.abs(np.asarray(made).astype(int) - np.asarray(page)).mean() < 12


@pytest.mark.parametrize("pages", ["p0.png", b"...", Image.new("RGB", (5, 5)), Path("p0.png")])
def test_a_page_in_the_place_of_a_list_is_named(pages):
    with pytest.raises(ValueError, match=r"pair 0 .'q'.: the pages are a single .*; expected a list of pages"):
        Pages([("q", pages)])


def test_open_files_and_arrays_are_candidates_like_others():
    data = stored(6)
    pages = Pages([("q", [io.BytesIO(data), data, upright(), Image.open(io.BytesIO(data))])])
    assert len(set(pages.keys[0])) == 2, "files by their bytes, images by their pixels"
    assert [pages.image(key).tobytes() == upright().tobytes() for key in pages.keys[0]] == [True] * 4
