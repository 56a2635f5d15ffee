"""The words by which ``findings-checker`` reads a text: phrases as regular expressions, and what each one says.

A longer phrase wins over a shorter one at the same place. What a text says in other words is not read.
"""

from __future__ import annotations

import re
from functools import cache

_THE = "(?:the |your )?"
_YOUR = "(?:the|your)"
_AREA = "(?:areas?|regions?|zones?|foc(?:us|i)|patch(?:es)?|spots?)"
_SEEN = (
    "(?:seen|identified|found|present|visible|demonstrated|shown|detected|evident|appreciated|noted|visuali[sz]ed|there"
    "|observed|apparent)"
)

PHRASES: dict[tuple[str, str], tuple[str, ...]] = {
    ("plane", "axial"): (
        "axial(?:ly)?", "transverse", "transaxial", "horizontal(?:ly)?",
        "(?:slice )?(?:from side to side )?across the head",
    ),
    ("plane", "coronal"): (
        "coronal", "mid-?coronal", "(?:seen |viewed |view |slice )*from the front", "front(?:al)? view",
        "frontal plane",
    ),
    ("plane", "sagittal"): (
        "(?:para)?sagittal", "(?:seen |viewed |view |slice )*from the side", "side view", "side-on", "lateral view",
    ),
    ("contrast", "T1"): (
        "t1(?:[- ]?weighted|w|wi)?",
    ),
    ("contrast", "T2"): (
        "t2(?:[- ]?weighted|w|wi)?",
    ),
    ("contrast", "FLAIR"): (
        "(?:t2[- /]?)?flair", "fluid[- ]attenuated(?: inversion[- ]recovery)?",
    ),
    ("level", "cerebellum"): (
        "cerebell(?:um|ar)(?: hemispheres?)?", "posterior fossa",
        "(?:lower|low) (?:back|rear)(?: part| end| side)?(?: of the (?:brain|head))?", "(?:little|small) brain",
        "keeps? you steady", "(?:for|controls?|with) (?:your )?balance",
    ),
    ("level", "ventricles"): (
        "(?:lateral |third |fourth )?ventric(?:les?|ular)(?: system| bodies)?",
        "fluid(?:[- ]filled)? (?:spaces?|chambers?|cavit(?:y|ies))",
        "(?:chambers?|spaces?) (?:that hold|of|with|filled with) fluid",
    ),
    ("level", "vertex"): (
        "(?:cerebral )?vertex", "high convexit(?:y|ies)", f"(?:very )?top (?:part )?of {_THE}(?:brain|head|skull)",
        f"crown of {_THE}head",
    ),
    ("level", "frontal lobes"): (
        "(?:bi)?frontal(?: lobes?| regions?| poles?)?",
        f"(?:lobes? |part of {_YOUR} brain )?behind {_YOUR} forehead",
    ),
    ("level", "thalamus"): (
        "thalam(?:us|i|ic)(?: nucle(?:us|i))?", f"deep (?:core|centre|center|middle) of {_YOUR} brain",
        "relay (?:point|station|centre|center)",
    ),
    ("level", "occipital lobes"): (
        "occipital(?: lobes?| regions?| poles?)?", "(?:used |needed )?for (?:your )?(?:sight|vision|seeing)",
        "visual cortex",
    ),
    ("level", "midline"): (
        "(?:the )?mid-?line(?: structures?)?", "mid-?sagittal",
        f"(?:exact )?(?:middle|centre|center)(?: line)? of {_THE}(?:brain|head)",
    ),
    ("level", "putamen"): (
        "putam(?:en|ina|inal)(?: regions?)?", "lenti(?:form|cular) nucle(?:us|i)", "helps? you (?:to )?move",
        "basal ganglia",
    ),
    ("level", "temporal lobe"): (
        "temporal(?: lobes?| regions?| poles?)?", f"(?:part of the brain |lobe )?near {_YOUR} (?:ears?|temples?)",
    ),
    ("side", "left"): (
        "left(?:[- ](?:sided|side|hemispher(?:e|ic)|half))?", "leftwards?",
    ),
    ("side", "right"): (
        "right(?:[- ](?:sided|side|hemispher(?:e|ic)|half))?", "rightwards?",
    ),
    ("side", "anterior"): (
        "anterior(?:ly)?", "front", "ventral(?:ly)?",
    ),
    ("side", "posterior"): (
        "posterior(?:ly)?", "back", "rear", "dorsal(?:ly)?",
    ),
    ("sides", "both"): (
        "bilateral(?:ly)?", "both sides", "both hemispheres", "both halves", "each side", "either side",
        "either hemisphere",
    ),
    ("size", "small"): (
        "small(?:er|ish|[- ]sized?)?", "tiny", "little", "punctate", "sub-?centimet(?:re|er)", "diminutive",
        "minute", "minuscule", "pinpoint", "wee",
    ),
    ("size", "large"): (
        "large(?:[- ]sized?)?", "larger", "big(?:ger)?", "sizeable", "sizable", "extensive", "voluminous", "huge",
        "bulky", "massive", "giant", "enormous",
    ),
    ("size", "medium"): (
        "medium(?:[- ]sized?)?", "moderate(?:[- ]sized?|ly sized)?", "intermediate[- ]size[d]?", "mid-?sized?",
    ),
    ("signal", "bright"): (
        "bright(?:er)?", "white", "light(?:er)?(?:[- ]coloured)?", "hyper-?intense",
        "(?:high|increased|elevated)[- ]signal(?: intensity)?", "hypersignal",
    ),
    ("signal", "dark"): (
        "dark(?:er)?", "black", "hypo-?intense", "(?:low|decreased|reduced)[- ]signal(?: intensity)?", "hyposignal",
    ),
    ("signal+lesion", "bright"): (
        "hyper-?intensity", "brightening",
    ),
    ("signal+lesion", "dark"): (
        "hypo-?intensity", "darkening",
    ),
    ("lesion", ""): (
        "(?:focal |parenchymal |signal )*(?:lesion|abnormality|anomaly|alteration)",
        "(?:abnormal|unusual|suspicious|strange|odd) (?:signal|spot|area|region|patch|mark|finding|focus|tissue)",
        f"{_AREA} (?:of|with) (?:abnormal|altered|unusual|changed|different|hyp(?:er|o)-?intense)(?: signal| tissue)?",
        f"{_AREA} of signal (?:alteration|abnormality|change)",
        "(?:area|region|part|spot) (?:that|which) (?:looks?|appears?|is) (?:different|abnormal|unusual|odd)", "spot",
        "patch", "mark", "focus", "blemish", "abnormal(?:ly)?", "unusual", "signal change",
    ),
    ("lesions", ""): (
        "(?:focal |parenchymal |signal )*(?:lesions|abnormalities|anomalies|alterations)",
        "(?:abnormal|unusual|suspicious) (?:signals|spots|areas|regions|patches|marks|findings|foci)", "spots",
        "patches", "marks", "foci", "blemishes", "hyper-?intensities", "hypo-?intensities",
    ),
    ("area", ""): (
        "area", "region", "zone", "one",
    ),
    ("mass", "tumour"): (
        "mass(?:es)?", "tumou?rs?", "nodules?", "growths?", "neoplas(?:m|ms|ia|tic)", "lump", "cyst(?:s|ic)?",
        r"space-occupying(?: \w+)?",
    ),
    ("normal", ""): (
        "lesion-free",
        "(?:looks? |appears? |is |are )?(?:completely |entirely |perfectly )?(?:normal|unremarkable|healthy)",
        "(?:looks? |appears? |is |are )?(?:intact|preserved)",
        "(?:is|are|looks?) (?:all )?(?:clear|fine|okay|good)", "all clear", "within normal limits",
        "as (?:it|they) should(?: be)?",
        "nothing (?:abnormal|unusual|wrong|focal|remarkable|suspicious|of note|to see|to report|special)",
    ),
    ("absence", ""): (
        "nothing (?:is|was|can be|has been) (?:seen|found|visible|wrong)",
    ),
    ("rest", ""): (
        "rest", "remainder", "remaining", "otherwise", "elsewhere", "nothing else", "everything else",
        "other parts?", "surrounding brain",
    ),
    ("other", ""): (
        "other", "another", "additional", "further", "second", "third", "extra", "more", "separate", "new",
    ),
    ("count", ""): (
        "two", "three", "four", "five", "several", "multiple", "many", "numerous", "few", "various", "a pair of",
        "scattered", "innumerable",
    ),
    ("negate", ""): (
        "no", "without", "not", "never", "nor", "neither", "none", "cannot", "absence of", "absent",
        "lack(?:s|ing)?(?: of)?", "free (?:of|from)", "negative for", "devoid of",
        "no (?:evidence|sign|signs|trace|indication|suggestion)(?: of)?", "rather than", "instead of",
        "fail(?:s|ed) to", "as opposed to", "rules? out", "excludes?", r"\w+n't",
    ),
    ("negated", ""): (
        f"(?:is|are|was|were|has|have|can|could)(?: not|n't|not) (?:been |be )?(?:clearly )?{_SEEN}", f"not {_SEEN}",
        "(?:is|are|was|were) (?:absent|missing|excluded|nowhere)",
        "(?:is|are) no longer (?:seen|visible|present|there)", "(?:has|have) (?:resolved|gone|disappeared)",
        "(?:is |are |was |were )?ruled out",
    ),
    ("harmless", ""): (
        "not only", "no doubt", "doubtless", "not without", "without (?:a |any )?doubt", "in front of", "all right",
        "right (?:now|away|after|before)", "that is right", "left (?:over|behind|untreated|out|alone)",
        "nothing left", "(?:white|gr[ea]y|black|dark) matter", "in (?:the )?light of", "than normal",
        "focus(?:es|ed)? on", "by and large", "a little (?:to|bit|more|later|about)", "large (?:part|number) of",
        "small part of", "big picture", "(?:come|go|call|get|look) back", "feedback", "back to", "back and forth",
        "mark my words", "if you have", r"you may (?:\w+)", "may (?:help|want|ask|wish)", "side of",
        "no longer than", "light on", "short (?:note|text|report|summary|answer)", "larger than life", "more about",
        "tell you more", "further (?:information|questions|details)", "more information", r"previous \w+",
        "older scans?", "last scan",
    ),
    ("hedge", ""): (
        "possibl[ey]", "probabl[ey]", "questionable", "suspected", "equivocal",
        r"(?:may|might|could)(?: not)?(?: \w+)?", "perhaps", "maybe", "whether", "if", "unlikely", "likely",
        "uncertain", "unclear",
        "(?:cannot|can not|can't|not|could not) (?:be )?(?:entirely )?(?:exclude[d]?|ruled? out)", "versus", "vs",
        r"\w+ or not",
    ),
    ("verb", ""): (
        "is", "are", "was", "were", "has", "have", "had", "there", "shows?", "showed", "demonstrates?", "reveals?",
        "seen", "see", "lies", "sits", "measures", "it",
    ),
    ("article", ""): (
        "an?", "the", "this", "its", "your",
    ),
    ("around", ""): (
        "(?:around|surrounding|adjacent to|next to|beside|near|within|from) (?:the|this|it|that)",
    ),
}  # fmt: skip
"""What is said, as (kind, value), and the phrases that say it; in small letters."""

