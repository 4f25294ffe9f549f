"""Corpus folders: reading and writing."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmr5_lab.corpus import page_store, writing
from mmr5_lab.corpus.documents import ANNOTATIONS, LAYOUT_COLUMNS, LAYOUTS, PAGES, load_corpus
from mmr5_lab.corpus.ids import CorpusError, page_id, parse_page_id
from mmr5_lab.corpus.page_store import PageStore
from mmr5_lab.corpus.writing import regroup_pages, write_corpus


def picture(grey: int, size: tuple[int, int] = (8, 10), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, grey).save(buffer, kind)
    return buffer.getvalue()


def page(doc_name: str, grey: int, text: str = "", **more) -> dict:
    return {"doc_name": doc_name, "image_binary": picture(grey), "ocr_text": text} | more


def document(doc_name: str, *questions: dict, **more) -> dict:
    return {"doc_name": doc_name, "domain": "Laws", "questions": list(questions)} | more


def question(text: str, gold: list[int], kind: str = "text-only", **more) -> dict:
    return {"Q": text, "A": "yes", "page_id": gold, "type": kind, "layout_mapping": []} | more


@pytest.fixture
def folder(tmp_path):
    """Two documents of two and three pages; page greys are 10, 11 and 20, 21, 22."""
    box = {"page": 2, "page_size": [612.0, 792.0], "bbox": [10, 20, 30, 40]}
    write_corpus(
        tmp_path / "corpus",
        [
            document("a b.pdf", question("First?", [1]), question("Second?", [0, 1], "['Chart', 'Table']")),
            document(
                "c.pdf",
                question("Third?", [2, 2], "[]", layout_mapping=[box], facts={"row": "Ada"}),
                domain="News",
                split="rl",
                pages=["known", "content"],
            ),
        ],
        [
            page("a b.pdf", 10, "alpha"),
            page("a b.pdf", 11, "beta"),
            page("c.pdf", 20),
            page("c.pdf", 21, " \n"),
            page("c.pdf", 22, "gamma", vlm_text="a page"),
        ],
    )
    return tmp_path / "corpus"


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / ANNOTATIONS).read_text().splitlines()]


def rewrite(folder, records) -> None:
    (folder / ANNOTATIONS).write_text("".join(json.dumps(record) + "\n" for record in records))


# --- reading ------------------------------------------------------------------------------------------------


def test_documents_and_questions_are_tables(folder):
    corpus = load_corpus(folder)
    assert corpus.documents.drop(columns="extra").to_dict("records") == [
        {"doc_name": "a b.pdf", "domain": "Laws", "split": "eval", "num_pages": 2, "first_row": 0},
        {"doc_name": "c.pdf", "domain": "News", "split": "rl", "num_pages": 3, "first_row": 2},
    ]
    assert corpus.documents["extra"].tolist() == [{}, {"pages": ["known", "content"]}]
    frame = corpus.questions
    assert frame["question_id"].tolist() == ["a%20b.pdf:q0", "a%20b.pdf:q1", "c.pdf:q0"]
    assert frame["question"].tolist() == ["First?", "Second?", "Third?"]
    assert frame["answer"].tolist() == ["yes"] * 3
    assert frame["domain"].tolist() == ["Laws", "Laws", "News"]
    assert frame["gold_pages"].tolist() == [[1], [0, 1], [2]]  # a page named twice counts once
    # one word, a list written as text, and an empty list
    assert frame["type"].tolist() == [("text-only",), ("Chart", "Table"), ()]
    assert frame["boxes"][2] == [{"page": 2, "page_size": [612.0, 792.0], "bbox": [10, 20, 30, 40]}]
    assert frame["extra"].tolist() == [{}, {}, {"facts": {"row": "Ada"}}]


def test_pages_are_counted_from_zero_in_each_document(folder):
    corpus = load_corpus(folder)
    image = corpus.page_image("c.pdf", 1)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (8, 10), (21, 21, 21))
    assert corpus.page_bytes("a b.pdf", 1) == picture(11)
    assert corpus.page_text("c.pdf", 2) == "gamma"
    assert corpus.page_text("c.pdf", 2, source="vlm_text") == "a page"
    assert corpus.page_text("c.pdf", 0) == ""


@pytest.fixture
def with_layouts(folder):
    """Parts of the pages of both documents, as MMDocIR publishes them; those of `c.pdf` are rows 1 to 3."""
    parts = [
        ("a b.pdf", 0, "text", "Alpha", None),
        ("c.pdf", 0, "text", "Heading", None),
        ("c.pdf", 2, "table", None, "Ada | 12"),
        ("c.pdf", 2, "figure", None, None),
    ]
    rows = [
        {
            "doc_name": name, "domain": "News", "type": kind, "layout_id": k, "page_id": page_number,
            "image_path": "", "image_binary": picture(k), "text": text, "ocr_text": ocr, "vlm_text": None,
            "bbox": [10, 20 + k, 30, 40.5], "page_size": [612.0, 792.0],
        }
        for k, (name, page_number, kind, text, ocr) in enumerate(parts)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / LAYOUTS, row_group_size=2)
    for record, span in zip(records := lines(folder), ([0, 0], [1, 3]), strict=True):
        record["layout_indices"] = span
    rewrite(folder, records)
    return folder


def test_the_parts_of_pages_are_read_where_they_are_published(with_layouts):
    corpus = load_corpus(with_layouts)
    found = corpus.layouts("c.pdf")
    assert found[["layout_id", "page", "type", "text"]].to_numpy().tolist() == [
        [1, 0, "text", "Heading"],
        [2, 2, "table", "Ada | 12"],
        [3, 2, "figure", ""],
    ]
    assert found["bbox"][1] == [10, 22, 30, 40.5]
    assert found["page_size"][1] == [612, 792]
    assert corpus.layouts("c.pdf", 2)["layout_id"].tolist() == [2, 3]
    assert corpus.layouts("c.pdf", 1).columns.tolist() == LAYOUT_COLUMNS, "a page without parts"
    assert corpus.layouts("a b.pdf")["layout_id"].tolist() == corpus.layouts("A B")["layout_id"].tolist() == [0]
    assert corpus.split("rl").layouts("c.pdf")["layout_id"].tolist() == [1, 2, 3]
    with pytest.raises(CorpusError, match=r"'c\.pdf' has no page 3; it has pages 0 to 2"):
        corpus.layouts("c.pdf", 3)
    with pytest.raises(CorpusError, match=r"no document 'x\.pdf'"):
        corpus.layouts("x.pdf")


def test_without_the_layout_file_its_absence_is_named(folder):
    with pytest.raises(CorpusError, match=f"{LAYOUTS} is missing .* optional"):
        load_corpus(folder).layouts("c.pdf")


def test_pages_without_words_are_flagged(folder):
    pages = load_corpus(folder).pages
    assert pages["page_id"].tolist() == ["a%20b.pdf:0", "a%20b.pdf:1", "c.pdf:0", "c.pdf:1", "c.pdf:2"]
    assert pages["has_text"].tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("doc_name", ["report.pdf", "a b\tc.pdf", "50%.pdf", "x:1.pdf", "報告.pdf", "dir/x.pdf"])
def test_page_ids_have_no_white_space_and_map_back(doc_name):
    identifier = page_id(doc_name, 12)
    assert identifier.split() == [identifier]
    assert parse_page_id(identifier) == (doc_name, 12)


@pytest.mark.parametrize("identifier", ["", "report.pdf", "report.pdf:", ":3", "report.pdf:-1", "report.pdf:q0"])
def test_other_ids_are_refused(identifier):
    with pytest.raises(CorpusError, match="is not a page id"):
        parse_page_id(identifier)


def test_split_and_subset_are_views_with_the_same_pages(folder):
    corpus = load_corpus(folder)
    rl = corpus.split("rl")
    assert rl.documents["doc_name"].tolist() == ["c.pdf"]
    assert rl.questions["question_id"].tolist() == ["c.pdf:q0"]
    assert rl.page_text("c.pdf", 2) == "gamma"
    assert rl.store is corpus.store
    with pytest.raises(CorpusError, match=r"no document 'a b\.pdf'"):
        rl.page_text("a b.pdf", 0)
    assert corpus.subset(["a b.pdf"]).questions["question"].tolist() == ["First?", "Second?"]
    with pytest.raises(CorpusError, match="no documents of split 'sft'; its splits are: eval, rl"):
        corpus.split("sft")
    with pytest.raises(CorpusError, match=r"no document 'd\.pdf'"):
        corpus.subset(["d.pdf"])


def test_only_the_groups_last_used_are_kept(tmp_path, monkeypatch):
    """100 pages are groups of 32, 32, 32 and 4 rows; a cache smaller than a group keeps the last one only."""
    write_corpus(tmp_path, [document("a.pdf")], (page("a.pdf", n, f"page {n}") for n in range(100)))
    assert pq.ParquetFile(tmp_path / PAGES).metadata.num_row_groups == 4
    monkeypatch.setattr(page_store, "_CACHE_BYTES", 1)
    store = PageStore(tmp_path / PAGES)
    assert [store.value(row, "ocr_text") for row in (0, 31, 32, 99)] == [
        "page 0",
        "page 31",
        "page 32",
        "page 99",
    ]
    assert list(store._cache) == [(3, "ocr_text")]
    monkeypatch.undo()
    roomy = PageStore(tmp_path / PAGES)
    assert roomy.value(99, "image_binary") == picture(99)
    assert roomy.value(0, "ocr_text") == "page 0"
    assert list(roomy._cache) == [(3, "image_binary"), (0, "ocr_text")]


def test_one_huge_row_group_is_refused_until_regrouped(folder, monkeypatch):
    """MMDocIR's published page file is one row group of gigabytes."""
    monkeypatch.setattr(page_store, "_LARGEST_GROUP", 200)
    monkeypatch.setattr(writing, "_ROWS_PER_GROUP", 2)
    with pytest.raises(CorpusError, match="regroup_pages"):
        load_corpus(folder).page_bytes("c.pdf", 0)
    regroup_pages(folder)
    assert pq.ParquetFile(folder / PAGES).metadata.num_row_groups == 3
    assert load_corpus(folder).page_text("c.pdf", 2) == "gamma"
    with pytest.raises(CorpusError, match="is missing"):
        regroup_pages(folder.parent)


