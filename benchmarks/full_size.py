"""Memory and time of a model of full size on a GPU, beside what the planner says; its weights are random.

    python benchmarks/full_size.py [--shape 7b|tiny] [--parts rank ten sft grpo paper] [--json OUT]

A random model of Qwen2.5-VL-7B's configuration (`--shape tiny`: to try this on a CPU) goes the way of the real one: it
is loaded from a folder; questions on pages of 1,280 visual tokens are reranked in each mode, by the released class's
way, and with ten pages; SFT as the profile `paper` sets it, GRPO from its merged model as `recommended` or `paper` do.
Memory is all that PyTorch holds, weights included (on a CPU: the process). Random weights hardly end a completion.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from common import Peak
from real_shape import PAGE, QUESTIONS, SEVEN_B, EndByPrompt, build, document_questions
from rerank import Work, released_way
from transformers import TrainerCallback

from mmr5_lab.images import open_page
from mmr5_lab.models.memory import GIB, plan, plan_training
from mmr5_lab.prompting.prompts import build_messages
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.ranking import MODES
from mmr5_lab.training import stages
from mmr5_lab.training.monitoring import ReportProgress

TINY = {"hidden": 512, "layers": 2, "heads": 4, "vision_hidden": 160, "vision_layers": 2}
SHAPES: dict[str, dict[str, Any]] = {"7b": SEVEN_B, "tiny": TINY}
SIZE = PAGE[::-1]  # height, width
WRITTEN = 400  # tokens of an answer at most: five explanations of 40 words, and the ids
LOOKS = {  # what a step of training looks like, by part
    "sft": {"batch_size": 1, "accumulation": 4, "lora_rank": 8},
    "grpo": {"batch_size": 8, "accumulation": 8, "lora_rank": 64, "generations": 8},
    "paper": {"batch_size": 2, "accumulation": 4, "lora_rank": 64, "generations": 4, "iterations": 2},
}
OTHERWISE: dict[str, dict[str, Any]] = {  # and what the planner need not know
    "sft": {"lora_alpha": 32, "lora_dropout": 0.05, "loraplus_ratio": 16.0, "learning_rate": 1e-4, "epochs": 1.0},
    "grpo": {"learning_rate": 1e-6, "beta": 0.04, "top_entropy": 0.2, "max_steps": 2},
    "paper": {"learning_rate": 1e-6, "beta": 0.04, "max_steps": 4},
}
COMPLETIONS = {"sft": WRITTEN, "grpo": 1024, "paper": 2048}

rows: list[dict[str, Any]] = []


class Measured:
    """The seconds of what happens within, and the peak of memory."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._peak = Peak().__enter__()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self._started
        self._peak.__exit__()

    @property
    def gib(self) -> float:
        on_gpu = torch.cuda.is_available()
        return torch.cuda.max_memory_allocated() / GIB if on_gpu else self._peak.megabytes * 1e6 / GIB


def report(name: str, measured: Measured, planned: int | None = None, **more: Any) -> None:
    row = {"name": name, "GiB": measured.gib, **({} if planned is None else {"planned GiB": planned / GIB}), **more}
    rows.append(row)
    texts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print("  ".join(texts), flush=True)


def rank(folder: Path, few: bool) -> None:
    """Each mode on five pages a query, and the released way on two queries."""
    pairs = document_questions(1 if few else 2)
    with Measured() as measured:
        engine = Reranker.from_pretrained(folder, max_new_tokens=WRITTEN)
    report("load", measured, seconds=measured.seconds)
    tokenizer = engine.processor.tokenizer
    ending = lambda: [EndByPrompt(tokenizer.eos_token_id, tokenizer.pad_token_id)]  # noqa: E731
    engine.generation["logits_processor"] = ending()
    work = Work(engine.model)
    engine.rank_many(pairs[:1], "score")  # warm up
    planned = plan(folder, [SIZE] * 5, max_new_tokens=WRITTEN, batch_size=QUESTIONS)
    texts: list[str] = []
    for mode in MODES:
        engine.page_cache.clear()
        work.tokens = work.pages = 0
        with Measured() as measured:
            rankings = engine.rank_many(pairs, mode, QUESTIONS)
        texts = [ranking.text for ranking in rankings] if mode == "reason" else texts
        n = len(pairs)
        report(f"{mode}, {QUESTIONS} queries of 5", measured, planned.needed(QUESTIONS) if mode == "reason" else None,
               seconds_a_query=measured.seconds / n, tokens=work.tokens / n, pages=work.pages / n)  # fmt: skip
    cache = engine.page_cache
    cache.clear()
    cache._module.get_image_features = cache._tower  # as transformers loads it
    options = {"max_new_tokens": WRITTEN, "logits_processor": ending()}
    with Measured() as measured:
        written = [released_way(engine.model, engine.processor, *pair, **options)[0] for pair in pairs[:2]]
    same = sum(a == b for a, b in zip(texts, written, strict=False))
    report("released way", measured, seconds_a_query=measured.seconds / 2, texts_the_same=same)


