"""Can the model's own attention rank pages? Heads chosen on training questions, tested on unseen documents.

    python benchmarks/attention.py [MODEL …] [--questions N] [--corpus FOLDER]

The question is repeated behind the pages, and one forward pass says how much of its attention each head gives to each
page (arXiv 2410.02642), less what a question without content gets (`CONTENT_FREE`). Heads are ordered by the mean
reciprocal rank of gold pages on the split `sft`, and the mean of the first k ranks the split `eval` (arXiv 2510.02219
chooses heads by a contrast of the same kind). Any model whose attention goes through transformers' interface will do.
"""

import argparse
import time
from dataclasses import replace

import pandas as pd
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mmr5_lab.corpus.documents import Corpus, load_corpus
from mmr5_lab.evaluation.comparison import compare
from mmr5_lab.evaluation.metrics import evaluate_runs
from mmr5_lab.reranking.inputs import model_inputs, prompts_of
from mmr5_lab.reranking.local import Reranker
from mmr5_lab.reranking.pages import Pages, Pair
from mmr5_lab.reranking.ranking import CONTENT_FREE, scored_ranking
from mmr5_lab.reranking.whole_runs import pair_of
from mmr5_lab.retrieval.retrieve import retrieve

CHOSEN = (1, 2, 4, 8)  # numbers of heads
BATCH = 16


class PageAttention:
    """A model whose layers note how much attention the last tokens of each prompt give to each page."""

    def __init__(self, reranker: Reranker):
        self.reranker, self.noted = reranker, list[torch.Tensor]()
        AttentionInterface.register("noted", self._attend)
        AttentionMaskInterface.register("noted", sdpa_mask)
        reranker.model.set_attn_implementation({"text_config": "noted"})
        self.image = reranker.model.config.image_token_id

    def _attend(self, module, query, key, value, attention_mask, scaling=None, **options):
        output = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        heads, length = query.shape[1], key.shape[2]
        key = key.repeat_interleave(heads // key.shape[1], 1)
        scores = query[:, :, -self.last :] @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        seen = torch.ones(self.last, length, dtype=torch.bool, device=key.device).tril(length - self.last)
        weights = scores.masked_fill(~(seen & self.mask[:, None, None]), -torch.inf).float().softmax(-1).mean(2)
        self.noted.append(torch.einsum("bhn,bpn->bph", weights, self.pages))  # batch, page, head
        return output

    @torch.inference_mode()
    def of(self, pairs: list[Pair]) -> torch.Tensor:
        """Return the attention to each page, by head of all layers: (pair, page, head)."""
        reranker, found = self.reranker, []
        tokenizer = reranker.processor.tokenizer
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            pages = Pages(batch)
            prompts = prompts_of(batch, pages, "reason", reranker.model, reranker.processor, 1)
            again = [f"\nThe question is: {query}" for query, _ in batch]
            prompts = [replace(p, text=p.text + more) for p, more in zip(prompts, again, strict=True)]
            inputs = model_inputs(prompts, pages, reranker.model, reranker.processor, reranker.page_cache)
            self.last = min(len(tokenizer(more, add_special_tokens=False)["input_ids"]) for more in again)
            self.mask = inputs["attention_mask"].bool()
            shown = inputs["input_ids"] == self.image
            number = (shown & ~shown.roll(1, 1)).cumsum(1) * shown  # 1 for the tokens of the first page, 2, …
            self.pages = torch.stack([(number == k).float() for k in range(1, int(number.max()) + 1)], 1)
            self.noted.clear()
            reranker.model(**inputs, use_cache=False, logits_to_keep=1)
            found.append(torch.cat(self.noted, -1).cpu())
        return torch.cat(found)


def calibrated(attention: PageAttention, pairs: list[Pair]) -> torch.Tensor:
    return attention.of(pairs) - attention.of([(CONTENT_FREE, pages) for _, pages in pairs])


def questions(corpus: Corpus, count: int | None) -> tuple[list[str], list[list[int]], list[Pair]]:
    """Ids, candidates and pairs of the questions with five candidates."""
    ranked = {q: pages for q, pages in retrieve(corpus, "bm25", 5).pages.items() if len(pages) == 5}
    asked = list(ranked)[:count]
    pairs = [pair_of(corpus, corpus.by_id[q], ranked[q]) for q in asked]
    return asked, [ranked[q] for q in asked], pairs


def orders(scores: torch.Tensor, candidates: list[list[int]]) -> list[list[int]]:
    ranked = [scored_ranking(row.tolist()).order for row in scores]
    return [[pages[k] for k in order] for order, pages in zip(ranked, candidates, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["data/mini/base"])
    parser.add_argument("--corpus", default="data/mini/corpus")
    parser.add_argument("--questions", type=int)
    given = parser.parse_args()
    training, unseen = (load_corpus(given.corpus, split) for split in ("sft", "eval"))
    of_training, of_unseen = questions(training, given.questions), questions(unseen, given.questions)
    systems = {"bm25": dict(zip(*of_unseen[:2], strict=True))}
    for model in given.models:
        attention = PageAttention(Reranker.from_pretrained(model))
        asked, candidates, pairs = of_training
        learnt = calibrated(attention, pairs)
        heads = range(learnt.shape[-1])
        by_head = {str(h): dict(zip(asked, orders(learnt[..., h], candidates), strict=True)) for h in heads}
        tables = evaluate_runs(by_head, training.with_questions(asked), measures=("RR",))
        best = sorted(heads, key=lambda h: -tables[str(h)].loc["micro", "MRR"])
        asked, candidates, pairs = of_unseen
        started = time.perf_counter()
        tested = calibrated(attention, pairs)
        seconds = (time.perf_counter() - started) / len(pairs)
        for k in CHOSEN:
            scores = tested[..., best[:k]].mean(-1)
            systems[f"{model}, {k} of {len(heads)} heads"] = dict(zip(asked, orders(scores, candidates), strict=True))
        print(f"{model}: {seconds:.3f} s a question; heads {best[: max(CHOSEN)]}")
    table = compare(systems, unseen.with_questions(of_unseen[0]), baseline="bm25")
    with pd.option_context("display.width", 200, "display.max_columns", None, "display.precision", 3):
        print(table[[c for c in ("micro R@1", "micro R@3", "low", "high", "difference", "p Holm") if c in table]])


if __name__ == "__main__":
    main()
