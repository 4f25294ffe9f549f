"""The miniature's documents: small pages with known content, in MMDocIR's own files.

A document is a report about two or three entities, three measures and three years. Each page states the
product of a few of them (a table of two measures by two years states four facts), so the other pages of a
document are natural hard negatives: the same entity in another year, another measure of it, another row.
Everything is drawn in a real font from a seed; words and their boxes are known.

Remake the shipped corpora: ``python -m mmr5_lab.mini.documents data/mini/corpus`` and ``… data/mini/long --long``, for
evaluation on documents of 12 to 20 pages, so that ten candidates are ten.
"""

import argparse
import io
import itertools
import random
import textwrap
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.writing import write_corpus

WIDTH, HEIGHT, CELL = 140, 168, 28  # pixels; a cell is what one visual token of the miniature model sees

ENTITIES = [
    "Orion", "Vega", "Lyra", "Atlas", "Nova", "Titan", "Delta", "Sigma", "Omega", "Zephyr", "Falcon", "Cedar",
    "Maple", "Birch", "Aspen", "Coral", "Amber", "Jade", "Onyx", "Ruby", "Quartz", "Pearl", "Cobalt", "Copper",
    "Silver", "Harbor", "Summit", "Canyon", "Meadow", "Lagoon", "Tundra", "Mesa", "Fjord", "Delphi", "Sparta",
    "Troy", "Corinth", "Thebes", "Argos", "Rhodes",
]  # fmt: skip
MEASURES = [
    "revenue", "profit", "staff", "patents", "exports", "imports", "loans", "grants", "visitors", "permits",
    "rainfall", "harvest", "turnout", "energy", "traffic", "tuition", "rents", "wages", "debt", "sales",
]  # fmt: skip
YEARS = [str(year) for year in range(2014, 2024)]
KINDS = ("text", "table", "chart", "figure")

Fact = tuple[str, str, str]  # entity, measure, year
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

# MMDocIR's ten domains, each with the colour of its headings, and its names for where the evidence stands.
DOMAINS = {
    "Academic paper": (25, 25, 25),
    "Administration/Industry file": (20, 70, 70),
    "Brochure": (120, 30, 90),
    "Financial report": (15, 60, 120),
    "Government": (110, 25, 25),
    "Guidebook": (30, 90, 40),
    "Laws": (70, 50, 20),
    "News": (10, 10, 60),
    "Research report / Introduction": (60, 30, 110),
    "Tutorial/Workshop": (130, 70, 10),
}
QUESTION_TYPE = {
    "text": "Pure-text (Plain-text)",
    "table": "Table",
    "chart": "Chart",
    "figure": "Generalized-text (Layout)",
}
QUESTIONS = (
    "What was the {measure} of {entity} in {year}?",
    "How high was the {measure} of {entity} in {year}?",
    "In {year}, what {measure} did {entity} report?",
)
FINE_PRINT = [
    "the", "board", "notes", "that", "figures", "are", "rounded", "and", "restated", "where", "methods", "changed;",
    "see", "the", "annex", "for", "sources,", "scope", "and", "definitions", "used", "by", "the", "group", "in",
    "this", "section", "of", "the", "report", "and", "in", "the", "notes", "that", "follow",
]  # fmt: skip

SPLITS = {"sft": (64, 5), "rl": (40, 6), "eval": (50, 8)}  # documents (few are learnt by heart), questions of each
LONG_SPLITS = {"eval": (40, 8)}


@dataclass(frozen=True)
class PageContent:
    """What a page states: every (entity, measure, year) of the product, with one value each.

    ``values`` are in the order of ``itertools.product(entities, measures, years)``.
    """

    kind: str
    entities: tuple[str, ...]
    measures: tuple[str, ...]
    years: tuple[str, ...]
    values: tuple[int, ...]

    @property
    def words(self) -> list[str]:
        """Entities, measures and years in the order in which a reader meets them on the page, each once."""
        if self.kind == "table":
            return [*self.entities, *self.years, *self.measures]
        if self.kind == "chart" and len(self.entities) > 1:
            return [*self.measures, *self.years, *self.entities]
        return [*self.entities, self.measures[0], *self.years, *self.measures[1:]]

    @property
    def facts(self) -> list[Fact]:
        return list(itertools.product(self.entities, self.measures, self.years))


