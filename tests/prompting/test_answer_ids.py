"""Ids are told from ranks, scores and list numbers, in the forms that models write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmr5_lab.prompting.answer_ids import read_ids
from mmr5_lab.prompting.answers import FAULTS, parse_ranking

# block, ids, whether other numbers were left out; of 5 candidates
BLOCKS = {
    "list numbers": ("1. Image 3\n2. Image 1\n3. Image 2", [3, 1, 2], True),
    "in one line": ("1. Image 3 / 2. Image 1 / 3. Image 2", [3, 1, 2], True),
    "ranks": ("Rank 1: Image 3, Rank 2: Image 1", [3, 1], True),
    "ranks in another order": ("Rank 2: Image 1, Rank 1: Image 3", [3, 1], True),
    "ranks after": ("Image 1: rank 2, Image 2: rank 3, Image 3: rank 1", [3, 1, 2], True),
    "hyphens": ("page-3 > page-1 > page-2", [3, 1, 2], False),
    "hyphens after other scripts": ("图片-3 > 图片-1 > 图片-2", [3, 1, 2], False),
    "ordinals": ("1st: Image 3; 2nd: Image 1", [3, 1], True),
    "ordinals and numbers": ("1st 3, 2nd 1", [3, 1], True),
    "ranks to ids": ('{"1": 3, "2": 1}', [3, 1], True),
    "ranks to ids, in another order": ('{"2": 1, "1": 3}', [3, 1], True),
    "ranks to names": ('{"1": "Image 3", "2": "Image 1"}', [3, 1], True),
    "ids to ranks": ('{"3": 1, "1": 2, "2": 3}', [3, 1, 2], True),
    "ids to scores": ("3: 9, 1: 8, 2: 5", [3, 1, 2], True),
    "objects": ('[{"id": 3, "score": 2}, {"id": 1, "score": 1}]', [3, 1], True),
    "objects with ranks": ('[{"id": 1, "rank": 2}, {"id": 3, "rank": 1}]', [3, 1], True),
    "objects with remarks": ('[{"image": 3, "why": "unlike image 2"},\n{"image": 1, "why": "page 7"}]', [3, 1], True),
    "an object with remarks": ('{"why": "Image 1 has 2 charts", "ranking": [3, 1, 2]}', [3, 1, 2], False),
    "lists of ids and scores": ('{"ranking": [3, 1, 2], "scores": [9, 8, 7]}', [3, 1, 2], False),
    "list numbers and brackets": ("1. [3] 2. [1]", [3, 1], True),
    "brackets": ("[3] > [1] > [2]", [3, 1, 2], False),
    "names in brackets": ("[Image 3] > [Image 1]", [3, 1], False),
    "list numbers and numbers": ("1) 3\n2) 1\n3) 2", [3, 1, 2], True),
    "words that are not known": ("1. Bild 3\n2. Bild 1", [3, 1], True),
    "a table": ("| Rank | Image |\n|---|---|\n| 1 | 3 |\n| 2 | 1 |", [3, 1], True),
    "a table of names": ("| 1 | Image 3 |\n| 2 | Image 1 |", [3, 1], True),
    "bullets": ("- **Image 3**\n- **Image 1**", [3, 1], False),
    "lines with remarks": ("1. Image 3: unlike Image 2\n2. Image 1: unlike 4", [3, 1], True),
    "sentences": ("Image 3 is best, then Image 1.\nImage 2 is last.", [3, 1, 2], False),
    "one word for all": ("Images 3, 1 and 2", [3, 1, 2], False),
    "a word for some": ("Image 3 > 1 > Image 2", [3, 1, 2], False),
    "pages of images": ("Image 3 (page 2), Image 1 (page 4)", [3, 1], True),
    "shares and fractions": ("Image 3: 95%, Image 1: 8/10, Image 2: 0.3", [3, 1, 2], False),
    "scores in words": ("3 (score 9), 1 (score 8)", [3, 1], True),
    "a heading": ("Relevance: 3, 1, 2", [3, 1, 2], False),
    "arrows": ("3 -> 1 -> 2", [3, 1, 2], False),
    "dots between ids": ("3. 1. 2. 4", [3, 1, 2, 4], False),
    "two rows of ids": ("[3, 1,\n2, 4]", [3, 1, 2, 4], False),
    "Chinese": ("图3、图1", [3, 1], False),
    "files": ("image_3.png, image_1.png", [3, 1], False),
    "list numbers without a mark": ("1 Image 3, 2 Image 1", [3, 1], True),
    "pairs of id and score": ("[(3, 9), (1, 8), (2, 5)]", [3, 1, 2], True),
    "pairs of ids": ("(3, 1), (2, 4)", [3, 1, 2, 4], False),
    "remarks after ids": ("3: most, 1: some, 2: no, 4: no", [3, 1, 2, 4], False),
    "places": ("Image 1: 2nd, Image 2: 3rd, Image 3: 1st", [3, 1, 2], True),
    "followed by": ("Most relevant is image 3, followed by 1 and 2", [3, 1, 2], False),
    "XML": ("<image>3</image><image>1</image>", [3, 1], False),
    "nothing": ("the first one", [], False),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks(case):
    text, ids, others = BLOCKS[case]
    read, left_out = read_ids(text, 5)
    assert [x.value for x in read] == ids
    assert left_out == others


def numbered(write):
    return lambda ids: [write(rank, i) for rank, i in enumerate(ids, 1)]


# how a form is written: ids to a text
FORMS = {
    "asked": str,
    "commas": lambda ids: ", ".join(map(str, ids)),
    "greater": lambda ids: " > ".join(map(str, ids)),
    "brackets": lambda ids: " > ".join(f"[{i}]" for i in ids),
    "names": lambda ids: ", ".join(f"Image {i}" for i in ids),
    "names in a list": lambda ids: str([f"Image {i}" for i in ids]),
    "bold names": lambda ids: " > ".join(f"**Image {i}**" for i in ids),
    "lines": lambda ids: "\n".join(f"- Image {i}" for i in ids),
    "list numbers": lambda ids: "\n".join(numbered("{}. Image {}".format)(ids)),
    "list numbers in a line": lambda ids: " / ".join(numbered("{}. Image {}".format)(ids)),
    "list numbers and numbers": lambda ids: "\n".join(numbered("{}. {}".format)(ids)),
    "list numbers and brackets": lambda ids: " ".join(numbered("{}. [{}]".format)(ids)),
    "remarks": lambda ids: "\n".join(numbered("{}. Image {}: unlike Image 1, it has 2 charts".format)(ids)),
    "ranks": lambda ids: ", ".join(numbered("Rank {}: Image {}".format)(ids)),
    "ranks and numbers": lambda ids: "; ".join(numbered("Rank {}: {}".format)(ids)),
    "ordinals": lambda ids: "\n".join(numbered("{}th: Image {}".format)(ids)),
    "ranks to ids": lambda ids: "{" + ", ".join(numbered('"{}": {}'.format)(ids)) + "}",
    "ranks to names": lambda ids: "{" + ", ".join(numbered('"{}": "Image {}"'.format)(ids)) + "}",
    "objects": lambda ids: "[" + ", ".join(numbered('{{"score": {}, "id": {}}}'.format)(ids)) + "]",
    "objects with scores": lambda ids: "[" + ", ".join(f'{{"id": {i}, "score": {13 - i}}}' for i in ids) + "]",
    "a table": lambda ids: "| Rank | Image |\n|---|---|\n" + "\n".join(numbered("| {} | {} |".format)(ids)),
    "a fence": lambda ids: f"```json\n{ids}\n```",
    "a box": lambda ids: rf"\boxed{{{ids}}}",
    "full width": lambda ids: "".join(chr(ord(c) + 0xFEE0) if c in "[],0123456789" else c for c in str(ids)),
    "Chinese": lambda ids: "、".join(f"图{i}" for i in ids),
}
PERMUTATIONS = st.integers(1, 12).flatmap(lambda n: st.permutations(range(1, n + 1)))


@settings(deadline=None)
@given(PERMUTATIONS, st.sampled_from(sorted(FORMS)))
def test_a_permutation_is_read_in_any_form(ids, form):
    parsed = parse_ranking(f"<think>Image 1 fits.</think><answer>{FORMS[form](ids)}</answer>", len(ids))
    assert parsed.answer == tuple(ids)
    assert parsed.order == tuple(i - 1 for i in ids)
    assert parsed.valid == (FORMS[form](ids) == str(ids))
    assert not parsed.faults & {"duplicate", "out_of_range", "missing", "no_answer"}
    assert parsed.faults <= FAULTS


@settings(deadline=None)
@given(PERMUTATIONS, st.sampled_from(sorted(set(FORMS) - {"remarks"})))
def test_a_permutation_from_0_is_read_in_any_form(ids, form):
    parsed = parse_ranking(
        f"<think>Image 1 fits.</think><answer>{FORMS[form]([i - 1 for i in ids])}</answer>", len(ids)
    )
    assert parsed.answer == tuple(ids)
    assert "zero_based" in parsed.faults


@settings(deadline=None)
@given(PERMUTATIONS, st.sampled_from(sorted(set(FORMS) - {"a table"})))
def test_a_permutation_is_read_without_tags(ids, form):
    text = FORMS[form](ids)
    if form == "remarks" and len(ids) < 2:
        return
    parsed = parse_ranking(f"<think>Image 1 fits.</think>\n{text}", len(ids))
    assert parsed.answer == tuple(ids)
    assert "untagged" in parsed.faults


@settings(deadline=None, max_examples=300)
@given(PERMUTATIONS, st.sampled_from(sorted(FORMS)), st.floats(0, 1))
def test_a_cut_never_invents_an_id(ids, form, share):
    """Every prefix of an answer reads as a prefix of its ids."""
    text = FORMS[form](ids)
    parsed = parse_ranking(f"<think>Image 1 fits.</think><answer>{text[: int(share * len(text))]}", len(ids))
    answer = parsed.answer or ()
    assert answer == tuple(ids[: len(answer)])
    assert "truncated" in parsed.faults