def test_annotations_alone_give_documents_and_questions(folder):
    (folder / PAGES).unlink()
    corpus = load_corpus(folder)
    assert len(corpus.questions) == 3
    with pytest.raises(CorpusError, match=f"{PAGES} is missing"):
        corpus.page_image("c.pdf", 0)
    with pytest.raises(CorpusError, match="is missing"):
        _ = corpus.pages


# --- bad corpora --------------------------------------------------------------------------------------------


def test_a_folder_without_annotations_is_no_corpus(tmp_path):
    with pytest.raises(CorpusError, match=f"{tmp_path} is not a corpus folder: {ANNOTATIONS} is missing"):
        load_corpus(tmp_path)


@pytest.mark.parametrize("line", ['{"doc_name": "c.pdf', "[1]", "\xff"])
def test_a_line_that_is_not_json_is_named(folder, line):
    text = (folder / ANNOTATIONS).read_bytes()
    (folder / ANNOTATIONS).write_bytes(text + b"\n" + line.encode("latin-1") + b"\n")
    # two documents, a blank line, and then this one
    with pytest.raises(CorpusError, match=f"{ANNOTATIONS}, line 4 is not"):
        load_corpus(folder)


@pytest.mark.parametrize("gold", [3, -1])
def test_a_gold_page_that_does_not_exist_is_named(folder, gold):
    first, second = lines(folder)
    second["questions"].append(question("Fourth?", [0, gold]))
    rewrite(folder, [first, second])
    with pytest.raises(
        CorpusError,
        match=rf"line 2: question 1 of 'c.pdf': gold page {gold} does not exist; pages are 0 to 2",
    ):
        load_corpus(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doc_name": None}, "line 1: doc_name is missing"),
        ({"domain": 3}, "line 1: domain is missing"),
        ({"questions": None}, "line 1: questions is missing"),
        ({"page_indices": [0]}, r"line 1: page_indices is not \[first row, last row\]"),
        ({"page_indices": [1, 0]}, r"line 1: page_indices is not .*, but \[1, 0\]"),
        ({"page_indices": [0, 2]}, "carry the names 'a b', 'c'"),
        ({"page_indices": [0, 9]}, "rows 0 to 9 of the 5 in"),
        ({"doc_name": "c.pdf", "page_indices": [2, 4]}, "line 2: document 'c.pdf' is annotated twice"),
        ({"doc_name": "d.pdf"}, "should be the pages of 'd.pdf', but carry the names 'a b'"),
        ({"questions": [question("?", [])]}, "page_id is not a list of page numbers"),
        ({"questions": [question("?", ["1"])]}, "page_id is not a list of page numbers"),
        ({"questions": [{"A": "yes"}]}, "question 0 of 'a b.pdf' has no text Q"),
        ({"questions": [question("?", [0], "[__import__('os')]")]}, "is neither a word nor a list of words"),
        ({"questions": [question("?", [0], "[1]")]}, "is neither a word nor a list of words"),
    ],
)
def test_a_malformed_annotation_is_named(folder, change, message):
    first, second = lines(folder)
    rewrite(folder, [first | change, second])
    with pytest.raises(CorpusError, match=message):
        load_corpus(folder)