INVENTED: dict[str, tuple[str, ...]] = {
    "mass effect": (
        "mass[- ]effect", "push(?:es|ing)? (?:on|against)", "press(?:es|ing)? (?:on|against)",
        "compress(?:es|ion|ing)", "displac(?:es|ement|ed)", "effac(?:es|ement|ed)",
    ),
    "shift": (
        "(?:mid-?line |slight |subfalcine )*shift(?:ed)?(?: of the mid-?line)?", "herniat(?:ion|es|ed)",
    ),
    "haemorrhage": (
        "(?:intracranial |intraventricular |subdural |subarachnoid )*ha?emorrhag(?:e|es|ic)", "bleed(?:s|ing)?",
        "blood(?: products?)?", "ha?ematomas?", "microbleeds?",
    ),
    "oedema": (
        "(?:vasogenic |cytotoxic |perilesional )*o?edema(?:tous)?", "swelling", "swollen",
    ),
    "infarct": (
        "infarct(?:s|ion|ions|ed)?", "strokes?", "isch[ae]+mi[ac]", "small vessel disease", "thromb(?:us|osis)",
        "lacun(?:e|es|ar)",
    ),
    "cancer": (
        "cancer(?:ous)?", "malignan(?:t|cy)", "metasta(?:sis|ses|tic)", "gliomas?", "glioblastomas?", "meningiomas?",
        "astrocytomas?", "lymphomas?",
    ),
    "infection": (
        "infect(?:ion|ious|ed)", "abscess(?:es)?", "encephalitis", "meningitis", "inflammat(?:ion|ory)", "inflamed",
    ),
    "calcification": (
        "calcif(?:ied|ications?)", "calcium",
    ),
    "ventricles": (
        "hydrocephalus", "ventriculomegaly", "enlarge(?:d|ment)(?: ventricles)?",
        "ventricular (?:enlargement|dilatation)", "dilat(?:ed|ation)", "wider than (?:normal|usual)", "widened",
    ),
    "atrophy": (
        "atroph(?:y|ic)", "shrink(?:age|ing)", "shrunken", "volume loss", "thinning",
    ),
    "enhancement": (
        "(?:contrast )?enhanc(?:es|ement|ing|ed)", "gadolinium", "post-?contrast", "contrast[- ]enhanced",
    ),
    "diffusion": (
        "diffusion(?: restriction|[- ]weighted)?", "restricted diffusion", "dwi", "adc",
    ),
    "sequence": (
        "swi", "susceptibility", "proton[- ]density", "gradient[- ]echo", "angiograph(?:y|ic)", r"t2\*", "ct", "pet",
        "x-?ray", "ultrasound", "mammogram",
    ),
    "disease": (
        "demyelinat(?:ion|ing)", "(?:multiple )?sclerosis", "plaques?", "dementia", "alzheimer(?:'s)?",
        "parkinson(?:'s)?", "epilepsy", "seizures?", "encephalopathy", "leukoencephalopathy", "migraine",
    ),
    "vessel": (
        "aneurysms?", "malformations?", "avm", "cavernomas?", "vasculitis",
    ),
    "injury": (
        "fractures?", "trauma(?:tic)?", "contusions?", "injur(?:y|ies|ed)", "post-?operative", "surg(?:ery|ical)",
        "resection", "craniotomy",
    ),
    "artefact": (
        "art[ei]fact(?:s|ual)?", "motion", "blurr(?:y|ed|ing)",
    ),
    "patient": (
        "year[- ]old", "male", "female", "man", "woman", "boy", "girl", "history of", "symptoms?", "headaches?",
        "dizz(?:y|iness)", "pain",
    ),
    "body": (
        "spine", "spinal", "liver", "lungs?", "chest", "heart", "kidneys?", "abdom(?:en|inal)", "neck", "bones?",
        "sinus(?:es)?", "orbits?", "pituitary", "brain ?stem", "pons", "hippocamp(?:us|al|i)",
        "parietal(?: lobes?)?", "caudate", "corpus callosum", "insula(?:r)?",
    ),
    "measure": (
        r"\d+(?:\.\d+)?(?: ?[x×] ?\d+(?:\.\d+)?)* ?-?(?:mm|cm|millimet(?:re|er)s?|centimet(?:re|er)s?|inch(?:es)?)",
    ),
    "progress": (
        "progress(?:ion|ive|ed)", "growing", "grown", "increas(?:ed|ing) in size", "worse(?:ning|ned)?", "stable",
        "unchanged", "improv(?:ed|ing|ement)",
    ),
    "treatment": (
        "medicines?", "medication", "drugs?", "chemotherapy", "radiotherapy", "treatment", "biopsy",
        "operat(?:ion|ed)",
    ),
}  # fmt: skip
"""What no row says: a name for it, and the phrases that say it."""

BREAKS = (
    "but", "however", "although", "though", "while", "whereas", "yet", "except(?: for)?", "apart from",
    "aside from", "other than", "because", "so", "then",
)  # fmt: skip
"""Words that begin another clause."""


@cache
def expressions() -> list[tuple[tuple[str, str], re.Pattern[str]]]:
    """What can be said, and the expression for it, to be tried at the beginning of a word."""
    meanings = [*PHRASES.items(), *((("invented", name), phrases) for name, phrases in INVENTED.items())]
    meanings.append((("break", ""), BREAKS))
    return [(meaning, re.compile(f"(?:{_longest_first(phrases)})(?![\\w*])")) for meaning, phrases in meanings]


def _longest_first(phrases: tuple[str, ...]) -> str:
    """One expression of all, for the first that fits is taken."""
    return "|".join(sorted(phrases, key=len, reverse=True))