def random_content(rng: random.Random, entities, measures, years) -> PageContent:
    """A page about some of the given entities, measures and years, each in alphabetical order."""
    kind = rng.choice(KINDS)
    shape = {
        "text": [(1, 1, 2), (1, 2, 1), (1, 1, 1)],
        "table": [(1, 2, 2), (1, 1, 2), (1, 2, 1)],
        "chart": [(2, 1, 1), (1, 1, 2)],
        "figure": [(1, 1, 1)],
    }
    counts = rng.choice(shape[kind])
    about, what, when = (
        tuple(sorted(rng.sample(list(pool), n))) for pool, n in zip((entities, measures, years), counts, strict=True)
    )
    values = [rng.randint(10, 99) for _ in range(counts[0] * counts[1] * counts[2])]
    return PageContent(kind, about, what, when, tuple(values))


def describe(content: PageContent, asked: dict[str, str] | None = None) -> str:
    """What a page shows, in reading order; with ``asked`` (entity, measure, year) each word is compared with it.

    >>> page = PageContent("table", ("Orion",), ("staff", "sales"), ("2014",), (12, 34))
    >>> describe(page)
    'a table with Orion 2014 staff sales'
    >>> describe(page, {"entity": "Orion", "measure": "debt", "year": "2014"})
    'a table with Orion (right) 2014 (right) staff (wrong) sales (wrong)'
    """
    words = content.words
    if asked is not None:
        words = [f"{word} ({'right' if word in asked.values() else 'wrong'})" for word in words]
    return f"a {content.kind} with {' '.join(words)}"


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it, so that pages look the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@dataclass(frozen=True)
class DrawnPage:
    """A page image (RGB, WIDTH × HEIGHT), its words with boxes ``(word, (left, top, right, bottom))``, and the boxes of
    the values that it states, a bar's with its number."""

    image: Image.Image
    words: list[tuple[str, Box]]
    values: dict[Fact, Box]


# As printed, lower-cased -> as the tokenizer has it.
WORDS = {word.lower(): word for word in (*ENTITIES, *MEASURES, *YEARS)}
INK, LEFT, TOP = (25, 25, 30), 6, 8  # the text's colour, and where a page's first line begins


