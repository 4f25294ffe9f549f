"""The ledger of runs: what stands in `runs/`, read anew each time from the run folders themselves.

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
from mmr5_lab.evaluation.comparison import compare
from mmr5_lab.evaluation.metrics import per_question
from mmr5_lab.experiments.fingerprint import RUN_FOLDER
from mmr5_lab.experiments.runs import Record, lock_of, project_root, read_run
from mmr5_lab.html import html_page, html_table

CONDITION = re.compile(r"(?P<name>[\w .+@-]+?)\s*(?P<sign>!=|<=|>=|=|<|>)\s*(?P<value>.*)")
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
CEILING = "ceiling"  # rows of an evaluation's table that are no system
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } caption { text-align: left; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ccc; } th:first-child { text-align: left; }
"""


class LedgerError(ValueError):
    """A run that is not there, or a condition that cannot be read."""


def read_runs(root: str | Path = "runs", notebook: str = "*") -> Iterator[Record]:
    """The runs under a folder, of one notebook or of all, sorted by notebook and hash."""
    for manifest in sorted(Path(root).glob(f"{notebook}/*/manifest.json")):
        yield read_run(manifest.parent)


def state(record: Record) -> str:
    """Of a run: "done", "damaged" (its results cannot be trusted), "failed" or "unfinished" (running, or stopped)."""
    if record.done:
        return "done"
    return "damaged" if record.fault else "failed" if (record.folder / "failed.txt").exists() else "unfinished"


def runs_table(root: str | Path = "runs", conditions: Sequence[str] = ()) -> pd.DataFrame:
    """One row a run: notebook, run (hash), state, started, seconds, folder, parameters, results; the newest last.

    conditions: of the form "NAME=VALUE", also with != < > <= >=; NAME is a column, a parameter or a figure of the
        results ("table.SFT.micro R@1"). A run without it fits none but "!=".

    Raises LedgerError for a condition that is not of this form.
    """
    checks = [_condition(text) for text in conditions]
    rows = []
    for record in read_runs(root):
        manifest = record.manifest
        row = {
            "notebook": manifest.get("notebook", record.folder.parent.name), "run": record.folder.name,
            "state": state(record), "started": manifest.get("started", ""), "seconds": seconds_taken(record),
            "folder": record.folder, "parameters": manifest.get("parameters", {}), "results": record.results or {},
        }  # fmt: skip
        if all(check(row) for check in checks):
            rows.append(row)
    columns = ["notebook", "run", "state", "started", "seconds", "folder", "parameters", "results"]
    return pd.DataFrame(sorted(rows, key=lambda row: row["started"]), columns=columns)


def _condition(text: str) -> Callable[[Mapping[str, Any]], bool]:
    match = CONDITION.fullmatch(text.strip())
    if match is None:
        raise LedgerError(f"cannot read {text!r}: write NAME=VALUE, or != < > <= >= in place of =")
    name, sign, wanted = match["name"], match["sign"], match["value"]

    def check(row: Mapping[str, Any]) -> bool:
        found = row[name] if name in row else row["parameters"].get(name, flat(row["results"]).get(name))
        if found is None:
            return sign == "!="
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            try:
                return SIGNS[sign](found, float(wanted))
            except ValueError:
                return sign == "!="
        return SIGNS[sign](str(found).lower(), wanted.lower())

    return check


