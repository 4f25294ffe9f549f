"""Judge what a chat server answered: what the model wrote, whether that is an answer, and what it cost.

Servers differ in where they put things: `content` may be null, a list of parts, or begin in the middle of the thinking;
thinking may stand in `reasoning`, `reasoning_content` or a part, and the whole completion with it; an error may come
as a 200.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from mmr5_lab.html import visible
from mmr5_lab.prompting.answers import with_opening

PROBLEMS = {
    "cut": "the answer was cut off at its token limit",
    "refused": "the model refuses to answer",
    "filtered": "a content filter stopped the answer",
    "empty": "nothing was answered",
    "failed": "the server reports an error",
}
_ENDINGS = {  # finish reasons; with any other one the model ended by itself
    "length": "cut", "max_tokens": "cut",
    "content_filter": "filtered", "safety": "filtered", "recitation": "filtered",
    "error": "failed", "abort": "failed",
}  # fmt: skip
_PART = {"reasoning": "thinking", "thinking": "thinking", "refusal": "refusal"}
_END_TOKEN = re.compile(r"<\|\w+\|>\s*\Z")


@dataclass(frozen=True)
class Reply:
    """What a server wrote, and whether that is an answer.

    text: as the model wrote it, thinking included: `<think>…</think>…`
    problem: why this is not an answer (a name from `PROBLEMS`), or None
    detail: the server's own words on the problem, or ""
    prompt_tokens, completion_tokens: as the server counted them; None where it did not
    steps: of each token, if asked for: log-probabilities of the texts that it might have been, its own text first
    """

    text: str
    problem: str | None = None
    detail: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    steps: tuple[dict[str, float], ...] = ()

    @property
    def answer(self) -> str:
        """What stands outside the thinking."""
        _, closed, after = self.text.rpartition("</think>")
        return after.strip() if closed or not self.text.lstrip().startswith("<think>") else ""

    @property
    def reason(self) -> str:
        """The problem in one line, such as "filtered: a content filter stopped the answer (finish reason safety)"."""
        if self.problem is None:
            return ""
        return f"{self.problem}: {PROBLEMS[self.problem]}{f' ({self.detail})' if self.detail else ''}"


def read_reply(body: str) -> Reply:
    """Return the reply in the body of a server's answer (HTTP status 200).

    Raises ValueError where the body is neither a chat completion nor JSON that says why there is none.
    """
    try:
        return _judged(json.loads(body.removeprefix("\ufeff")))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise ValueError(f"the answer is not a chat completion: {visible(body[:80])!r}") from None


def own_words(body: Any) -> str:
    """Return a server's message in the JSON of an error, or ""."""
    for _ in range(3):
        if isinstance(body, dict):
            body = body.get("message") or body.get("error") or body.get("detail")
    return body if isinstance(body, str) else ""


def _judged(body: Any) -> Reply:
    error = body.get("error") or ("choices" not in body and own_words(body))
    choices = None if error else body["choices"]
    if not isinstance(choices, list | None):
        raise TypeError
    choice = choices[0] if choices else {}
    message = choice.get("message") or {}
    written = _written(message.get("content"))
    # servers with a reasoning parser (vLLM, transformers) give what stood within <think> apart
    written["thinking"] += _string(message.get("reasoning_content") or message.get("reasoning"))
    written["refusal"] += _string(message.get("refusal"))
    text = _whole(written["text"], _END_TOKEN.sub("", written["thinking"]))
    ended = choice.get("finish_reason")
    problem, detail = _ENDINGS.get(str(ended).lower()), f"finish reason {ended}"
    error = error or choice.get("error")
    if error:
        problem, detail = "failed", own_words(error) or json.dumps(error)
    elif written["refusal"].strip():
        problem, detail = "refused", written["refusal"]
    elif not problem:
        problem, detail = None if Reply(text).answer else "empty", ""
    steps = tuple(map(_step, (choice.get("logprobs") or {}).get("content") or ()))
    return Reply(text, problem, visible(" ".join(detail.split()))[:300], *_tokens(body.get("usage")), steps)


def _step(token: Any) -> dict[str, float]:
    """Log-probabilities of the texts that a token might have been; of texts that tokens share, the highest."""
    step: dict[str, float] = {}
    for each in (token, *(token.get("top_logprobs") or ())):
        text = _string(each["token"])
        step[text] = max(float(each["logprob"]), step.get(text, -math.inf))
    return step


def _string(value: Any) -> str:
    """A string, with U+FFFD for halves of characters; "" for nothing. Raises TypeError for anything else."""
    if not isinstance(value, str | None):
        raise TypeError
    return (value or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _written(content: Any) -> dict[str, str]:
    """Text, thinking and refusal in a message's content: a string, or a list of parts."""
    written = dict.fromkeys(("text", "thinking", "refusal"), "")
    for part in content if isinstance(content, list) else [content]:
        kind, value = "text", part
        if isinstance(part, dict):
            kind = _PART.get(str(part.get("type")), "text")
            value = part.get(part.get("type")) if kind != "text" else None
            value = value or part.get("text")
        written[kind] += "".join(_written(value).values()) if isinstance(value, list) else _string(value)
    return written


def _whole(content: str, thinking: str) -> str:
    """The completion as the model wrote it: thinking that a server gives apart is put back in front."""
    if not thinking.strip() or content.lstrip().startswith("<think>"):
        return with_opening(content)
    opened = thinking if thinking.lstrip().startswith("<think>") else f"<think>{thinking}"
    # Empty content: the model never closed its think block, or the server took everything for thinking.
    return f"{opened}</think>{content}" if content.strip() else opened


def _tokens(usage: Any) -> tuple[int | None, int | None]:
    """Tokens of prompt and completion; None where they are not counted."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    prompt, completion, total = (c if type(c) is int and 0 <= c < 1 << 40 else 0 for c in counts)
    if not prompt:
        return None, None
    return prompt, max(completion, total - prompt)  # some count thinking, which they bill, in the total alone
