"""The command line: what it prints, and its exit codes."""

import inspect
import subprocess
import sys

import pytest

from mmr5_lab import cli
from mmr5_lab.cli import main
from mmr5_lab.corpus.documents import PAGES
from mmr5_lab.corpus.writing import write_corpus


@pytest.fixture
def folder(tmp_path):
    """Two domains with a question each; BM25 finds the page of the first, and not that of the second."""

    def asked(text, gold):
        return {"Q": text, "A": "", "page_id": gold, "type": "text-only", "layout_mapping": []}

    texts = {"a.pdf": ["apples", "pears"], "b.pdf": ["plums", "pears"]}
    write_corpus(
        tmp_path / "corpus",
        [
            {"doc_name": "a.pdf", "domain": "Laws", "questions": [asked("Where are pears?", [1])]},
            {"doc_name": "b.pdf", "domain": "News", "split": "rl", "questions": [asked("pears?", [0])]},
        ],
        [{"doc_name": name, "image_binary": b"x", "ocr_text": t} for name in texts for t in texts[name]],
    )
    return tmp_path / "corpus"


def test_retrieve_then_evaluate(folder, tmp_path, capsys):
    run = tmp_path / "bm25.trec"
    assert main(["retrieve", str(folder), "--method", "bm25", "--out", str(run)]) == 0
    assert [line.split()[2:4] for line in run.read_text().splitlines()] == [
        ["a.pdf:1", "1"],
        ["a.pdf:0", "2"],
        ["b.pdf:1", "1"],
        ["b.pdf:0", "2"],
    ]
    assert capsys.readouterr().out == f"{run}: 2 questions, up to 10 pages each\n"
    assert main(["evaluate", str(folder), str(run), "--ks", "1", "2"]) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if line]
    assert rows[0][0] == f"{run}:"
    for row in (
        ["Laws", "1.0000", "1.0000"],
        ["News", "0.0000", "1.0000"],
        ["macro", "0.5000", "1.0000"],
        ["macro_ex_news", "1.0000", "1.0000"],
        ["micro", "0.5000", "1.0000"],
        ["ceiling_macro", "1.0000", "1.0000"],
        ["ceiling_micro", "1.0000", "1.0000"],
    ):
        assert row in rows


def test_a_table_is_no_wider_than_the_terminal(folder, tmp_path, capsys, monkeypatch):
    run = str(tmp_path / "run.trec")
    main(["retrieve", str(folder), "--out", run])
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    assert main(["evaluate", str(folder), run, "--by", "type", "--measures", "R", "nDCG", "RR"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown[1:])) <= 80  # below the path
    assert any("MRR" in line for line in shown)


def test_a_question_without_a_model_is_told_where_to_get_one(folder, tmp_path, capsys, monkeypatch):
    """Before any training; in a fresh checkout data/mini/base is there."""
    monkeypatch.chdir(tmp_path)
    assert main(["ask", str(folder), "How high was the staff?"]) == 1
    assert "no model: name one with --model (a folder such as data/mini/base" in capsys.readouterr().err


def test_a_vision_model_retrieves_from_the_shell(tmp_path, capsys):
    """Small random weights of the real classes, by a folder, to a run; the second run encodes nothing."""
    from helpers.retrievers import clip

    clip(tmp_path / "clip")
    build_mini(tmp_path / "corpus")
    arguments = ["retrieve", str(tmp_path / "corpus"), "--method", "clip", "--model", str(tmp_path / "clip")]
    arguments += ["--out", str(tmp_path / "clip.trec"), "--top-k", "2"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'clip.trec'}: 1 questions, up to 2 pages each\n"
    assert "encoding: 100%" in captured.err
    first = (tmp_path / "clip.trec").read_text()
    assert [line.split()[0] for line in first.splitlines()] == ["a.pdf:q0"] * 2
    assert first.splitlines()[0].endswith(" clip")
    assert main(arguments) == 0
    assert "encoding" not in capsys.readouterr().err
    assert (tmp_path / "clip.trec").read_text() == first
    assert main([*arguments, "--max-pixels", "100"]) == 2


def build_mini(folder) -> None:
    import io

    from PIL import Image

    def picture(grey):
        buffer = io.BytesIO()
        Image.new("L", (60, 80), grey).save(buffer, "PNG")
        return buffer.getvalue()

    asked = {"Q": "Which?", "A": "", "page_id": [1], "type": "text-only", "layout_mapping": []}
    pages = [{"doc_name": "a.pdf", "image_binary": picture(grey)} for grey in (0, 100, 200)]
    write_corpus(folder, [{"doc_name": "a.pdf", "domain": "Laws", "questions": [asked]}], pages)


def test_methods_of_the_shell_are_those_of_python():
    from mmr5_lab.cli import _parser
    from mmr5_lab.retrieval.encoders import ENCODERS
    from mmr5_lab.retrieval.retrieve import METHODS

    for method in METHODS:
        assert _parser().parse_args(["retrieve", "c", "--out", "r", "--method", method]).method == method
    assert set(METHODS) == {"bm25", *ENCODERS}


