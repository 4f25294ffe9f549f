"""Keep a server's answers, count tokens and money, and hold a budget.

    account = Account("answers.sqlite", price_in=2.5, price_out=10.0, budget=20.0)

One SQLite file, which several processes may share. Each try is booked before it is sent, at the most that it can cost,
and corrected by what the server counted: so the budget holds over threads, restarts and kills.
"""

import sqlite3
import threading
from pathlib import Path

import pandas as pd

_TABLE = """create table if not exists tries (
    id integer primary key, key text not null, model text not null, answer text, problem text,
    prompt_tokens integer not null, completion_tokens integer not null, cost real not null)"""
_INDEX = "create index if not exists answers on tries (key) where answer is not null"
_SPENT = "select coalesce(sum(cost), 0) from tries"


class BudgetError(RuntimeError):
    """The next call could pass the budget."""


class Account:
    """Answers by key, and the cost of all tries; threads and processes may share it.

    price_in, price_out: money for a million tokens of prompt and completion
    budget: money that all tries in this file, earlier ones too, may cost together; None: without limit

    Raises ValueError for a negative price or budget, a budget without prices, and a file of another kind.
    """

    def __init__(self, path: str | Path, *, price_in: float = 0.0, price_out: float = 0.0, budget: float | None = None):
        if min(price_in, price_out, budget or 0.0) < 0:
            raise ValueError("prices and budget must not be negative")
        if budget is not None and not (price_in or price_out):
            raise ValueError("a budget needs prices: say what a million tokens cost")
        self.path, self.price_in, self.price_out, self.budget = Path(path), price_in, price_out, budget
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._file = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._file.execute("pragma journal_mode = wal")
            self._file.execute("pragma synchronous = normal")  # safe against kills of the process
            self._file.execute(_TABLE)
            self._file.execute(_INDEX)
            self._file.execute("select problem from tries limit 0")  # refuse an older file before anything is paid
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is not a file of answers: {error}") from None

    def find(self, key: str) -> str | None:
        """Return the answer to this key, or None."""
        with self._lock:
            row = self._file.execute("select answer from tries where key = ? and answer is not null", (key,)).fetchone()
        return row and row[0]

    def open_try(self, key: str, model: str, prompt_tokens: int, completion_tokens: int) -> int:
        """Book a try that is about to be sent, at the most tokens it can take; return its number.

        Raises BudgetError where it could pass the budget; nothing is booked then.
        """
        cost = self._cost(prompt_tokens, completion_tokens)
        with self._lock, self._file:
            self._file.execute("begin immediate")  # no other process may book between the sum and the insertion
            spent = 0.0 if self.budget is None else self._file.execute(_SPENT).fetchone()[0]
            if self.budget is not None and spent + cost > self.budget:
                raise BudgetError(
                    f"the budget of {self.budget:g} would be passed: {spent:.4g} is spent or under way, the next may"
                    f" cost {cost:.4g}. Raise the budget and start again to go on"
                )
            number = self._file.execute(
                "insert into tries (key, model, prompt_tokens, completion_tokens, cost) values (?, ?, ?, ?, ?)",
                (key, model, prompt_tokens, completion_tokens, cost),
            ).lastrowid
        assert number is not None
        return number

    def close_try(
        self, number: int, prompt_tokens: int, completion_tokens: int, answer: str | None = None, problem: str = ""
    ) -> None:
        """Correct a try by what the server counted, and keep its answer, or the kind of problem it had."""
        row = (answer, problem or None, prompt_tokens, completion_tokens, self._cost(prompt_tokens, completion_tokens))
        with self._lock:
            self._file.execute(
                "update tries set answer = ?, problem = ?, prompt_tokens = ?, completion_tokens = ?, cost = ?"
                " where id = ?",
                (*row, number),
            )

    @property
    def spent(self) -> float:
        """Money spent or reserved for calls under way."""
        with self._lock:
            return self._file.execute(_SPENT).fetchone()[0]

    def summary(self) -> pd.DataFrame:
        """Return a row a model: answers, tries without one and their kinds, tokens and cost of all.

        "unfinished" counts tries under way and those whose process was killed.
        """
        with self._lock:
            tries = pd.read_sql(
                "select model, answer is not null as answers, answer is null as 'tries without', prompt_tokens as"
                " 'prompt tokens', completion_tokens as 'completion tokens', cost, problem from tries",
                self._file,
            )
        problems = tries.pop("problem").fillna("unfinished")[tries["answers"] == 0]
        counts = tries.groupby("model").sum()
        return counts.join(pd.crosstab(tries["model"], problems).reindex(counts.index, fill_value=0))

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6
