"""Read from a chat server what may come next, as the local engine reads it from logits.

The server needs three extensions of OpenAI's interface, all of which vLLM has: log-probabilities (`logprobs`,
`top_logprobs`), a last message that it goes on with (`continue_final_message`), and answers that are held to a form
(`structured_outputs`). What it lacks is found out by requests of one token without pages.
"""

import re
from collections.abc import Iterator
from typing import Any

from mmr5_lab.models.allowed_ids import AllowedIds
from mmr5_lab.models.chat import Chat, RequestError
from mmr5_lab.models.replies import Reply

TOP = 20  # most probable tokens that are asked for: what OpenAI and vLLM (--max-logprobs) give at most
IMPOSSIBLE = -9000.0  # log-probability; vLLM writes -9999 for minus infinity

Messages = list[dict[str, Any]]
Step = dict[str, float]  # as in `Reply.steps`
_PROBE: Messages = [{"role": "user", "content": "N/A"}]
_EXTENSIONS = re.compile("logprobs|continue_final|add_generation|structured_outputs")


class LackingError(RequestError):
    """A server cannot do what a mode needs."""

    def __init__(self, what: str):
        super().__init__(
            f"lacking: the server cannot rank in this mode: {what}. vLLM 0.12 or newer can; mode 'reason' needs less"
        )


class ServedTokens:
    """What the model behind a chat may write next. May be called from any number of threads.

    known: keeps what is found out about the server
    """

    def __init__(self, chat: Chat, known: dict[tuple[str, bool], int]):
        self.chat, self._known = chat, known

    def check(self, begun: bool) -> None:
        """Raise LackingError if the server gives no log-probabilities, or cannot go on with what was `begun`."""
        self._prompt_tokens("")
        if begun and not self._goes_on():
            raise LackingError(
                "it does not go on with an answer that was begun (continue_final_message), or counts no tokens (usage)"
            )

    def allowed_ids(self, n: int) -> AllowedIds:
        """Return what may follow `<answer>[`, in the server's own tokens: digits, or whole numbers."""

        def tokens_of(text: str) -> list[str]:
            whole = text.isdigit() and (len(text) == 1 or self._length("9" * len(text)) < len(text))
            return [text] if whole else list(text)

        return AllowedIds(tokens_of, n, "")

    def first_token(self, word: str) -> str:
        """Return the first of a word's tokens; the word, if the server cannot say how many it makes."""
        if not self._goes_on() or (whole := self._length(word)) == 1:
            return word
        parts = [(word[:k], word[k:]) for k in range(len(word) - 1, 0, -1)]
        return next((a for a, b in parts if self._length(a) == 1 and self._length(b) == whole - 1), word)

    def log_probs(self, messages: Messages, tokens: list[str], begun: str = "") -> Step:
        """Return the log-probability of each of the tokens after `begun`, the beginning of an answer.

        What is not among the most probable tokens is asked for as a choice. Servers may give the probabilities among
        the choices, so there is a token among them whose probability is known.
        """
        [step] = self._ask(messages, begun).steps
        likely = sorted(step, key=lambda token: (token not in tokens, -step[token]))
        known = next((token for token in likely if re.fullmatch(r"[\w ,.:()]+", token)), "")
        while missing := [token for token in tokens if token not in step]:
            choices = [text for text in (known, *missing) if text]
            [held] = self._ask(messages, begun, structured_outputs={"choice": choices}).steps
            told = {token for token in choices if held.get(token, IMPOSSIBLE) > IMPOSSIBLE}
            if known not in told or len(told) < 2:
                raise LackingError(f"it gives no log-probabilities of {choices} as choices (structured_outputs)")
            step |= {token: step[known] + held[token] - held[known] for token in told}
        return {token: step[token] for token in tokens}

    def permutation(self, messages: Messages, begun: str, allowed: AllowedIds) -> list[str]:
        """Return the tokens of a permutation, each the most probable of those allowed, as the local engine writes it.

        The server writes on as long as it keeps to that; where it departs, it is asked to go on from the right token.
        """
        written: list[str] = []
        an_id = f"({'|'.join(map(''.join, allowed.ids))})"
        steps: Iterator[Step] = iter(())  # of what the server wrote after that
        while (following := allowed.following(written)) != [allowed.end]:
            so_far, step = begun + "".join(written), next(steps, {})
            if len(following) > 1 and not step:
                form = ("[0-9]*" if written and written[-1].isdigit() else an_id) + f"(, {an_id})*"
                room = allowed.longest - len(written)
                said = self._ask(messages, so_far, max_tokens=room, structured_outputs={"regex": form})
                steps = iter(said.steps)
                step = next(steps)
            chosen = next(iter(step), None)
            if len(following) > 1 and all(step.get(token, IMPOSSIBLE) <= IMPOSSIBLE for token in following):
                step = self.log_probs(messages, following, so_far)
            written.append(max(following, key=lambda token: step.get(token, IMPOSSIBLE)))
            if written[-1] != chosen:
                steps = iter(())
        return written

    def _length(self, text: str) -> int:
        """Return how many tokens a text makes; the digit before it keeps a template from stripping it."""
        return self._prompt_tokens("1" + text) - self._prompt_tokens("1")

    def _goes_on(self) -> bool:
        """Does the server go on with an answer that was begun? Otherwise it closes it, which takes tokens."""
        try:
            return self._prompt_tokens("1") < self._prompt_tokens("1", goes_on=False)
        except LackingError:
            return False

    def _prompt_tokens(self, begun: str, goes_on: bool = True) -> int:
        """Return the tokens of a small request, or 0 if the server does not count them. Raises LackingError."""
        if (begun, goes_on) not in self._known:
            self._known[begun, goes_on] = self._ask(_PROBE, begun, goes_on).prompt_tokens or 0
        return self._known[begun, goes_on]

    def _ask(self, messages: Messages, begun: str, goes_on: bool = True, **options: Any) -> Reply:
        """Return a reply that has `steps`."""
        if begun:
            messages = [*messages, {"role": "assistant", "content": begun}]
            options |= {"continue_final_message": goes_on, "add_generation_prompt": not goes_on}
        asked = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": TOP}
        try:
            reply = self.chat.ask(messages, **asked | options)
        except RequestError as error:
            if not error.passing and _EXTENSIONS.search(str(error)):
                raise LackingError(str(error)) from None
            raise
        if reply.problem not in (None, "cut", "empty"):
            raise RequestError(reply.reason)
        if not reply.steps:
            raise LackingError("it gives no log-probabilities (logprobs)")
        return reply