def test_evaluate_by_type_with_other_measures(folder, tmp_path, capsys):
    run = str(tmp_path / "run")
    main(["retrieve", str(folder), "--out", run])
    capsys.readouterr()
    assert main(["evaluate", str(folder), run, "--by", "type", "--ks", "1", "--measures", "R", "RR"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    # recall@1, the same under both ceilings, MRR (ranks 1 and 2), its ceilings, questions
    assert ["text-only", "0.5000", "1.0000", "1.0000", "0.7500", "1.0000", "1.0000", "2"] in rows
    with pytest.raises(SystemExit):
        main(["evaluate", str(folder), run, "--measures", "P"])


def test_one_split_alone(folder, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["retrieve", str(folder), "--out", run, "--split", "rl", "--top-k", "1"]) == 0
    assert (tmp_path / "run").read_text().split()[:3] == ["b.pdf:q0", "Q0", "b.pdf:1"]
    assert main(["evaluate", str(folder), run, "--split", "rl"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(folder), run, "--split", "sft"]) == 2
    assert "no documents of split 'sft'; its splits are: eval, rl" in capsys.readouterr().err


def test_ingest_renders_pdfs(tmp_path, capsys):
    from PIL import Image

    (tmp_path / "pdfs").mkdir()
    Image.new("RGB", (30, 40)).save(tmp_path / "pdfs" / "scan.pdf")
    (tmp_path / "pdfs" / "bad.pdf").write_bytes(b"")
    out = tmp_path / "out"
    arguments = ["ingest", str(tmp_path / "pdfs"), str(out), "--max-pixels", "1200", "--ocr", "none", "--workers", "1"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}: 1 documents, 1 pages (read: 1 by none; 1 without words), 0 questions\n"
    assert "pages: 100%" in captured.err
    assert main(["retrieve", str(out), "--out", str(tmp_path / "run")]) == 2
    assert "has no questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ingest", "EMPTY", "OUT"], "holds no PDF files"),
        (["ingest", "ABSENT", "OUT"], "is not a folder"),
        (["ingest", "EMPTY", "OUT", "--annotations", "ABSENT"], "holds no PDF files"),
        (["retrieve", "EMPTY", "--out", "OUT"], "is not a corpus folder"),
        (["evaluate", "CORPUS", "ABSENT"], "the run ABSENT does not exist"),
        (["evaluate", "CORPUS", "bad.trec"], "bad.trec, line 1 is not `question Q0 page rank"),
        (["evaluate", "CORPUS", "part.trec"], "b.pdf:q0"),
    ],
)
def test_bad_input_is_one_line_and_code_2(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    folder.rename(tmp_path / "CORPUS")
    (tmp_path / "bad.trec").write_text("nonsense\n")
    (tmp_path / "part.trec").write_text("a.pdf:q0 Q0 a.pdf:1 1 1.0 x\n")  # nothing for the other question
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmr5: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_missing_page_file_is_bad_input(folder, tmp_path, capsys):
    (folder / PAGES).unlink()
    assert main(["retrieve", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert f"{PAGES} is missing" in capsys.readouterr().err


def test_what_fails_on_the_way_is_code_1(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert main(["retrieve", str(folder), "--out", str(tmp_path / "file" / "run")]) == 1
    assert capsys.readouterr().err.startswith("mmr5: error: ")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmr5_lab.retrieval.retrieve.load_corpus", interrupt)
    assert main(["retrieve", str(folder), "--out", str(tmp_path / "run")]) == 1
    assert "interrupted" in capsys.readouterr().err


def test_a_fault_of_a_library_keeps_its_traceback(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mmr5_lab.retrieval.retrieve.load_corpus", lambda *_: __import__("json").loads("{"))
    with pytest.raises(ValueError, match="Expecting property name"):
        main(["retrieve", str(folder), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("name", [row[0] for row in cli.COMMANDS])
def test_help_of_each_command(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mmr5 {name}")


@pytest.mark.parametrize("row", cli.COMMANDS, ids=lambda row: row[0])
def test_a_commands_arguments_are_those_of_its_function(row):
    name, function, _, _, *arguments = row
    function = cli._named(function) if isinstance(function, str) else function
    written = [names[0] for names, settings in arguments if not names[0].startswith("-")]
    written += [f"{names[0]}=1" for names, settings in arguments if settings.get("required")]
    written = ["2" if word == "pair" else word for word in written for _ in range(1 + (word == "pair"))]
    options = vars(cli._parser().parse_args([*name.split(), *written]))
    del options["function"]
    inspect.signature(function).bind(**options)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["retrieve", "corpus"],
        ["retrieve", "corpus", "--out", "run", "--top-k", "0"],
        ["retrieve", "corpus", "--out", "run", "--method", "magic"],
        ["ingest", "pdfs", "out", "--max-pixels", "many"],
        ["traces", "corpus", "run", "--out", "o", "--price-in", "-1"],
        ["traces", "corpus", "run", "--out", "o", "--budget", "nan"],
        ["traces", "corpus", "run", "--out", "o", "--timeout", "soon"],
        ["rerank", "corpus", "run", "--out", "o", "--mode", "think"],
        ["rerank", "corpus", "run", "--out", "o", "--shard", "3/2"],
        ["sweep", "grid", "--tracker", "excel"],
    ],
)
def test_unknown_arguments_are_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: mmr5")


def test_help_is_answered_without_loading_the_libraries():
    """In a process of its own: pandas or torch would make `mmr5 --help` wait for seconds."""
    code = (
        "import sys; from mmr5_lab.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print([name for name in ('pandas', 'torch', 'pyarrow', 'bm25s') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("ingest", "retrieve", "evaluate"))
    assert done.stdout.splitlines()[-1] == "[]"
