"""Which tokens may follow, so that a decoded answer is a permutation of the candidates' ids."""

from collections.abc import Sequence


class AllowedIds:
    """Holds what comes after `<answer>[` to a permutation of 1..n, then the end token.

    `paths[i]` are the tokens of id i + 1; where they begin another id's tokens (1 and 10), the separator's
    first token is added, which tells the two apart. `longest` is the number of tokens of a permutation.
    """

    def __init__(self, tokenizer, n: int):
        ids = [tuple(tokenizer(str(i), add_special_tokens=False)["input_ids"]) for i in range(1, n + 1)]
        self.separator = tuple(tokenizer(", ", add_special_tokens=False)["input_ids"])
        self.ids, self.end = ids, tokenizer.eos_token_id
        self.paths = [
            path + self.separator[:1] if any(other[: len(path)] == path and other != path for other in ids) else path
            for path in ids
        ]
        self.longest = sum(map(len, ids)) + (n - 1) * len(self.separator)

    def following(self, written: Sequence[int]) -> list[int]:
        """Return the tokens that may follow what was written after `<answer>[` so far."""
        unused, rest = set(self.ids), tuple(written)
        while True:
            # An id is complete where the separator follows: of 1 and 10, only that tells which was written.
            used = next((path for path in unused if rest[: len(path) + 1] == path + self.separator[:1]), None)
            if used is None:
                break
            unused.remove(used)
            rest = rest[len(used) :]
            if rest[: len(self.separator)] != self.separator:  # it is not written to its end
                return [self.separator[len(rest)]]
            rest = rest[len(self.separator) :]
        following = {path[len(rest)] for path in unused if path[: len(rest)] == rest and path != rest}
        if rest in unused:
            following.add(self.separator[0] if len(unused) > 1 else self.end)
        return sorted(following) or [self.end]
