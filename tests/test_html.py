"""Text is shown as text, whatever it holds."""

import pandas as pd
import pytest

from mmr5_lab.html import escape_html, escape_latex, html_table, latex_table, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ✓ é", "plain ✓ é"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("abc\u202egpj.exe", r"abc\u202egpj.exe"),
        ("a\nb\tc", "a\nb\\tc"),
    ],
)
def test_control_and_direction_characters_become_visible(text, shown):
    assert visible(text) == shown


def test_html_is_escaped_for_content_and_attributes():
    assert escape_html("""<img src=x onerror='a("&")'>""") == (
        "&lt;img src=x onerror=&#x27;a(&quot;&amp;&quot;)&#x27;&gt;"
    )


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        (r"\input{x}", r"\textbackslash{}input\{x\}"),
        ("50% of $5 & #1_a^b~c", r"50\% of \$5 \& \#1\_a\textasciicircum{}b\textasciitilde{}c"),
        ("−0.5–1\n\n2", "$-$0.5--1  2"),
        ("\u202e", r"\textbackslash{}u202e"),
    ],
)
def test_latex_has_no_commands_left(text, latex):
    assert escape_latex(text) == latex


def test_tables_round_numbers_and_mark_absent_ones():
    frame = pd.DataFrame({"R@1": [0.25, None], "n": ["<b>", "2"]}, index=pd.Index(["a&b", "c"], name="system"))
    assert html_table(frame, "<i>", digits=2).splitlines() == [
        "<table><caption>&lt;i&gt;</caption>",
        '<thead><tr><th scope="col">system</th><th scope="col">R@1</th><th scope="col">n</th></tr></thead>',
        "<tbody>",
        '<tr><th scope="row">a&amp;b</th><td>0.25</td><td>&lt;b&gt;</td></tr>',
        '<tr><th scope="row">c</th><td>–</td><td>2</td></tr>',
        "</tbody>",
        "</table>",
    ]
    lines = latex_table(frame, "50%", digits=2).splitlines()
    assert lines[2:] == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"system & R@1 & n \\",
        r"\midrule",
        r"a\&b & 0.25 & \textless{}b\textgreater{} \\",
        r"c & -- & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\caption{50\%}",
        r"\end{table}",
    ]
