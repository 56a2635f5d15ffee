"""The words of the findings world: what each fact may be called, in plain words and in those of a radiologist.

Every list is a pair ``(plain, jargon)``. Lists overlap where a word is used by both.
"""

from __future__ import annotations

Choices = tuple[tuple[str, ...], tuple[str, ...]]

PLANE: dict[str, Choices] = {
    "axial": (("axial", "horizontal"), ("axial", "transverse", "transaxial")),
    "coronal": (("coronal",), ("coronal",)),
    "sagittal": (("sagittal",), ("sagittal",)),
}
VIEW: dict[str, tuple[str, ...]] = {
    "axial": ("a slice across the head", "a horizontal slice", "a slice from side to side across the head"),
    "coronal": ("a slice seen from the front", "a view from the front", "a coronal slice"),
    "sagittal": ("a slice seen from the side", "a side view", "a view from the side"),
}
"""How a patient is told the plane."""
CONTRAST: dict[str, Choices] = {
    "T1": (("T1",), ("T1", "T1-weighted", "T1-weighted")),
    "T2": (("T2",), ("T2", "T2-weighted", "T2-weighted")),
    "FLAIR": (("FLAIR",), ("FLAIR", "FLAIR", "fluid-attenuated inversion recovery")),
}
LEVEL: dict[str, Choices] = {
    "cerebellum": (("the cerebellum",), ("the cerebellum", "the posterior fossa", "the cerebellar hemispheres")),
    "ventricles": (("the ventricles",), ("the ventricles", "the lateral ventricles", "the ventricular system")),
    "vertex": (("the vertex",), ("the vertex", "the high convexity", "the cerebral vertex")),
    "frontal lobes": (("the frontal lobes",), ("the frontal lobes", "the frontal region")),
    "thalamus": (("the thalamus",), ("the thalamus", "the thalami", "the thalamic nuclei")),
    "occipital lobes": (("the occipital lobes",), ("the occipital lobes", "the occipital region")),
    "midline": (("the midline",), ("the midline", "the midline structures")),
    "putamen": (("the putamen",), ("the putamen", "the putaminal region", "the lentiform nucleus")),
    "temporal lobe": (("the temporal lobe",), ("the temporal lobe", "the temporal region")),
}
PLACE: dict[str, tuple[str, ...]] = {
    "cerebellum": ("the lower back part of the brain", "the part of the brain that keeps you steady"),
    "ventricles": ("the fluid spaces in the brain", "the chambers that hold fluid", "the fluid spaces"),
    "vertex": ("the top of the brain", "the top of the head", "the crown of the head"),
    "frontal lobes": ("the part of the brain behind the forehead", "the lobes behind the forehead"),
    "thalamus": ("the deep core of the brain", "the relay point deep in the brain"),
    "occipital lobes": ("the part of the brain used for sight", "the lobes used for sight"),
    "midline": ("the middle of the brain", "the middle of the head"),
    "putamen": ("a deep part of the brain that helps you move", "the part of the brain that helps you move"),
    "temporal lobe": ("the part of the brain near the ear", "the lobe near the ear"),
}
"""How a patient is told the level."""
SIZE: dict[str, Choices] = {
    "small": (("small", "small", "tiny", "little"), ("small", "punctate", "subcentimetre", "diminutive")),
    "large": (("large", "large", "big"), ("large", "sizeable", "extensive", "voluminous")),
}
SIGNAL: dict[str, Choices] = {
    "bright": (("bright", "light", "white"), ("hyperintense", "high-signal", "bright")),
    "dark": (("dark", "black", "dark"), ("hypointense", "low-signal", "dark")),
}
NOUN: Choices = (
    ("lesion", "spot", "spot", "patch", "mark", "area"),
    ("lesion", "focal lesion", "signal abnormality", "focus of abnormal signal", "area of abnormal signal",
     "parenchymal lesion", "area of signal alteration", "focal parenchymal abnormality"),
)  # fmt: skip
BARE_NOUN: Choices = (
    ("lesion", "abnormal spot", "abnormal area", "unusual patch", "unusual mark"),
    NOUN[1],
)
"""Nouns that say what it is without an adjective of brightness."""
_HALVES: dict[str, Choices] = {
    side: (
        (f"on the {side}", f"on the {side} side", f"on the {side} side of the brain",
         f"in the {side} half of the brain"),
        (f"in the {side} hemisphere", f"within the {side} cerebral hemisphere", f"in the {side} hemisphere",
         f"in the {side} cerebral hemisphere"),
    )
    for side in ("left", "right")
}  # fmt: skip
WHERE: dict[str, Choices] = {
    **_HALVES,
    "anterior": (
        ("in the front half of the brain", "towards the front", "in the front half",
         "in the front part of the picture"),
        ("in the anterior half", "anteriorly", "within the anterior portion of the section", "in the anterior half"),
    ),
    "posterior": (
        ("in the back half of the brain", "towards the back", "in the back half", "in the back part of the picture"),
        ("in the posterior half", "posteriorly", "within the posterior portion of the section",
         "in the posterior half"),
    ),
}  # fmt: skip
SIDED: dict[str, str] = {"left": "left-sided", "right": "right-sided", "anterior": "anterior", "posterior": "posterior"}

