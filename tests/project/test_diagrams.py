"""Each notebook opens with its diagram, described for those who cannot see it."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
DRAWING = runpy.run_path(str(ROOT / "docs" / "diagrams.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_its_diagram(path):
    opening = nbformat.read(path, as_version=4).cells[0].source
    about = DRAWING["DIAGRAMS"][path.stem]["about"]
    assert opening.split("\n\n")[1] == f"![{about}](diagrams/{path.stem}.svg)"


@pytest.mark.parametrize("name", DRAWING["DIAGRAMS"])
def test_the_committed_diagram_is_the_drawn_one_and_arrows_join_its_boxes(name):
    drawn = DRAWING["drawn"](name)
    assert (DRAWING["FOLDER"] / f"{name}.svg").read_text(encoding="utf-8") == drawn
    texts = [text.text for text in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[::2] == [box[3] for box in DRAWING["DIAGRAMS"][name]["boxes"]]
    assert drawn.count("marker-end") == len(DRAWING["DIAGRAMS"][name]["arrows"])


def test_the_course_shows_every_notebook():
    titles = [box[3] for box in DRAWING["DIAGRAMS"]["course"]["boxes"]]
    assert sorted(re.match(r"\d+", title)[0] for title in titles) == [path.name[:2] for path in NOTEBOOKS]
