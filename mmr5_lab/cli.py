"""The command line, `mmr5`: each command does what the function of the same step does in Python.

Exit code 0: done, 1: failed on the way, 2: the input cannot be used; errors are one line on standard error.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import walk_tb

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` is `sys.argv[1:]` by default.

    Raises SystemExit for `--help` (code 0) and for arguments that it cannot parse (code 2), as argparse does.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="mmr5: %(levelname)s: %(message)s")
    # Modules are imported by the commands, so that `mmr5 --help` answers at once.
    try:
        arguments.command(arguments)
    except KeyboardInterrupt:
        return _failed("interrupted; the same command goes on from here", EXIT_FAILED)
    except (ValueError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        return _failed(error, EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED)
    except OSError as error:
        return _failed(error, EXIT_FAILED)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmr5",
        description="Multimodal page reranking with reasoning, from documents to results.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad input.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_ingest(commands)
    _add_retrieve(commands)
    _add_traces(commands)
    _add_rerank(commands)
    _add_ask(commands)
    _add_evaluate(commands)
    _add_tables(commands)
    _add_sweep(commands)
    _add_runs(commands)
    _add_export(commands)
    return parser


def _add_demo(commands) -> None:
    command = commands.add_parser(
        "demo",
        help="the whole method on the miniature",
        description="Run notebooks 01 to 06 in a chain, print the result table and write runs/report.html. "
        "An interrupted run continues when started again; a finished one is shown at once.",
    )
    command.add_argument(
        "--profile", default="notebooks/profiles/mini.yaml", metavar="FILE", help="parameters (default: %(default)s)"
    )
    command.add_argument("--runs", default="runs", metavar="FOLDER", help="where runs are kept (default: runs)")
    command.add_argument(
        "--until", default="", metavar="NOTEBOOK", help="stop after it, such as 02_sft, without a report"
    )
    command.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from mmr5_lab.experiments.chain import run_demo

    run_demo(Path(arguments.profile), arguments.runs, arguments.until)


def _add_ingest(commands) -> None:
    command = commands.add_parser(
        "ingest",
        help="turn a folder of PDFs into a corpus",
        description="Render the PDFs of a folder and read their text layers, or where a page has none, its picture by "
        "OCR, into a corpus folder. PDFs that cannot be used are skipped with a warning. Progress and time left are "
        "shown; an interrupted run continues at its page when started again.",
    )
    command.add_argument("pdf_folder", metavar="PDF_FOLDER")
    command.add_argument("out", metavar="OUT", help="corpus folder to write")
    command.add_argument("--annotations", metavar="FILE", help="questions, in MMDocIR's annotation format")
    command.add_argument(
        "--max-pixels",
        type=_positive,
        metavar="N",
        help="largest width × height of a page image (default: 1003520)",
    )
    command.add_argument("--workers", type=_positive, metavar="N", help="rendering processes (default: one a core)")
    command.add_argument(
        "--ocr",
        choices=["auto", "tesseract", "rapidocr", "none"],
        default="auto",
        help="who reads pages without a text layer (default: auto, the first of tesseract and rapidocr installed)",
    )
    command.set_defaults(command=_ingest)


def _ingest(arguments: argparse.Namespace) -> None:
    from mmr5_lab.corpus.ingest import build_corpus, read_by
    from mmr5_lab.corpus.pdf import DEFAULT_MAX_PIXELS

    corpus = build_corpus(
        arguments.pdf_folder,
        arguments.out,
        arguments.annotations,
        max_pixels=DEFAULT_MAX_PIXELS if arguments.max_pixels is None else arguments.max_pixels,
        workers=arguments.workers or os.cpu_count() or 1,
        ocr=arguments.ocr,
    )
    pages = corpus.pages
    readers = ", ".join(f"{count} by {reader}" for reader, count in read_by(arguments.out).items())
    print(
        f"{arguments.out}: {len(corpus.documents)} documents, {len(pages)} pages (read: {readers}; "
        f"{int((~pages['has_text']).sum())} without words), {len(corpus.questions)} questions"
    )


def _add_retrieve(commands) -> None:
    command = commands.add_parser(
        "retrieve",
        help="rank the pages of each question's document",
        description="Rank the pages of each question's own document and write a TREC run. All methods but bm25 encode "
        "the pages first and keep the vectors, with progress and time left; an interrupted run continues when started "
        "again.",
    )
    command.add_argument("corpus", metavar="CORPUS", help="corpus folder")
    command.add_argument(
        "--method",
        choices=["bm25", "clip", "e5-v", "dse", "gme", "colqwen", "dense"],
        default="bm25",
        help="retriever (default: bm25); dense reads the pages' text, the others their images",
    )
    command.add_argument("--model", help="model folder or hub name (default: the paper's for the method)")
    command.add_argument(
        "--vectors", metavar="FOLDER", help="where page vectors are kept (default: CORPUS/vectors, one folder a model)"
    )
    command.add_argument("--batch-size", type=_positive, default=4, metavar="N", help="pages a batch (default: 4)")
    command.add_argument("--max-pixels", type=_positive, metavar="N", help="pixels of a page (default: the model's)")
    command.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    command.add_argument("--out", required=True, metavar="RUN", help="TREC run to write")
    command.add_argument("--top-k", type=_positive, default=10, metavar="K", help="pages a question (default: 10)")
    command.add_argument("--split", metavar="NAME", help="only the documents of this split")
    command.set_defaults(command=_retrieve)


def _retrieve(arguments: argparse.Namespace) -> None:
    from mmr5_lab.corpus.ids import CorpusError
    from mmr5_lab.corpus.rankings import write_trec
    from mmr5_lab.retrieval.retrieve import retrieve

    corpus = _corpus(arguments)
    if corpus.questions.empty:
        raise CorpusError(
            f"{arguments.corpus} has no questions to retrieve for: mark some (mmr5_lab.Annotator), give mmr5 ingest"
            " --annotations, or ask one with mmr5 ask"
        )
    options = {name: getattr(arguments, name) for name in ("max_pixels", "device") if getattr(arguments, name)}
    if arguments.method == "bm25" and (options or arguments.model or arguments.vectors):
        raise ValueError("bm25 has no --model, --vectors, --max-pixels or --device: name another --method")
    if arguments.method in ("clip", "dense") and arguments.max_pixels:
        raise ValueError(f"{arguments.method} has no pixel budget: leave --max-pixels away")
    run = retrieve(
        corpus,
        arguments.method,
        arguments.top_k,
        model=arguments.model,
        vectors=arguments.vectors,
        batch_size=arguments.batch_size,
        **options,
    )
    write_trec(run, corpus, arguments.out, tag=arguments.method)
    print(f"{arguments.out}: {len(run.pages)} questions, up to {arguments.top_k} pages each")


def _add_traces(commands) -> None:
    command = commands.add_parser(
        "traces",
        help="reasoning traces to train on, from a teacher",
        description="Let a teacher that knows the labels explain the candidates of a TREC run, and write one trace a "
        "question as JSON lines, page images beside it. Traces with a fault go to OUT.rejected.jsonl, with the fault; "
        "a dataset card and a page to look through them are written too. An interrupted run continues when started "
        "again: the teacher is asked only for what is missing.",
    )
    command.add_argument("corpus", metavar="CORPUS", help="corpus folder")
    command.add_argument("run", metavar="RUN", help="TREC run with the candidates")
    command.add_argument("--out", required=True, metavar="FILE", help="traces to write, such as traces.jsonl")
    command.add_argument(
        "--server",
        metavar="URL",
        help="the teacher's server, with OpenAI's interface, such as https://api.openai.com/v1; its key is read from"
        " OPENAI_API_KEY. Without: an offline teacher, which quotes the words that match",
    )
    command.add_argument("--model", help="the teacher's name on the server, such as gpt-4o")
    command.add_argument("--refine", action="store_true", help="sum each trace up in two sentences (one more call)")
    command.add_argument("--candidates", type=_positive, default=5, metavar="N", help="pages a trace (default: 5)")
    command.add_argument(
        "--shuffles",
        type=_count,
        default=1,
        metavar="K",
        help="orders of a question's pages, a trace each; 0: the run's order (default: 1)",
    )
    command.add_argument("--seed", type=_count, default=0, metavar="N", help="of the shuffles (default: 0)")
    command.add_argument("--max-traces", type=_positive, metavar="N", help="traces at most")
    command.add_argument("--max-words", type=_positive, default=60, metavar="N", help="words on a page (default: 60)")
    command.add_argument("--concurrency", type=_positive, default=16, metavar="N", help="calls at once (default: 16)")
    command.add_argument("--per-minute", type=float, metavar="N", help="calls a minute at most")
    command.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds a call (default: 120)")
    command.add_argument("--max-pixels", type=_positive, metavar="N", help="pixels of a page at most, for the server")
    command.add_argument("--budget", type=float, metavar="MONEY", help="stop before all calls together cost more")
    command.add_argument("--price-in", type=float, default=0.0, metavar="MONEY", help="of a million prompt tokens")
    command.add_argument("--price-out", type=float, default=0.0, metavar="MONEY", help="of a million written tokens")
    command.add_argument(
        "--answers", metavar="FILE", help="where answers and their cost are kept (default: beside OUT, OUT.sqlite)"
    )
    command.add_argument("--split", metavar="NAME", help="only the documents of this split")
    command.set_defaults(command=_traces)


def _traces(arguments: argparse.Namespace) -> None:
    from mmr5_lab.corpus.rankings import read_trec
    from mmr5_lab.mini.teacher import evidence_teacher
    from mmr5_lab.traces.construction import make_traces, read_traces, rejected_path, training_candidates
    from mmr5_lab.traces.quality import dataset_card, report
    from mmr5_lab.traces.teachers import ServerTeacher, open_teacher
    from mmr5_lab.views.widgets import trace_browser

    corpus = _corpus(arguments)
    run = read_trec(arguments.run, corpus)
    candidates = training_candidates(corpus, run, arguments.candidates, arguments.seed, arguments.shuffles)
    out = Path(arguments.out)
    with open_teacher(
        corpus,
        arguments.server,
        arguments.model,
        arguments.answers or out.with_suffix(".sqlite"),
        concurrency=arguments.concurrency,
        per_minute=arguments.per_minute,
        timeout=arguments.timeout,
        price_in=arguments.price_in,
        price_out=arguments.price_out,
        budget=arguments.budget,
        max_pixels=arguments.max_pixels,
        offline=evidence_teacher(corpus),
    ) as teacher:
        try:
            chosen = candidates[: arguments.max_traces]
            make_traces(corpus, chosen, teacher, out, arguments.refine, max_words=arguments.max_words)
        finally:
            if isinstance(teacher, ServerTeacher):
                print(teacher.account.summary().to_string())
    accepted, rejected = read_traces(out), read_traces(rejected_path(out))
    print(report(accepted, rejected)[["traces", "share"]].to_string(formatters={"share": "{:.1%}".format}))
    out.with_suffix(".card.md").write_text(dataset_card(accepted, rejected, out.stem), encoding="utf-8")
    look = trace_browser(corpus, accepted, rejected).twin().save(out.with_suffix(".html"))
    print(f"{out}: {len(accepted)} traces; {rejected_path(out)}: {len(rejected)} with a fault; to look at: {look}")


def _add_ranker(command) -> None:
    """The arguments that say what ranks: a model here or on a server, its mode, a strategy."""
    command.add_argument("--model", help="model folder or hub name (mmr5 ask: default the newest run of 03_grpo)")
    command.add_argument("--adapter", help="PEFT adapter folder")
    command.add_argument(
        "--server",
        metavar="URL",
        help="ask a server with OpenAI's interface instead, such as http://localhost:8000/v1; --model is its name"
        " there, OPENAI_API_KEY its key",
    )
    command.add_argument(
        "--mode", choices=["reason", "direct", "score", "pointwise"], default="reason", help="default: reason"
    )
    command.add_argument(
        "--max-pixels", type=_positive, metavar="N", help="pixels of a page at most (default: the model's limit)"
    )
    command.add_argument("--max-new-tokens", type=_positive, default=2048, metavar="N", help="default: 2048")
    command.add_argument("--window", type=_positive, metavar="N", help="pages shown at once, in sliding windows")
    command.add_argument(
        "--stride", type=_positive, metavar="N", help="places that a window moves (default: half a window)"
    )
    command.add_argument(
        "--shuffles", type=_positive, metavar="K", help="consensus of K shuffles of the candidates (Borda)"
    )


def _ranker(arguments: argparse.Namespace, model: str):
    if arguments.stride and not arguments.window:
        raise ValueError("--stride says how far a window moves: give --window too")
    if arguments.server and arguments.adapter:
        raise ValueError("a server has its adapter loaded already: leave out --adapter, or --server")
    from mmr5_lab.reranking.local import Reranker
    from mmr5_lab.reranking.ranking import Ranker

    ranker: Ranker
    if arguments.server:
        from mmr5_lab.reranking.remote import RemoteReranker

        ranker = RemoteReranker(
            arguments.server, model, max_pixels=arguments.max_pixels, max_new_tokens=arguments.max_new_tokens
        )
    else:
        ranker = Reranker.from_pretrained(
            model, arguments.adapter, max_pixels=arguments.max_pixels, max_new_tokens=arguments.max_new_tokens
        )
    if arguments.window:
        from mmr5_lab.reranking.strategies import Windows

        ranker = Windows(ranker, arguments.window, arguments.stride or max(1, arguments.window // 2))
    if arguments.shuffles:
        from mmr5_lab.reranking.strategies import Consensus

        ranker = Consensus(ranker, arguments.shuffles)
    return ranker


def _add_rerank(commands) -> None:
    command = commands.add_parser(
        "rerank",
        help="rerank a run with a vision-language model",
        description="Rerank the candidates of a TREC run and write a new one, with what the model wrote beside it "
        "(RUN2.generations.parquet). An interrupted run continues when started again.",
    )
    command.add_argument("corpus", metavar="CORPUS", help="corpus folder")
    command.add_argument("run", metavar="RUN", help="TREC run with the candidates")
    command.add_argument("--out", required=True, metavar="RUN2", help="TREC run to write")
    _add_ranker(command)
    command.add_argument("--candidates", type=_positive, default=10, metavar="N", help="pages ranked (default: 10)")
    command.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="questions a batch (default: 8)")
    command.add_argument("--split", metavar="NAME", help="only the documents of this split")
    command.set_defaults(command=_rerank)


def _rerank(arguments: argparse.Namespace) -> None:
    from mmr5_lab.corpus.rankings import Rankings, RankingsError, read_trec
    from mmr5_lab.reranking.whole_runs import rerank_run

    if not arguments.model:
        raise RankingsError("which model is to rerank? Name it with --model")
    corpus = _corpus(arguments)
    run = read_trec(arguments.run, corpus)
    run = Rankings({question: pages[: arguments.candidates] for question, pages in run.pages.items()})
    if not arguments.server and arguments.mode == "reason":
        _check_budget(arguments, corpus, run)
    out = Path(arguments.out)
    names = ("model", "adapter", "server", "max_pixels", "max_new_tokens", "window", "stride", "shuffles")
    settings = {name: getattr(arguments, name) for name in names}
    if arguments.server:
        from mmr5_lab.models.chat import check_address

        settings["server"] = check_address(arguments.server)  # without the user or key that it may hold
    written = rerank_run(
        _ranker(arguments, arguments.model),
        corpus,
        run,
        out.parent,
        out.stem,
        mode=arguments.mode,
        batch_size=arguments.batch_size,
        trec=out,
        settings=settings,
    )
    print(f"{out}: {len(written)} questions, {written['valid'].mean():.1%} of the answers without a fault")


def _check_budget(arguments: argparse.Namespace, corpus, run) -> None:
    """Refuse, before weights are loaded, what will not fit; the question with most candidates stands for all."""
    from mmr5_lab.models.memory import plan

    documents = dict(zip(corpus.questions["question_id"], corpus.questions["doc_name"], strict=True))
    question = max(run.pages, key=lambda q: len(run.pages[q]), default=None)
    if question is None:
        return
    pages = run.pages[question][: arguments.window]
    images = [corpus.page_image(documents[question], page) for page in pages]
    budget = plan(
        arguments.model,
        [(image.height, image.width) for image in images],
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        max_pixels=arguments.max_pixels,
    )
    print(budget, flush=True)
    budget.check()


def _add_ask(commands) -> None:
    command = commands.add_parser(
        "ask",
        help="ask one question: retrieve, rerank, show the pages",
        description="Take BM25's best pages for a question, rerank them, print them with the model's reasoning and "
        "write an HTML page with thumbnails.",
    )
    command.add_argument("corpus", metavar="CORPUS", help="corpus folder")
    command.add_argument("question", metavar="QUESTION")
    command.add_argument("--document", metavar="NAME", help="look only into this document")
    command.add_argument("--out", default="ask.html", metavar="FILE", help="HTML page to write (default: ask.html)")
    command.add_argument("--candidates", type=_positive, default=5, metavar="N", help="pages ranked (default: 5)")
    _add_ranker(command)
    command.set_defaults(command=_ask)


def _ask(arguments: argparse.Namespace) -> None:
    from mmr5_lab.corpus.documents import load_corpus
    from mmr5_lab.experiments.runs import latest
    from mmr5_lab.files import results
    from mmr5_lab.views.ask import as_text, ask, write_page

    corpus = load_corpus(arguments.corpus)
    try:
        model = arguments.model or results(latest("03_grpo"))["model"]
    except FileNotFoundError:
        raise FileNotFoundError(
            "no model: name one with --model (a folder such as data/mini/base, or a hub name) or train one: mmr5 demo"
        ) from None
    answer = ask(
        corpus,
        arguments.question,
        _ranker(arguments, model),
        document=arguments.document,
        candidates=arguments.candidates,
        mode=arguments.mode,
    )
    print(as_text(answer))
    print(f"\n{write_page(answer, corpus, arguments.out)}")


def _add_evaluate(commands) -> None:
    command = commands.add_parser(
        "evaluate",
        help="recall of runs, by domain",
        description="Print recall@k of each run by domain, its macro and micro averages, and the ceiling "
        "that a perfect ranking reaches; or by question type or number of gold pages, beside both ceilings.",
    )
    command.add_argument("corpus", metavar="CORPUS", help="corpus folder")
    command.add_argument("runs", metavar="RUN", nargs="+", help="TREC run")
    command.add_argument("--ks", type=_positive, nargs="+", default=[1, 3, 5], metavar="K", help="default: 1 3 5")
    command.add_argument(
        "--measures",
        nargs="+",
        choices=["R", "nDCG", "RR", "AP"],
        default=["R"],
        metavar="M",
        help="R, nDCG (both at k), RR and AP, whose means are MRR and MAP (default: R)",
    )
    command.add_argument("--by", choices=["type", "gold"], help="by question type, or by number of gold pages")
    command.add_argument("--split", metavar="NAME", help="only the documents of this split")
    command.set_defaults(command=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from mmr5_lab.corpus.rankings import read_trec
    from mmr5_lab.evaluation.metrics import breakdown, evaluate_runs

    corpus = _corpus(arguments)
    runs = {path: read_trec(path, corpus).pages for path in arguments.runs}
    tables = evaluate_runs(runs, corpus, arguments.ks, arguments.measures)
    for path, run in runs.items():
        table = breakdown(run, corpus, arguments.by, arguments.ks, arguments.measures) if arguments.by else tables[path]
        print(f"{path}: {len(run)} of {len(corpus.questions)} questions")
        width = shutil.get_terminal_size((0, 0)).columns or None  # a file gets whole lines
        print(table.to_string(float_format="{:.4f}".format, line_width=width), end="\n\n")


def _add_tables(commands) -> None:
    command = commands.add_parser(
        "tables",
        help="the paper's two result tables, ours beside",
        description="Build the result tables of arXiv 2506.12364 from TREC runs. A run belongs to a row by its name: "
        "colqwen.trec is the retriever, colqwen_mm-r5.trec the reranker MM-R5 on its candidates; runs of other names "
        "get a table of their own. Rows without a run say what command makes it.",
    )
    command.add_argument("corpus", metavar="CORPUS", help="corpus folder")
    command.add_argument("runs", metavar="RUNS", nargs="+", help="TREC runs, or folders with *.trec at any depth")
    command.add_argument("--split", metavar="NAME", help="only the documents of this split")
    command.add_argument("--html", metavar="FILE", help="also write them as HTML")
    command.add_argument("--latex", metavar="FILE", help="also write them as LaTeX")
    command.set_defaults(command=_tables)


def _tables(arguments: argparse.Namespace) -> None:
    from mmr5_lab.evaluation.paper_tables import as_html, as_latex, as_text, find_runs, paper_tables

    corpus = _corpus(arguments)
    tables = paper_tables(find_runs(arguments.runs), corpus)
    print(as_text(tables, corpus))
    for path, write in ((arguments.html, as_html), (arguments.latex, as_latex)):
        if path:
            Path(path).write_text(write(tables, corpus), encoding="utf-8")


def _add_sweep(commands) -> None:
    command = commands.add_parser(
        "sweep",
        help="many runs of notebooks, from a grid file",
        description="Run notebooks with every combination of a grid file's values (notebooks/sweeps/*.yaml), as many "
        "at once as cores and memory allow. Everything is checked before anything starts. Finished runs are reused; "
        "an interrupted sweep continues when started again.",
    )
    command.add_argument("grid", metavar="GRID", help="grid file")
    command.add_argument("--runs", default="runs", metavar="FOLDER", help="where runs are kept (default: runs)")
    command.add_argument("--dry-run", action="store_true", help="check and tell what would be run, and stop")
    command.add_argument("--cores", type=_positive, metavar="N", help="cores for all runs together (default: all)")
    command.add_argument("--memory", type=_positive, metavar="GB", help="memory for all runs (default: what is free)")
    command.add_argument(
        "--backend",
        choices=["processes", "ray"],
        default="processes",
        help="where runs are made (default: %(default)s)",
    )
    command.add_argument("--address", help="of a running Ray cluster (default: one is started on this machine)")
    command.add_argument("--tracker", metavar="NAME", help="also log to trackio, tensorboard, wandb or mlflow")
    command.set_defaults(command=_sweep)


def _sweep(arguments: argparse.Namespace) -> None:
    from mmr5_lab.experiments.grids import as_text, plan_sweep, read_grid
    from mmr5_lab.experiments.scheduler import Processes, Sweep, Terminal, Workers, run_sweep

    plan = plan_sweep(read_grid(arguments.grid), arguments.runs)
    workers: Workers = Processes(arguments.cores, arguments.memory)
    if arguments.backend == "ray" and not arguments.dry_run:
        from mmr5_lab.experiments.ray_workers import RayWorkers

        workers = RayWorkers(arguments.address, arguments.cores)
    print(as_text(plan, workers.cores), flush=True)
    if arguments.dry_run:
        return
    shown: list[Callable[[Sweep], None]] = [Terminal()]
    if arguments.tracker:
        from mmr5_lab.experiments.trackers import Tracked

        shown.append(Tracked(arguments.tracker))
    sweep = run_sweep(plan, workers, *shown)
    if bad := [state for state in sweep.states.values() if not state.good]:
        raise RuntimeError(
            f"{sweep.count('failed')} of {len(sweep.states)} runs failed and {sweep.count('skipped')} were skipped for "
            f"that; the first is {bad[0].job.folder}: {bad[0].message}. The same command tries them again"
        )


def _add_runs(commands) -> None:
    command = commands.add_parser(
        "runs",
        help="the history of runs: list, show, compare, prune …",
        description="Look into the runs that are there. Conditions narrow them down: NAME=VALUE, or != < > <= >=; "
        "NAME is notebook, run, state (done, failed, unfinished, damaged), a parameter or a figure of the results. "
        "A run is named by the first digits of its hash.",
    )
    kinds = command.add_subparsers(required=True, metavar="WHAT")

    def add(name: str, function: Callable[[argparse.Namespace], None], told: str) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, help=told, description=told[0].upper() + told[1:] + ".")
        kind.add_argument("--runs", default="runs", metavar="FOLDER", help="where runs are kept (default: runs)")
        kind.set_defaults(command=function)
        return kind

    def conditions(kind: argparse.ArgumentParser) -> None:
        kind.add_argument("conditions", metavar="CONDITION", nargs="*", help='such as "LORA_RANK=8" or "last_loss<0.5"')

    kind = add("list", _runs_list, "a line a run, the newest last")
    conditions(kind)
    kind.add_argument("--show", metavar="NAME", nargs="+", default=[], help="parameters and figures to show as columns")
    add("show", _runs_show, "parameters, results and files of a run").add_argument("run", metavar="RUN")
    add("lineage", _runs_lineage, "what a run came from and what came from it").add_argument("run", metavar="RUN")
    kind = add("compare", _runs_compare, "two systems query by query, with what differs in how they were made")
    kind.add_argument("pair", metavar="RUN[:SYSTEM]", nargs=2, help="a run of 04 or 05, and which of its systems")
    kind.add_argument("--changes", type=_positive, default=10, metavar="N", help="questions shown (default: 10)")
    kind = add("leaderboard", _runs_leaderboard, "all evaluated systems, seeds averaged, the best first")
    conditions(kind)
    kind.add_argument("--html", metavar="FILE", help="also write it as HTML")
    kind = add("prune", _runs_prune, "runs that nobody needs (default: those that are not done), and delete them")
    conditions(kind)
    kind.add_argument("--delete", action="store_true", help="delete them (without, they are only listed)")


def _runs_list(arguments: argparse.Namespace) -> None:
    from mmr5_lab.experiments.history import list_text

    print(list_text(arguments.runs, arguments.conditions, arguments.show))


def _runs_show(arguments: argparse.Namespace) -> None:
    from mmr5_lab.experiments.history import find_run, run_text

    print(run_text(find_run(arguments.run, arguments.runs)))


def _runs_lineage(arguments: argparse.Namespace) -> None:
    from mmr5_lab.experiments.history import find_run, lineage

    print(lineage(find_run(arguments.run, arguments.runs), arguments.runs))


def _runs_compare(arguments: argparse.Namespace) -> None:
    from mmr5_lab.experiments.history import comparison_text

    print(comparison_text(arguments.pair[0], arguments.pair[1], arguments.runs, arguments.changes))


def _runs_leaderboard(arguments: argparse.Namespace) -> None:
    from mmr5_lab.experiments.history import leaderboard, write_leaderboard

    table = leaderboard(arguments.runs, arguments.conditions)
    print(table.to_string(float_format="{:.3f}".format, na_rep=""))
    if arguments.html:
        print(write_leaderboard(table, arguments.html))


def _runs_prune(arguments: argparse.Namespace) -> None:
    from mmr5_lab.experiments.history import prune

    rows = prune(arguments.runs, arguments.conditions, arguments.delete)
    for row in rows.itertuples():
        print(f"{row.folder}: {row.state}, {row.MB:.1f} MB")
    done = "deleted" if arguments.delete else "would be deleted: say --delete to do so"
    print(f"{len(rows)} runs, {rows['MB'].sum():.1f} MB, {done}")


def _add_export(commands) -> None:
    command = commands.add_parser(
        "export",
        help="a trained model with adapter and model card",
        description="Copy the model of a finished run of notebook 02 or 03 to a new folder: merged weights that "
        "transformers loads, the adapter, and a card with data, parameters and results.",
    )
    command.add_argument("run", metavar="RUN", help="run folder, such as runs/03_grpo/0123456789ab")
    command.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    command.add_argument("--evaluation", metavar="RUN", help="run of notebook 05 for the card (default: found beside)")
    command.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> None:
    from mmr5_lab.training.export import export_model

    print(export_model(arguments.run, arguments.out, arguments.evaluation))


def _corpus(arguments: argparse.Namespace):
    """The corpus that a command names, or the split of it."""
    from mmr5_lab.corpus.documents import load_corpus

    corpus = load_corpus(arguments.corpus)
    return corpus.split(arguments.split) if arguments.split else corpus


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _is_ours(error: Exception) -> bool:
    """Did this package raise it, in words for the user? One from a library is worth its traceback."""
    innermost = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)][-1]
    return innermost.startswith("mmr5_lab.")


def _failed(message: object, code: int) -> int:
    print(f"mmr5: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
