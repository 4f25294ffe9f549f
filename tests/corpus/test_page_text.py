"""Texts of pages: broken words, control characters, garbage."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_lab.corpus.page_text import HYPHEN, clean_text, count_words, is_garbage, join_hyphens, vocabulary


@pytest.mark.parametrize(
    ("text", "elsewhere", "joined"),
    [
        ("photo¶synthesis", "", "photosynthesis"),
        ("a well¶known plant", "It is well-known.", "a well-known plant"),  # as the document writes it
        ("a well¶known plant", "The Well‐Known plant", "a well-known plant"),  # U+2010, capitals
        ("re¶action", "for re-action and reaction", "re-action"),
        ("state-of¶the-art", "", "state-of-the-art"),
        ("non-sense¶less", "a senseless thing", "non-senseless"),
        ("the Asia¶Pacific region", "", "the Asia-Pacific region"),
        ("INFOR¶MATION", "", "INFORMATION"),
        ("cross¶country skiing", "a country and a cross", "cross-country skiing"),  # both are words here
        ("in¶formation", "the formation in question", "information"),  # short words prove nothing
        ("Haus¶tür", "Das Haus hat eine Tür.", "Haustür"),  # a noun would have its capital
        ("con¶ver¶sion", "", "conversion"),
        ("photo¶\nsynthesis", "", "photosynthesis"),
        ("¶ alone ¶", "", " alone "),
        ("étu¶de", "", "étude"),
    ],
)
def test_broken_words_are_joined_as_the_document_writes_them(text, elsewhere, joined):
    text = text.replace("¶", HYPHEN)
    assert join_hyphens(text, vocabulary([text, elsewhere])) == joined


@given(st.text(alphabet=f"ab-é \n{HYPHEN}"))
def test_no_mark_is_left(text):
    joined = join_hyphens(text, vocabulary([text]))
    assert HYPHEN not in joined
    letters = [c for c in text if c in "abé"]
    assert [c for c in joined if c in "abé"] == letters


@given(st.text())
def test_clean_texts_can_be_written_and_hold_no_control_characters(text):
    clean = clean_text(text)
    clean.encode()
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in clean)
    assert clean_text(clean) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("one\x02two\x00three\x1f", "one two three "),
        ("cafe\u0301", "café"),
        ("hy\xadphen, at the end\xad\ning", "hyphen, at the ending"),
        ("half \ud83d of a face", "half   of a face"),
        ("face 🙂, नमस्ते, שלום", "face 🙂, नमस्ते, שלום"),
        ("line\n\ttab", "line\n\ttab"),
    ],
)
def test_what_is_no_text_becomes_a_space(text, clean):
    assert clean_text(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "\x01\x02\x03\x04 of \x05\x06\x07\x08\x0e\x0f",
        "\ue001\ue002\ue003 \ue004\ue005 page",  # private characters, as of a subset font
        "��� ��� �� words",
        " ".join(
            ["Wkhuh", "lv", "qr", "zrug", "lq", "wklv", "vkliwhg", "whaw", "dqg", "qrqh", "zloo", "frph"] * 3
        ),  # every letter moved by three
    ],
)
def test_a_layer_of_no_text_is_garbage(text):
    assert is_garbage(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Revenue grew by 12 %",
        "• one • two",
        "\uf0a7 a list with \uf0a7 bullets of a symbol font",
        "12.5 13.7 (4.2) 2015 2016",
        "XPS PDF HTML CSS JSON",  # too few to judge
        "Genir pawb yn rhydd ac yn gydradd â'i gilydd mewn urddas a hawliau. " * 3,
        "売上高は増加した。",
        "Strč prst skrz krk, řekl Kryštof čtyřem smrtkám; bylo to v létě, kdy pole voní. " * 3,
        "The following 24 pages hold tables; " * 5,
    ],
)
def test_real_text_is_not_garbage(text):
    assert not is_garbage(text)


def test_words_are_counted_in_chinese_too():
    assert count_words("Two words, 3 2015") == 4
    assert count_words("売上高は増加") == 6
