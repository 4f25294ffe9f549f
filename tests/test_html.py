"""Text is shown as text, whatever it holds."""

import re

import pandas as pd
import pytest

from mmr5_lab.html import STYLE, escape_html, escape_latex, html_page, html_table, latex_table, visible


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
    assert lines == [
        r"\begin{table}",
        r"\centering",
        r"\caption{50\%}",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"system & R@1 & n \\",
        r"\midrule",
        r"a\&b & 0.25 & \textless{}b\textgreater{} \\",
        r"c & -- & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_pages_are_headed_escaped_and_hold_the_one_style_sheet():
    page = html_page("<i>", "<p>text</p>")
    assert "<title>&lt;i&gt;</title>" in page
    assert '<body class="mmr5-page"><main><h1>&lt;i&gt;</h1>\n<p>text</p></main></body>' in page
    assert page.count("<style>") == 1
    assert html_page("a", "<h1>b</h1>").count("<h1>") == 1
    assert "<h1" not in html_page("a", "<div></div>", kind="mmr5-window")


def test_no_rule_of_the_style_sheet_reaches_beyond_what_is_ours():
    """Notebooks hold it too: a rule about all tables would change theirs."""
    rules = re.sub(r"/\*.*?\*/", "", STYLE.read_text(), flags=re.DOTALL)
    selectors = [part.split("}")[-1].strip() for part in rules.split("{")[:-1]]
    assert len(selectors) > 80
    assert [s for s in selectors if not re.match(r"(\.mmr5|@container|\[data-jp-theme-light)", s)] == []
