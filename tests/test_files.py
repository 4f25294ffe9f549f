"""Files that are appended to: each row whole or not at all, one process at a time."""

import json
import resource
import subprocess
import sys

import pytest

from mmr5_lab.files import appending, read_lines

APPEND_AND_WAIT = """
import sys
from mmr5_lab.files import appending
with appending(sys.argv[1]) as append:
    append({"n": 2})
    print("open", flush=True)
    sys.stdin.read()
"""


def test_rows_are_read_back_as_written(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [{"a": "line\u2028separator"}, {"a": 'quote " and\nbreak', "b": [1.5, None]}]
    with appending(path) as append:
        for row in rows:
            append(row)
            assert read_lines(path)[-1] == row, "it is there at once"
    assert read_lines(path) == rows


def test_a_half_written_line_is_left_out_by_readers_and_cut_off_by_the_next_writer(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = json.dumps({"n": 1}) + "\n"
    path.write_bytes(whole.encode() + '{"n": 2, "text": "é'.encode()[:-1])  # within a character
    before = path.read_bytes()
    assert read_lines(path) == [{"n": 1}]
    assert path.read_bytes() == before, "a reader changes nothing: it may still be written"
    with appending(path) as append:
        append({"n": 3})
    assert read_lines(path) == [{"n": 1}, {"n": 3}]


def test_two_processes_on_one_file_are_refused_until_the_first_is_gone(tmp_path):
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", APPEND_AND_WAIT, path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    with pytest.raises(RuntimeError, match=r"another process is writing .*rows\.jsonl"), appending(path):
        pass
    process.kill()
    process.wait()
    with appending(path) as append:
        append({"n": 4})
    assert [row["n"] for row in read_lines(path)] == [2, 4]


def test_a_row_that_does_not_fit_leaves_no_half(tmp_path):
    path = tmp_path / "rows.jsonl"
    with appending(path) as append:
        append({"n": 1})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as on a full disk, only a part is written
        try:
            with pytest.raises(OSError, match=r"rows\.jsonl"):
                append({"n": "2" * 200})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        append({"n": 3})
    assert path.read_text() == '{"n": 1}\n{"n": 3}\n'


def test_a_line_that_is_not_an_object_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"n": 1}\n[2]\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_lines(tmp_path / "rows.jsonl")
