"""Chat messages for a question and its candidate pages: the one builder for SFT, RL and inference.

The texts are part of the released model's interface (MIT licence, i2vec/MM-R5, `examples/reranker.py` and
`src/sft`; arXiv 2506.12364): one changed byte and another model is measured. They are therefore constants
here, and `PROMPT_VERSION` goes into every manifest and trace that was made with them.

What is untrusted (the question, and a teacher's words about a page) goes through `neutralise` first, so that
text which looks like a special token cannot close a turn or claim an image.
"""

import hashlib
import operator
import random
import re
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> and "
    "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think><answer> "
    "answer here </answer>"
)

_REQUEST = (
    "Please rank the following images according to their relevance to the question. Provide your "
    "response in the format: <think>your reasoning process here</think><answer>[image_id_1, "
    "image_id_2, ...]</answer> where the numbers in the list represent the ranking order of "
    "images'id from most to least relevant. Before outputting the answer, you need to analyze each "
    "image and provide your analysis process.For example: <think>Image 1 shows the most relevant "
    "content because...</think><answer>[id_most_relevant, id_second_relevant, ...]</answer>\n"
)
INFERENCE_QUESTION_TEMPLATE = (
    _REQUEST + "The question is: {Question}\n\n"
    "There are {image_num} images, id from 1 to {image_num_end}, Image ID to image mapping:\n"
)
SFT_QUESTION_TEMPLATE = (  # released, and counted in PROMPT_VERSION; it lacks one newline
    _REQUEST + "The question is: {question}\n\n"
    "There are {image_num} images, id from 1 to {image_num}, Image ID to image mapping:"
)

_QUESTION = re.compile(r"The question is: (.*?)\n\nThere are \d+ images", re.DOTALL)

IMAGE_PREFIX = "\nImage {i}: "

TEACHER_POSITIVE_TEMPLATE = (
    "Given an image retrieved from the document, please analyze in a paragraph of 40 words or less "
    "why the information in this picture can help answer this question about the document: {question}"
)

TEACHER_NEGATIVE_TEMPLATE = (
    "Given an image retrieved from the document, please analyze in a paragraph of 40 words or less "
    "why the information in this picture cannot help answer this question about the document: "
    "{question}"
)

TEACHER_REFINE_TEMPLATE = (
    "Given a question and the analysis of the five retrieved images, please summarize in one "
    "sentence why {positive_image} can help answer the question, and in another sentence why the "
    "other images cannot.\n\n"
    "Question: {question}\n\n"
    "Analysis of the images:\n"
    "{think}"
)

# What MonoQwen2-VL was trained on (lightonai/MonoQwen2-VL-v0.1, model card): the page first, then this.
POINTWISE_TEMPLATE = (
    "Assert the relevance of the previous image document to the following query, answer True or False. "
    "The query is: {query}"
)
POINTWISE_ANSWERS = ("True", "False")

# Twelve hexadecimal digits name the texts above: traces and runs made with other texts do not compare.
PROMPT_VERSION = hashlib.sha256("\0".join([
    SYSTEM_PROMPT, INFERENCE_QUESTION_TEMPLATE, SFT_QUESTION_TEMPLATE, IMAGE_PREFIX,
    TEACHER_POSITIVE_TEMPLATE, TEACHER_NEGATIVE_TEMPLATE, TEACHER_REFINE_TEMPLATE,
]).encode()).hexdigest()[:12]  # fmt: skip

# Two shapes of control text. `<|name|>` is Qwen's (also Llama's and Phi's; DeepSeek writes it with a
# full-width bar). The listed names stand in plain angle brackets: image placeholders of ms-swift, LLaVA,
# Gemma and InternVL, turn marks of Gemma and Llama, and Qwen's reasoning and tool marks. Other tags, such as
# `<title>`, are ordinary text, and so are the operators in `f <| x |> g`. Both shapes are look-aheads from
# one `<` that stop at the next `<`, so the search is linear.
_CONTROL_TEXT = re.compile(
    r"<(?=[|｜][^\s<>]*[|｜]>"
    r"|/?(?:(?:start_of_|end_of_|begin_of_)?(?:image|img|video|audio|turn)(?:[ _-]?[0-9]+|[_-]\w+)?"
    r"|bbox|box|quad|ref|ref-object|think|answer|tool_call|tool_response"
    r"|s|bos|eos|pad|unk)>)",
    re.IGNORECASE,
)


