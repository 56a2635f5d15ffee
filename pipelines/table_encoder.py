"""From a table row to what an image model is conditioned on, in place of the states of its text encoder.

A folder ``table_encoder/`` beside the other parts of a pipeline holds it: ``config.json`` and ``model.safetensors``. A
cell is one value of its column, or missing, which means "not said": a row without any cell asks for nothing at all, and
is the unconditional branch of classifier-free guidance.

Shape legend: ``B`` rows, ``A`` columns, ``K`` conditioning tokens, ``D`` their width, ``N`` combinations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.errors import ConfigError, InputError, NotFoundError
from diffalign.runs import write_text

FOLDER = "table_encoder"
"""Its place in the folder of a pipeline."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MISSING = 0
"""The code of a cell that is not known; value ``i`` of a column has the code ``i + 1``."""
Codes = tuple[int, ...]


class TableEncoder(nn.Module):
    """A small transformer over the cells of a row and ``K`` tokens that it fills."""

    combinations: Tensor

    def __init__(
        self, columns: Mapping[str, Sequence[str]], combinations: Tensor, *, tokens: int, width: int,
        layers: int = 2, heads: int = 4,
    ) -> None:  # fmt: skip
        """``columns`` are the values of each column; ``combinations`` ``(N, A)`` are the codes of every full row that
        it was trained on: a row that agrees with none of them contradicts itself.
        """
        super().__init__()
        self.columns = {name: tuple(values) for name, values in columns.items()}
        self.sizes = {"tokens": tokens, "width": width, "layers": layers, "heads": heads}
        self.cells = nn.ModuleList(nn.Embedding(len(values) + 1, width) for values in self.columns.values())
        self.tokens = nn.Parameter(0.5 * torch.randn(tokens, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        self.register_buffer("combinations", combinations.to(torch.uint8))

    @classmethod
    def load(cls, folder: str | Path) -> TableEncoder:
        """The encoder of a folder, for use: in float32, in evaluation mode.

        Raises NotFoundError where there is none, InputError where its files are broken.
        """
        place = Path(folder)
        if not place.is_dir():
            raise NotFoundError(f"there is no table encoder {place.name} in {place.parent.name or '.'}")
        try:
            settings = json.loads((place / CONFIG).read_text(encoding="utf-8"))
            weights = load_file(place / WEIGHTS)
            encoder = cls(settings.pop("columns"), weights["combinations"], **settings)
            encoder.load_state_dict(weights)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"table encoder {place} cannot be loaded: {reason}") from error
        return encoder.requires_grad_(False).float().eval()

    def save(self, folder: Path) -> None:
        """Writes the folder, in half precision."""
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict().items()
        weights = {name: (t.half() if t.is_floating_point() else t).contiguous().cpu() for name, t in state}
        save_file(weights, folder / WEIGHTS)
        columns = {name: list(values) for name, values in self.columns.items()}
        write_text(folder / CONFIG, json.dumps({"columns": columns, **self.sizes}, indent=2) + "\n")

    @property
    def empty(self) -> Codes:
        """The codes of the row that says nothing."""
        return (MISSING,) * len(self.columns)

    def codes(self, row: Mapping[str, object]) -> Codes:
        """The codes ``(A,)`` of a row; a cell that is absent, None or empty is missing.

        Raises ConfigError for a column or a value that the encoder does not know, and for a row that contradicts
        itself, such as a side without a lesion.
        """
        if strange := [str(name) for name in row if name not in self.columns]:
            raise ConfigError(f"column {strange[0]} is none of the table encoder; it has {', '.join(self.columns)}")
        found = []
        for name, values in self.columns.items():
            value = row.get(name)
            if value is None or value == "":
                found.append(MISSING)
            elif value in values:
                found.append(values.index(str(value)) + 1)
            else:
                raise ConfigError(f"{name} is {value!r}; the table encoder knows {', '.join(values)}")
        known = torch.tensor(found, device=self.combinations.device)
        if not ((self.combinations == known) | (known == MISSING)).all(1).any():
            shown = ", ".join(f"{name} {row[name]}" for name in self.columns if row.get(name) not in (None, ""))
            raise ConfigError(f"the row ({shown}) contradicts itself: the table encoder knows no such combination")
        return tuple(found)

    def forward(self, codes: Tensor) -> Tensor:
        """Tokens ``(B, K, D)`` of codes ``(B, A)``."""
        cells = torch.stack([table(codes[:, i]) for i, table in enumerate(self.cells)], 1)
        states = torch.cat([cells, self.tokens.expand(len(codes), -1, -1)], 1)
        filled: Tensor = self.out(self.norm(self.blocks(states)[:, len(self.cells) :]))
        return filled

    @torch.no_grad()
    def states(self, codes: Sequence[Codes]) -> Tensor:
        """Tokens ``(B, K, D)`` float32 of rows given by their codes.

        Each row goes through by itself: in a batch its last bits would depend on the others.
        """
        device = self.tokens.device
        return torch.cat([self(torch.tensor([row], device=device)) for row in codes])

    def encode(self, rows: Sequence[Mapping[str, object]]) -> Tensor:
        """Tokens ``(B, K, D)`` float32 of rows. Raises what ``codes`` raises."""
        return self.states([self.codes(row) for row in rows])
