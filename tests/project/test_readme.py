"""The commands that README and the documents show: all are understood, the quick ones are run as they stand there."""

import argparse
import ast
import importlib
import re
import shlex
import shutil
import string
import tomllib
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mmr5_lab.cli import _parser, main
from mmr5_lab.experiments.grids import read_grid

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md")]
ELSEWHERE = {"accelerate", "make", "python", "source", "trl", "vllm"}  # programs beside ours


def blocks(path: Path, language: str = "") -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [
        body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if kind == language
    ]


def commands(path: Path) -> list[list[str]]:
    """The words of each line of the document's shell blocks, its variables filled in."""
    found, variables = [], {}
    for block in blocks(path):
        if not re.match(
            r"(?:\w+=\S+ )*(?:RUN=|mmr5 |" + "|".join(f"{name} " for name in sorted(ELSEWHERE)) + ")", block
        ):
            continue  # a file map, a run, a model's answer
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(string.Template(line).safe_substitute(variables), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                name, _, variables[name] = words.pop(0).partition("=")
            if words:
                found.append(words)
    return found


SHOWN = [(path.name, words) for path in DOCUMENTS for words in commands(path)]
OURS = [(name, words) for name, words in SHOWN if words[0] == "mmr5"]


def test_documents_show_only_programs_that_are_known():
    assert {words[0] for _, words in SHOWN} - ELSEWHERE == {"mmr5"}
    assert len(OURS) > 20  # the blocks are found
    for name, words in SHOWN:
        assert words[0] != "python" or (ROOT / words[1]).is_file(), (name, words)


@pytest.mark.parametrize(
    "words", [words for _, words in OURS], ids=[f"{name}: {' '.join(words)}" for name, words in OURS]
)
def test_a_command_is_understood(words):
    """Every name, option and number; argparse ends the process where it does not know one."""
    assert isinstance(_parser().parse_args(words[1:]), argparse.Namespace)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_a_document_imports_what_there_is(path):
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], node.module


def test_files_that_documents_link_to_are_there():
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s#]+)", path.read_text(encoding="utf-8")):
            assert "://" in link or (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_grid_of_the_guide_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (grid,) = blocks(ROOT / "docs" / "guide.md", "yaml")
    (tmp_path / "my_grid.yaml").write_text(grid)
    assert read_grid(tmp_path / "my_grid.yaml")


def test_from_pdfs_to_a_table_as_the_guide_says(tmp_path, monkeypatch, capsys):
    """The quick commands in the guide's order; a copy of BM25's run stands for the reranked one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_pdfs").mkdir()
    first, second = (Image.new("RGB", (200, 260), "white") for _ in range(2))
    ImageDraw.Draw(second).text((20, 20), "Revenue 2015: 17")
    first.save("my_pdfs/report.pdf", save_all=True, append_images=[second])
    (line,) = [body for body in blocks(ROOT / "docs" / "formats.md", "json") if "page_indices" not in body][:1]
    Path("questions.jsonl").write_text(line.replace("[3]", "[1]"))
    used = ("ingest", "retrieve", "evaluate")
    own = [words[1:] for name, words in OURS if name == "guide.md" and "mmdocir" not in words]  # that one is downloaded
    quick = [words for words in own if words[0] in used]
    assert [words[0] for words in quick] == ["ingest", "retrieve", "evaluate", "evaluate"]
    for words in quick:
        assert main(words) == 0, words
        if words[0] == "retrieve":
            shutil.copy("bm25.trec", "reranked.trec")
    assert "micro" in capsys.readouterr().out


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_the_readme_maps_every_room():
    """The first level of the package, each name once, from the bottom up as the import contract has it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^  (\w+)(?:\.py|/) ", text, re.MULTILINE)
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    assert shown == contract[::-1]
