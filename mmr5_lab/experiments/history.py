"""The history of runs: what stands in `runs/`, read anew each time from the run folders themselves.

    table = runs_table("runs", ["notebook=02_sft", "LORA_RANK=8", "last_loss<0.5"])
    print(lineage(find_run("3f2a")))
    leaderboard("runs")

There is no index that could fall behind: manifests and results are written whole, so any number of processes may write
runs while others read.
"""

import json
import operator
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.rankings import read_trec
from mmr5_lab.evaluation.comparison import compare, presented
from mmr5_lab.evaluation.metrics import per_question
from mmr5_lab.evaluation.paper_tables import RETRIEVER
from mmr5_lab.experiments.fingerprint import RUN_FOLDER
from mmr5_lab.experiments.runs import DAMAGED, OPEN, RUN_OF_SYSTEM, Run, lock_of, project_root, read_run
from mmr5_lab.files import write_text
from mmr5_lab.html import html_page, html_table, visible

CONDITION = re.compile(r"(?P<name>[\w .+@-]+?)\s*(?P<sign>!=|<=|>=|=|<|>)\s*(?P<value>.*)")
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
CEILING = "ceiling"  # rows of an evaluation's table that are no system
# What a retriever's row depends on in 04: which questions were ranked, and how many candidates of each.
QUESTIONS_OF_04 = {f"04_inference.{name}" for name in ("CORPUS", "SPLIT", "MAX_QUESTIONS", "NUM_CANDIDATES")}


class HistoryError(ValueError):
    """A run that is not there, or a condition that cannot be read."""


def read_runs(root: str | Path = "runs", notebook: str = "*") -> Iterator[Run]:
    """Return the runs under a folder, of one notebook or of all, sorted by notebook and hash."""
    # "[!.]": a folder that is being deleted begins with a dot
    for manifest in sorted(Path(root).glob(f"{notebook}/[!.]*/manifest.json")):
        yield read_run(manifest.parent)


def runs_table(root: str | Path = "runs", conditions: Sequence[str] = ()) -> pd.DataFrame:
    """Return one row a run: notebook, run (hash), state, started, seconds, folder, parameters, results; newest last.

    conditions: of the form "NAME=VALUE", also with != < > <= >=; NAME is a column, a parameter or a figure of the
        results ("table.SFT.micro R@1"). A run without it fits none but "!=".

    Raises HistoryError for a condition that is not of this form.
    """
    checks = [_condition(text) for text in conditions]
    columns = ["notebook", "run", "state", "started", "seconds", "folder", "parameters", "results"]
    rows = []
    for run in read_runs(root):
        started = run.manifest.get("started", "")
        values = (run.notebook, run.folder.name, run.state, started, seconds_taken(run), run.folder, run.parameters)
        row = dict(zip(columns, (*values, run.results or {}), strict=True))
        if all(check(row) for check in checks):
            rows.append(row)
    return pd.DataFrame(sorted(rows, key=lambda row: row["started"]), columns=columns)


def _condition(text: str) -> Callable[[Mapping[str, Any]], bool]:
    match = CONDITION.fullmatch(text.strip())
    if match is None:
        raise HistoryError(f"cannot read {text!r}: write NAME=VALUE, or != < > <= >= in place of =")
    name, sign, wanted = match["name"], match["sign"], match["value"]

    def check(row: Mapping[str, Any]) -> bool:
        value = row[name] if name in row else row["parameters"].get(name, flat(row["results"]).get(name))
        if value is None:
            return sign == "!="
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return SIGNS[sign](value, float(wanted))
            except ValueError:
                return sign == "!="
        return SIGNS[sign](str(value).lower(), wanted.lower())

    return check


