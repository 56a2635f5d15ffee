"""The findings that the chest X-ray models know, and which of them a prompt asks for or rules out.

**The rule** (in the manner of NegEx, Chapman et al. 2001): a text is cut into statements at ``.``, ``;``, ``:``, line
ends and words of contrast (*but*, *however*, *although*, *though*, *except*, *with*, *there is*, …). Inside a
statement, a finding is ruled out when a word of negation stands before it (*no*, *without*, *no evidence of*,
*negative for*, *free of*, …), which reaches over commas, *and* and *or* to the end of the statement, or when the
statement says so after it (*is absent*, *not seen*, *has resolved*, …). *No change in*, *not only* and the like negate
nothing. A finding that is asked for in one statement and ruled out in another (*left effusion, but no right effusion*)
is asked for: the models do not know sides.

Limits: the rule does not read doubt (*possible*, *cannot exclude*) as anything but presence, and *no effusion,
cardiomegaly* rules out both.
"""

from __future__ import annotations

import re

FINDINGS = (
    "Atelectasis",
    "Consolidation",
    "Infiltration",
    "Pneumothorax",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Effusion",
    "Pneumonia",
    "Pleural_Thickening",
    "Cardiomegaly",
    "Nodule",
    "Mass",
    "Hernia",
    "Lung Lesion",
    "Fracture",
    "Lung Opacity",
    "Enlarged Cardiomediastinum",
)
"""The 18 outputs of torchxrayvision's DenseNets, in their order and spelling."""

NA: None = None
# fmt: off
THRESHOLDS: dict[str, tuple[float | None, ...]] = {
    "all": (0.07422872, 0.038290843, 0.09814756, 0.0098118475, 0.023601074, 0.0022490358, 0.010060724, 0.103246614,
            0.056810737, 0.026791653, 0.050318155, 0.023985857, 0.01939503, 0.042889766, 0.053369623, 0.035975814,
            0.20204692, 0.05015312),
    "nih": (0.039117552, 0.0034529066, 0.11396341, 0.0057298196, 0.00045666535, 0.0018880932, 0.012037827, 0.038744126,
            0.0037213727, 0.014730946, 0.016149804, 0.054241467, 0.037198864, 0.0004403434, NA, NA, NA, NA),
    "pc": (0.031012505, 0.013347598, 0.081435576, 0.001262615, 0.002587246, 0.0035944257, 0.0023071, 0.055412333,
           0.044385884, 0.042766232, 0.043258056, 0.037629247, 0.005658899, 0.0091741895, NA, 0.026507627, NA, NA),
    "chex": (0.1988969, 0.05710573, NA, 0.0531293, 0.1435217, NA, NA, 0.27212676, 0.07749717, NA, 0.19712369, NA, NA,
             NA, 0.09932402, 0.09273402, 0.3270967, 0.10888247),
    "rsna": (NA, NA, NA, NA, NA, NA, NA, NA, 0.13486601, NA, NA, NA, NA, NA, NA, NA, 0.13511065, NA),
    "mimic_nb": (0.08558747, 0.011884617, NA, 0.0040595434, 0.010733786, NA, NA, 0.118761964, 0.022924708, NA,
                 0.06358637, NA, NA, NA, 0.022143636, 0.017476924, 0.1258702, 0.014020768),
    "mimic_ch": (0.09121389, 0.010573786, NA, 0.005023008, 0.003698257, NA, NA, 0.08001232, 0.037242252, NA, 0.05006329,
                 NA, NA, NA, 0.019866971, 0.03823637, 0.11303808, 0.0069147074),
}
# fmt: on
"""Per training set, the probability at which the published models call a finding present.

None: the model was not trained for it, and its output there is random.
"""

