"""A one-pass scorer: train what a model says at an answer's first id, which mode "score" ranks by.

    log = train_scorer(model, rl_dataset(corpus, candidates, seed=0), "runs/scorer", learning_rate=1e-3, …)
    Reranker.from_pretrained("runs/scorer/model").rank(query, pages, mode="score")

After `<think></think><answer>[` the model gives each id a log-probability; one forward pass ranks all candidates
(FIRST, arXiv 2406.15657; ZipRerank, arXiv 2605.11864). The loss is ListNet's (Cao et al. 2007): the cross-entropy
between the wanted chances of standing first and the model's, among the candidates. The wanted ones are equal shares for
the gold pages, or shares of the model's own sampled rankings (`first_shares`), which need no labels.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from mmr5_lab.corpus.documents import Corpus
from mmr5_lab.models.allowed_ids import AllowedIds
from mmr5_lab.reranking.inputs import with_answer_start
from mmr5_lab.reranking.ranking import Ranker
from mmr5_lab.reranking.whole_runs import pair_of
from mmr5_lab.traces.construction import Candidates
from mmr5_lab.training.checkpoints import train_to_the_end
from mmr5_lab.training.inputs import check_prompts
from mmr5_lab.training.monitoring import ReportProgress
from mmr5_lab.training.stages import NewOrders, common_arguments, freed, load_for_training, log_if_finished, lora
from mmr5_lab.training.stopping import StopWhenBroken

Shares = Mapping[str, Mapping[int, float]]  # question -> page -> wanted chance of standing first


@freed()
def train_scorer(
    model: str | Path,
    data: datasets.Dataset,
    folder: str | Path,
    *,
    first: Shares | None = None,
    learning_rate: float,
    epochs: float = 1.0,
    max_steps: int = -1,
    batch_size: int,
    accumulation: int = 1,
    lora_rank: int,
    lora_alpha: int | None = None,
    warmup: float = 0.05,
    max_pixels: int = 0,
    four_bit: bool = False,
    workers: int = 0,
    save_steps: int = 50,
    tracker: str = "",
    seed: int = 0,
) -> pd.DataFrame:
    """Train `model` to rank prompts (`rl_dataset`) in one pass, and return the log.

    first: of each question, the wanted chances of pages (`first_shares`); None: equal shares of the gold pages
    batch_size: prompts a device and pass

    The other arguments, the folder's files, running again and the errors are those of `train_sft`.
    """
    folder, settings = Path(folder), locals()  # all arguments
    if (log := log_if_finished(folder, settings)) is not None:
        return log
    check_prompts(data, batch_size, accumulation, 1)
    arguments = TrainingArguments(
        **common_arguments(settings),
        save_steps=save_steps,
        max_steps=max_steps,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        label_names=[],
    )
    loaded, processor = load_for_training(model, max_pixels, four_bit)
    trainer = ScorerTrainer(
        get_peft_model(loaded, lora(lora_rank, lora_alpha or 2 * lora_rank, 0.0)),
        arguments,
        data_collator=Collator(processor, first),
        train_dataset=data,
        processing_class=processor,
        callbacks=[NewOrders(data), StopWhenBroken(), ReportProgress(folder, "scorer step")],
    )
    trainer.model_accepts_loss_kwargs = False  # so that the loss of a pass is divided by the passes of a step
    return train_to_the_end(trainer, processor, folder, model)


def first_shares(
    ranker: Ranker, corpus: Corpus, candidates: Sequence[Candidates], samples: int = 8, batch_size: int = 16
) -> dict[str, dict[int, float]]:
    """Return in which share of `samples` written rankings each page of each question stands first.

    ranker: one that samples (`temperature` above 0) without a seed, or all samples are the same
    """
    pairs = [pair_of(corpus, chosen.question, chosen.pages) for chosen in candidates]
    shares: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for _ in range(samples):
        for chosen, ranking in zip(candidates, ranker.rank_many(pairs, batch_size=batch_size), strict=True):
            shares[chosen.question["question_id"]][chosen.pages[ranking.order[0]]] += 1 / samples
    return {question: dict(pages) for question, pages in shares.items()}


class Collator:
    """Makes a batch of prompts: a row each, and one more for each beginning that several ids share (1 of 1 and 10)."""

    def __init__(self, processor, first: Shares | None):
        self.processor, self.first = processor, first
        tokens_of = lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        self.allowed = lru_cache(lambda n: AllowedIds(tokens_of, n, processor.tokenizer.eos_token_id))

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        texts: list[str] = []
        images, rows, paths, wanted = [], [], [], []
        for example in examples:
            allowed = self.allowed(example["num_candidates"])
            prompt = self.processor.apply_chat_template(example["prompt"], tokenize=False, add_generation_prompt=True)
            rows.append({begun: len(texts) + k for k, begun in enumerate(allowed.branches)})
            texts += [with_answer_start(prompt) + tokenizer.decode(begun) for begun in allowed.branches]
            images += [example["images"]] * len(allowed.branches)
            paths.append(allowed.paths)
            wanted.append(self._wanted(example))
        inputs = self.processor(
            text=texts, images=images, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        )
        return {**inputs, "rows": rows, "paths": paths, "wanted": wanted}

    def _wanted(self, example: Mapping[str, Any]) -> list[float]:
        if self.first is None:
            gold = example["positive_ids"]
            return [(i in gold) / len(gold) for i in range(1, example["num_candidates"] + 1)]
        shares = self.first[example["query_id"]]
        return [shares.get(page, 0.0) for page in example["candidates"]]


class ScorerTrainer(Trainer):
    """transformers' Trainer with ListNet's loss on the log-probabilities of the first id."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows, paths, wanted = (inputs.pop(name) for name in ("rows", "paths", "wanted"))
        log_probs = model(**inputs, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
        losses = []
        for row_of, ids, shares in zip(rows, paths, wanted, strict=True):
            scores = torch.stack([sum(log_probs[row_of[p[:k]], p[k]] for k in range(len(p))) for p in ids])
            losses.append(-(scores.log_softmax(0) * scores.new_tensor(shares)).sum())
        return torch.stack(losses).mean()
