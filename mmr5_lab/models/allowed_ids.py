"""Which tokens may follow, so that a decoded answer is a permutation of the candidates' ids."""

from collections.abc import Sequence


class AllowedIds:
    """Which tokens may follow, so that what comes after `<answer>[` is a permutation of 1..n.

    `paths[i]` are the tokens of id i + 1; where they begin another id's tokens (1 and 10), the separator's
    first token is added, which tells the two apart.
    """

    def __init__(self, tokenizer, n: int):
        ids = [tuple(tokenizer(str(i), add_special_tokens=False)["input_ids"]) for i in range(1, n + 1)]
        self.separator = tuple(tokenizer(", ", add_special_tokens=False)["input_ids"])
        self.ids, self.end = ids, tokenizer.eos_token_id
        self.paths = [
            path + self.separator[:1] if any(other[: len(path)] == path and other != path for other in ids) else path
            for path in ids
        ]
        self.longest = sum(map(len, ids)) + (n - 1) * len(self.separator) + 1

    def following(self, written: Sequence[int]) -> list[int]:
        """Tokens that may follow what was written after `<answer>[` so far; the end token once all ids are there."""
        left, at, written = dict(enumerate(self.ids)), 0, tuple(written)
        while True:
            rest = written[at:]
            # the longest id that is complete and followed by the separator (or by nothing more)
            whole = [i for i, path in left.items() if rest[: len(path) + 1] == path + self.separator[:1]]
            if whole:
                taken = whole[0]
                at += len(left.pop(taken))
                gap = written[at : at + len(self.separator)]
                if gap != self.separator:  # in the middle of the separator
                    return [self.separator[len(gap)]]
                at += len(self.separator)
                continue
            complete = [i for i, path in left.items() if rest == path]
            following = {
                path[len(rest)] for path in left.values() if len(path) > len(rest) and path[: len(rest)] == rest
            }
            if complete:
                following |= {self.separator[0]} if len(left) > 1 else {self.end}
            return sorted(following) or [self.end]

    def complete(self, written: Sequence[int]) -> bool:
        """Are all ids written?"""
        return self.following(written) == [self.end]

    def run(self, written: Sequence[int], token: int) -> list[int]:
        """`token`, written next, and the tokens after it that leave no choice, up to the end token."""
        new = [token]
        while len(following := self.following([*written, *new])) == 1 and following != [self.end]:
            new += following
        return new
