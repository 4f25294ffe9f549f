"""Queries a second of the reranking engine against the released class's way, with the same weights and answers.

    python benchmarks/rerank.py [--quick] [--json OUT] [--model FOLDER] [--figure FILE] [--shape real]

Baseline: one query at a time, every page encoded anew, plain `generate` of a model as transformers loads it, as
`examples/reranker.py` of https://github.com/i2vec/MM-R5 does it, but greedy, so that both must write the same. The
engine is as `Reranker.from_pretrained` makes it, its page cache empty at the start of each round. Both are given the
pages' files. The corpus is the miniature's evaluation split: questions in the order of their documents, five BM25
candidates each. `--shape real` measures a random model with the shape of the real ones instead (`real_shape.py`).
"""

import io
import math
import re
import tempfile
import time
from pathlib import Path

import torch
from common import Peak, Report, arguments, chat_server, interleaved, model_folder
from matplotlib.figure import Figure
from PIL import Image
from real_shape import MEDIUM, QUESTIONS, EndByPrompt, build, document_questions
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmr5_lab.corpus.documents import load_corpus
from mmr5_lab.evaluation.metrics import evaluate
from mmr5_lab.experiments.runs import project_root
from mmr5_lab.prompting.answers import parse_ranking
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.ranking import MODES, Ranking
from mmr5_lab.reranking.remote import RemoteReranker
from mmr5_lab.retrieval.retrieve import retrieve

NEW_TOKENS = 220
LATENCY = 0.2  # seconds of the server


def released_way(model, processor, query: str, pages: list[bytes], **options) -> tuple[str, list[int]]:
    images = [Image.open(io.BytesIO(page)).convert("RGB") for page in pages]
    text = processor.apply_chat_template(build_messages(query, len(images)), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=images, padding=True, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        ids = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW_TOKENS, **options})
    written = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return written, list(parse_ranking(written, len(images)).order)


def five_a_document(asked: list[str], rows: dict, pairs: list) -> list:
    """The pairs of five questions of each document, as MMDocIR asks (documents with fewer are left out)."""
    by_document: dict[str, list] = {}
    for question, pair in zip(asked, pairs, strict=True):
        by_document.setdefault(rows[question]["doc_name"], []).append(pair)
    return [pair for group in by_document.values() if len(group) >= 5 for pair in group[:5]]


def compared(report: Report, name: str, baseline, ours, work: int, rounds: int) -> None:
    with Peak() as peak:
        seconds, results = interleaved({"baseline": baseline, "ours": ours}, rounds)
    assert [r.order for r in results["ours"]] == [r.order for r in results["baseline"]], "batches changed a ranking"
    report.add(name, seconds["baseline"], seconds["ours"], work, "queries/s", f"peak {peak.megabytes:.0f} MB")


def draw(rows: list[dict], path: Path) -> None:
    """Queries a second against the number of candidates and against the batch size."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    kinds = {"candidates": "score,", "queries a batch": "reason,"}
    for axes, (what, mode) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
        found = [row for row in rows if row["name"].startswith(mode) and row["name"].endswith("against 1")]
        places = [int(re.findall(r"\d+", row["name"])[0]) for row in found]
        axes.plot(places, [row["ours"] for row in found], "o-", color="#0072B2", label="batched")
        axes.plot(places, [row["baseline"] for row in found], "s--", color="#D55E00", label="one by one")
        axes.set(xlabel=what, ylabel="queries a second", ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=120)


class Work:
    """Counts the tokens that a model's language model reads and the pages that its vision tower encodes."""

    def __init__(self, model):
        self.tokens = self.pages = 0
        model.model.language_model.register_forward_pre_hook(self._read, with_kwargs=True)
        model.model.visual.register_forward_pre_hook(self._encoded, with_kwargs=True)

    def _read(self, module, args, options):
        self.tokens += math.prod(options["inputs_embeds"].shape[:2])

    def _encoded(self, module, args, options):
        self.pages += len(options["grid_thw"])


