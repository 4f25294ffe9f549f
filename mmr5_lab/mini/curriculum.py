"""Make the miniature's base model: ``python -m mmr5_lab.mini.curriculum data/mini/base``.

Eight lessons in an order found by trial (docs/log.md); the exercises of the language lessons are in `lessons`:

1. ``verdicts`` text alone, a question and descriptions of pages: is each word of them what is asked for?
2. ``text``     text alone, a page is its words: describe it, compare it, list pages, repeat words.
3. ``vision``   the vision tower alone, with dense targets: each visual token must become the embedding of the
                word that stands in its cell of the page (or of the kind of page, where no word stands).
4. ``images``   lesson 2 on page images; the vision tower is frozen from here on.
5. ``judge``    mostly: is all that is asked for on a page? Which pages are these?
6. ``point``    with a second loss on the choice among ids: name the images that were just described.
7. ``more``     the same again, with a fresh optimizer: after 850 steps in all, the ids come right at once.
8. ``answer``   the form of the released answer: sort, list, judge, explain first or answer at once.

A checkpoint is written every ``--save-every`` steps; a run that was stopped goes on from there.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, normalize
from tqdm.auto import tqdm

from mmr5_lab.mini.documents import (
    CELL,
    DOMAINS,
    ENTITIES,
    HEIGHT,
    KINDS,
    MEASURES,
    WIDTH,
    YEARS,
    DrawnPage,
    PageContent,
    draw_page,
    random_content,
)
from mmr5_lab.mini.lessons import JUDGEMENTS, VERDICTS, Exercise, draw_exercise, user
from mmr5_lab.mini.model import build_model, build_processor

READING = {"describe": 0.35, "compare": 0.45, "list": 0.15, "repeat": 0.05}
JUDGING = {"judge": 0.6, "compare": 0.2, "describe": 0.2}
POINTING = {"judge": 0.5, "list": 0.3, "compare": 0.1, "describe": 0.1}
ANSWERING = {
    "keep": 0.45,
    "sort": 0.15,
    "judge": 0.15,
    "list": 0.1,
    "sentence": 0.08,
    "compare": 0.04,
    "describe": 0.02,
    "repeat": 0.01,
}

POINTED = ("verdicts", "judgements", "ids")


@dataclass(frozen=True)
class Lesson:
    """rate: peak learning rate; pages: of a batch; shares: of the exercises; counts: images an exercise may have, drawn
    evenly; choices: keys of `CHOICES` that have a loss of their own"""

    name: str
    steps: int
    rate: float
    pages: int
    shares: dict[str, float] | None
    counts: Sequence[int] = (1, 2, 3, 4, 5)
    choices: tuple[str, ...] = ("verdicts", "judgements")


LESSONS = [
    Lesson("verdicts", 110, 1.5e-3, 112, {"compare": 1.0}, counts=[2]),
    Lesson("text", 1200, 1.5e-3, 84, READING, counts=(1, 2, 3)),
    Lesson("vision", 800, 2e-3, 48, None),
    Lesson("images", 900, 8e-4, 40, READING),
    Lesson("judge", 450, 5e-4, 40, JUDGING),
    Lesson("point", 350, 7e-4, 40, POINTING, choices=POINTED),
    Lesson("more", 1000, 7e-4, 40, POINTING, choices=POINTED),
    Lesson("answer", 900, 6e-4, 40, ANSWERING, counts=(1, 2, 3, 4, 4, 5, 5, 5), choices=(*POINTED, "ends", "starts")),
]
CHOICES = {  # tokens between which an exercise asks to choose
    "verdicts": VERDICTS,
    "judgements": JUDGEMENTS,
    "ids": tuple("0123456789"),
    "ends": (",", "]</answer>"),  # without it answers end an id too early
    "starts": ("Image ", "</think>"),  # without it "Answer at once." is ignored: one token in a hundred hangs on it
}
COUNTING = ("Image ", "\nImage ")  # an id that follows these only counts on and is no choice
CHOICE_WEIGHT = 2.0  # of each kind of choice, beside the loss of all tokens
CLEAN = 200  # first steps of the text lesson, where a page holds each of its words once
POOL = 4000  # page images drawn once for the vision lesson
PLACED = 0.3  # weight of the distance to the embedding, beside the choice of word
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def words_of_page(page: PageContent, rng: random.Random, clean: bool) -> str:
    """A page as text: its words in reading order; unless ``clean``, spaced as the cells of an image are."""
    if clean:
        return " " + " ".join([page.kind, *page.words])
    words = [page.kind] * rng.choice([0, 1])
    for word in page.words:
        words += [word] + [page.kind] * rng.choice([0, 0, 1, 2])
    return " " + " ".join([*words, page.kind])


def random_page(rng: random.Random) -> tuple[PageContent, DrawnPage]:
    content = random_content(rng, ENTITIES, MEASURES, YEARS)
    return content, draw_page(content, rng.choice(list(DOMAINS)), rng.randint(1, 12), rng)


def lesson_batch(lesson: Lesson, processor, rng: random.Random, step: int) -> dict[str, torch.Tensor]:
    """One batch of a language lesson, all its exercises with equally many pages: little padding."""
    count = rng.choice(lesson.counts)
    exercises = [
        draw_exercise(rng, lesson.shares or {}, count, processor.tokenizer) for _ in range(lesson.pages // count)
    ]
    if lesson.name == "verdicts":  # the question alone: the descriptions come out of nowhere, their verdicts do not
        exercises = [e._replace(messages=[user(e.messages[0]["content"][0]["text"], 0)], pages=[]) for e in exercises]
    if lesson.name in ("verdicts", "text"):
        return encode(exercises, processor, None, rng, clean=step < CLEAN)
    domain = rng.choice(list(DOMAINS))
    images = [draw_page(page, domain, rng.randint(1, 12), rng).image for e in exercises for page in e.pages]
    return encode(exercises, processor, images, rng)


def encode(
    exercises: Sequence[Exercise], processor, images: list | None, rng: random.Random, clean: bool = False
) -> dict[str, torch.Tensor]:
    """Model inputs, right-padded, with ``labels`` (-100 outside completions). images: None writes pages as words"""
    tokenizer = processor.tokenizer
    texts, lengths = [], []
    for messages, completion, pages in exercises:
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if images is None:
            for page in pages:
                prompt = prompt.replace(IMAGE, f"<|vision_start|>{words_of_page(page, rng, clean)}<|vision_end|>", 1)
        texts.append(prompt + completion + "<|im_end|>")
        lengths.append(len(tokenizer(completion + "<|im_end|>")["input_ids"]))
    if images:
        batch = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    else:
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        batch["mm_token_type_ids"] = torch.zeros_like(batch["input_ids"])
    labels = batch["input_ids"].clone()
    for row, (end, length) in enumerate(zip(batch["attention_mask"].sum(1), lengths, strict=True)):
        labels[row, : end - length] = -100
        labels[row, end:] = -100
    return {**batch, "labels": labels}


def language_loss(
    model, batch, choices: dict[str, torch.Tensor], counting: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of completion tokens plus that of each kind of choice, and the shares that are right.

    counting: tokens after which an id only counts on and is no choice
    """
    labels = batch.pop("labels")
    hidden = model.model(**batch).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    kept = wanted != -100
    before = batch["input_ids"][:, :-1][kept]
    logits, wanted = model.lm_head(hidden[kept]), wanted[kept]
    loss = cross_entropy(logits, wanted)
    shares = {"tokens": (logits.argmax(-1) == wanted).float().mean().item()}
    counts = torch.isin(before, counting)
    for name, tokens in choices.items():
        chosen = torch.isin(wanted, tokens) & ~counts
        if chosen.any():
            choice, right = logits[chosen][:, tokens], (wanted[chosen][:, None] == tokens).int().argmax(1)
            loss = loss + CHOICE_WEIGHT * cross_entropy(choice, right)
            shares[name] = (choice.argmax(-1) == right).float().mean().item()
    return loss, shares


