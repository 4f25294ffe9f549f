"""A sweep in a notebook's cell: a bar, what runs now, what failed; updated in place and kept as plain HTML.

run_sweep(plan, Processes(), LiveView())
"""

import time

from IPython.display import HTML, display

from mmr5_lab.experiments.grids import in_words
from mmr5_lab.experiments.scheduler import Sweep
from mmr5_lab.html import escape_html

EVERY = 1.0  # seconds between two updates
ROWS = 24  # runs shown at most: those that run or failed, then the last that ended, then what waits
MARKS = {"running": "▶", "done": "✓", "reused": "↺", "failed": "✗", "skipped": "–", "waiting": "…"}
ORDER = ("running", "failed", "skipped", "done", "reused", "waiting")
STYLE = """
<style>
.sweep { font: 13px/1.45 system-ui, sans-serif; max-width: 60rem; color: #222; background: #fff; padding: .3rem; }
.sweep meter { width: 100%; height: 1.1rem; }
.sweep table { font: inherit; border-collapse: collapse; margin-top: .4rem; font-variant-numeric: tabular-nums; }
.sweep th, .sweep td { text-align: left; padding: .1rem .8rem .1rem 0; border-bottom: 1px solid #ddd; }
.sweep td { vertical-align: top; white-space: nowrap; } .sweep td.n { text-align: right; }
.sweep td:last-child { white-space: normal; }
.sweep .failed { color: #B00020; font-weight: bold; } .sweep .running { color: #0059A0; }
</style>
"""


class LiveView:
    """Shows a sweep below the cell that runs it; to be called with the sweep, as `schedule.run_sweep` does."""

    def __init__(self) -> None:
        self._handle = display(HTML(""), display_id=True)
        self._next = 0.0

    def __call__(self, sweep: Sweep) -> None:
        over = all(state.over for state in sweep.states.values())
        if over or time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            self._handle.update(HTML(as_html(sweep)))


def as_html(sweep: Sweep) -> str:
    """The sweep as it stands, for people and screen readers."""
    table = sweep.table()
    table = table.iloc[table["state"].map(ORDER.index).argsort(kind="stable")]
    over = sum(state.over for state in sweep.states.values())
    rows = "".join(
        f'<tr><td class="{row.state}">{MARKS[row.state]} {row.state}</td><td>{escape_html(row.notebook)}</td>'
        f"<td><code>{row.run}</code></td><td class='n'>{in_words(row.seconds) if row.seconds else ''}</td>"
        f"<td>{escape_html(row.progress or row.message)}</td></tr>"
        for row in table.head(ROWS).itertuples()
    )
    more = f"<p>and {len(table) - ROWS} more</p>" if len(table) > ROWS else ""
    return (
        f'{STYLE}<div class="sweep"><strong>{escape_html(sweep.line())}</strong>'
        f'<meter min="0" max="{len(table)}" value="{over}">{over} of {len(table)}</meter>'
        f"<table><thead><tr><th>state</th><th>notebook</th><th>run</th><th>time</th><th>progress or reason</th></tr>"
        f"</thead><tbody>{rows}</tbody></table>{more}</div>"
    )