class Sheet:
    """A page that is being drawn; it notes where each word of the vocabulary stands."""

    def __init__(self, content: PageContent, colour: tuple[int, int, int], rng: random.Random):
        self.content, self.colour, self.rng = content, colour, rng
        paper = rng.choice([(255, 255, 255), (253, 251, 243), (246, 249, 253)])
        self.image = Image.new("RGB", (WIDTH, HEIGHT), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.words: list[tuple[str, Box]] = []
        self.values: dict[Fact, Box] = {}

    def write(self, x: float, y: float, text: str, size: int, bold: bool = False, fill=INK) -> Box:
        """Write a line; return the box of its last word."""
        for word in text.split(" "):
            self.draw.text((x, y), word, font=font(size, bold), fill=fill)
            plain = word.strip(".,:")
            box = font(size, bold).getbbox(plain)
            at = (int(x + box[0]), int(y + box[1]), int(x + box[2]), int(y + box[3]))
            if plain.lower() in WORDS:
                self.words.append((WORDS[plain.lower()], at))
            x += font(size, bold).getlength(word + " ")
        return at

    def fine_print(self, y: int, lines: int) -> None:
        """Write small grey lines: a person sees body text, at a size that the model cannot read."""
        for k in range(lines):
            start = self.rng.randrange(len(FINE_PRINT))
            line = " ".join((FINE_PRINT * 2)[start : start + 9])
            line = textwrap.shorten(line, 36, placeholder="")
            self.draw.text((LEFT, y + 8 * k), line, font=font(6), fill=(150, 150, 155))


def draw_page(content: PageContent, domain: str, number: int, rng: random.Random) -> DrawnPage:
    """Draw one page. ``number`` is the 1-based page number in its foot; ``rng`` decorates."""
    sheet = Sheet(content, DOMAINS[domain], rng)
    sheet.draw.rectangle([0, 0, WIDTH, 2], fill=sheet.colour)
    sheet.draw.text((WIDTH - 16, HEIGHT - 10), str(number), font=font(6), fill=(120, 120, 120))
    {"text": _draw_text, "table": _draw_table, "chart": _draw_chart, "figure": _draw_figure}[content.kind](sheet)
    return DrawnPage(sheet.image, sheet.words, sheet.values)


def _draw_text(sheet: Sheet) -> None:
    content = sheet.content
    sheet.write(LEFT, TOP, content.entities[0], 13, True, sheet.colour)
    y = TOP + CELL
    for k, (fact, value) in enumerate(zip(content.facts, content.values, strict=True)):
        _, measure, year = fact
        if k == 0:
            text = f"{measure.capitalize()} in {year}"
        else:
            text = f"and in {year}" if len(content.years) > 1 else measure.capitalize()
        sheet.values[fact] = sheet.write(LEFT, y, f"{text}: {value}", 11)
        sheet.fine_print(y + 17, 1)
        y += CELL
    while y < HEIGHT - 30:
        sheet.fine_print(y, 3)
        y += CELL


def _draw_table(sheet: Sheet) -> None:
    content = sheet.content
    values = dict(zip(content.facts, content.values, strict=True))
    sheet.write(LEFT, TOP, content.entities[0], 13, True, sheet.colour)
    columns = [LEFT + 62 + 34 * k for k in range(len(content.years))]
    for x, year in zip(columns, content.years, strict=True):
        sheet.write(x, TOP + CELL, year, 10, True)
    sheet.draw.line([LEFT, TOP + CELL + 17, WIDTH - 6, TOP + CELL + 17], fill=sheet.colour)
    for row, measure in enumerate(content.measures):
        y = TOP + CELL * (2 + row)
        sheet.write(LEFT, y, measure.capitalize(), 10)
        for x, year in zip(columns, content.years, strict=True):
            fact = (content.entities[0], measure, year)
            sheet.values[fact] = sheet.write(x + 4, y, str(values[fact]), 10)
        sheet.draw.line([LEFT, y + 18, WIDTH - 6, y + 18], fill=(205, 205, 205))
    sheet.fine_print(TOP + CELL * 4 + 4, 3)


def _draw_chart(sheet: Sheet) -> None:
    """Draw two bars: two years of an entity, or two entities in a year."""
    content, draw = sheet.content, sheet.draw
    if len(content.years) > 1:
        title, labels = (content.entities[0], content.measures[0]), content.years
    else:
        title, labels = (content.measures[0].capitalize(), content.years[0]), content.entities
    sheet.write(LEFT, TOP, title[0], 12, True, sheet.colour)
    sheet.write(LEFT + 8, TOP + CELL - 4, title[1], 11, False, sheet.colour)
    ground = TOP + CELL * 4 - 4
    draw.line([LEFT, ground, WIDTH - 8, ground], fill=INK)
    shade = sheet.rng.choice([(86, 140, 200), (214, 139, 60), (90, 160, 110)])
    for k, (label, fact, value) in enumerate(zip(labels, content.facts, content.values, strict=True)):
        left, height = LEFT + 8 + 64 * k, 10 + value * 40 // 100
        draw.rectangle([left, ground - height, left + 30, ground - 1], fill=shade)
        draw.text((left + 8, ground - height - 9), str(value), font=font(7), fill=INK)
        sheet.values[fact] = (left, ground - height - 9, left + 30, ground)
        sheet.write(left - 2, ground + 5, label, 10)
    sheet.fine_print(TOP + CELL * 5 - 4, 2)


def _draw_figure(sheet: Sheet) -> None:
    """Draw a pie in a frame, with its share below."""
    content, draw, top = sheet.content, sheet.draw, TOP + 2
    share = content.values[0]
    frame = [LEFT, top - 2, WIDTH - 10, top + CELL * 2 - 2]
    draw.rounded_rectangle(frame, 6, fill=(232, 236, 240), outline=sheet.colour)
    left = LEFT + sheet.rng.randint(8, 60)
    pie = [left, top + 3, left + 44, top + 47]
    draw.ellipse(pie, fill=(250, 250, 250), outline=sheet.colour)
    draw.pieslice(pie, -90, -90 + share * 360 // 100, fill=sheet.colour)
    sheet.write(LEFT, TOP + CELL * 2 + 4, content.entities[0], 12, True)
    line = f"{content.measures[0]} in {content.years[0]}: {share}%"
    sheet.values[content.facts[0]] = sheet.write(LEFT, TOP + CELL * 3 + 2, line, 10)
    sheet.fine_print(TOP + CELL * 4, 4)


def text_layer(page: DrawnPage, kind: str, rng: random.Random, noise: float) -> str:
    """A noisy text layer: confused characters, dropped words, of a chart no more than its heading."""
    confuse = str.maketrans({"o": "0", "l": "1", "e": "c", "i": "l", "s": "5", "a": "d", "0": "O", "1": "l", "2": "z"})
    out = []
    for word, _ in page.words[:2] if kind == "chart" else page.words:
        roll = rng.random()
        if roll >= noise:  # two thirds of the noise confuses a word, one third drops it
            out.append(word)
        elif roll < noise * 2 / 3:
            out.append(word.translate(confuse))
    start = rng.randrange(len(FINE_PRINT))
    return " ".join(out + (FINE_PRINT * 2)[start : start + rng.randint(6, 18)])


def make_document(
    name: str, domain: str, split: str, questions: int, rng: random.Random, noise: float = 0.2, long: bool = False
):
    """One document -> (annotation in MMDocIR's form, page rows). 6 to 12 pages.

    long: 12 to 20 pages about three or four entities and four measures and years; with fewer, too many facts would
        appear on two pages
    """
    entities = rng.sample(ENTITIES, rng.choice([3, 4] if long else [2, 2, 3]))
    measures, years = rng.sample(MEASURES, 3 + long), sorted(rng.sample(YEARS, 3 + long))
    count = rng.randint(12, 20) if long else rng.randint(6, 12)
    pages = [random_content(rng, entities, measures, years) for _ in range(count)]
    drawn = [draw_page(content, domain, k + 1, rng) for k, content in enumerate(pages)]
    rows = []
    for k, (content, page) in enumerate(zip(pages, drawn, strict=True)):
        buffer = io.BytesIO()
        page.image.quantize(64).save(buffer, "PNG", optimize=True)
        rows.append({
            "doc_name": name, "domain": domain, "passage_id": str(k), "image_path": f"{name}_{k}.png",
            "image_binary": buffer.getvalue(), "ocr_text": text_layer(page, content.kind, rng, noise), "vlm_text": "",
        })  # fmt: skip
    return {
        "doc_name": name, "domain": domain, "split": split, "pages": [asdict(content) for content in pages],
        "questions": make_questions(pages, drawn, questions, rng),
    }, rows  # fmt: skip


def make_questions(pages: list[PageContent], drawn: list[DrawnPage], count: int, rng: random.Random) -> list[dict]:
    """Questions about facts of the document; a fact on more than two pages is not asked, on two seldom."""
    where: dict[tuple[str, str, str], list[int]] = {}
    for k, content in enumerate(pages):
        for fact in content.facts:
            where.setdefault(fact, []).append(k)
    single = [fact for fact, at in where.items() if len(at) == 1]
    double = [fact for fact, at in where.items() if len(at) == 2]
    rng.shuffle(single)
    rng.shuffle(double)
    chosen = double[: max(1, count // 5)]
    chosen += single[: count - len(chosen)]
    rng.shuffle(chosen)
    questions = []
    for fact in chosen:
        entity, measure, year = fact
        boxes = []
        for k in where[fact]:
            stated = [*(box for word, box in drawn[k].words if word in fact), drawn[k].values[fact]]
            lefts, tops, rights, bottoms = zip(*stated, strict=True)
            bbox = [min(lefts) - 1, min(tops) - 1, max(rights) + 1, max(bottoms) + 1]
            boxes.append({"page": k, "page_size": [WIDTH, HEIGHT], "bbox": bbox})
        first = pages[where[fact][0]]
        questions.append({
            "Q": rng.choice(QUESTIONS).format(entity=entity, measure=measure, year=year),
            "A": str(dict(zip(first.facts, first.values, strict=True))[fact]),
            "page_id": where[fact],
            "type": str(sorted({QUESTION_TYPE[pages[k].kind] for k in where[fact]})),
            "layout_mapping": boxes,
            "facts": {"entity": entity, "measure": measure, "year": year},
        })  # fmt: skip
    return questions


def make_corpus(
    folder: str | Path, seed: int = 2026, splits: dict[str, tuple[int, int]] | None = None, long: bool = False
) -> Corpus:
    """Write the miniature corpus into ``folder`` and load it. Every split has documents of its own."""
    rng = random.Random(seed)
    annotations, rows, first = [], [], 0
    for split, (documents, questions) in (splits or (LONG_SPLITS if long else SPLITS)).items():
        for k in range(documents):
            domain = list(DOMAINS)[k % len(DOMAINS)]
            name = f"{'long-' * long}{split}-{k:03d}"
            annotation, pages = make_document(name, domain, split, questions, rng, long=long)
            annotation["page_indices"] = [first, first + len(pages) - 1]
            annotation["layout_indices"] = [0, 0]
            first += len(pages)
            annotations.append(annotation)
            rows.extend(pages)
    write_corpus(folder, annotations, rows)
    return load_corpus(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the miniature's corpus (the same files for the same seed).")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--long", action="store_true", help="documents of 12 to 20 pages, for evaluation alone")
    arguments = parser.parse_args()
    corpus = make_corpus(arguments.folder, arguments.seed, long=arguments.long)
    print(f"{len(corpus.documents)} documents, {len(corpus.questions)} questions in {arguments.folder}")