SEEN: Choices = (("seen", "visible"), ("seen", "identified", "demonstrated", "visualised", "appreciated"))
SHOWS: Choices = (("shows", "shows"), ("shows", "demonstrates", "reveals"))
STUDY: Choices = (
    ("image", "slice", "scan", "picture"),
    ("image", "MR image", "acquisition", "section", "MRI of the brain"),
)

NOTHING: Choices = (
    ("No lesion is seen.", "No lesion.", "The brain looks normal.", "No spot or mark is seen.", "There is no lesion.",
     "Nothing unusual is seen.", "The slice is normal.", "No focal lesion."),
    ("No focal lesion.", "No focal lesion is identified.", "Unremarkable appearance of the parenchyma.",
     "No focal parenchymal signal abnormality is demonstrated.", "No evidence of focal signal alteration.",
     "The visualised parenchyma is unremarkable.", "The parenchyma is within normal limits.",
     "There is no appreciable focal abnormality.", "Unremarkable study without focal lesion.",
     "Parenchymal signal characteristics are unremarkable."),
)  # fmt: skip
"""Whole sentences for a row without a lesion."""
NOTHING_TOLD: Choices = (
    ("Your brain looks normal here.", "Nothing unusual was found.", "There is no spot or mark here.",
     "We found no lesion.", "There is nothing unusual here.", "All looks as it should.", "No lesion was found.",
     "This part of your brain looks healthy."),
    ("No focal abnormality was identified in your brain.", "No evidence of a focal parenchymal lesion was identified.",
     "The visualised portion of your brain demonstrates no signal abnormality.",
     "The radiological appearance of your brain is unremarkable.", "Your examination demonstrates no focal lesion."),
)  # fmt: skip
"""The same, as a patient is told."""

REST: Choices = (
    ("The rest looks normal.", "No other lesion is seen.", "The rest of the brain looks normal.",
     "Nothing else stands out."),
    ("No additional focal abnormality is identified.", "The remainder of the visualised parenchyma is unremarkable.",
     "There is no associated mass effect or haemorrhage.", "No midline shift is demonstrated.",
     "No additional parenchymal signal alteration is appreciated."),
)  # fmt: skip
"""What may follow a lesion; nothing of it is wrong."""
QUIET: Choices = (
    ("There is no swelling.", "There is no sign of bleeding."),
    ("There is no mass effect or haemorrhage.", "No midline shift is demonstrated.",
     "There is no evidence of intracranial haemorrhage.", "No space-occupying process is appreciated."),
)  # fmt: skip
"""What may follow where there is no lesion."""
CLOSING: Choices = (
    ("Your doctor can tell you more.", "Ask your doctor what this means for you.",
     "Your care team will talk with you about it."),
    ("Please discuss the significance of this examination with your physician.",
     "Correlation with your clinical presentation is recommended.",
     "Additional information is obtainable from your referring physician."),
)  # fmt: skip
ADVICE: Choices = (
    ("Please compare with older scans.", "Compare with the last scan."),
    ("Correlation with the clinical presentation is recommended.",
     "Comparison with previous examinations is recommended.", "Clinical correlation is advised."),
)  # fmt: skip

INVENTED: Choices = (
    ("There is some swelling around it.", "There is a little bleeding.", "A second spot is seen close by.",
     "It pushes on the tissue next to it.", "The fluid spaces are wider than normal."),
    ("There is mild surrounding oedema.", "Mild mass effect is present.", "A second lesion is seen nearby.",
     "Associated haemorrhage is demonstrated.", "Coarse calcification is noted.",
     "There is mild ventricular enlargement.", "Slight midline shift is present."),
)  # fmt: skip
"""What no row says: the flaw ``invented``."""