_WORDS = {
    "Atelectasis": r"atelecta(?:sis|ses|tic)",
    "Consolidation": r"consolidat(?:ions?|ed|ive)",
    "Infiltration": r"infiltrat(?:es?|ions?)",
    "Pneumothorax": r"(?:hydro)?pneumothora(?:x|xes|ces)",
    "Edema": r"o?edema",
    "Emphysema": r"(?<!subcutaneous )(?<!mediastinal )emphysema(?:tous)?",
    "Fibrosis": r"fibro(?:sis|tic)",
    "Effusion": r"(?<!pericardial )(?<!joint )effusions?",
    "Pneumonia": r"pneumonias?",
    "Pleural_Thickening": r"pleural thickening|thicken(?:ed|ing of the) pleura",
    "Cardiomegaly": r"cardiomegaly|(?:enlarged|large) (?:heart|cardiac silhouette)|"
    r"(?:heart|cardiac silhouette) (?:is |size is )?enlarged",
    "Nodule": r"nodul(?:es?|ar)",
    "Mass": r"(?<!body )(?<!bone )mass(?:es)?",
    "Hernia": r"hernias?",
    "Lung Lesion": r"(?:lung|pulmonary) lesions?",
    "Fracture": r"fractur(?:es?|ed)",
    "Lung Opacity": r"opacit(?:y|ies)|opacifications?",
    "Enlarged Cardiomediastinum": r"(?:enlarged|widened|wide) (?:cardio)?mediastinum|mediastinal widening|"
    r"mediastinum is (?:enlarged|widened|wide)",
}
_FINDINGS = {finding: re.compile(rf"\b(?:{words})\b") for finding, words in _WORDS.items()}
_STATEMENTS = re.compile(
    r"[.;:\n]|\b(?:but|however|although|though|except(?: for)?|yet|"
    r"(?<!consistent )(?<!compatible )(?<!associated )with|showing|shows|there (?:is|are)|which)\b"
)
_NEUTRAL = re.compile(
    r"\b(?:no|without(?: any)?) (?:\w+ ){0,2}?(?:change|increase|decrease|improvement|difference)s?(?: (?:in|of))?\b|"
    r"\bnot (?:only|changed|increased|decreased|improved|resolved|certain)\b|\bno longer (?:small|mild)\b"
)
_BEFORE = re.compile(
    r"\b(?:no|not|without|nor|neither|never|denies|lacks?|lacking|absence of|absent|negative for|free of|clear of|"
    r"resolved|resolution of|ruled out|rules out|excludes?|excluding)\b"
)
_AFTER = re.compile(
    r"\b(?:(?:is|are|was|were|has been|have been)? ?(?:absent|excluded|ruled out|negative|resolved|cleared)|"
    r"(?:has|have) (?:resolved|cleared)|not (?:seen|present|visible|identified|detected|evident|apparent|found)|"
    r"no longer (?:seen|present|visible|identified|evident))\b"
)


def named(prompt: str) -> dict[str, bool]:
    """Per finding that the prompt names: whether it is asked for (True) or ruled out (False)."""
    found: dict[str, bool] = {}
    for statement in _STATEMENTS.split(re.sub(r"[ \t_]+", " ", prompt.lower())):
        for finding, present in _in_statement(statement).items():
            found[finding] = found.get(finding, False) or present
    return {finding: found[finding] for finding in FINDINGS if finding in found}


def _in_statement(statement: str) -> dict[str, bool]:
    text = _NEUTRAL.sub(_blank, statement)
    matches = [(finding, match) for finding, pattern in _FINDINGS.items() for match in pattern.finditer(text)]
    # What is said of the finding before it negates nothing that comes after it.
    said = [
        end
        for end in _AFTER.finditer(text)
        if any(m.end() <= end.start() and "," not in text[m.end() : end.start()] for _, m in matches)
    ]
    before = _BEFORE.search(
        _AFTER.sub(lambda end: _blank(end) if end.span() in {e.span() for e in said} else end[0], text)
    )
    found: dict[str, bool] = {}
    for finding, match in matches:
        ruled_out = (before is not None and before.end() <= match.start()) or any(
            match.end() <= end.start() and "," not in text[match.end() : end.start()] for end in said
        )
        found[finding] = found.get(finding, False) or not ruled_out
    return found


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])
