"""Preference data: read whatever shape it has, keep it in one form, look at it, split it without leaks.

``read`` goes through any known format; ``write`` and ``Table`` are the native form (see ``table``), ``write_trl`` and
its like those of other tools; ``split`` holds out whole prompts; ``Summary`` counts what can be wrong.
"""

from __future__ import annotations

from diffalign.preferences.reading import Pairs, read, read_texts, read_unpaired
from diffalign.preferences.rows import Broken, Defects
from diffalign.preferences.splitting import group, split
from diffalign.preferences.summary import Summary
from diffalign.preferences.table import Table, write
from diffalign.preferences.writing import Written, write_kto, write_pick_a_pic, write_rows, write_trl

__all__ = [
    "Broken", "Defects", "Pairs", "Summary", "Table", "Written", "group", "read",
    "read_texts", "read_unpaired", "split", "write",
    "write_kto", "write_pick_a_pic", "write_rows", "write_trl",
]  # fmt: skip