@pytest.mark.parametrize(
    ("gold", "cause"),
    [
        (
            ["3"],
            r'page_id is not a list of page numbers with at least one entry, but \["3"\] \(.Fourth\?.\); write',
        ),
        ([1.0], r"but \[1.0\] "),
        ([None], r"but \[null\] "),
        (2, "but 2 "),
        ("2", 'but "2" '),
        (None, "but null "),
        ([True], r"but \[true\] "),
        ([1, 3], r"gold page 3 does not exist; pages are 0 to 2 \('Fourth\?'\); are its pages counted from 1\?"),
    ],
)
def test_a_label_that_is_no_page_is_named_with_its_likely_cause(folder, gold, cause):
    first, second = lines(folder)
    second["questions"].append(question("Fourth?", gold))
    rewrite(folder, [first, second])
    with pytest.raises(CorpusError, match=rf"{ANNOTATIONS}, line 2: question 1 of 'c.pdf': .*{cause}"):
        load_corpus(folder)


def test_ends_that_are_exclusive_are_told(folder):
    first, second = lines(folder)
    rewrite(folder, [first | {"page_indices": [0, 2]}, second])
    with pytest.raises(CorpusError, match=r"line 1: rows 0 to 2 .* 'a b', 'c'; the end is inclusive: write \[0, 1\]"):
        load_corpus(folder)
    rewrite(folder, [first, second | {"page_indices": [2, 5]}])
    with pytest.raises(CorpusError, match=r"line 2: rows 2 to 5 of the 5 in .*; the end is inclusive: write \[2, 4\]"):
        load_corpus(folder)