def flat(results: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return results within results under a name with dots.

    >>> flat({"loss": 0.5, "table": {"SFT": {"valid": 1.0}}})
    {'loss': 0.5, 'table.SFT.valid': 1.0}
    """
    values: dict[str, Any] = {}
    for name, value in results.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return values


def list_text(root: str | Path = "runs", conditions: Sequence[str] = (), show: Sequence[str] = ()) -> str:
    """Return `runs_table` as text; show: parameters and figures that get a column each."""
    table = runs_table(root, conditions)
    for name in show:
        values = zip(table["parameters"], table["results"], strict=True)
        table[name] = [parameters.get(name, flat(results).get(name, "")) for parameters, results in values]
    shown = table[["notebook", "run", "state", "started", "seconds", *show]]
    text = shown.to_string(index=False, na_rep="", float_format="{:.4g}".format) + "\n" if len(shown) else ""
    return f"{text}{len(shown)} runs"


def run_text(run: str, root: str | Path = "runs") -> str:
    """Return what there is of a run (see `find_run`): state, why it failed, manifest, results, names of its files."""
    found = find_run(run, root)
    lines = [f"{found.folder}: {found.state}{': ' * bool(found.fault)}{found.fault}"]
    failed = found.folder / "failed.txt"
    if failed.exists():
        lines.append(visible(failed.read_text(encoding="utf-8", errors="replace")))
    lines.append(visible(json.dumps({"manifest": found.manifest, "results": found.results}, indent=2)))
    return "\n".join([*lines, *sorted(path.name for path in found.folder.iterdir())])


def find_run(name: str, root: str | Path = "runs") -> Run:
    """Return the run whose hash begins so, or that lies in this folder. Raises HistoryError for none or several."""
    if (Path(name) / "manifest.json").is_file():
        return read_run(name)
    paths = sorted(Path(root).glob(f"*/{name}*/manifest.json")) if re.fullmatch(r"\w+(\.damaged\d*)?", name) else []
    folders = [path.parent for path in paths if DAMAGED in name or DAMAGED not in path.parent.name]
    if not folders:
        raise HistoryError(f"there is no run {name!r} in {root}/; `mmr5 runs list` shows them")
    if len(folders) > 1:
        raise HistoryError(f"several runs begin with {name!r}: {', '.join(map(str, folders))}")
    return read_run(folders[0])


def parents_of(run: Run) -> dict[str, Path]:
    """Return the run folders that a run took, by parameter: DATA_RUN, SFT_RUN …, or MODEL where it lies in a run."""
    parents = {}
    for name, value in run.parameters.items():
        if isinstance(value, str) and (match := RUN_FOLDER.search(value)):
            parents[name] = project_root() / value[: match.end()].rstrip("/")
    return parents


def lineage(run: Run | str, root: str | Path = "runs") -> str:
    """Return a run (or the one of `find_run`) with all it came from and all that came from it, as lines of text."""
    run = find_run(run, root) if isinstance(run, str) else run
    children: dict[Path, list[Run]] = {}
    for other in read_runs(root):
        for parent in dict.fromkeys(parents_of(other).values()):
            children.setdefault(parent.resolve(), []).append(other)
    lines: list[str] = []

    def add_ancestors(one: Run) -> None:
        for parent in dict.fromkeys(parents_of(one).values()):
            add_ancestors(read_run(parent))
        if one is not run and (line := f"from {_line(one)}") not in lines:
            lines.append(line)

    def add_descendants(one: Run, depth: int) -> None:
        for child in children.get(one.folder.resolve(), []):
            lines.append(f"{'  ' * depth}to {_line(child)}")
            add_descendants(child, depth + 1)

    add_ancestors(run)
    lines.append(_line(run))
    add_descendants(run, 1)
    return "\n".join(lines)


def _line(run: Run) -> str:
    state = f"{run.state} {run.manifest.get('started', '')}" if run.manifest else "(gone)"
    return f"{run.folder.parent.name} {run.folder.name} {state}"


def settings_of(run: Run, read: Callable[[Path], Run] = read_run, without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the parameters of a run and of all runs that it came from: "02_sft.LORA_RANK" …, but for paths to runs.

    read: `read_run`, or a cache of it
    without: parameters of the run whose runs, and what those came from, are left out
    """
    settings: dict[str, Any] = {}
    parents = parents_of(run)
    for parent in dict.fromkeys(folder for name, folder in parents.items() if name not in without):
        settings |= settings_of(read(parent), read)
    return settings | {f"{run.notebook}.{name}": value for name, value in run.parameters.items() if name not in parents}


def leaderboard(root: str | Path = "runs", conditions: Sequence[str] = ()) -> pd.DataFrame:
    """Return systems of all finished evaluations (05) that fit, the best micro R@1 first; a row for all seeds.

    Index: system, with the mode of its inference where that is not "reason". Columns: each setting, anywhere in a
    system's lineage, in which the rows differ; "seeds"; the figures of the evaluations' tables (means over seeds), and
    "sd" of the micro R@1 over seeds (NaN for one).
    """
    rows, settings, figures = _evaluated(root, conditions)
    groups = rows.groupby("group", sort=False)
    table = groups[settings].first().rename(columns=lambda name: name.partition(".")[2])
    table = table.assign(seeds=groups.size()).join(groups[figures].mean())
    if "micro R@1" in table:
        table = table.assign(sd=groups["micro R@1"].std()).sort_values("micro R@1", ascending=False, kind="stable")
    return table.set_index(groups["system"].first().reindex(table.index))


def by_seed(
    root: str | Path = "runs", conditions: Sequence[str] = (), figure: str = "micro R@1"
) -> dict[str, list[float]]:
    """Return a figure of each row of the leaderboard, seed by seed, under the system's name and settings."""
    rows, settings, _ = _evaluated(root, conditions)
    seeds = {}
    for _, group in rows.groupby("group", sort=False):
        values = group[settings].iloc[0].dropna()
        shown = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in values.items())
        seeds[group["system"].iloc[0] + (f" ({shown})" if shown else "")] = group[figure].tolist()
    return seeds


