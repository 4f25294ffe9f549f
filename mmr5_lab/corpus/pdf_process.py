"""PDFium in processes of its own: a PDF that crashes it costs that PDF alone, and two processes render twice as fast.

    with PdfProcesses(2) as processes:
        counts = list(processes.map(processes.num_pages, paths))

multiprocessing's processes would import the caller's script once more, which fails without a main guard; loky's take a
second to start and outlive a caller that is killed.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmr5_lab.corpus.pdf import PdfError, Rendering, make_page, open_pdf, write_page

_SECONDS = 1800  # that a request may take; a long page is read by OCR in up to 40 strips
_ATTEMPTS = 2  # a process may also die because others took all memory


class PdfProcesses:
    """Some processes that open PDFs and make their pages, and a thread for each that waits for it."""

    def __init__(self, count: int):
        self._threads = ThreadPoolExecutor(max(1, count))  # processes, since PDFium is not safe among threads
        self._own = threading.local()
        self._started: list[subprocess.Popen[str]] = []
        self._closed = False

    def __enter__(self) -> "PdfProcesses":
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._started:
            process.kill()
        self._threads.shutdown()
        for process in self._started:
            _end(process)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Return the results of a function that calls the methods below, in the order of the items."""
        return self._threads.map(function, items)

    def num_pages(self, pdf: Path) -> int:
        """Return a PDF's number of pages. Raises PdfError where it cannot be used."""
        return self._ask(pdf)

    def make_page(self, pdf: Path, page: int, folder: Path, rendering: Rendering) -> None:
        """Make a page and write it into its file. Raises PdfError where the PDF cannot be opened or kills PDFium."""
        self._ask(pdf, page=page, folder=str(folder.absolute()), rendering=asdict(rendering))

    def _ask(self, pdf: Path, **request: Any) -> Any:
        """Return the result that this thread's process answers to a request; both are lines of JSON."""
        for _ in range(_ATTEMPTS):
            process = self._process()
            started = time.monotonic()
            timer = threading.Timer(_SECONDS, process.kill)
            timer.start()
            line = ""
            with suppress(OSError):  # it died before the request
                process.stdin.write(json.dumps(request | {"pdf": str(pdf.absolute())}) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            timer.cancel()
            if line:
                answer = json.loads(line)
                if "error" in answer:
                    raise PdfError(answer["error"])
                return answer["result"]
            _end(process)
            if time.monotonic() - started >= _SECONDS:
                break
        what = f"page {request['page']}" if "page" in request else "it"
        raise PdfError(f"{what} makes PDFium crash, take all memory, or run for more than {_SECONDS // 60} minutes")

    def _process(self) -> Any:
        """Return this thread's process, a new one where it has none or the old one died."""
        if not hasattr(self._own, "process") or self._own.process.poll() is not None:
            if self._closed:
                raise PdfError("the run has ended")
            # The package that runs here, wherever the process is started.
            paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
            self._own.process = subprocess.Popen(
                [sys.executable, "-m", "mmr5_lab.corpus.pdf_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )
            self._started.append(self._own.process)
        return self._own.process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with suppress(OSError), process:  # closes its pipes and waits for it
        pass


def main() -> None:
    """Answer the requests on standard input until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too, but its parent ends it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand among the answers
    path, document = "", None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["pdf"] != path or document is None:
                path, document = request["pdf"], None
                document = open_pdf(path)
            if "page" in request:
                page = make_page(document, request["page"], Rendering(**request["rendering"]))
                write_page(Path(request["folder"]), request["page"], page)
            answer: dict[str, Any] = {"result": len(document)}
        except PdfError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
