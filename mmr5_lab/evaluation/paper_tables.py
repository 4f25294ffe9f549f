"""The two result tables of arXiv 2506.12364, filled from the TREC runs in a folder, beside the paper's figures.

    runs = find_runs(["runs/mmdocir"])
    tables = paper_tables(runs, corpus)
    print(as_text(tables, corpus))

A run belongs to a row by its file name (`run_name`): `colqwen.trec` is the retriever alone, `colqwen_mm-r5.trec` MM-R5
on its candidates. A run of another name gets a row of its own in a table "other". In a run folder of notebook 04 its
retriever, system and mode say which row it is (`ROWS`), and its seeds are averaged.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.corpus.rankings import RankingsError, read_trec
from mmr5_lab.evaluation.comparison import compare, presented
from mmr5_lab.evaluation.metrics import evaluate, evaluate_runs
from mmr5_lab.files import read_object, results
from mmr5_lab.html import escape_html, html_page, html_table, latex_table, visible

RETRIEVER_ONLY = "retriever only"
MMDOCIR_QUESTIONS = 1658
KS = (1, 3, 5)
KINDS = ("macro", "macro_ex_news", "micro")
AVERAGES = [f"{kind} R@{k}" for kind in KINDS for k in KS]
CEILING = "perfect ranking"

# The paper's rerankers: weights, how they are asked. "-cot" thinks before it answers.
_BASE = "Qwen/Qwen2.5-VL-7B-Instruct"
RERANKERS = {
    "Qwen2.5-VL-7B": (_BASE, "direct"),
    "Qwen2.5-VL-7B-cot": (_BASE, "reason"),
    "Qwen2.5-VL-32B": ("Qwen/Qwen2.5-VL-32B-Instruct", "direct"),
    "Qwen2.5-VL-32B-cot": ("Qwen/Qwen2.5-VL-32B-Instruct", "reason"),
    "Gemma3-12B": ("google/gemma-3-12b-it", "direct"),
    "Gemma3-12B-cot": ("google/gemma-3-12b-it", "reason"),
    "Qwen2.5-VL-7B-sft": ("MODEL", "reason"),
    "Qwen2.5-VL-7B-rl": ("MODEL", "reason"),
    "MM-R5": ("i2vec/MM-R5", "reason"),
}
RETRIEVER = "retriever"  # the candidates among the rankings of a run of notebook 04
SEEDS = ("SEED", "SYSTEMS", "FRONTIER", "BATCH_SIZE")  # parameters of runs that count as seeds of one row
OF_CANDIDATES = ("CORPUS", "SPLIT", "ENCODER", "NUM_CANDIDATES", "MAX_QUESTIONS")  # on which a retriever's row depends
ROWS = {  # a system of such a run, and how it was asked -> its row
    RETRIEVER: RETRIEVER_ONLY, "base direct": "Qwen2.5-VL-7B", "base reason": "Qwen2.5-VL-7B-cot",
    "SFT reason": "Qwen2.5-VL-7B-sft", "RL only reason": "Qwen2.5-VL-7B-rl", "SFT + RL reason": "MM-R5",
}  # fmt: skip


def paper_results() -> pd.DataFrame:
    """Return the paper's figures, as shares, from `data/paper_results.csv` of this checkout.

    Columns: table ("main" or "retrievers"), first_stage, method, macro_r1 … micro_r5.
    """
    return pd.read_csv(Path(__file__).parents[2] / "data" / "paper_results.csv")


def run_name(first_stage: str, method: str = RETRIEVER_ONLY) -> str:
    """Return the name of the run of a row, without `.trec`.

    >>> run_name("ColQwen"), run_name("E5-V", "MM-R5")
    ('colqwen', 'e5-v_mm-r5')
    """
    return (first_stage if method == RETRIEVER_ONLY else f"{first_stage}_{method}").lower()


def find_runs(paths: Iterable[str | Path]) -> dict[str, list[Path]]:
    """Return TREC runs by name: files of `paths`, and the `.trec` files at any depth of its folders.

    Those in a run folder of notebook 04 are named after its retriever, system and mode; those of several seeds have the
    same name. Raises RankingsError for a path that does not exist, no run at all, two other files of the same name, and
    runs of the notebook that are the same row with other parameters than seeds.
    """
    runs: dict[str, list[Path]] = {}
    listed = [Path(path) for path in paths]
    for path in listed:
        if not path.exists():
            raise RankingsError(f"the run or folder {path} does not exist")
        for file in sorted(path.rglob("*.trec")) if path.is_dir() else [path]:
            of_notebook = _row_of(file)
            name = of_notebook or file.name.removesuffix(".trec").lower()
            same = runs.setdefault(name, [])
            if same and not of_notebook and not file.samefile(same[0]):
                raise RankingsError(f"{same[0]} and {file} have the same name: give the one that is meant")
            if same and of_notebook and (other := _asked(file).items() ^ _asked(same[0]).items()):
                names = ", ".join(sorted({key for key, _ in other}))
                raise RankingsError(
                    f"{same[0]} and {file} are of one row, but differ in {names}: give the runs of one sweep"
                )
            if not any(file.samefile(other) for other in same) and not (same and file.stem == RETRIEVER):
                same.append(file)
    if not runs:
        raise RankingsError(f"there are no .trec files in {', '.join(map(str, listed))}: write some with mmr5 retrieve")
    return runs


def _row_of(file: Path) -> str | None:
    """Return the name of a file in a finished run folder of notebook 04; None elsewhere."""
    try:
        run = results(file.parent)
    except FileNotFoundError:
        return None
    if "asked" not in run:  # not of notebook 04
        return None
    system = file.stem if file.stem == RETRIEVER else f"{file.stem} {run['asked']}"
    return run_name(run["retriever"], ROWS.get(system, system))


def _asked(file: Path) -> dict[str, str]:
    """Return the parameters of the run that a file stands in, without seeds and the runs that it took."""
    parameters = (read_object(file.with_name("manifest.json"))[0] or {}).get("parameters", {})
    if file.stem == RETRIEVER:
        parameters = {key: value for key, value in parameters.items() if key in OF_CANDIDATES}
    return {key: repr(value) for key, value in parameters.items() if key not in SEEDS and not key.endswith("RUN")}


def paper_tables(files: Mapping[str, Sequence[Path]], corpus: Corpus) -> dict[str, pd.DataFrame]:
    """Return the paper's tables, "main" and "retrievers", and "other" for runs that are not in them.

    files: name -> TREC runs, as `find_runs` gives them; several, such as those of seeds, count with their mean

    Rows: "ColQwen" (retriever), "ColQwen + MM-R5" (reranker on its candidates) in the paper's order, or a run's name,
    and last `CEILING`, which no ranking can pass. Columns: for each of `AVERAGES` ours (NaN without a run) and, where
    the paper has it, "paper …" and "Δ …" (ours - paper's).

    Raises RankingsError, naming file and line, for a run that cannot be read, and ValueError, naming the file, for one
    that does not fit the corpus.
    """
    paper = paper_results()
    ranked = {str(path): read_trec(path, corpus).pages for paths in files.values() for path in paths}
    evaluated = {path: _flat(table) for path, table in evaluate_runs(ranked, corpus, KS).items()}
    means = {name: sum(evaluated[str(path)] for path in paths) / len(paths) for name, paths in files.items()}
    ours = pd.DataFrame(means, index=AVERAGES).T
    gold_first = dict(zip(corpus.questions["question_id"], corpus.questions["gold_pages"], strict=True))
    ceiling = _flat(evaluate(gold_first, corpus, KS)).to_frame(CEILING).T
    tables = {}
    for name, rows in paper.groupby("table", sort=False):
        systems = list(zip(rows["first_stage"], rows["method"], strict=True))
        runs = [run_name(*system) for system in systems]
        table = ours.reindex(runs).set_axis([a if b == RETRIEVER_ONLY else f"{a} + {b}" for a, b in systems])
        for average in (name for name in AVERAGES if not name.startswith("macro_ex_news")):
            table[f"paper {average}"] = rows[average.replace(" R@", "_r")].to_numpy()
            table[f"Δ {average}"] = table[average] - table[f"paper {average}"]
        tables[str(name)] = pd.concat([table, ceiling])
    known = [run_name(a, b) for a, b in zip(paper["first_stage"], paper["method"], strict=True)]
    others = ours.drop(index=known, errors="ignore")
    if len(others):
        tables["other"] = pd.concat([others, ceiling])
    return {name: table.rename_axis("system") for name, table in tables.items()}


def gains(files: Mapping[str, Sequence[Path]], corpus: Corpus) -> list[pd.DataFrame]:
    """Return, for each retriever that has a run, its rerankers against it: `compare`, seeds averaged by question."""
    tables = []
    for first in sorted(name for name in files if any(other.startswith(f"{name}_") for other in files)):
        names = [first, *sorted(name for name in files if name.startswith(f"{first}_"))]
        ranked = {name: [read_trec(path, corpus).pages for path in files[name]] for name in names}
        tables.append(compare(ranked, corpus, baseline=first))
    return tables


def _short(table: pd.DataFrame) -> pd.DataFrame:
    """Return what a table of `gains` adds to the tables above it."""
    return presented(table).filter(regex=r"^(seeds|sd|micro R@1|interval|difference|its interval|p)$")


def as_text(tables: Mapping[str, pd.DataFrame], corpus: Corpus, compared: Sequence[pd.DataFrame] = ()) -> str:
    """Return the tables for a terminal, and below them those of `gains`."""
    parts = [_note(corpus)]
    parts += [
        f"{title}\n{block.to_string()}" for name, table in tables.items() for title, block in _blocks(name, table)
    ]
    parts += [f"{table.attrs['note']}\n{_short(table).to_string()}" for table in compared]
    return visible("\n\n".join(parts))


def as_html(tables: Mapping[str, pd.DataFrame], corpus: Corpus, compared: Sequence[pd.DataFrame] = ()) -> str:
    """Return the tables as one HTML page."""
    parts = [f"<p>{escape_html(_note(corpus))}</p>"]
    parts += [html_table(block, title) for name, table in tables.items() for title, block in _blocks(name, table)]
    parts += [html_table(_short(table), table.attrs["note"]) for table in compared]
    return html_page("Recall beside the paper's", "\n".join(parts))


def as_latex(tables: Mapping[str, pd.DataFrame], corpus: Corpus, compared: Sequence[pd.DataFrame] = ()) -> str:
    """Return the tables in LaTeX (package booktabs)."""
    blocks = [block for name, table in tables.items() for block in _blocks(name, table)]
    parts = [latex_table(block, f"{title}. {_note(corpus)}") for title, block in blocks]
    return "\n".join([*parts, *(latex_table(_short(table), table.attrs["note"]) for table in compared)])


def tables_text(corpus: str | Path, runs: Sequence[str], split: str | None, html: str | None, latex: str | None) -> str:
    """Return the tables of TREC files (or folders of them) on a corpus folder as text.

    html, latex: files to write them to as well
    """
    part = load_corpus(corpus, split)
    files = find_runs(runs)
    shown = paper_tables(files, part), part, gains(files, part)
    for path, write in ((html, as_html), (latex, as_latex)):
        if path:
            Path(path).write_text(write(*shown), encoding="utf-8")
    return as_text(*shown)


def _blocks(name: str, table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """A table by kind of average as texts, with a title each; rows of which nothing is known are left out."""
    for kind in KINDS:
        names = {f"{before}{kind} R@{k}": f"{before}R@{k}" for k in KS for before in ("", "paper ", "Δ ")}
        block = table[[column for column in names if column in table]].dropna(how="all")
        texts = block.apply(lambda of: of.map(("{:+.4f}" if of.name.startswith("Δ") else "{:.4f}").format))
        shown = texts.where(block.notna(), "–").rename(columns=names)
        yield f"{name}, {kind.replace('_ex_news', ' without News')}", shown


def _note(corpus: Corpus) -> str:
    count = len(corpus.questions)
    note = "Recall of our runs, beside it the paper's (arXiv 2506.12364), and Δ, ours - the paper's."
    if count == MMDOCIR_QUESTIONS:
        return note
    return f"{note} The paper's are of MMDocIR's {MMDOCIR_QUESTIONS} questions, ours of another set of {count}."


def _flat(table: pd.DataFrame) -> pd.Series:
    return pd.Series({average: table.loc[average.split()[0], average.split()[1]] for average in AVERAGES})