def cell_words(drawn: DrawnPage, kind: str) -> list[str]:
    """What each cell (row by row) must become: the word of which it holds the largest part, else the kind of page.

    Each word stands in one cell only. In all the cells that it covers, the word after it is hard to find.
    """
    columns, rows = WIDTH // CELL, HEIGHT // CELL
    words: dict[int, str] = {}
    for word, (x1, y1, x2, y2) in drawn.words:
        overlap = {
            row * columns + column: max(0, min(x2, (column + 1) * CELL) - max(x1, column * CELL))
            * max(0, min(y2, (row + 1) * CELL) - max(y1, row * CELL))
            for row in range(rows)
            for column in range(columns)
        }  # fmt: skip
        words[max((cell for cell in overlap if cell not in words), key=lambda cell: overlap[cell])] = word
    return [words.get(cell, kind) for cell in range(rows * columns)]


def vision_features(model, batch) -> torch.Tensor:
    """Visual tokens of all images, concatenated: (cells, hidden)."""
    features = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
    return features if isinstance(features, torch.Tensor) else torch.cat(list(features))


class Vision:
    """The vision lesson: a pool of drawn pages and the embedding that each of their cells must become."""

    def __init__(self, model, processor):
        words = [*ENTITIES, *MEASURES, *YEARS, *KINDS]
        ids = processor.tokenizer([f" {word}" for word in words])["input_ids"]
        assert all(len(row) == 1 for row in ids), "every word of the vocabulary must be one token"
        index = {word: i for i, word in enumerate(words)}
        self.processor, rng = processor, random.Random("vision pool")
        self.targets = model.get_input_embeddings().weight[torch.tensor(ids)[:, 0]].detach().clone()
        self.pages, cells = [], []
        for _ in tqdm(range(POOL), desc="drawing pages", mininterval=5):
            content, drawn = random_page(rng)
            self.pages.append(drawn.image)
            cells.append([index[word] for word in cell_words(drawn, content.kind)])
        self.cells = torch.tensor(cells)

    def loss(self, model, count: int, rng: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = rng.sample(range(len(self.pages)), count)
        batch = self.processor.image_processor(images=[self.pages[i] for i in chosen], return_tensors="pt")
        features, cells = vision_features(model, batch), self.cells[chosen].flatten()
        logits = 16 * normalize(features, dim=-1) @ normalize(self.targets, dim=-1).T
        word = cells < len(self.targets) - len(KINDS)
        weights = torch.where(word, 1.0, 0.1)  # most cells are blank, and easy
        weights = weights / weights.sum()
        wanted = self.targets[cells]
        read = cross_entropy(logits, cells, reduction="none") @ weights
        placed = (features - wanted).square().sum(1) @ weights / (wanted.square().sum(1) @ weights)
        right = (logits.argmax(-1) == cells).float()
        return read + PLACED * placed, {
            "words": right[word].mean().item(),
            "blank": right[~word].mean().item(),
            "placed": placed.item(),
        }


def token_ids(tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Ids of texts that are one token each."""
    return torch.tensor(tokenizer(list(texts))["input_ids"]).squeeze(1)


def train(lesson: Lesson, model, processor, folder: Path, save_every: int) -> None:
    """Run one lesson to its end, going on from ``folder/NAME.pt`` where a run was stopped."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = (".visual." in name) == (lesson.name == "vision")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lesson.rate, weight_decay=0.01, betas=(0.9, 0.98))
    checkpoint, first = folder / f"{lesson.name}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    if first == lesson.steps:
        return
    vision = Vision(model, processor) if lesson.name == "vision" else None
    choice_ids = {name: token_ids(processor.tokenizer, CHOICES[name]) for name in lesson.choices}
    counting = token_ids(processor.tokenizer, COUNTING)
    averages: dict[str, float] = {}
    started = time.monotonic()
    progress = tqdm(range(first, lesson.steps), initial=first, total=lesson.steps, desc=lesson.name, mininterval=10)
    for step in progress:
        rng = random.Random(f"{lesson.name} {step}")  # data depend on the step alone: a resumed run sees the same
        cosine = 0.5 * (1 + math.cos(math.pi * step / lesson.steps))
        for group in optimizer.param_groups:
            group["lr"] = lesson.rate * min(1, (step + 1) / 40) * (0.1 + 0.9 * cosine)
        if vision is not None:
            loss, shares = vision.loss(model, lesson.pages, rng)
        else:
            loss, shares = language_loss(model, lesson_batch(lesson, processor, rng, step), choice_ids, counting)
        if not torch.isfinite(loss):
            raise RuntimeError(f"lesson {lesson.name}, step {step}: the loss is {loss.item()}; lower the lesson's rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for key, value in {"loss": loss.item(), **shares}.items():
            averages[key] = 0.9 * averages.get(key, value) + 0.1 * value
        progress.set_postfix({key: f"{value:.3f}" for key, value in averages.items()})
        if (step + 1) % save_every == 0 or step + 1 == lesson.steps:
            save(checkpoint, model, optimizer, step + 1)
            record = {"lesson": lesson.name, "step": step + 1, "seconds": round(time.monotonic() - started), **averages}
            with (folder / "progress.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")


def save(path: Path, model, optimizer, step: int) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
    temporary.replace(path)


@torch.no_grad()
def reading_accuracy(model, processor, pages: list[tuple[PageContent, DrawnPage]]) -> dict[str, float]:
    """Share of the words (entities, measures, years) of each kind of page that a greedy description holds."""
    processor.tokenizer.padding_side = "left"
    hits: dict[str, list[float]] = {kind: [] for kind in KINDS}
    prompt = processor.apply_chat_template(
        [user("Describe each image.", 1)], tokenize=False, add_generation_prompt=True
    )
    for start in range(0, len(pages), 40):
        part = pages[start : start + 40]
        batch = processor(text=[prompt] * len(part), images=[drawn.image for _, drawn in part], return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=40, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for (content, _), text in zip(part, processor.batch_decode(output, skip_special_tokens=True), strict=True):
            said = set(text.replace(".", " ").split())
            hits[content.kind] += [float(word in said) for word in content.words]
    return {kind: sum(shares) / len(shares) for kind, shares in hits.items() if shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the finished checkpoint")
    parser.add_argument("--work", type=Path, default=Path("runs/base"), help="folder for checkpoints on the way")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    processor = build_processor()
    model = build_model(processor)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f} million parameters, {len(processor.tokenizer)} tokens")
    for lesson in LESSONS:
        train(lesson, model, processor, arguments.work, arguments.save_every)
    model.requires_grad_(False).eval()
    rng = random.Random("unseen pages")
    print("reading accuracy:", reading_accuracy(model, processor, [random_page(rng) for _ in range(400)]))
    model.save_pretrained(arguments.out)
    processor.save_pretrained(arguments.out)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
