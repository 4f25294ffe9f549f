"""The whole method in one go: notebooks 01 to 06 in a chain, then one HTML report and the result table.

`make demo` calls this with the miniature's profile. Interrupted, it goes on where it was: finished notebooks are
not run again, and a notebook that was stopped continues from its last checkpoint.
"""

import re
import time
from pathlib import Path

import nbformat
import pandas as pd
from latex2mathml.converter import convert as to_mathml

from mmr5_lab.experiments.fingerprint import NOT_WORK
from mmr5_lab.experiments.notebooks import notebook_html, run_notebook, with_parents, without_widgets
from mmr5_lab.experiments.parameters import read_profile
from mmr5_lab.experiments.runs import CHAIN, inside_project, project_root
from mmr5_lab.files import results, write_text
from mmr5_lab.html import escape_html, html_page, html_table


def run_demo(profile: Path, root: str | Path = "runs", until: str = "") -> Path:
    """Run the chain with a profile's parameters, print the results and return the path of the report.

    until: stop after this notebook, without a report, and return its run folder; empty: the whole chain

    Raises NotebookError for bad parameters, NotebookFailedError where a notebook fails.
    """
    parameters = read_profile(profile)
    unknown = sorted(set(parameters) - set(CHAIN))
    if unknown:
        raise ValueError(f"{profile} has parameters for {', '.join(unknown)}; the chain is {', '.join(CHAIN)}")
    if until and until not in CHAIN:
        raise ValueError(f"there is no notebook {until} to stop after; the chain is {', '.join(CHAIN)}")
    folders: dict[str, Path] = {}
    for number, name in enumerate(CHAIN, 1):
        started = time.monotonic()
        print(f"[{number}/{len(CHAIN)}] {name}", flush=True)
        values = with_parents(name, parameters.get(name, {}), folders)
        folders[name] = inside_project(run_notebook(name, values, root))
        print(f"      {time.monotonic() - started:.0f} s, in {folders[name]}", flush=True)
        if name == until:
            return folders[name]
    print("\n" + result_table(folders["05_evaluation"]).to_string(float_format="{:.3f}".format, na_rep=""))
    report = write_report(folders, project_root() / root / "report.html")
    print(f"\nReport of the whole run: {report}")
    return report


def result_table(folder: Path) -> pd.DataFrame:
    """Return the table of a finished run of 05: a row a system, macro and micro R@k and the share of valid answers."""
    return pd.DataFrame.from_dict(results(folder)["table"], orient="index")


def write_report(folders: dict[str, Path], path: Path) -> Path:
    """Write one self-contained HTML file: the result table, then every executed notebook without its code."""
    table = html_table(result_table(folders["05_evaluation"]).rename_axis("system"), digits=3)
    links = " · ".join(f'<a href="#{name}">{name}</a>' for name in folders)
    sections = "\n".join(
        f'<section id="{name}">{_body(folder / "notebook.ipynb")}</section>' for name, folder in folders.items()
    )
    page = (
        f"<h1>MM-R5 Lab: the whole method in one run</h1>"
        f"<p>Recall on the evaluation split: the retriever, the base model, after SFT, after SFT and RL.</p>{table}"
        f"<p>{links}</p>{sections}"
    )
    return write_text(path, html_page("MM-R5 Lab: report", page))


def _body(path: Path) -> str:
    """A notebook's prose and results as HTML, without its exercises.

    A run that was finished in JupyterLab keeps no executed notebook; a sentence stands for it.
    """
    if not path.is_file():
        return f"<p>Run in JupyterLab, with its results in {escape_html(str(path.parent))}.</p>"
    notebook = without_widgets(nbformat.read(path, as_version=4))
    notebook.cells = [cell for cell in notebook.cells if NOT_WORK.isdisjoint(cell.metadata.get("tags", ()))]
    formulas: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _cut_formulas(cell.source, formulas)
        else:  # warnings are of no use to a reader
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    body = notebook_html(notebook, "basic", exclude_input=True, exclude_output_prompt=True)
    return re.sub(r"FORMULA(\d+)ALUMROF", lambda match: formulas[int(match[1])], body)


def _cut_formulas(markdown: str, formulas: list[str]) -> str:
    """Put a mark for each TeX formula, and append its MathML, which browsers show without a library or a network.

    MathML within Markdown would not survive the conversion to HTML.
    """

    def mark(match: re.Match[str]) -> str:
        formulas.append(to_mathml(match[2].strip(), display="block" if match[1] == "$$" else "inline"))
        return f"FORMULA{len(formulas) - 1}ALUMROF"

    return re.sub(r"(?<!\\)(\$\$?)(.+?)\1", mark, markdown, flags=re.DOTALL)
