"""Take reasoning apart by image: one reason for each, without its label and markup."""

import re
from collections.abc import Sequence

_REMARK = r"\([^()\n]{0,80}\)"  # as in "Image 3 (page 7):"
# "Image 3" where a line or sentence begins, after whatever markup and list number stands there; or, with a capital,
# wherever a colon follows. Then what parts it from its reason, if anything does: closing markup, a remark, and a
# colon, a bar, a dash or the end of a heading's line.
_LABEL = re.compile(
    rf"""(?:
      (?:^[ \t]*+(?:(?:[#>*_`•\[(|-]|[0-9]{{1,3}}[.)])[ \t]*+)*+ | (?<=[.!?][ ])[*_`\[(]*+ | (?<=[。！？])[*_`\[(]*+)
      (?P<name>(?i:image)|图[像片]?|画像) [ \t]?[#№]? (?P<number>[0-9]{{1,4}})(?![0-9])
    | \b(?P<midname>Image)[ ](?P<midnumber>[0-9]{{1,4}})(?=[*_`\])]*+[ ]?(?:{_REMARK})?[*_`]*+:)
    )
    (?P<separator>
      [*_`\])]*+ (?:[ \t]*+(?P<remark>{_REMARK})[*_`]*+)?+ (?:[ \t]*+[:：|] | [ \t]++[–—-](?=[ \t]) | [ \t]*+$) [*_`]*+
    )?
    """,
    re.MULTILINE | re.VERBOSE,
)
_HEADING = re.compile(r"^[ \t]*+(?:\#{1,6}[ \t]|\*\*[^*\n]++\*\*:?[ \t]*+$)", re.MULTILINE)  # of a part about no image
_BULLET = re.compile(r"^([ \t]*+)\*(?=[ \t])", re.MULTILINE)
# Asterisks of emphasis touch a word on one side; those of a product on both or on none.
_EMPHASIS = re.compile(r"\*\*+|(?<!\S)\*(?=\S)|(?<=\S)\*(?!\S)|(?<=\w)\*(?=[^\w\s])|(?<=[^\w\s])\*(?=\w)")


def reasoning_by_image(think: str, n: int) -> dict[int, str]:
    """Return what reasoning says of each image: 1-based id -> its text, the ids 1..n that it speaks of only.

    A part begins with "Image i" at the start of a line or sentence, or with "Image i:", whatever markup stands around
    it (`**Image 1**:`, `### Image 1`, `[Image 1]:`, `1. Image 1`), and ends where the next one or a heading begins.
    An image that is spoken of twice gets both parts, joined by a line break. Emphasis is taken off.

        >>> reasoning_by_image("**Image 1:** a *chart*.\\nImage 2 shows the year. Image 1 does not.", 2)
        {1: 'a chart.\\nImage 1 does not.', 2: 'Image 2 shows the year.'}
    """
    parts: dict[int, list[str]] = {}
    labels = list(_LABEL.finditer(think))
    for k, label in enumerate(labels, 1):
        name = "name" if label["name"] else "midname"
        number = int(label["number"] or label["midnumber"])
        start = label.start(name) if label["separator"] is None else label.end()
        end = labels[k].start() if k < len(labels) else len(think)
        text = think[start:end].strip()
        heading = _HEADING.search(text, 1)  # not where the reason begins
        text = _BULLET.sub(r"\1-", text[: heading.start()] if heading else text)
        text = _EMPHASIS.sub("", text).strip().rstrip("*_[(| \n")
        if label["remark"]:
            text = f"{label['remark']} {text}"
        if 1 <= number <= n and text:
            parts.setdefault(number, []).append(text)
    return {number: "\n".join(texts) for number, texts in parts.items()}


def reasons_in_order(think: str | None, order: Sequence[int], shown: Sequence[int] | None = None) -> list[str]:
    """Return what reasoning says of each candidate of `order` (0-based); "" where it says nothing of it.

    shown: the candidates that "Image 1", "Image 2", … are; None: all, in their order (as in `ranking.Ranking`)

        >>> reasons_in_order("Image 1: a chart. Image 2: a table.", [1, 0])
        ['a table.', 'a chart.']
    """
    images = list(range(len(order)) if shown is None else shown)
    # A table of answers holds NaN, which is true, where a text has no reasoning.
    by_image = reasoning_by_image(think if isinstance(think, str) else "", len(images))
    return [by_image.get(images.index(k) + 1, "") if k in images else "" for k in order]