def real_shape(given) -> None:
    """The modes against the released way on a model and pages of the real shape."""
    documents, alone, rounds = (1, 2, 1) if given.quick else (2, 4, 3)
    pairs = document_questions(documents)
    few = pairs[:: len(pairs) // alone][:alone]  # the baseline is slow
    shown = sum(len(pages) for _, pages in pairs)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), **MEDIUM)
        engine = Reranker.from_pretrained(folder, max_new_tokens=400)
        plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=engine.model.dtype).eval()
        plain.to(engine.model.device)
    processor = engine.processor
    ending = lambda: [EndByPrompt(processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id)]  # noqa: E731
    engine.generation["logits_processor"] = ending()
    works = {"baseline": Work(plain), "ours": Work(engine.model)}

    def measured(work: Work, way, queries: int):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        work.tokens = work.pages = 0
        started = time.process_time()  # what others do on the machine does not change it
        with Peak() as peak:
            result = way()
        processor_seconds = (time.process_time() - started) / queries
        megabytes = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else peak.megabytes
        return result, work.tokens / queries, work.pages / queries, megabytes, processor_seconds

    def released():
        options = {"max_new_tokens": 400, "logits_processor": ending()}
        return [released_way(plain, processor, *pair, **options)[0] for pair in few]

    def ours(mode: str):
        engine.page_cache.clear()
        return [ranking.text for ranking in engine.rank_many(pairs, mode, QUESTIONS)]

    ways = {"baseline": lambda: measured(works["baseline"], released, len(few))}
    ways |= {mode: lambda mode=mode: measured(works["ours"], lambda: ours(mode), len(pairs)) for mode in MODES}
    million = plain.num_parameters() / 1e6
    report = Report(
        f"Real shape: {million:.0f} M parameters, {len(pairs)} queries of 5 pages, 1,280 visual tokens each"
    )
    seconds, results = interleaved(ways, rounds)
    texts = [results["reason"][0][pairs.index(pair)] for pair in few]
    same = sum(a == b for a, b in zip(texts, results["baseline"][0], strict=True))
    scale = [s * len(pairs) / len(few) for s in seconds["baseline"]]
    for mode in MODES:
        _, tokens, pages, megabytes, processor_seconds = results[mode]
        note = f"tokens a query {tokens:.0f} ({results['baseline'][1]:.0f}), peak {megabytes:.0f} MB"
        note += f" ({results['baseline'][3]:.0f}), CPU s a query {processor_seconds:.1f} ({results['baseline'][4]:.1f})"
        note += f", encoded {pages * len(pairs) / shown:.2f} of the pages"
        note += f", {same} of {len(few)} texts the same" if mode == "reason" else ""
        report.add(f"{mode}, batches of {QUESTIONS}", scale, seconds[mode], len(pairs), "queries/s", note)
    report.finish(given.json)