def _evaluated(root: str | Path, conditions: Sequence[str]) -> tuple[pd.DataFrame, list[str], list[str]]:
    """One row a system and seed of the finished evaluations, the settings in which a system's rows differ, the figures.

    Rows of one "group" differ in their seeds alone. Raises HistoryError where there is no evaluation.
    """
    systems, settings, figures = [], [], []
    read = cache(read_run)  # a run of 01 has many descendants
    for folder in runs_table(root, ["notebook=05_evaluation", "state=done", *conditions])["folder"]:
        evaluation = read(folder)
        for system, values in (evaluation.results or {}).get("table", {}).items():
            if not system.startswith(CEILING):
                settings.append(_settings_of_system(system, "valid" in values, evaluation, read))
                mode = settings[-1].get("04_inference.MODE", "reason")
                systems.append(f"{system}, {mode}" if mode != "reason" else system)
                figures.append(values)
    if not systems:
        raise HistoryError(f"no finished run of 05_evaluation in {root}/ fits: run a sweep that ends with it")
    rows, numbers = pd.DataFrame(settings, dtype=object), pd.DataFrame(figures)
    texts = rows.map(str).assign(system=systems)  # lists cannot be compared by groupby
    fixed = [name for name in rows if not name.endswith(".SEED")]
    differing = [name for name in fixed if texts.groupby("system")[name].nunique().max() > 1]
    rows = rows.assign(system=systems, group=texts.groupby(["system", *fixed], sort=False).ngroup()).join(numbers)
    return rows[~texts.duplicated()], differing, list(numbers)  # a retriever is in many evaluations


def _settings_of_system(system: str, reranks: bool, evaluation: Run, read: Callable[[Path], Run]) -> dict[str, Any]:
    """The settings that a row of an evaluation's table depends on: those of its own training, and of no other.

    reranks: whether the system is a model; a retriever depends on the data and on which questions were ranked
    """
    settings = settings_of(evaluation, read, without=["INFERENCE_RUN"])
    folder = parents_of(evaluation).get("INFERENCE_RUN")
    if folder is None:
        return settings
    others = set(RUN_OF_SYSTEM.values()) - {RUN_OF_SYSTEM.get(system)}
    inference = settings_of(read(folder), read, without=others)
    unrelated = {f"04_inference.{name}" for name in (*others, "SYSTEMS", "FRONTIER")}
    if not reranks:
        unrelated |= {name for name in inference if name.startswith("04_") and name not in QUESTIONS_OF_04}
    return settings | {name: value for name, value in inference.items() if name not in unrelated}


def write_leaderboard(table: pd.DataFrame, path: str | Path) -> Path:
    """Write a leaderboard as a self-contained HTML page."""
    caption = "Means over seeds; sd is that of micro R@1 over seeds. Each row is a system with its settings."
    return write_text(path, html_page("Leaderboard", html_table(table, caption, digits=3)))


def leaderboard_text(root: str | Path = "runs", conditions: Sequence[str] = (), html: str | None = None) -> str:
    """Return `leaderboard` as text; html: a file to write it to as well."""
    table = leaderboard(root, conditions)
    text = table.to_string(float_format="{:.3f}".format, na_rep="")
    return f"{text}\n{write_leaderboard(table, html)}" if html else text