def test_half_a_character_is_named(folder):
    """JSON can hold one half of a surrogate pair, and no file that is written later."""
    first, second = lines(folder)
    second["questions"].append(question("Which face is \ud83d?", [0]))
    rewrite(folder, [first, second])
    with pytest.raises(
        CorpusError, match=r"line 2: the record of 'c.pdf' has half a character .* after .*Which face is "
    ):
        load_corpus(folder)


def test_an_answer_that_is_null_is_empty(folder):
    first, second = lines(folder)
    second["questions"].append(question("Fourth?", [0], A=None))
    rewrite(folder, [first, second])
    assert load_corpus(folder).questions["answer"].tolist()[-1] == ""


def test_annotations_and_pages_may_spell_names_otherwise(folder):
    first, second = lines(folder)
    rewrite(folder, [first | {"doc_name": "A B"}, second | {"doc_name": "C.PDF"}])
    corpus = load_corpus(folder)
    assert corpus.page_bytes("a b.pdf", 1) == corpus.page_bytes("A B", 1) == picture(11)


def test_a_page_file_must_have_its_columns_and_be_parquet(folder):
    pq.write_table(pq.read_table(folder / PAGES).drop_columns(["ocr_text"]), folder / PAGES)
    with pytest.raises(CorpusError, match=f"{PAGES} lacks the columns ocr_text"):
        load_corpus(folder)
    (folder / PAGES).write_bytes(b"PAR1 but no more")
    with pytest.raises(CorpusError, match=f"{PAGES} is not a readable parquet file"):
        load_corpus(folder)


