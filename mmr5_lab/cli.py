"""The command line, `mmr5`: each command does what the function of the same step does in Python.

Exit code 0: done, 1: failed on the way, 2: the input cannot be used; errors are one line on standard error.
"""

import argparse
import importlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` is `sys.argv[1:]` by default.

    Raises SystemExit for `--help` (code 0) and for arguments that it cannot parse (code 2), as argparse does.
    """
    options = vars(_parser().parse_args(argv))
    function = options.pop("function")
    logging.basicConfig(format="mmr5: %(levelname)s: %(message)s")
    try:
        outcome = (_named(function) if isinstance(function, str) else function)(**options)
        if isinstance(outcome, str | Path):
            print(outcome)
    except KeyboardInterrupt:
        return _failed("interrupted; the same command goes on from here", EXIT_FAILED)
    except (ValueError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        return _failed(error, EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED)
    except OSError as error:
        return _failed(error, EXIT_FAILED)
    return EXIT_DONE


def _is_ours(error: Exception) -> bool:
    """Did this package raise it, in words for the user? One from a library is worth its traceback."""
    innermost = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)][-1]
    return innermost.startswith("mmr5_lab.")


def _failed(message: object, code: int) -> int:
    print(f"mmr5: error: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmr5",
        description="Multimodal page reranking with reasoning, from documents to results.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad input.",
    )
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for command, function, about, description, *arguments in COMMANDS:
        group, _, name = command.rpartition(" ")
        if group not in groups:
            group_parser = groups[""].add_parser(group, help=GROUPS[group][0], description=GROUPS[group][1])
            groups[group] = group_parser.add_subparsers(required=True, metavar="WHAT")
        subparser = groups[group].add_parser(name, help=about, description=description or None)
        subparser.set_defaults(function=function)
        for names, settings in arguments:
            subparser.add_argument(*names, **settings)
    return parser


def _named(function: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(f"mmr5_lab.{module}"), name)


def arg(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, settings


class Choices:
    """What a room has to choose from, imported when it is needed: `mmr5 --help` must not load pandas and PyTorch."""

    def __init__(self, names: str, *more: str):
        self.names, self.more = names, more

    def __iter__(self) -> Iterator[str]:
        yield from (*self.more, *_named(self.names))


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if _positive(part) > _positive(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part of a whole, such as 1/4")
    return int(part), int(parts)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _traces(
    corpus, split, run, out, candidates, seed, shuffles, max_traces, max_per_domain, refine, max_words, answers,
    **teacher,
) -> str:  # fmt: skip
    from mmr5_lab.corpus.documents import load_corpus
    from mmr5_lab.corpus.rankings import read_trec
    from mmr5_lab.mini.teacher import evidence_teacher
    from mmr5_lab.traces import construction, quality
    from mmr5_lab.traces.teachers import ServerTeacher, open_teacher
    from mmr5_lab.views.widgets import trace_browser

    part, out = load_corpus(corpus, split), Path(out)
    chosen = construction.training_candidates(part, read_trec(run, part), candidates, seed, shuffles)
    chosen = construction.within_quota(chosen, max_traces or len(chosen), max_per_domain)
    answers, offline = answers or out.with_suffix(".sqlite"), evidence_teacher(part)
    with open_teacher(part, answers=answers, offline=offline, **teacher) as opened:
        try:
            construction.make_traces(part, chosen, opened, out, refine, max_words=max_words)
        finally:
            if isinstance(opened, ServerTeacher):
                print(opened.account.summary().to_string())
    rejected_file = construction.rejected_path(out)
    accepted, rejected = construction.read_traces(out), construction.read_traces(rejected_file)
    print(quality.report(accepted, rejected)[["traces", "share"]].to_string(formatters={"share": "{:.1%}".format}))
    out.with_suffix(".card.md").write_text(quality.dataset_card(accepted, rejected, out.stem), encoding="utf-8")
    page = trace_browser(part, accepted, rejected).static_export().save(out.with_suffix(".html"))
    return f"{out}: {len(accepted)} traces; {rejected_file}: {len(rejected)} with a fault; to look at: {page}"


CORPUS = arg(
    "corpus", metavar="CORPUS", help="corpus folder, mmdocir or mmdocir-train from the hub, or several: 'A + B'"
)
RANKING = arg("run", metavar="RUN", help="TREC run with the candidates")
SPLIT = arg("--split", metavar="NAME", help="only the documents of this split")
RUNS = arg("--runs", dest="root", default="runs", metavar="FOLDER", help="where runs are kept (default: runs)")
RUN = arg("run", metavar="RUN", help="the first digits of its hash, or its folder")
CONDITIONS = arg("conditions", metavar="CONDITION", nargs="*", help='such as "LORA_RANK=8" or "last_loss<0.5"')
RANKER = (  # what ranks: a model here or on a server, its mode, a strategy
    arg("--model", help="model folder or hub name (mmr5 ask: default the newest run of 03_grpo)"),
    arg("--adapter", help="PEFT adapter folder"),
    arg("--server", metavar="URL", help="ask a server with OpenAI's interface instead, such as "
        "http://localhost:8000/v1; --model is its name there, OPENAI_API_KEY its key"),
    arg("--mode", choices=Choices("reranking.ranking:SERVER_MODES"), default="reason", metavar="MODE",
        help="one of %(choices)s (default: %(default)s); rerank: of a --server with the interface /v1/rerank"),
    arg("--max-pixels", type=_positive, metavar="N", help="pixels of a page at most (default: the model's limit)"),
    arg("--max-new-tokens", type=_positive, default=2048, metavar="N", help="of an answer (default: 2048)"),
    arg("--window", type=_positive, metavar="N", help="pages shown at once, in sliding windows"),
    arg("--stride", type=_positive, metavar="N", help="places that a window moves (default: half a window)"),
    arg("--shuffles", type=_positive, metavar="K", help="consensus of K shuffles of the candidates (Borda)"),
)  # fmt: skip


GROUPS = {
    "runs": (
        "the history of runs: list, show, compare, prune …",
        "Look into the runs that are there. Conditions narrow them down: NAME=VALUE, or != < > <= >=; NAME is "
        "notebook, run, state (done, failed, unfinished, damaged), a parameter or a figure of the results. A run is "
        "named by the first digits of its hash.",
    )
}
# Name; function that takes the arguments and returns a text to print ("room.module:function": imported when the command
# is run); help in the list of commands; help of the command; arguments.
COMMANDS: list[tuple] = [
    (
        "demo", "experiments.chain:run_demo", "the whole method on the miniature",
        "Run notebooks 01 to 06 in a chain, print the result table and write runs/report.html. An interrupted run "
        "continues when started again; a finished one is shown at once.",
        arg("--profile", type=Path, default="notebooks/profiles/mini.yaml", metavar="FILE",
            help="parameters (default: %(default)s)"),
        RUNS,
        arg("--until", default="", metavar="NOTEBOOK", help="stop after it, such as 02_sft, without a report"),
    ),
    (
        "reproduce", "experiments.reproduce:reproduce", "the paper's tables at full size",
        "Run the paper's experiments with MMDocIR and the real models from the Hugging Face hub. Disk, GPU, key and "
        "files are checked before anything starts; an interrupted run continues when started again.",
        arg("target", metavar="TARGET", help="released, baselines, paper, recommended or small (docs/full_size.md)"),
        arg("--dry-run", action="store_true",
            help="say what it downloads, computes, asks of a teacher and writes, and stop"),
        arg("--max-questions", type=_positive, metavar="N", help="of each row of the tables (default: all)"),
        arg("--profile", metavar="FILE", help="parameters in place of the target's, notebooks/profiles/TARGET.yaml"),
        RUNS,
    ),
    (
        "ingest", "corpus.ingest:ingest_text", "turn a folder of PDFs into a corpus",
        "Render the PDFs of a folder into a corpus folder, with the text layer of each page, or where a page has "
        "none, the text that OCR reads from its picture. PDFs that cannot be used are skipped with a warning. "
        "Progress and time left are shown; an interrupted run continues at its page when started again.",
        arg("pdf_folder", metavar="PDF_FOLDER"),
        arg("out", metavar="OUT", help="corpus folder to write"),
        arg("--annotations", metavar="FILE", help="questions, in MMDocIR's annotation format"),
        arg("--max-pixels", type=_positive, default=1_003_520, metavar="N",
            help="largest width × height of a page image (default: %(default)s)"),
        arg("--workers", type=_positive, metavar="N", help="rendering processes (default: one a core)"),
        arg("--ocr", choices=Choices("corpus.ocr:ENGINES", "auto", "none"), default="auto", metavar="READER",
            help="what reads pages without a text layer: one of %(choices)s (default: auto, the first installed)"),
    ),
    (
        "retrieve", "retrieval.retrieve:retrieve_to_file", "rank the pages of each question's document",
        "Rank the pages of each question's own document and write a TREC run. All methods but bm25 encode the pages "
        "first and keep the vectors, with progress and time left; an interrupted run continues when started again.",
        CORPUS,
        arg("--method", choices=Choices("retrieval.retrieve:METHODS"), default="bm25", metavar="METHOD",
            help="one of %(choices)s (default: bm25); dense reads the pages' text, the others their images"),
        arg("--model", help="model folder or hub name (default: the paper's for the method)"),
        arg("--vectors", metavar="FOLDER", help="where page vectors are kept (default: CORPUS/vectors, one a model)"),
        arg("--batch-size", type=_positive, default=4, metavar="N", help="pages a batch (default: 4)"),
        arg("--max-pixels", type=_positive, metavar="N", help="pixels of a page (default: the model's)"),
        arg("--device", help="cuda, mps or cpu (default: the first that is there)"),
        arg("--out", required=True, metavar="RUN", help="TREC run to write"),
        arg("--top-k", type=_positive, default=10, metavar="K", help="pages a question (default: 10)"),
        SPLIT,
    ),
    (
        "fuse", "retrieval.fusion:fuse_files", "one ranking of several retrievers",
        "Fuse TREC runs of the same questions by reciprocal rank fusion, and write a TREC run.",
        CORPUS,
        arg("runs", metavar="RUN", nargs="+", help="TREC run"),
        arg("--weights", type=_amount, nargs="+", metavar="W", help="one a run (default: 1 each)"),
        arg("--out", required=True, metavar="RUN2", help="TREC run to write"),
        arg("--top-k", type=_positive, default=10, metavar="K", help="pages a question (default: 10)"),
        SPLIT,
    ),
    (
        "traces", _traces, "reasoning traces to train on, from a teacher",
        "Let a teacher that knows the labels explain the candidates of a TREC run, and write one trace a question as "
        "JSON lines, page images beside it. Traces with a fault go to OUT.rejected.jsonl, with the fault; a dataset "
        "card and a page to look through them are written too. An interrupted run continues when started again: the "
        "teacher is asked only for what is missing.",
        CORPUS, RANKING,
        arg("--out", required=True, metavar="FILE", help="traces to write, such as traces.jsonl"),
        arg("--server", metavar="URL", help="the teacher's server, with OpenAI's interface, such as "
            "https://api.openai.com/v1; its key is read from OPENAI_API_KEY. Without: an offline teacher, which quotes "
            "the words that match"),
        arg("--model", help="the teacher's name on the server, such as gpt-4o"),
        arg("--refine", action="store_true", help="sum each trace up in two sentences (one more call)"),
        arg("--candidates", type=_positive, default=5, metavar="N", help="pages a trace (default: 5)"),
        arg("--shuffles", type=_count, default=1, metavar="K",
            help="orders of a question's pages, a trace each; 0: the run's order (default: 1)"),
        arg("--seed", type=_count, default=0, metavar="N", help="of the shuffles (default: 0)"),
        arg("--max-traces", type=_positive, metavar="N", help="traces at most"),
        arg("--max-per-domain", type=_count, default=0, metavar="N",
            help="traces at most of each domain, or training subset of MMDocIR (default: no limit)"),
        arg("--max-words", type=_positive, default=60, metavar="N", help="words on a page (default: 60)"),
        arg("--concurrency", type=_positive, default=16, metavar="N", help="calls at once (default: 16)"),
        arg("--per-minute", type=_amount, metavar="N", help="calls a minute at most"),
        arg("--timeout", type=_amount, default=120.0, metavar="S", help="seconds a call (default: 120)"),
        arg("--max-pixels", type=_positive, metavar="N", help="pixels of a page at most, for the server"),
        arg("--max-tokens", type=_positive, default=300, metavar="N", help="tokens of an answer (default: 300)"),
        arg("--budget", type=_amount, metavar="MONEY", help="stop before all calls together cost more"),
        arg("--price-in", type=_amount, default=0.0, metavar="MONEY", help="of a million prompt tokens"),
        arg("--price-out", type=_amount, default=0.0, metavar="MONEY", help="of a million written tokens"),
        arg("--answers", metavar="FILE", help="where answers and their cost are kept (default: OUT.sqlite)"),
        SPLIT,
    ),
    (
        "rerank", "reranking.opening:rerank_to_file", "rerank a ranking file with a vision-language model",
        "Rerank the candidates of a TREC run and write a new one, with what the model wrote beside it "
        "(RUN2.generations.parquet). An interrupted run continues when started again.",
        CORPUS, RANKING,
        arg("--out", required=True, metavar="RUN2", help="TREC run to write"),
        *RANKER,
        arg("--channel", choices=Choices("reranking.whole_runs:CHANNELS"), default="image", metavar="CHANNEL",
            help="what is shown of a page, one of %(choices)s (default: image)"),
        arg("--candidates", type=_positive, default=10, metavar="N", help="pages ranked (default: 10)"),
        arg("--batch-size", type=_positive, default=8, metavar="N", help="questions a batch (default: 8)"),
        arg("--shard", type=_shard, default=(1, 1), metavar="K/N",
            help="rerank part K of N, for several GPUs; then join the parts: cat part?.trec > RUN2"),
        SPLIT,
    ),
    (
        "ask", "views.ask:ask_to_file", "ask one question: retrieve, rerank, show the pages",
        "Take BM25's best pages for a question, rerank them, print them with the model's reasoning and write an HTML "
        "page with thumbnails.",
        CORPUS,
        arg("question", metavar="QUESTION"),
        arg("--document", metavar="NAME", help="look only into this document"),
        arg("--out", default="ask.html", metavar="FILE", help="HTML page to write (default: ask.html)"),
        arg("--candidates", type=_positive, default=5, metavar="N", help="pages ranked (default: 5)"),
        *RANKER,
    ),
    (
        "serve", "reranking.service:serve", "a reranking server with the /v1/rerank interface",
        "Serve a model to clients that speak /v1/rerank as Jina, Cohere and vLLM do. Pages are images: data: URLs, "
        "base64, or paths inside --images. Clients send the key of the environment variable MMR5_SERVE_KEY, if it is "
        "set. Ctrl-C ends it after the requests at work.",
        *RANKER,
        arg("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"),
        arg("--port", type=_count, default=8787, help="default: %(default)s; 0: a free one"),
        arg("--images", metavar="FOLDER", help="folder whose pages may be given by path"),
        arg("--allow-urls", action="store_true", help="fetch pages that are given as http(s) URLs"),
        arg("--batch-size", type=_positive, default=8, metavar="N", help="requests a batch (default: 8)"),
        arg("--documents", type=_positive, default=100, metavar="N", help="of a request at most (default: 100)"),
        arg("--waiting", type=_positive, default=64, metavar="N", help="requests that may wait (default: 64)"),
        arg("--timeout", type=_amount, default=300.0, metavar="S", help="seconds a request (default: 300)"),
    ),
    (
        "parity", "reranking.parity:parity", "does a server rank as the same model does here?",
        "Rank some questions with a model here and through a server that has it loaded, in each mode, and say where "
        "token counts, texts and scores part. Exit code 1: they do.",
        arg("model", metavar="MODEL", help="model folder or hub name"),
        arg("--server", required=True, metavar="URL", help="such as http://localhost:8000/v1"),
        arg("--served-as", metavar="NAME", help="the model's name on the server (default: MODEL)"),
        arg("--corpus", default="data/mini/corpus", metavar="CORPUS", help="default: the miniature's"),
        arg("--run", metavar="RUN", help="TREC run with the candidates (default: BM25's)"),
        arg("--questions", type=_positive, default=20, metavar="N", help="default: 20"),
        arg("--candidates", type=_positive, default=5, metavar="N", help="pages ranked (default: 5)"),
        arg("--max-pixels", type=_positive, metavar="N", help="pixels of a page at most (default: the model's limit)"),
        arg("--max-new-tokens", type=_positive, default=512, metavar="N", help="of an answer (default: 512)"),
    ),
    (
        "evaluate", "evaluation.ranking_files:evaluation_text", "recall of ranking files, by domain",
        "Print recall@k of each run by domain, its macro and micro averages, and the ceiling that a perfect ranking "
        "reaches; or by question type or number of gold pages, beside both ceilings.",
        CORPUS,
        arg("runs", metavar="RUN", nargs="+", help="TREC run"),
        arg("--ks", type=_positive, nargs="+", default=[1, 3, 5], metavar="K", help="default: 1 3 5"),
        arg("--measures", nargs="+", choices=Choices("evaluation.gold_ranks:MEASURES"), default=["R"], metavar="M",
            help="some of %(choices)s (R and nDCG at k; the means of RR and AP are MRR and MAP); default: R"),
        arg("--by", choices=["type", "gold"], help="by question type, or by number of gold pages"),
        SPLIT,
    ),
    (
        "tables", "evaluation.paper_tables:tables_text", "the paper's two result tables, ours beside",
        "Build the result tables of arXiv 2506.12364 from TREC runs. A run belongs to a row by its name: colqwen.trec "
        "is the retriever, colqwen_mm-r5.trec the reranker MM-R5 on its candidates; runs of other names get a table "
        "of their own. Runs of notebook 04 fill the row of their retriever, system and mode, seeds by their mean.",
        CORPUS,
        arg("runs", metavar="RUNS", nargs="+", help="TREC runs, or folders that hold some, as runs/04_inference"),
        SPLIT,
        arg("--html", metavar="FILE", help="also write them as HTML"),
        arg("--latex", metavar="FILE", help="also write them as LaTeX"),
    ),
    (
        "sweep", "experiments.scheduler:sweep", "many runs of notebooks, from a grid file",
        "Run notebooks with every combination of a grid file's values (notebooks/sweeps/*.yaml), as many at once as "
        "cores and memory allow. Everything is checked before anything starts. Finished runs are reused; an "
        "interrupted sweep continues when started again.",
        arg("grid", metavar="GRID", help="grid file"),
        RUNS,
        arg("--dry-run", action="store_true", help="check and say what would be run, and stop"),
        arg("--cores", type=_positive, metavar="N", help="cores for all runs together (default: all)"),
        arg("--memory", type=_positive, metavar="GB", help="memory for all runs (default: what is free)"),
        arg("--backend", choices=["processes", "ray"], default="processes",
            help="where runs are made (default: processes)"),
        arg("--address", help="of a running Ray cluster (default: one is started on this machine)"),
        arg("--tracker", choices=Choices("training.monitoring:TRACKERS"), metavar="NAME",
            help="also log to one of %(choices)s"),
    ),
    (
        "runs list", "experiments.history:list_text", "a line a run, the newest last", "", RUNS, CONDITIONS,
        arg("--show", metavar="NAME", nargs="+", default=[], help="parameters and figures to show as columns"),
    ),
    ("runs show", "experiments.history:run_text", "parameters, results and files of a run", "", RUNS, RUN),
    ("runs lineage", "experiments.history:lineage", "what a run came from and what came from it", "", RUNS, RUN),
    (
        "runs compare", "experiments.history:comparison_text",
        "two systems query by query, with what differs in how they were made", "", RUNS,
        arg("pair", metavar="RUN[:SYSTEM]", nargs=2, help="a run of 04 or 05, and which of its systems"),
        arg("--changes", type=_positive, default=10, metavar="N", help="questions shown (default: 10)"),
    ),
    (
        "runs leaderboard", "experiments.history:leaderboard_text",
        "all evaluated systems, seeds averaged, the best first", "", RUNS, CONDITIONS,
        arg("--html", metavar="FILE", help="also write it as HTML"),
    ),
    (
        "runs prune", "experiments.history:prune_text", "runs that nobody needs, to delete them", "", RUNS, CONDITIONS,
        arg("--delete", action="store_true", help="delete them (without, they are only listed)"),
    ),
    (
        "export", "training.export:export_model", "a trained model with adapter and model card",
        "Copy the model of a finished run of notebook 02 or 03 to a new folder: merged weights that transformers "
        "loads, the adapter, and a card with data, parameters and results.",
        arg("run", metavar="RUN", help="run folder, such as runs/03_grpo/0123456789ab"),
        arg("out", metavar="OUT", help="folder to write; new or empty"),
        arg("--evaluation", metavar="RUN", help="run of notebook 05 for the card (default: found beside)"),
    ),
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
