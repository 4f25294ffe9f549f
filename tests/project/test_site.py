"""The site, built from the documents, notebooks and docstrings as they are: whole, offline, readable on a phone."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOKED_AT = (
    "index",
    "formats",
    "faq",
    "method",
    "mmr5_lab.corpus.documents",
)  # a page of each kind, beside the notebooks
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]  # axe's names of the rules of level AA
CUT_FORMULAS = """width => [...document.querySelectorAll("math")]
    .filter(m => [...m.querySelectorAll("*")].some(part => part.getBoundingClientRect().right > width))
    .map(m => m.textContent)"""
LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href"}  # what a browser fetches by itself
WIDGET = "application/vnd.jupyter.widget-view+json"


class Page(HTMLParser):
    """Ids, links and what is loaded."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(LOADED.get(tag, "")):
            self.loaded.append(given[LOADED[tag]])


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[Path, Page]:
    """The site with one executed notebook, 02: file -> what is in there. Any warning of mkdocs ends the build."""
    folder = tmp_path_factory.mktemp("site")
    run = folder / "runs" / "02_sft" / "0123456789ab"
    run.mkdir(parents=True)
    for name in ("manifest.json", "results.json"):
        (run / name).write_text(json.dumps({}))
    outputs = [
        new_output("stream", name="stdout", text="**12** steps, $3 and $4 </div>\n"),
        new_output("stream", name="stderr", text="a warning\n"),
        new_output("display_data", {"text/html": "<table><tr><td>0.93</td></tr></table>"}),
        new_output("display_data", {WIDGET: {"model_id": "x"}, "text/plain": "a live widget"}),
    ]
    told = new_markdown_cell("# 02 · Learnt\n\nThe loss $\\frac{a}{b}$ falls.")
    notebook = new_notebook(cells=[told, new_code_cell("train()", outputs=outputs)])
    nbformat.write(notebook, run / "notebook.ipynb")
    site = folder / "site"
    extra = {"runs": str(folder / "runs")}
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), strict=True, extra=extra)
    build(config)
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.fixture
def page(pages):
    """The text of one page."""
    return lambda name: next(
        content.text for path, content in pages.items() if path.as_posix().endswith(f"site/{name}")
    )


def test_every_link_leads_somewhere(pages):
    dead = []
    for path, content in pages.items():
        for link in (*content.links, *content.loaded):
            to = urlsplit(link)
            if to.scheme or to.netloc or path.name == "404.html":  # the latter is for servers: its links are absolute
                continue
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            if not target.is_file():
                dead.append(f"{path.name}: {link}")
            elif to.fragment and target in pages and unquote(to.fragment) not in pages[target].ids:
                dead.append(f"{path.name}: {link} (no such place)")
    assert dead == []


def test_nothing_comes_from_another_server(pages):
    for path, content in pages.items():
        assert [link for link in content.loaded if urlsplit(link).netloc] == [], path.name


def test_every_document_notebook_and_module_has_its_page(pages):
    names = {path.name for path in pages}
    sources = [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert {f"{path.stem}.html" for path in sources} <= names
    modules = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "mmr5_lab").rglob("[a-z]*.py")]
    assert {f"{'.'.join(module.parts)}.html" for module in modules} | {"mmr5_lab.html.html"} <= names
    assert {"index.html", "changes.html", "contributing.html"} <= names


def test_an_executed_notebook_is_shown_with_its_results(page):
    shown = page("notebooks/02_sft.html")
    assert "<h1" in shown
    assert "02 · Learnt" in shown
    assert "<mfrac>" in shown
    assert "**12** steps, $3 and $4 &lt;/div&gt;" in shown  # as printed: neither Markdown, nor a formula, nor HTML
    assert "<td>0.93</td>" in shown
    assert "a warning" not in shown
    assert "a live widget" not in shown
    assert "With the results of the newest run" in shown


def test_a_notebook_that_was_not_run_says_so(page):
    shown = page("notebooks/01_data_construction.html")
    assert "Without results" in shown
    assert "<mfrac>" in shown  # BM25's formula
    assert "$$" not in shown


def test_docstrings_are_lists_where_they_list_arguments(page):
    shown = page("reference/mmr5_lab.models.loading.html")
    assert "<li><code>adapter</code>: a PEFT adapter, merged into the weights; also the folder of a run" in shown


def test_an_example_after_a_list_is_code(page):
    shown = page("reference/mmr5_lab.experiments.history.html")
    assert re.search(r"<code>.*flat.*table\.SFT\.valid", shown, re.DOTALL)


def test_links_of_the_readme_lead_to_pages_of_the_site(pages):
    (index,) = [content for path, content in pages.items() if path.name == "index.html"]
    assert {"method.html", "formats.html", "faq.html"} <= set(index.links)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_pages_fit_a_desktop_and_a_phone(pages):
    """Wide tables and code scroll by themselves; the page does not move sideways, nothing fails to load, and nothing is
    amiss by WCAG 2.2 AA as far as axe can tell: contrast, names, roles, what a keyboard reaches."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    troubles = []
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page()
        tab.on("requestfailed", lambda request: troubles.append(request.url))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        for path in pages:
            if path.stem in LOOKED_AT or path.parent.name == "notebooks":
                tab.goto(path.as_uri())
                for width in (1280, 390):
                    tab.set_viewport_size({"width": width, "height": 900})
                    wide = tab.evaluate("document.documentElement.scrollWidth")
                    if wide > width:
                        troubles.append(f"{path.name} is {wide} pixels wide on a screen of {width}")
                    cut = tab.evaluate(CUT_FORMULAS, width)
                    troubles += [f"{path.name}: {formula} is cut off on a screen of {width}" for formula in cut]
                found = axe.run(tab, options={"runOnly": WCAG, "preload": False}).response["violations"]
                troubles += [f"{path.name}: {v['id']}: {v['nodes'][0]['html']}" for v in found]
        browser.close()
    assert troubles == []
