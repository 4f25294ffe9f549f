"""Processes that open PDFs: what happens to one that a PDF kills."""

import os
import threading
import time

import psutil
import pytest
from helpers.pdfs import blank_pdf

from mmr5_lab.corpus.pdf import PdfError, Rendering, read_page_file
from mmr5_lab.corpus.pdf_process import PdfProcesses


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "mmr5_lab.corpus.pdf_process" in child.cmdline()]


def kill_children(times: int) -> None:
    """Kill the processes that this one starts, one after another, each a moment after its start."""
    for _ in range(times):
        while not (started := children()):
            time.sleep(0.01)
        for child in started:
            child.kill()
            child.wait()


def test_pages_are_counted_and_written(tmp_path):
    blank_pdf(tmp_path / "a.pdf", 3)
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4")
    with PdfProcesses(2) as processes:
        assert list(processes.map(processes.num_pages, [tmp_path / "a.pdf"] * 3)) == [3, 3, 3]
        with pytest.raises(PdfError, match="PDFium cannot read it"):
            processes.num_pages(tmp_path / "b.pdf")
        processes.make_page(tmp_path / "a.pdf", 2, tmp_path, Rendering(max_pixels=600))
        page = read_page_file(tmp_path, 2)
        assert (page.text, page.read_by, page.problem) == ("", "none", "")
    assert children() == []


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_pdf_that_kills_its_process_twice_is_given_up(tmp_path, deaths):
    """A pipe without a writer stands for such a PDF: whoever opens it waits, until killed or something is written."""
    os.mkfifo(tmp_path / "a.pdf")
    blank_pdf(tmp_path / "b.pdf", 4)
    with PdfProcesses(1) as processes:
        killer = threading.Thread(target=kill_children, args=[deaths])
        killer.start()
        if deaths == 2:
            with pytest.raises(PdfError, match="it makes PDFium crash, take all memory, or run for more than 30 min"):
                processes.num_pages(tmp_path / "a.pdf")
        else:
            assert processes.num_pages(tmp_path / "b.pdf") == 4
        killer.join()
        assert processes.num_pages(tmp_path / "b.pdf") == 4