def test_vlm_text_is_only_missed_when_asked_for(folder):
    pq.write_table(pq.read_table(folder / PAGES).drop_columns(["vlm_text"]), folder / PAGES)
    corpus = load_corpus(folder)
    assert corpus.page_text("c.pdf", 2) == "gamma"
    with pytest.raises(CorpusError, match="lacks the column vlm_text"):
        corpus.page_text("c.pdf", 2, source="vlm_text")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"page 1 of 'c.pdf': the image is empty \(0 bytes\)"),
        (picture(0, (80, 80), "JPEG")[:400], "page 1 of 'c.pdf' is truncated or corrupt"),
        (picture(0, (80, 80), "PNG")[:60], "page 1 of 'c.pdf' is truncated or corrupt"),
        (b"no image at all", "page 1 of 'c.pdf' is not a readable image"),
    ],
)
def test_a_bad_image_names_document_and_page(folder, data, message):
    table = pq.read_table(folder / PAGES).to_pylist()
    table[3]["image_binary"] = data
    pq.write_table(pa.Table.from_pylist(table, writing.PAGE_SCHEMA), folder / PAGES)
    corpus = load_corpus(folder)
    assert corpus.page_image("c.pdf", 0).getpixel((0, 0)) == (20, 20, 20)  # its neighbour is fine
    with pytest.raises(CorpusError, match=message):
        corpus.page_image("c.pdf", 1)


@pytest.mark.parametrize(
    ("doc_name", "number", "message"),
    [
        ("c.pdf", 3, "has no page 3; it has pages 0 to 2"),
        ("c.pdf", -1, "no page -1"),
        ("d.pdf", 0, "no document 'd.pdf'"),
    ],
)
def test_an_unknown_page_is_named(folder, doc_name, number, message):
    with pytest.raises(CorpusError, match=message):
        load_corpus(folder).page_image(doc_name, number)


# --- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotations", "pages", "message"),
    [
        ([document("a.pdf")], [page("b.pdf", 0)], "pages of 'b.pdf' but no annotation"),
        ([document("a.pdf"), document("b.pdf")], [page("a.pdf", 0)], "'b.pdf' is annotated but has no pages"),
        (
            [document("a.pdf"), document("b.pdf")],
            [page("a.pdf", 0), page("b.pdf", 0), page("a.pdf", 0)],
            "the pages of 'a.pdf' do not stand together",
        ),
        (
            [document("a.pdf", page_indices=[0, 1])],
            [page("a.pdf", 0)],
            r"\[0, 1\], but its pages are rows \[0, 0\]",
        ),
        ([document("a.pdf", question("?", [1]))], [page("a.pdf", 0)], "gold page 1 does not exist"),
        ([{"doc_name": "a.pdf"}], [], "domain is missing"),
    ],
)
def test_a_corpus_that_contradicts_itself_replaces_nothing(folder, annotations, pages, message):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CorpusError, match=message):
        write_corpus(folder, annotations, iter(pages))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_documents_without_pages_can_be_left_out(folder):
    write_corpus(folder, [document("a.pdf"), document("b.pdf")], iter([page("b.pdf", 0)]), leave_out_empty=True)
    assert load_corpus(folder).documents[["doc_name", "first_row"]].to_numpy().tolist() == [["b.pdf", 0]]


def test_rows_have_mmdocir_columns(folder):
    table = pq.read_table(folder / PAGES)
    assert table.column_names == [
        *("doc_name", "domain", "passage_id", "image_path", "image_binary", "ocr_text", "vlm_text")
    ]
    assert table.column("passage_id").to_pylist() == ["0", "1", "0", "1", "2"]
    assert table.column("domain").to_pylist() == ["Laws"] * 2 + ["News"] * 3
