"""Teach the miniature's base model to read pages and compare them with a question; never to rank them.

``python -m mmr5_lab.mini.pretrain data/mini/base`` remakes the shipped checkpoint. Seven lessons, in an order
found by trial (docs/log.md):

1. ``verdicts`` text alone, a question and descriptions of pages: is each word of them what is asked for?
2. ``text``     text alone, a page is its words: describe it, compare it, list pages, repeat words.
3. ``vision``   the vision tower alone, with dense targets: each visual token must become the embedding of the
                word that stands in its cell of the page (or of the kind of page, where no word stands).
4. ``images``   lesson 2 on real page images, vision tower frozen.
5. ``judge``    the same, mostly: is all that is asked for on a page? Which of them are these?
6. ``point``    the same with a second loss on the choice among ids: naming the images that were just described.
7. ``more``     the same again, with a fresh optimizer: after 850 steps in all, the ids come right at once.

A checkpoint is written every ``--save-every`` steps; a run that was stopped goes on from there.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, normalize
from tqdm.auto import tqdm

from mmr5_lab.mini.documents import (  # fmt: skip
    CELL,
    DOMAINS,
    ENTITIES,
    HEIGHT,
    KINDS,
    MEASURES,
    QUESTIONS,
    WIDTH,
    YEARS,
    DrawnPage,
    PageContent,
    describe,
    draw_page,
    random_content,
)
from mmr5_lab.mini.model import build_model, build_processor
from mmr5_lab.prompting.prompts import build_messages

LESSONS = {  # steps
    "verdicts": 110,
    "text": 1200,
    "vision": 800,
    "images": 900,
    "judge": 450,
    "point": 350,
    "more": 1000,
}
PAGES = {"verdicts": 112, "text": 84, "vision": 48, "images": 40, "judge": 40, "point": 40, "more": 40}  # a batch
RATE = {"verdicts": 1.5e-3, "text": 1.5e-3, "vision": 2e-3, "images": 8e-4, "judge": 5e-4, "point": 7e-4, "more": 7e-4}
CLEAN = 200  # first steps of the text lesson, where a page holds each of its words once
SHARES = {"describe": 0.35, "compare": 0.45, "list": 0.15, "repeat": 0.05}  # of the exercises
JUDGING = {"judge": 0.6, "compare": 0.2, "describe": 0.2}
POINTING = {"judge": 0.5, "list": 0.3, "compare": 0.1, "describe": 0.1}
CHOICES = {  # tokens between which an exercise asks to choose
    "verdicts": (" (wrong)", " (right)"),
    "judgements": (" It does not help.", " It answers the question."),
    "ids": ("1", "2", "3", "4", "5"),  # in the last two lessons
}
COUNTING = ("Image ", "\nImage ")  # an id that follows these is no choice
CHOICE_WEIGHT = 2.0  # of each kind of choice, beside the loss of all tokens
POOL = 4000  # page images drawn once for the vision lesson
PLACED = 0.3  # weight of the distance to the embedding, beside the choice of word
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def sample_pages(rng: random.Random, count: int) -> tuple[list[PageContent], dict[str, str]]:
    """Pages of one imagined document, and an asked fact: one that a page states (one time in three), or any."""
    pools = [rng.sample(words, rng.choice([2, 2, 3])) for words in (ENTITIES, MEASURES, YEARS)]
    pages = [random_content(rng, *pools) for _ in range(count)]
    fact = rng.choice(rng.choice(pages).facts) if rng.random() < 0.33 else tuple(rng.choice(pool) for pool in pools)
    return pages, dict(zip(("entity", "measure", "year"), fact, strict=True))


def lesson_sample(
    rng: random.Random, count: int, tokenizer, shares: dict[str, float]
) -> tuple[list[dict], str, list[PageContent]]:
    """One exercise: chat messages with image placeholders, the completion, the pages behind the placeholders."""
    task = rng.choices(list(shares), list(shares.values()))[0]
    if task == "repeat":  # any token may be asked for, so that no output embedding stays untrained
        words = [f" {word}" for word in (*ENTITIES, *MEASURES, *YEARS)]
        text = "".join(
            rng.choice(words) if rng.random() < 0.7 else tokenizer.decode([rng.randrange(8, len(tokenizer))])
            for _ in range(rng.randint(4, 10))
        )
        return [user([{"type": "text", "text": "Repeat:" + text}])], text, []
    pages, asked = sample_pages(rng, count)
    images = [
        part for i in range(1, count + 1) for part in ({"type": "text", "text": f"\nImage {i}: "}, {"type": "image"})
    ]
    if task == "describe":
        lines = [f"Image {i}: {describe(page)}." for i, page in enumerate(pages, 1)]
        return [user([{"type": "text", "text": "Describe each image."}, *images])], "\n".join(lines), pages
    if task == "judge":
        asked = dict(zip(asked, rng.choice(rng.choice(pages).facts), strict=True))
        question = rng.choice(QUESTIONS).format(**asked) + " Judge each image."
        missing, found = CHOICES["judgements"]
        ids = [i for i, page in enumerate(pages, 1) if tuple(asked.values()) in page.facts]
        lines = [
            f"Image {i}: {describe(page, asked)}.{found if i in ids else missing}" for i, page in enumerate(pages, 1)
        ]
        lines.append(f"Answer: {', '.join(map(str, ids))}.")  # in the images' own order, so nothing is ranked
        return [user([{"type": "text", "text": question}, *images])], "\n".join(lines), pages
    if task == "compare":
        question = rng.choice(QUESTIONS).format(**asked) + " Compare each image with the question."
        lines = [f"Image {i}: {describe(page, asked)}." for i, page in enumerate(pages, 1)]
        return [user([{"type": "text", "text": question}, *images])], "\n".join(lines), pages
    # list: one property, ids in the images' own order, so nothing is ranked
    page = rng.choice(pages)
    wanted = rng.choice([*page.entities, *page.measures, *page.years])
    lines = [f"Image {i}: {describe(p)}." for i, p in enumerate(pages, 1)]
    ids = [i for i, p in enumerate(pages, 1) if wanted in (*p.entities, *p.measures, *p.years)]
    system = build_messages("-", 1)[0]
    text = f"Which images show {wanted}? Answer with their ids."
    completion = f"<think>{chr(10).join(lines)}</think><answer>{ids}</answer>"
    return [system, user([{"type": "text", "text": text}, *images])], completion, pages


def user(content: list[dict]) -> dict:
    return {"role": "user", "content": content}


def words_of_page(page: PageContent, rng: random.Random, clean: bool) -> str:
    """A page as text: its words in reading order; unless ``clean``, spaced as the cells of an image are."""
    if clean:
        return " " + " ".join([page.kind, *page.words])
    words = [page.kind] * rng.choice([0, 1])
    for word in page.words:
        words += [word] + [page.kind] * rng.choice([0, 0, 1, 2])
    return " " + " ".join([*words, page.kind])


def encode(samples, processor, images: list | None, rng: random.Random, clean: bool = False) -> dict[str, torch.Tensor]:
    """Samples -> model inputs, right-padded, with ``labels`` (-100 outside completions)."""
    tokenizer = processor.tokenizer
    texts, lengths = [], []
    for messages, completion, pages in samples:
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


def random_page(rng: random.Random) -> tuple[PageContent, DrawnPage]:
    content = random_content(rng, ENTITIES, MEASURES, YEARS)
    return content, draw_page(content, rng.choice(list(DOMAINS)), rng.randint(1, 12), rng)


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

    def loss(self, model, rng: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = rng.sample(range(len(self.pages)), PAGES["vision"])
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


def lesson_batch(lesson: str, processor, rng: random.Random, step: int) -> dict[str, torch.Tensor]:
    """One batch of a language lesson, all its samples with equally many pages: little padding."""
    count = 2 if lesson == "verdicts" else rng.randint(1, 3 if lesson == "text" else 5)
    shares = {"verdicts": {"compare": 1.0}, "judge": JUDGING, "point": POINTING, "more": POINTING}.get(lesson, SHARES)
    samples = [lesson_sample(rng, count, processor.tokenizer, shares) for _ in range(PAGES[lesson] // count)]
    if lesson == "verdicts":  # the question alone: the descriptions come out of nowhere, their verdicts do not
        samples = [([user(messages[0]["content"][:1])], text, []) for messages, text, _ in samples]
    if lesson in ("verdicts", "text"):
        return encode(samples, processor, None, rng, clean=step < CLEAN)
    pages = [page for _, _, pages in samples for page in pages]
    domain = rng.choice(list(DOMAINS))
    return encode(samples, processor, [draw_page(p, domain, rng.randint(1, 12), rng).image for p in pages], rng)


def token_ids(tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Ids of texts that are one token each."""
    return torch.tensor(tokenizer(list(texts))["input_ids"]).squeeze(1)


