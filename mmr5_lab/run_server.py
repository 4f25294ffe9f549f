"""What the server of a sweep (`schedule.Processes`) has ready when it forks a process for each run.

The libraries are loaded, and a first small page has brought the templates of the HTML with all that they use. What
is there is left out of the runs' garbage collections, which would copy its memory into each process
(https://docs.python.org/3/library/gc.html#gc.freeze).
"""

import gc

from mmr5_lab import schedule  # noqa: F401
from mmr5_lab.execute import as_html  # before nbformat: it says why

# isort: split
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

as_html(new_notebook(cells=[new_markdown_cell("# A"), new_code_cell("1", outputs=[new_output("stream", text="1")])]))
gc.freeze()
