"""The first dataset of docs/generate.md is made as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from apps import generate
from diffalign.synthesis.store import Generated

PAGE = (Path(__file__).parent.parent / "docs" / "generate.md").read_text()


def test_the_first_dataset_is_made_as_it_stands(tmp_path: Path) -> None:
    """Eight cases, each of which the checker finds right in everything; half of them in each corner."""
    first = PAGE.partition("## A first dataset")[2]
    (text,) = re.findall(r"```yaml\n(.*?)```", first.partition("\n## ")[0], re.DOTALL)
    assert 10 <= len(text.strip().splitlines()) <= 15
    path = tmp_path / "corners.yaml"
    path.write_text(text)
    assert generate.run(str(path), [], tmp_path / "corners") == 0
    dataset = Generated.open(tmp_path / "corners")
    cases = list(dataset.cases())
    dataset.close()
    assert dataset.complete and len(cases) == 8 and (tmp_path / "corners" / "report.html").is_file()
    assert sorted(case.row["corner"] for case in cases) == ["bottom right"] * 4 + ["top left"] * 4  # type: ignore[type-var]
    assert all(case.scores["emoji-checker/everything"] == 1 for case in cases)
    assert sorted(case.split for case in cases) == ["test"] * 2 + ["train"] * 6