def miniature(given) -> None:
    """The modes, the page cache and batches on the miniature, and a server."""
    corpus = load_corpus(project_root() / "data/mini/corpus").split("eval")
    run = retrieve(corpus, "bm25", top_k=5)
    rows = corpus.by_id
    asked = [q for q, pages in run.pages.items() if len(pages) == 5][: 32 if given.quick else 96]
    pairs = [
        (rows[q]["question"], [corpus.page_bytes(rows[q]["doc_name"], page) for page in run.pages[q]]) for q in asked
    ]
    gold = corpus.with_questions(asked)
    folder = model_folder(given.model)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    engine = Reranker.from_pretrained(folder, max_new_tokens=NEW_TOKENS)
    plain = Reranker.from_pretrained(folder, max_new_tokens=NEW_TOKENS, page_cache_bytes=0)
    cache = engine.page_cache
    few = pairs[:: 4 if given.quick else 6]  # the baseline is slow: every nth query
    modes = {"reason": 48, "direct": 16, "score": 16, "pointwise": 16}  # and the queries in a batch

    def ours(asked: list, mode: str) -> list[Ranking]:
        cache.clear()
        return engine.rank_many(asked, mode, modes[mode])

    def recall(rankings) -> float:
        pages = {q: [run.pages[q][k] for k in r.order] for q, r in zip(asked, rankings, strict=True)}
        return float(evaluate(pages, gold).loc["micro", "R@1"])

    report = Report(f"Reranking: {len(pairs)} queries of 5 pages, {len(few)} of them for the baseline")
    ways = {"baseline": lambda: [released_way(model, processor, *pair) for pair in few]}
    ways |= {mode: lambda mode=mode: ours(pairs, mode) for mode in modes}
    for pair in few[:4]:  # warm up: a process's first passes can be several times slower
        released_way(model, processor, *pair)
    ours(few[:4], "score")
    seconds, results = interleaved(ways, 1 if given.quick else 3)
    by_query = [results["reason"][pairs.index(pair)] for pair in few]
    same = [r.text for r in by_query] == [text for text, _ in results["baseline"]]
    assert same, "the engine wrote something else than the released way"
    scale = [s * len(pairs) / len(few) for s in seconds["baseline"]]
    for mode in modes:
        note = f"R@1 {recall(results[mode]):.3f}" + (", same text" if mode == "reason" else "")
        report.add(f"{mode}, batches of {modes[mode]}", scale, seconds[mode], len(pairs), "queries/s", note)

    five = five_a_document(asked, rows, pairs)
    for mode in ("reason", "direct", "score"):
        cache.hits = cache.misses = 0
        ways = {
            "plain": lambda mode=mode: plain.rank_many(five, mode, modes[mode]),
            "cached": lambda mode=mode: ours(five, mode),
        }
        seconds, results = interleaved(ways, 1 if given.quick else 3)
        assert [r.order for r in results["cached"]] == [r.order for r in results["plain"]], "the cache changed an order"
        kept, bound = cache.bytes, cache.max_bytes
        note = f"hit rate {cache.hits / (cache.hits + cache.misses):.2f}, {kept / 1e6:.1f} MB kept"
        report.add(
            f"{mode}: page cache against none", seconds["plain"], seconds["cached"], len(five), "queries/s", note
        )
        cache.max_bytes = kept // 2
        ours(five, mode)
        assert cache.bytes <= kept // 2, "the cache passed its bound"
        cache.max_bytes = bound

    ours(pairs, "score")  # from here on all pages are encoded: batches alone make the difference
    pool = [page for _, pages in pairs for page in pages]
    for count in (5, 10, 20) if given.quick else (5, 10, 20, 50):
        wide = [("What was the staff of Orion in 2014?", pool[k * 7 : k * 7 + count]) for k in range(4)]
        compared(
            report, f"score, {count} candidates: batches of 4 against 1",
            lambda wide=wide: [engine.rank(*pair, mode="score") for pair in wide],
            lambda wide=wide: engine.rank_many(wide, "score", 4), 4, 1 if given.quick else 3,
        )  # fmt: skip
    part = pairs[: 32 if given.quick else 64]
    alone = lambda: engine.rank_many(part, "reason", 1)  # noqa: E731
    for n in (8, 32) if given.quick else (4, 16, 32, 64):
        batched = lambda n=n: engine.rank_many(part, "reason", n)  # noqa: E731
        compared(report, f"reason, batches of {n} against 1", alone, batched, len(part), 1)

    with chat_server(LATENCY, answer="<think>x</think><answer>[1, 2, 3, 4, 5]</answer>") as url:
        remote = RemoteReranker(url, "m", concurrency=16)
        many = [pairs[k % len(pairs)] for k in range(320)]
        remote.rank_many(many[:1])  # the server is up
        started = time.perf_counter()
        answered = remote.rank_many(many)
        rate = len(many) / (time.perf_counter() - started)
    assert not any(ranking.faults for ranking in answered)
    report.write("remote: share of concurrency ÷ latency", 16 / LATENCY, rate, "queries/s")
    report.finish(given.json)
    if given.figure:
        draw(report.rows, given.figure)


def main() -> None:
    given = arguments(__doc__.split("\n")[0], ("mini", "real"))
    (real_shape if given.shape == "real" else miniature)(given)


if __name__ == "__main__":
    main()
