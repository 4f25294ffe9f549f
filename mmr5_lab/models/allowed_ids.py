"""Which tokens may follow, so that a decoded answer is a permutation of the candidates' ids."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class AllowedIds:
    """Holds what comes after `<answer>[` to a permutation of 1..n, then the end token.

    tokens_of: gives the tokens of a text, as numbers (a tokenizer's) or texts (a server's)

    `paths[i]` are the tokens of id i + 1; where they begin another id's tokens (1 and 10), the separator's
    first token is added, which tells the two apart. `longest` is the number of tokens of a permutation; `branches`
    are the beginnings of paths, the empty one first, with the tokens that follow there.
    """

    def __init__(self, tokens_of: Callable[[str], Sequence[Any]], n: int, end: Any):
        ids = [tuple(tokens_of(str(i))) for i in range(1, n + 1)]
        self.separator = tuple(tokens_of(", "))
        self.ids, self.end = ids, end
        self.paths = [
            path + self.separator[:1] if any(other[: len(path)] == path and other != path for other in ids) else path
            for path in ids
        ]
        self.longest = sum(map(len, ids)) + (n - 1) * len(self.separator)
        beginnings = sorted({path[:k] for path in self.paths for k in range(len(path))}, key=len)
        self.branches = {
            start: sorted({path[len(start)] for path in self.paths if path[: len(start)] == start and path != start})
            for start in beginnings
        }

    def scores(self, log_probs: Mapping[tuple, Any]) -> list[float]:
        """Return the log-probability of each id, from those of tokens after each of the `branches`."""
        return [float(sum(log_probs[path[:k]][path[k]] for k in range(len(path)))) for path in self.paths]

    def following(self, written: Sequence[Any]) -> list[Any]:
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
