"""Make the miniature's retrievers, three kinds of the paper's Table 2: ``python -m mmr5_lab.mini.retrievers OUT``.

DSE, GME and ColQwen start from the miniature's base, as the real ones from a vision-language model, and learn from the
questions of the split `sft`: the gold page against pages of the same document that BM25 ranks high, and against the
other pages of the batch (InfoNCE; arXiv 2406.11251, 2412.16855, 2407.01449). They stop early on purpose, about where
the real ones stand on MMDocIR: a minute later they rank .9 of the gold pages first and leave nothing to rerank.

Each is saved as `from_pretrained` of its class finds it: `mmr5 retrieve CORPUS --method dse --model OUT/dse …`.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    ColQwen2Processor,
)

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.retrieval.encoders import load_encoder
from mmr5_lab.retrieval.retrieve import retrieve

DIMENSIONS = 48  # of a vector of ColQwen
TEMPERATURE = 0.05
STEPS = {"dse": 38, "gme": 90, "colqwen": 90}
RATE = {"dse": 3e-4, "gme": 3e-4, "colqwen": 5e-4}  # at the peak
BATCH = 16  # questions a step
NEGATIVES = 2  # pages of the question's own document

Batch = tuple[list[str], list[Image.Image]]  # texts; as many pages that answer them, then others


def build(method: str, base: Path, folder: Path) -> None:
    """Save a retriever as it is before its training."""
    model: Any = AutoModelForImageTextToText.from_pretrained(base)
    processor: Any = AutoProcessor.from_pretrained(base)
    if method == "colqwen":
        model, processor = colqwen(model, processor, DIMENSIONS)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def colqwen(model: Any, processor: Any, dimensions: int) -> tuple[ColQwen2ForRetrieval, ColQwen2Processor]:
    """Return a vision-language model as a ColQwen2, with a random projection to `dimensions`, and its processor."""
    late = ColQwen2ForRetrieval(ColQwen2Config(vlm_config=model.config.to_dict(), embedding_dim=dimensions))
    late.vlm.load_state_dict(model.model.state_dict())
    return late, ColQwen2Processor(processor.image_processor, processor.tokenizer)


def questions(corpus: Corpus, count: int, rng: random.Random) -> Iterator[Batch]:
    """Yield questions of different documents, a gold page of each, and `NEGATIVES` other pages of each document."""
    ranked = retrieve(corpus, "bm25", top_k=4 + NEGATIVES).pages
    by_document = [part.to_dict("records") for _, part in corpus.questions.groupby("doc_name")]
    while True:
        some = [rng.choice(part) for part in rng.sample(by_document, count)]
        golds = [rng.choice(list(question["gold_pages"])) for question in some]
        places = [(question["doc_name"], page) for question, page in zip(some, golds, strict=True)]
        for question in some:
            hard = [page for page in ranked[question["question_id"]] if page not in question["gold_pages"]]
            places += [(question["doc_name"], page) for page in rng.sample(hard, min(NEGATIVES, len(hard)))]
        yield [question["question"] for question in some], [corpus.page_image(*place) for place in places]


def similarities(queries: Sequence[torch.Tensor], pages: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over a query's vectors of the best product with one of a page's, of shape (queries, pages)."""
    padded = pad_sequence(list(pages), batch_first=True)
    there = torch.arange(padded.shape[1]) < torch.tensor([len(page) for page in pages])[:, None]
    products = torch.einsum("qd,pkd->qpk", torch.cat(list(queries)), padded).masked_fill(~there, -torch.inf)
    best = products.amax(-1).split([len(query) for query in queries])
    return torch.stack([of_query.mean(0) for of_query in best])


def train(method: str, folder: Path, corpus: Corpus, *, steps: int, seed: int = 0) -> None:
    """Train the retriever in a folder and save it there, in half precision: the file is for download."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    encoder: Any = load_encoder(method, folder, device="cpu")
    batches = questions(corpus, BATCH, rng)
    for name, parameter in encoder.model.named_parameters():
        parameter.requires_grad_("visual" not in name)  # the base's tower reads already
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=RATE[method], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE[method], total_steps=steps, pct_start=0.1)
    encoder.model.train()
    with tqdm(total=steps, desc=method, unit="step", mininterval=5) as progress:
        for _ in range(steps):
            texts, pages = next(batches)
            scores = similarities(encoder.query_vectors(texts), encoder.page_vectors(pages)) / TEMPERATURE
            loss = cross_entropy(scores, torch.arange(len(texts)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
            progress.update()
    encoder.model.half().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for one folder a method")
    parser.add_argument("--base", type=Path, default=Path("data/mini/base"))
    parser.add_argument("--corpus", type=Path, default=Path("data/mini/corpus"))
    parser.add_argument("--methods", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--steps", type=int, help="of each, in place of its own")
    given = parser.parse_args()
    corpus = load_corpus(given.corpus, "sft")
    for method in given.methods:
        build(method, given.base, given.out / method)
        train(method, given.out / method, corpus, steps=given.steps or STEPS[method])


if __name__ == "__main__":
    main()
