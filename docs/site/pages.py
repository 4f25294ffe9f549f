"""What the site shows beside docs/*.md: README and its like, a page a notebook, a page a module. mkdocs calls `on_…`.

A notebook is shown as its newest finished run left it, and where there is none, without results.
"""

import html
import posixpath
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert as to_mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbformat.v4 import new_notebook
from pygments.formatters import HtmlFormatter

from mmr5_lab.experiments.notebooks import notebook_html, without_widgets
from mmr5_lab.experiments.runs import latest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {"README.md": "index.md", "CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IMAGES = sorted((ROOT / "docs" / "images").rglob("*.png"))
DIAGRAMS = sorted((ROOT / "notebooks" / "diagrams").glob("*.svg"))
PACKAGE = ROOT / "mmr5_lab"
MODULES = sorted(  # a room's __init__.py counts where there is code in it
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" or "def " in path.read_text(encoding="utf-8")
)
SITE = {  # file of the repository -> page of the site
    **TEXTS,
    **{f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))},
    **{f"docs/{path}": path for path in (p.relative_to(ROOT / "docs").as_posix() for p in IMAGES)},
    **{f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in NOTEBOOKS},
}
REPOSITORY = {page: file for file, page in SITE.items()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = [
        {"Start": "index.md"},
        {"Documents": [path.name for path in sorted((ROOT / "docs").glob("*.md"))]},
        {"Notebooks": [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]},
        {"Reference": [{module.removeprefix("mmr5_lab."): f"reference/{module}.md"} for module in MODULES]},
        {"Project": [{"Changes": "changes.md"}, {"Contributing": "contributing.md"}]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    def add(uri: str, content: str) -> None:
        files.append(File.generated(config, uri, content=content))

    for name, uri in TEXTS.items():
        add(uri, (ROOT / name).read_text(encoding="utf-8"))
    for path in DIAGRAMS:
        add(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    for path in NOTEBOOKS:
        add(f"notebooks/{path.stem}.md", notebook_page(path, config.extra["runs"]))
    for module in MODULES:
        add(f"reference/{module}.md", f"::: {module}\n")
    add("site/pygments.css", HtmlFormatter(style="default").get_style_defs(".highlight"))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Links between files of the repository as links between pages of the site."""
    uri = page.file.src_uri
    file = REPOSITORY.get(uri, uri)

    def moved(match: re.Match[str]) -> str:
        target = SITE.get(posixpath.normpath(posixpath.join(posixpath.dirname(file), match[1])))
        return f"]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}" if target else match[0]

    return re.sub(r"\]\(([^)\s#]+)", moved, markdown)


def on_page_content(content: str, page: Page, **_) -> str:
    """Formulas as MathML, which browsers show without a library, and the results of notebooks in their places."""
    content = re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.+?)\\[)\]]</\1>',
        lambda match: to_mathml(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline"),
        content,
        flags=re.DOTALL,
    )
    content = re.sub(r'<div class="result" id="result-(\d+)"></div>', lambda m: _RESULTS[int(m[1])], content)
    # what is too wide scrolls, for those without a mouse too
    content = re.sub(r"(<table.*?</table>)", r'<div class="wide" tabindex="0">\1</div>', content, flags=re.DOTALL)
    return content.replace("<pre>", '<pre tabindex="0">')


_RESULTS: list[str] = []  # HTML of notebooks' results: kept apart, so that nothing in there is read as Markdown


def notebook_page(path: Path, runs: str) -> str:
    """A notebook as Markdown, with a mark for each cell's results."""
    try:
        source = latest(path.stem, ROOT / runs, holding="notebook.ipynb") / "notebook.ipynb"
        told = "With the results of the newest run."
    except FileNotFoundError:
        source, told = path, "Without results: a site that is built after the notebook has run shows them."
    parts = []
    for cell in without_widgets(nbformat.read(source, as_version=4)).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        else:
            parts.append(f"````python\n{cell.source}\n````")
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            if cell.outputs:
                parts.append(f'<div class="result" id="result-{len(_RESULTS)}"></div>')
                shown = notebook_html(
                    new_notebook(cells=[cell]), "basic", exclude_input=True, exclude_output_prompt=True
                )
                _RESULTS.append(f'<div class="result">{shown}</div>')
    heading, _, rest = "\n\n".join(parts).partition("\n")
    return f"{heading}\n\n*`notebooks/{path.name}`. {told}*\n{rest}"