def flat(results: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Results within results by a name with dots.

    >>> flat({"loss": 0.5, "table": {"SFT": {"valid": 1.0}}})
    {'loss': 0.5, 'table.SFT.valid': 1.0}
    """
    found: dict[str, Any] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def find_run(name: str, root: str | Path = "runs") -> Record:
    """The run whose hash begins so, or that lies in this folder. Raises LedgerError for none and for several."""
    if (Path(name) / "manifest.json").is_file():
        return read_run(name)
    found = sorted(Path(root).glob(f"*/{name}*/manifest.json")) if re.fullmatch(r"\w+(\.damaged\d*)?", name) else []
    if len(found) != 1:
        several = f"several runs begin with {name!r}: {', '.join(str(path.parent) for path in found)}"
        raise LedgerError(several if found else f"there is no run {name!r} in {root}/; `mmr5 runs list` shows them")
    return read_run(found[0].parent)


def parents_of(record: Record) -> dict[str, Path]:
    """The run folders that a run took, by parameter: DATA_RUN, SFT_RUN …, or MODEL where that lies in a run."""
    found = {}
    for name, value in record.manifest.get("parameters", {}).items():
        if isinstance(value, str) and (match := RUN_FOLDER.search(value)):
            found[name] = project_root() / value[: match.end()].rstrip("/")
    return found


def lineage(record: Record, root: str | Path = "runs") -> str:
    """A run with all it came from and all that came from it, as lines of text: data, SFT, RL, evaluation."""
    children: dict[Path, list[Record]] = {}
    for other in read_runs(root):
        for parent in dict.fromkeys(parents_of(other).values()):
            children.setdefault(parent.resolve(), []).append(other)
    lines: list[str] = []

    def up(one: Record) -> None:
        for parent in dict.fromkeys(parents_of(one).values()):
            up(read_run(parent))
        if one is not record and (line := f"from {_line(one)}") not in lines:
            lines.append(line)

    def down(one: Record, depth: int) -> None:
        for child in children.get(one.folder.resolve(), []):
            lines.append(f"{'  ' * depth}to {_line(child)}")
            down(child, depth + 1)

    up(record)
    lines.append(_line(record))
    down(record, 1)
    return "\n".join(lines)


def _line(record: Record) -> str:
    if not record.manifest:
        return f"{record.folder.parent.name} {record.folder.name} (gone)"
    return f"{record.folder.parent.name} {record.folder.name} {state(record)} {record.manifest.get('started', '')}"


def settings_of(record: Record, read: Callable[[Path], Record] = read_run) -> dict[str, Any]:
    """Parameters of a run and of all runs that it came from: "02_sft.LORA_RANK" …; paths to runs left out.

    read: `read_run`, or a cache of it
    """
    found: dict[str, Any] = {}
    parents = parents_of(record)
    for parent in dict.fromkeys(parents.values()):
        found |= settings_of(read(parent), read)
    notebook = record.manifest.get("notebook", record.folder.parent.name)
    given = record.manifest.get("parameters", {})
    return found | {f"{notebook}.{name}": value for name, value in given.items() if name not in parents}


def leaderboard(root: str | Path = "runs", conditions: Sequence[str] = ()) -> pd.DataFrame:
    """Systems of all finished evaluations (05) that fit, the best micro R@1 first; seeds of one setting in one row.

    Index: system, with the mode of its inference where that is not "reason". Columns: each setting, anywhere in a
    system's lineage, in which the rows differ; "seeds"; the figures of the evaluations' tables (means over seeds), and
    "sd" of the micro R@1 over seeds (NaN for one).
    """
    groups, differing = _by_setting(_evaluated(root, conditions))
    table = pd.DataFrame(
        [
            {name.partition(".")[2]: group[0]["settings"].get(name) for name in differing}
            | {"seeds": len(group)}
            | pd.DataFrame([row["figures"] for row in group]).mean().to_dict()
            | {"sd": pd.Series([row["figures"].get("micro R@1") for row in group], dtype=float).std()}
            for group in groups
        ],
        index=pd.Index([group[0]["system"] for group in groups], name="system"),
    )
    return table.sort_values("micro R@1", ascending=False, kind="stable") if "micro R@1" in table else table


def by_seed(
    root: str | Path = "runs", conditions: Sequence[str] = (), figure: str = "micro R@1"
) -> dict[str, list[float]]:
    """A figure of each row of the leaderboard, seed by seed, under the system's name and settings."""
    groups, differing = _by_setting(_evaluated(root, conditions))
    found: dict[str, list[float]] = {}
    for group in groups:
        settings = {name.partition(".")[2]: group[0]["settings"].get(name) for name in differing}
        told = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
        found[f"{group[0]['system']}{f' ({told})' if told else ''}"] = [row["figures"][figure] for row in group]
    return found


def _evaluated(root: str | Path, conditions: Sequence[str]) -> list[dict[str, Any]]:
    """One row a system of each finished evaluation: system, figures, settings. Raises LedgerError for none."""
    rows = []
    read = cache(read_run)  # runs have many children
    for evaluation in runs_table(root, ["notebook=05_evaluation", "state=done", *conditions])["folder"]:
        record = read(evaluation)
        settings = settings_of(record, read)
        for system, figures in (record.results or {}).get("table", {}).items():
            if not system.startswith(CEILING):
                mode = settings.get("04_inference.MODE", "reason")
                named = f"{system}, {mode}" if mode != "reason" and "valid" in figures else system
                rows.append({"system": named, "figures": figures, "settings": _of_system(figures, settings)})
    if not rows:
        raise LedgerError(f"no finished run of 05_evaluation in {root}/ fits: run a sweep that ends with it")
    return rows


def _of_system(figures: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a row of a table depends on: a retriever (it has no valid answers) on no training."""
    untrained = "valid" not in figures
    return {name: value for name, value in settings.items() if not (untrained and name[:2] in ("02", "03", "04"))}


def _by_setting(rows: Sequence[dict[str, Any]]) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """Rows that differ in their seeds alone, together, and the settings in which one system's groups differ."""

    def key(row: Mapping[str, Any], names: Iterable[str]) -> str:
        return json.dumps([row["system"], [row["settings"].get(name) for name in names]], default=str)

    names = sorted({name for row in rows for name in row["settings"]})
    fixed = [name for name in names if not name.endswith(".SEED")]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in {key(row, names): row for row in rows}.values():  # the retriever stands in many evaluations
        groups.setdefault(key(row, fixed), []).append(row)
    values: dict[tuple[str, str], set[str]] = {}
    for group in groups.values():
        for name in fixed:
            values.setdefault((name, group[0]["system"]), set()).add(str(group[0]["settings"].get(name)))
    differing = {name for (name, _), seen in values.items() if len(seen) > 1}
    return list(groups.values()), [name for name in fixed if name in differing]


def write_leaderboard(table: pd.DataFrame, path: str | Path) -> Path:
    """A leaderboard as a self-contained HTML page."""
    caption = "Means over seeds; sd is that of micro R@1 over seeds. Each row is a system with its settings."
    Path(path).write_text(html_page("Leaderboard", STYLE, html_table(table, caption, digits=3)), encoding="utf-8")
    return Path(path)


def compare_runs(
    first: str, second: str, root: str | Path = "runs", samples: int = 10_000
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Two systems, query by query.

    first, second: a run of 04 or 05 by its hash (or a part of it), and the system after a colon where there are
        several: "3f2a:SFT"

    Returns the parameters in their lineages that differ, the systems side by side (`compare.compare`, the first as
    baseline), and one row a question: question_id, domain, type, R@1 of each and "change", the largest losses first.
    Raises LedgerError for runs that ranked different questions or corpora.
    """
    runs, settings, corpora = {}, [], []
    for which in (first, second):
        record, system, corpus = _ranked(which, root)
        name = f"{system} ({record.folder.name[:6]})"
        runs[name if name not in runs else f"{name} again"] = read_trec(record.folder / f"{system}.trec", corpus).pages
        settings.append(settings_of(record) | {"system": system})
        corpora.append(corpus)
    asked = [set(run) for run in runs.values()]
    if corpora[0].folder != corpora[1].folder or asked[0] != asked[1]:
        raise LedgerError(
            f"{first} and {second} ranked different questions: {len(asked[0])} of {corpora[0].folder} and "
            f"{len(asked[1])} of {corpora[1].folder}, {len(asked[0] & asked[1])} of them the same"
        )
    corpus = corpora[0].with_questions(asked[0])
    scores = {name: per_question(run, corpus).set_index("question_id") for name, run in runs.items()}
    one, other = scores.values()
    queries = one[["domain", "type"]].assign(**{name: score["R@1"] for name, score in scores.items()})
    queries["change"] = other["R@1"] - one["R@1"]
    differing = [name for name in {**settings[0], **settings[1]} if settings[0].get(name) != settings[1].get(name)]
    parameters = pd.DataFrame(
        {name: [each.get(key) for key in differing] for name, each in zip(runs, settings, strict=True)}, index=differing
    )
    return parameters, compare(runs, corpus, samples=samples), queries.sort_values("change", kind="stable")


def _ranked(which: str, root: str | Path) -> tuple[Record, str, Corpus]:
    """A run of 04, the system in it that is meant, and the corpus that it ranked."""
    name, _, system = which.partition(":")
    record = find_run(name, root)
    if inference := parents_of(record).get("INFERENCE_RUN"):
        record = read_run(inference)
    systems = sorted(path.stem for path in record.folder.glob("*.trec"))
    if record.manifest.get("notebook") != "04_inference" or not systems:
        raise LedgerError(f"{record.folder} holds no rankings: name a run of 04_inference or 05_evaluation")
    if (not system and len(systems) > 1) or (system and system not in systems):
        raise LedgerError(f"which system of {record.folder}? Write {name}:SYSTEM; there are {', '.join(systems)}")
    parameters = record.manifest["parameters"]
    return record, system or systems[0], load_corpus(project_root() / parameters["CORPUS"]).split(parameters["SPLIT"])


def prune(root: str | Path = "runs", conditions: Sequence[str] = (), delete: bool = False) -> pd.DataFrame:
    """The runs that fit and nobody needs, with their size in MB ("MB"); `delete` deletes them.

    Without conditions, those that are not done. Kept in any case: a run that another, which is kept, came from, and
    one that a process is making. A folder is renamed before its files go, so that no half of a run is left.
    """
    fitting = runs_table(root, conditions or ["state!=done"])
    came_from = {r.folder.resolve(): {p.resolve() for p in parents_of(r).values()} for r in read_runs(root)}
    gone = {Path(folder).resolve() for folder in fitting["folder"]}
    keeping = [folder for folder in came_from if folder not in gone]
    while keeping:
        spared = came_from.get(keeping.pop(), set()) & gone
        gone -= spared
        keeping += spared
    rows = fitting[[Path(folder).resolve() in gone for folder in fitting["folder"]]].copy()
    rows["MB"] = [sum(file.stat().st_size for file in f.rglob("*") if file.is_file()) / 1e6 for f in rows["folder"]]
    if delete:
        deleted = [_delete(folder) for folder in rows["folder"]]
        rows = rows[deleted]
    return rows


def _delete(folder: Path) -> bool:
    try:
        with FileLock(lock_of(folder), timeout=0):
            doomed = folder.with_name(f".{folder.name}.deleted")
            folder.rename(doomed)
            shutil.rmtree(doomed)
    except Timeout:  # a process is making it
        return False
    return True


def seconds_taken(record: Record) -> float | None:
    """From the opening of a finished run to its results (the last opening, where it was gone on with)."""
    try:
        started = datetime.fromisoformat(record.manifest["started"]).timestamp()
        return max(0.0, (record.folder / "results.json").stat().st_mtime - started)
    except (KeyError, TypeError, ValueError, OSError):
        return None


def past_seconds(root: str | Path, notebooks: Iterable[str]) -> dict[str, list[tuple[dict[str, Any], float]]]:
    """Parameters and seconds of each notebook's finished runs."""
    past: dict[str, list[tuple[dict[str, Any], float]]] = {name: [] for name in notebooks}
    for name, runs in past.items():
        for record in read_runs(root, name):
            seconds = seconds_taken(record)
            if record.done and seconds is not None:
                runs.append((record.manifest.get("parameters", {}), seconds))
    return past