def train(lesson: str, model, processor, folder: Path, save_every: int) -> None:
    """Run one lesson to its end, going on from ``folder/{lesson}.pt`` where a run was stopped."""
    vision = lesson == "vision"
    for name, parameter in model.named_parameters():
        parameter.requires_grad = (".visual." in name) == vision
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE[lesson], weight_decay=0.01, betas=(0.9, 0.98))
    state, first = folder / f"{lesson}.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    steps = LESSONS[lesson]
    if first == steps:
        return
    source = Vision(model, processor) if vision else None
    asked = [name for name in CHOICES if name != "ids" or lesson in ("point", "more")]
    choices = {name: token_ids(processor.tokenizer, CHOICES[name]) for name in asked}
    counting = token_ids(processor.tokenizer, COUNTING)
    averages: dict[str, float] = {}
    started = time.monotonic()
    progress = tqdm(range(first, steps), initial=first, total=steps, desc=lesson, mininterval=10)
    for step in progress:
        rng = random.Random(f"{lesson} {step}")  # data depend on the step alone: a resumed run sees the same
        for group in optimizer.param_groups:
            group["lr"] = RATE[lesson] * min(1, (step + 1) / 40) * (0.45 * (1 + math.cos(math.pi * step / steps)) + 0.1)
        if source is not None:
            loss, shares = source.loss(model, rng)
        else:
            loss, shares = language_loss(model, lesson_batch(lesson, processor, rng, step), choices, counting)
        if not torch.isfinite(loss):
            raise RuntimeError(f"lesson {lesson}, step {step}: the loss is {loss.item()}; lower RATE[{lesson!r}]")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for key, value in {"loss": loss.item(), **shares}.items():
            averages[key] = 0.9 * averages.get(key, value) + 0.1 * value
        progress.set_postfix({key: f"{value:.3f}" for key, value in averages.items()})
        if (step + 1) % save_every == 0 or step + 1 == steps:
            temporary = state.with_suffix(".tmp")
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                temporary,
            )
            temporary.replace(state)
            record = {
                "lesson": lesson,
                "step": step + 1,
                "seconds": round(time.monotonic() - started),
                **{k: round(v, 4) for k, v in averages.items()},
            }
            with (folder / "progress.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")


@torch.no_grad()
def reading_accuracy(model, processor, pages: list[tuple[PageContent, DrawnPage]]) -> dict[str, float]:
    """Share of the words (entities, measures, years) of each kind of page that a greedy description holds."""
    processor.tokenizer.padding_side = "left"
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    messages = [
        user(
            [
                {"type": "text", "text": "Describe each image."},
                {"type": "text", "text": "\nImage 1: "},
                {"type": "image"},
            ]
        )
    ]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for start in range(0, len(pages), 40):
        part = pages[start : start + 40]
        batch = processor(text=[prompt] * len(part), images=[drawn.image for _, drawn in part], return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=40, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for (content, _), text in zip(part, processor.batch_decode(output, skip_special_tokens=True), strict=True):
            said = set(text.replace(".", " ").split())
            found[content.kind] += [float(word in said) for word in content.words]
    return {kind: sum(hits) / len(hits) for kind, hits in found.items() if hits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the finished checkpoint")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="folder for checkpoints on the way")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    processor = build_processor()
    model = build_model(processor)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, {len(processor.tokenizer)} tokens"
    )
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