def neutralise(text: str) -> str:
    """Put one space after the `<` of every special-token look-alike; leave all other text byte for byte.

    `<|im_end|>` becomes `< |im_end|>` and `<image>` becomes `< image>`: a reader still sees what was written, and no
    tokenizer takes it for a token. Nothing is removed, which could join the halves of another token. Linear time.
    """
    return _CONTROL_TEXT.sub("< ", text)


def build_messages(
    query: str, num_candidates: int, shown: Sequence[tuple[str, bool]] | None = None
) -> list[dict[str, Any]]:
    """Return the chat messages that ask a model to rank `num_candidates` pages for `query`.

    shown: of each page its text, and whether its image is shown too; the text stands behind the image, under the same
        name "Image i", which answers use. None: images alone, as released

    Returns `[system, user]`. The content of both is a list (trl needs that of every message): text parts
    `{"type": "text", "text": ...}` and, in candidate order, one `{"type": "image"}` placeholder a page. Read
    in order, the user's parts give the released inference text: the question, then "\\nImage i: " and image
    i, cut into parts as the release cuts it. SFT, RL and inference use it alike.

    Raises ValueError for a blank query, one that is not valid Unicode text (a lone surrogate), or fewer than one
    candidate, and TypeError for a query that is not a string.
    """
    count = operator.index(num_candidates)
    if count < 1:
        raise ValueError(f"num_candidates is {count}: a prompt needs at least one page to rank")
    question = _checked("query", query)
    text = INFERENCE_QUESTION_TEMPLATE.format(Question=question, image_num=count, image_num_end=count)
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for i, (words, image) in enumerate(shown or [("", True)] * count, 1):
        content += [{"type": "text", "text": IMAGE_PREFIX.format(i=i)}, *([{"type": "image"}] if image else [])]
        if words or not image:
            content.append({"type": "text", "text": neutralise(words) or "(a page without text)"})
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
        {"role": "user", "content": content},
    ]


def asked_question(prompt: str) -> str | None:
    """Return the question in the text of a prompt that was built with these templates; None in another."""
    question = _QUESTION.search(prompt)
    return question and question[1]


def build_pointwise_messages(query: str) -> list[dict[str, Any]]:
    """Return the messages that ask whether one page is relevant to `query`; the answer is one of `POINTWISE_ANSWERS`.

    Raises like `build_messages` for a bad query.
    """
    text = POINTWISE_TEMPLATE.format(query=_checked("query", query))
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def completion_text(think: str, answer_ids: Sequence[int]) -> str:
    """Return the completion that a model should write: `<think>…</think><answer>[3, 1, 2]</answer>`.

    `answer_ids` are 1-based candidate ids, best first; `think` must not hold `</think>` (see `neutralise`).
    """
    return f"<think>{think}</think><answer>{list(map(int, answer_ids))}</answer>"


def content_text(content: str | Sequence[dict[str, Any]] | None, image: str = "") -> str:
    """Return the text of a chat message's `content`: a string, or the text parts of a list joined; "" for None.

    image: stands for each image part
    """
    if isinstance(content, str):
        return content
    parts = () if content is None else content
    shown = [
        image if part.get("type") == "image" else part.get("type") == "text" and part.get("text") for part in parts
    ]
    return "".join(text or "" for text in shown)


def shuffled(items: Sequence[T], *seeds: Any) -> list[T]:
    """Return the items in an order drawn from `seeds` alone: the same in any run, on any number of devices."""
    return random.Random(" ".join(map(str, seeds))).sample(list(items), len(items))


def teacher_prompt(question: str, positive: bool) -> str:
    """Return what a teacher is asked about one page: why it can (`positive`) or cannot help answer `question`.

    The teacher explains, it does not judge (arXiv 2506.12364, data construction). Raises like `build_messages`.
    """
    template = TEACHER_POSITIVE_TEMPLATE if positive else TEACHER_NEGATIVE_TEMPLATE
    return template.format(question=_checked("question", question))


def refine_prompt(question: str, positive_images: Sequence[int], think: str) -> str:
    """Return what the refine pass is asked: one sentence for the positive images, one for the rest.

    `positive_images` are 1-based ids, at least one; `think` holds the lines "Image i: …" of the first pass. The
    template speaks of "the five retrieved images" whatever their number, as released. Raises like `build_messages`.
    """
    names = [f"Image {i}" for i in positive_images]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return TEACHER_REFINE_TEMPLATE.format(
        question=_checked("question", question), positive_image=listed, think=_checked("think", think)
    )


def _checked(what: str, text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} is a {type(text).__name__}, expected a string")
    if not text.strip():
        raise ValueError(f"{what} is empty: a prompt needs some text there")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode text: lone surrogate at {error.start}") from None
    return neutralise(text)