def compare_runs(
    first: str, second: str, root: str | Path = "runs", samples: int = 10_000
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Compare two systems, query by query.

    first, second: a run of 04 or 05 by its hash (or a part of it), and the system after a colon where there are
        several: "3f2a:SFT"

    Returns the parameters in their lineages that differ, the systems side by side (`comparison.compare`, the first as
    baseline), and one row a question: question_id, domain, type, R@1 of each and "change", the largest losses first.
    Raises HistoryError for runs that ranked different questions or corpora.
    """
    rankings, settings, corpora = {}, {}, []
    for which in (first, second):
        run, system, corpus = _ranked(which, root)
        name = f"{system} ({run.folder.name[:6]})"
        name += " again" * (name in rankings)
        rankings[name] = read_trec(run.folder / f"{system}.trec", corpus).pages
        settings[name] = settings_of(run) | {"system": system}
        corpora.append(corpus)
    questions, others = map(set, rankings.values())
    if corpora[0].folder != corpora[1].folder or questions != others:
        raise HistoryError(
            f"{first} and {second} ranked different questions: {len(questions)} of {corpora[0].folder} and "
            f"{len(others)} of {corpora[1].folder}, {len(questions & others)} of them the same"
        )
    corpus = corpora[0].with_questions(questions)
    scores = {name: per_question(pages, corpus).set_index("question_id") for name, pages in rankings.items()}
    before, after = scores.values()
    queries = before[["domain", "type"]].assign(**{name: score["R@1"] for name, score in scores.items()})
    queries["change"] = after["R@1"] - before["R@1"]
    parameters = pd.DataFrame(settings, dtype=object)
    same = [row.iloc[0] == row.iloc[1] for _, row in parameters.iterrows()]
    table = compare(rankings, corpus, samples=samples)
    return parameters[~pd.Series(same, parameters.index)], table, queries.sort_values("change", kind="stable")


def comparison_text(pair: Sequence[str], root: str | Path = "runs", changes: int = 10) -> str:
    """Return `compare_runs` of a pair as text, with the questions that changed most."""
    parameters, systems, queries = compare_runs(pair[0], pair[1], root)
    gains, losses = (queries["change"] > 0).sum(), (queries["change"] < 0).sum()
    largest = queries["change"].abs().sort_values(ascending=False, kind="stable").index[:changes]
    return (
        f"made differently:\n{parameters.to_string() if len(parameters) else 'in nothing'}\n\n"
        f"{presented(systems).T.to_string()}\n{systems.attrs['note']}\n\n"
        f"{gains} questions better, {losses} worse, {len(queries) - gains - losses} the same; the largest changes:\n"
        f"{queries.loc[largest].to_string(float_format='{:.3f}'.format)}"
    )


def _ranked(which: str, root: str | Path) -> tuple[Run, str, Corpus]:
    """A run of 04, the system in it that is meant, and the corpus that it ranked."""
    name, _, system = which.partition(":")
    run = find_run(name, root)
    if inference := parents_of(run).get("INFERENCE_RUN"):
        run = read_run(inference)
    systems = sorted((path.stem for path in run.folder.glob("*.trec")), key=lambda name: (name == RETRIEVER, name))
    if run.notebook != "04_inference" or not systems:
        raise HistoryError(f"{run.folder} holds no rankings: name a run of 04_inference or 05_evaluation")
    if (not system and len(systems) > 1 + (RETRIEVER in systems)) or (system and system not in systems):
        raise HistoryError(f"which system of {run.folder}? Write {name}:SYSTEM; there are {', '.join(systems)}")
    corpus = load_corpus(run.parameters["CORPUS"], run.parameters["SPLIT"], root=project_root())
    return run, system or systems[0], corpus


def prune(root: str | Path = "runs", conditions: Sequence[str] = (), delete: bool = False) -> pd.DataFrame:
    """Return the runs that fit and nobody needs, with their size in MB ("MB"); `delete` deletes them.

    Without conditions, those that are not done. Kept in any case: a run that another, which is kept, came from, and
    one that a process is making. A folder is renamed before its files go, so that no half of a run is left.
    """
    fitting = runs_table(root, conditions or ["state!=done"])
    came_from = {run.folder.resolve(): {p.resolve() for p in parents_of(run).values()} for run in read_runs(root)}
    unneeded = {Path(folder).resolve() for folder in fitting["folder"]}
    kept = [folder for folder in came_from if folder not in unneeded]
    while kept:
        needed = came_from.get(kept.pop(), set()) & unneeded
        unneeded -= needed
        kept += needed
    rows = fitting[[Path(folder).resolve() in unneeded for folder in fitting["folder"]]].copy()
    rows["MB"] = [sum(file.stat().st_size for file in f.rglob("*") if file.is_file()) / 1e6 for f in rows["folder"]]
    return rows[[_delete(folder) for folder in rows["folder"]]] if delete else rows


def prune_text(root: str | Path = "runs", conditions: Sequence[str] = (), delete: bool = False) -> str:
    """Return `prune` as text."""
    rows = prune(root, conditions, delete)
    lines = [f"{row.folder}: {row.state}, {row.MB:.1f} MB" for row in rows.itertuples()]
    done = "deleted" if delete else "would be deleted: say --delete to do so"
    return "\n".join([*lines, f"{len(rows)} runs, {rows['MB'].sum():.1f} MB, {done}"])


def _delete(folder: Path) -> bool:
    """Delete a run, unless a process makes it or has it open."""
    try:
        with FileLock(lock_of(folder), timeout=0), FileLock(folder / OPEN, timeout=0):
            doomed = folder.with_name(f".{folder.name}.deleted")
            folder.rename(doomed)
            shutil.rmtree(doomed)
    except Timeout:
        return False
    return True


def seconds_taken(run: Run) -> float | None:
    """Return the seconds from a finished run's opening (the last one) to its results."""
    try:
        started = datetime.fromisoformat(run.manifest["started"]).timestamp()
        return max(0.0, (run.folder / "results.json").stat().st_mtime - started)
    except (KeyError, TypeError, ValueError, OSError):
        return None
