"""A sweep in a notebook's cell: a bar, what runs now, what failed; updated in place and kept as plain HTML.

run_sweep(plan, Processes(), LiveView())
"""

import time

from IPython.display import HTML, display

from mmr5_lab.experiments.grids import in_words
from mmr5_lab.experiments.scheduler import Sweep
from mmr5_lab.html import escape_html, html_table, style_element

EVERY = 1.0  # seconds between two updates
ROWS = 24  # runs shown at most: those that run or failed, then the last that ended, then those that wait
MARKS = {"running": "▶", "failed": "✗", "skipped": "–", "done": "✓", "reused": "↺", "waiting": "…"}  # in this order


class LiveView:
    """Shows a sweep below the cell that runs it; `scheduler.run_sweep` calls it with the sweep."""

    def __init__(self) -> None:
        display(HTML(style_element()))
        self._handle = display(HTML(""), display_id=True)
        self._next = 0.0

    def __call__(self, sweep: Sweep) -> None:
        over = all(state.over for state in sweep.states.values())
        if over or time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            self._handle.update(HTML(as_html(sweep)))


def as_html(sweep: Sweep) -> str:
    """Return the sweep as it stands, for people and screen readers; the style sheet is not in it."""
    table = sweep.table()
    table = table.iloc[table["state"].map(list(MARKS).index).argsort(kind="stable")]
    shown = table.head(ROWS).assign(
        state=table["state"].map(lambda state: f"{MARKS[state]} {state}"),
        time=table["seconds"].map(lambda seconds: in_words(seconds) if seconds else ""),
        **{"progress or reason": table["progress"].where(table["progress"] != "", table["message"])},
    )
    shown = shown.set_index("state")[["notebook", "run", "time", "progress or reason"]]
    over = sum(state.over for state in sweep.states.values())
    more = f"<p>and {len(table) - ROWS} more</p>" if len(table) > ROWS else ""
    return (
        f'<div class="mmr5-page"><strong>{escape_html(sweep.line())}</strong>'
        f'<meter min="0" max="{len(table)}" value="{over}">{over} of {len(table)}</meter>'
        f"{html_table(shown, texts=True)}{more}</div>"
    )
