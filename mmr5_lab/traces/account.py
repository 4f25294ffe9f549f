"""What a server was asked and what that cost: answers are kept, tokens and money counted, a budget is never passed.

    account = Account("answers.sqlite", price_in=2.5, price_out=10.0, budget=20.0)

One SQLite file, which several processes may share. Each try of a call is entered before it is sent, at the most that
it can cost, and corrected by what the server counted: so the budget holds over threads, restarts and kills.
"""

import sqlite3
import threading
from pathlib import Path

import pandas as pd

_TABLE = """create table if not exists tries (
    id integer primary key, key text not null, model text not null, answer text,
    prompt_tokens integer not null, completion_tokens integer not null, cost real not null)"""
_INDEX = "create index if not exists answers on tries (key) where answer is not null"
_TOTAL = "create table if not exists total (id integer primary key check (id = 0), cost real not null)"


class BudgetError(RuntimeError):
    """The next call could pass the budget."""


class Account:
    """Answers by key, and what all tries cost; safe to share among threads and processes.

    price_in, price_out: money for a million tokens of prompt and completion
    budget: money that all tries in this file, earlier ones too, may cost together; None: without limit

    Raises ValueError for a negative price or budget, a budget without prices, and a file that is something else.
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
            for statement in (_TABLE, _INDEX, _TOTAL, "insert or ignore into total values (0, 0)"):
                self._file.execute(statement)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is not a file of answers: {error}") from None

    def find(self, key: str) -> str | None:
        """The answer that was given to this key, or None."""
        with self._lock:
            row = self._file.execute("select answer from tries where key = ? and answer is not null", (key,)).fetchone()
        return row and row[0]

    def open_try(self, key: str, model: str, prompt_tokens: int, completion_tokens: int) -> int:
        """Enter a call that is about to be sent, at the most tokens it can take; returns its number.

        Raises BudgetError where it could pass the budget; nothing is entered then.
        """
        cost = self._cost(prompt_tokens, completion_tokens)
        with self._lock, self._file:
            self._file.execute("begin immediate")
            [spent] = self._file.execute("select cost from total").fetchone()
            if self.budget is not None and spent + cost > self.budget:
                raise BudgetError(
                    f"the budget of {self.budget:g} would be passed: {spent:.4g} is spent or under way, the next may"
                    f" cost {cost:.4g}. Raise the budget and start again to go on"
                )
            self._file.execute("update total set cost = cost + ?", (cost,))
            row = (key, model, prompt_tokens, completion_tokens, cost)
            number = self._file.execute(
                "insert into tries (key, model, prompt_tokens, completion_tokens, cost) values (?, ?, ?, ?, ?)", row
            ).lastrowid
        assert number is not None
        return number

    def close_try(self, number: int, prompt_tokens: int, completion_tokens: int, answer: str | None = None) -> None:
        """Correct an entry by what the server counted (0 where it refused), and keep its answer."""
        cost = self._cost(prompt_tokens, completion_tokens)
        with self._lock, self._file:
            self._file.execute("begin immediate")
            self._file.execute(
                "update total set cost = cost + ? - (select cost from tries where id = ?)", (cost, number)
            )
            self._file.execute(
                "update tries set answer = ?, prompt_tokens = ?, completion_tokens = ?, cost = ? where id = ?",
                (answer, prompt_tokens, completion_tokens, cost, number),
            )

    @property
    def spent(self) -> float:
        """Money spent or reserved for calls under way."""
        with self._lock:
            return self._file.execute("select cost from total").fetchone()[0]

    def summary(self) -> pd.DataFrame:
        """A row a model: answers, tries without one (refused, cut off, killed), tokens and cost of all."""
        with self._lock:
            rows = self._file.execute(
                "select model, count(answer), count(*) - count(answer), sum(prompt_tokens), sum(completion_tokens),"
                " sum(cost) from tries group by model order by model"
            ).fetchall()
        columns = ["model", "answers", "tries without", "prompt tokens", "completion tokens", "cost"]
        return pd.DataFrame(rows, columns=columns).set_index("model")

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6
