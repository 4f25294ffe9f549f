"""JSON lines that others wrote or that a killed process left, and what a folder was made with."""

import json
import resource
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_lab.files import (
    appending,
    check_settings,
    fingerprint,
    json_lines,
    read_lines,
    read_progress,
    report_progress,
    write_json,
    write_lines,
)

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


OBJECT = st.dictionaries(
    st.text(st.characters(codec=None, exclude_categories=[])),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec=None)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


@given(st.lists(OBJECT, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_rows_are_read_back_as_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_lines(path, rows)
    assert read_lines(path) == rows
    assert len(path.read_bytes().decode().split("\n")) == len(rows) + 1, "UTF-8, one line a row"


LINES = b'{"n": 1}\n{"n": 2, "text": "\xc3\xa9"}\n'


@pytest.mark.parametrize(
    "data",
    [
        LINES,
        LINES[:-1],  # no line break at its end
        b"\xef\xbb\xbf" + LINES,  # as Windows' editors save UTF-8
        LINES.replace(b"\n", b"\r\n"),
        LINES.replace(b"\n", b"\r\n")[:-2],
        b"\n" + LINES.replace(b"\n", b"\n \n\n"),
    ],
)
def test_lines_of_other_programs_are_read_whole_and_appended_to(tmp_path, data, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    assert read_lines(path) == [{"n": 1}, {"n": 2, "text": "é"}]
    with appending(path) as append:
        append({"n": 3})
    assert [row["n"] for row in read_lines(path)] == [1, 2, 3]
    assert not caplog.records


def test_a_file_of_one_line_has_one_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"n": 1}')
    assert read_lines(tmp_path / "rows.jsonl") == [{"n": 1}]


@pytest.mark.parametrize("half", [b'{"n": 2, "text": "\xc3', b'{"n": 2', b"\0\0\0\0"])
def test_a_half_line_is_named_in_a_warning_and_refused_where_it_cannot_be_made_again(tmp_path, caplog, half):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n' + half)
    assert read_lines(path) == [{"n": 1}]
    assert f"{path}, line 2 was not written to its end and is left out" in caplog.text
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is not JSON"):
        list(json_lines(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named_and_not_touched(tmp_path, encoding):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES.decode().encode(encoding))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"rows\.jsonl is in UTF-16 .*: save it as UTF-8"):
        read_lines(path)
    with pytest.raises(ValueError, match="UTF-16"), appending(path):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "problem"), [("{'n': 2}", "not JSON"), ("[2]", "not a JSON object"), ("x", "not JSON")]
)
def test_what_is_no_row_is_named_wherever_it_stands(tmp_path, line, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"n": 1}}\n{line}\n{{"n": 3}}')
    with pytest.raises(ValueError, match=f"line 2 is {problem}"):
        read_lines(path)


def test_rows_that_cannot_be_written_leave_the_older_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_lines(path, [{"n": 1}])
    with pytest.raises(TypeError):
        write_lines(path, [{"n": 2}, {"n": object()}])
    assert read_lines(path) == [{"n": 1}]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_progress_is_read_as_reported(tmp_path):
    assert read_progress(tmp_path) is None
    report_progress(tmp_path, "pages", 3, 7)
    assert read_progress(tmp_path) == {"what": "pages", "done": 3, "total": 7}


SETTINGS = {
    "model": "base",
    "lora": {"rank": 8, "targets": ("q", "v")},
    "rate": 1e-4,
    "bad": float("nan"),
    "seed": None,
}


def test_equal_settings_are_taken_again(tmp_path):
    for again in (SETTINGS, SETTINGS, {**SETTINGS, "lora": {"rank": 8, "targets": ["q", "v"]}, "new": None}):
        check_settings(tmp_path / "deep" / "settings.json", again)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rate": 1e-3}, r"rate 0\.0001, now 0\.001"),
        ({"lora": {"rank": 16, "targets": ["q", "v"]}}, r"lora\.rank 8, now 16"),
        ({"lora": None}, "lora {'rank': 8.*}, now None"),
        ({"seed": 1, "more": [1]}, r"seed None, now 1; more None, now \[1\]"),
        ({"bad": 0.0}, r"bad nan, now 0\.0"),
    ],
)
def test_other_settings_are_refused_with_the_difference(tmp_path, changed, message):
    path = tmp_path / "settings.json"
    check_settings(path, SETTINGS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"was made with other settings \({message}\): delete it"):
        check_settings(path, {**SETTINGS, **changed}, "delete it")
    assert path.read_bytes() == before


def test_settings_that_cannot_be_read_are_no_reason_to_go_on(tmp_path):
    (tmp_path / "settings.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"settings\.json cannot be read .* choose another folder"):
        check_settings(tmp_path / "settings.json", SETTINGS)


def test_a_fingerprint_depends_on_values_and_their_order_alone():
    assert fingerprint({"a": 1, "b": [2]}, "x") == fingerprint({"b": [2], "a": 1}, "x")
    different = [
        fingerprint(),
        fingerprint(1),
        fingerprint("1"),
        fingerprint(1, 2),
        fingerprint(2, 1),
        fingerprint([1, 2]),
    ]
    assert len(set(different)) == 6
    assert all(len(digits) == 16 for digits in different)


def test_json_is_replaced_as_a_whole(tmp_path):
    write_json(tmp_path / "a.json", {"text": "é\ud800"}, indent=1)
    assert json.loads((tmp_path / "a.json").read_text()) == {"text": "é\ud800"}