def ten(folder: Path, few: bool) -> None:
    """Ten pages a query, in growing batches, in one pass."""
    pairs = document_questions(1 if few else 2)
    engine = Reranker.from_pretrained(folder)
    pairs = [(query, [*pages, *pairs[i - 1][1]]) for i, (query, pages) in enumerate(pairs)]
    for batch in (1, 2) if few else (1, 2, 4, 8):
        engine.page_cache.clear()
        planned = plan(folder, [SIZE] * 10, max_new_tokens=1, batch_size=batch)
        with Measured() as measured:
            engine.rank_many(pairs[:batch], "score", batch)
        report(f"score, {batch} queries of 10", measured, planned.needed(batch),
               seconds_a_query=measured.seconds / batch)  # fmt: skip


def train(folder: Path, few: bool, part: str) -> None:
    """A few steps, their adapter and the merged model."""
    completion, looks = COMPLETIONS[part], LOOKS[part]
    if few:
        completion, looks = 64, looks | dict.fromkeys({"batch_size", "accumulation", "generations"} & looks.keys(), 2)
    examples = [{"prompt": build_messages(query, len(pages)), "images": pages}
                for query, pages in document_questions(1 if few else 2)]  # fmt: skip
    if part == "sft":
        text = "<think>" + " a" * completion + "</think>"
        more: dict[str, Any] = {"completion": [{"role": "assistant", "content": [{"type": "text", "text": text}]}]}
    else:
        more = {"positive_ids": [1], "num_candidates": 5}
    data = datasets.Dataset.from_list([example | more for example in examples]).with_transform(opened)
    planned = plan_training(folder, [SIZE] * 5, completion=completion, **looks)
    options = {"max_completion": completion} if part != "sft" else {}
    merged = folder / "sft" / "model"
    start = merged if part != "sft" and merged.is_dir() else folder
    took: list[float] = []
    stages.ReportProgress = type("TimedProgress", (Timed, ReportProgress), {"took": took})  # type: ignore[misc]
    with Measured() as measured:
        getattr(stages, "train_sft" if part == "sft" else "train_grpo")(
            start, data, folder / part, **looks, **OTHERWISE[part], **options
        )
    step = looks["batch_size"] * looks["accumulation"] / looks.get("iterations", 1)
    report(part, measured, planned.memory, seconds=measured.seconds, steps=" ".join(f"{s:.1f}" for s in took),
           planned_step=3600 * planned.hours(step), plan=str(planned))  # fmt: skip


class Timed(TrainerCallback):
    """Notes the seconds of each step."""

    took: list[float]

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.took.append(time.perf_counter() - self.started)


def opened(batch: dict[str, Any]) -> dict[str, Any]:
    images = [[open_page(page) for page in pages] for pages in batch.get("images", [])]
    return batch | ({"images": images} if images else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--parts", nargs="+", choices=("rank", "ten", *LOOKS), default=["rank", "ten", "sft", "grpo"])
    parser.add_argument("--json", metavar="OUT", type=Path, help="also write the rows as JSON")
    given = parser.parse_args()
    few = given.shape == "tiny"
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.perf_counter()
        build(folder, **SHAPES[given.shape])
        print(f"{given.shape} built in {time.perf_counter() - started:.0f} s", flush=True)
        for part in given.parts:
            if part in LOOKS:
                train(folder, few, part)
            else:
                {"rank": rank, "ten": ten}[part](folder, few)
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
