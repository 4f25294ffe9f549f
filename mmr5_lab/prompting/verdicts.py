"""Read the verdict of a text about a page: does it say that the page answers the question?"""

import re

REFUSAL = re.compile(
    r"\bI(?: a|['’])m (?:very |so )?(?:sorry|unable|not able)\b|\bas an AI\b"
    r"|\bI (?:can(?:not|['’]t| not)|could(?: not|n['’]t)|wo(?:n['’]t|uld not))"
    r" (?:assist|help|see|view|access|analy[sz]e|comply|process|provide|read|open|fulfil)"
    r"|\bunable to (?:view|see|process|access|open|load) (?:the|this|any) (?:image|picture|page)"
    r"|\bno (?:image|picture|page) (?:was|is|has been|were) (?:provided|attached|given|uploaded)",
    re.IGNORECASE,
)
_CANNOT = re.compile(
    r"\b(?:can(?:not|['’]t| not)|(?:do|does|did|is|are|was)(?:n['’]t| not)|unable to|fails? to|lacks?|without)"
    r" (?:[\w'’-]+ ){0,4}?(?:help|answer|assist|contain|provide|address|include|mention|show|offer|give|state"
    r"|specif|relevant|related|relate|useful|sufficient|enough|information|data|details?)\w*"
    r"|\b(?:irrelevant|unrelated|unhelpful|useless|of no (?:help|use)|(?:less|least|hardly|barely|little) relevant)\b"
    r"|\b(?:none|neither|nothing)\b[^,]*?\b(?:relevant|helps?|answers?|useful)\b"
    r"|\bno (?:[\w-]+ ){0,2}?(?:information|mention|data|details?|evidence|answer)\b",
    re.IGNORECASE,
)
_CAN = re.compile(
    r"\b(?:can|could|will|does|directly|clearly|it|which|that|this|page|image(?: \d+)?|picture|table|figure|chart|graph"
    r"|text|data|information|and|thus|therefore) (?:\w+ly )?(?:helps?|answers?)\b"
    r"|\b(?:is|are|looks?|seems?) (?:\w+ly |most |very |the most )?(?:relevant|useful|helpful)\b"
    r"|\bthe answer (?:is|stands|lies|appears|can be (?:found|read|seen))\b"
    r"|\b(?:provides?|contains?|gives?|is|has) the (?:exact |required |needed |requested |very )?"
    r"(?:answer|information (?:needed|required|asked))\b",
    re.IGNORECASE,
)
_CONCESSION = re.compile(r"\b(?:although|though|while|whereas|even if|despite)\b[^,.;!?]*,", re.IGNORECASE)
_CLAUSES = re.compile(r"[.;!?]+(?:\s+|$)|,? \b(?:but|however|yet|nevertheless)\b", re.IGNORECASE)


def verdict(text: str) -> bool | None:
    """Does an explanation end by saying that the page helps (True), that it does not (False), or neither (None)?

    >>> verdict("The table lists revenue, but not for 2015, so it cannot help answer the question.")
    False
    >>> verdict("Although the left chart does not show it, the table answers the question.")
    True
    """
    said = None
    for clause in _CLAUSES.split(_CONCESSION.sub(" ", text)):
        if _CANNOT.search(clause):
            said = False
        elif _CAN.search(clause):
            said = True
    return said
