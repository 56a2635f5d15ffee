"""Makes ``assets/noto-emoji/`` from the tarball of the npm package ``emoji-datasource-google``.

``python -m diffalign.worlds.build_noto emoji-datasource-google-16.0.0.tgz`` writes the same bytes for the same
tarball and the same Pillow; a tarball with another SHA-256 is refused. ``LICENSE`` (Apache-2.0) is kept beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from diffalign.errors import InputError, NotFoundError

VERSION = "16.0.0"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
TILE = 64
COLUMNS = 6
ASSETS = Path(__file__).parent / "assets" / "noto-emoji"

# Chosen by eye at 26 px: (our word, its plural, short name in emoji.json). The heart is the blue one, because a red
# heart and a red apple are the same blob after a blur.
KINDS: tuple[tuple[str, str, str], ...] = (
    ("apple", "apples", "apple"),
    ("ball", "balls", "basketball"),
    ("banana", "bananas", "banana"),
    ("bear", "bears", "bear"),
    ("boat", "boats", "boat"),
    ("cake", "cakes", "birthday"),
    ("car", "cars", "car"),
    ("cat", "cats", "cat"),
    ("clock", "clocks", "alarm_clock"),
    ("dog", "dogs", "dog"),
    ("eggplant", "eggplants", "eggplant"),
    ("fish", "fish", "fish"),
    ("flower", "flowers", "hibiscus"),
    ("frog", "frogs", "frog"),
    ("heart", "hearts", "blue_heart"),
    ("house", "houses", "house"),
    ("mushroom", "mushrooms", "mushroom"),
    ("panda", "pandas", "panda_face"),
    ("pizza", "pizzas", "pizza"),
    ("robot", "robots", "robot_face"),
    ("rocket", "rockets", "rocket"),
    ("star", "stars", "star"),
    ("tree", "trees", "evergreen_tree"),
    ("umbrella", "umbrellas", "umbrella"),
)

NOTICE = f"""Noto Emoji
Copyright Google LLC
Licensed under the Apache License, Version 2.0 (see LICENSE in this folder).

Obtained from the npm package emoji-datasource-google {VERSION}, folder package/img/google/64
(tarball SHA-256 {SHA256}).

Changes: {len(KINDS)} of the 64 x 64 PNG drawings were copied, pixels unchanged, into one atlas (sprites.png); colour
values below fully transparent pixels were set to zero. sprites.json names the tiles. Made by
diffalign/worlds/build_noto.py.
"""


def build(tarball: Path, folder: Path = ASSETS) -> None:
    """Writes ``sprites.png``, ``sprites.json`` and ``NOTICE`` into ``folder`` from the npm tarball."""
    if not tarball.is_file():
        raise NotFoundError(f"{tarball}: no such file; give the tarball of emoji-datasource-google {VERSION}")
    data = tarball.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise InputError(f"{tarball} has SHA-256 {digest}, but emoji-datasource-google {VERSION} has {SHA256}")
    rows = -(-len(KINDS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
    entries = []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        by_name = {name: entry for entry in json.loads(_read(archive, "emoji.json")) for name in entry["short_names"]}
        for index, (word, plural, short_name) in enumerate(KINDS):
            file = by_name[short_name]["image"]
            sprite = Image.open(io.BytesIO(_read(archive, f"img/google/64/{file}"))).convert("RGBA")
            x, y = index % COLUMNS * TILE, index // COLUMNS * TILE
            atlas.paste(sprite, (x, y), sprite.getchannel("A").point(lambda alpha: 255 if alpha else 0))
            entries.append({"name": word, "plural": plural, "source": file, "x": x, "y": y})
    folder.mkdir(parents=True, exist_ok=True)
    atlas.save(folder / "sprites.png", optimize=True)
    (folder / "sprites.json").write_text(json.dumps({"tile": TILE, "sprites": entries}, indent=1) + "\n")
    (folder / "NOTICE").write_text(NOTICE)


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(f"package/{name}")
    assert member is not None
    return member.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tarball", type=Path)
    build(parser.parse_args().tarball)
