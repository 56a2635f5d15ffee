"""Many raters at once, for the load test: one asyncio process, a connection pool for each rater, as browsers have.

Run as ``python -m tests.label_raters URL VOTES THINK NAME...``. Each rater logs in, then VOTES times looks at the pair
for THINK seconds on average (exponentially distributed, so that raters meet), votes, and waits for the next pair.
Writes JSON: the number of every vote that was acknowledged, and two times of each in seconds. ``saved`` ends with the
answer to the vote, which brings the next pair's words; a page that has loaded the next pair's images in advance shows
them then. ``shown`` ends when both images of the next pair, asked for only then, have arrived.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

import httpx

from tests.label_server import HEADERS, password

CHOICES = ("left", "right", "tie_good", "tie_bad")


async def rate(url: str, name: str, votes: int, think: float) -> list[tuple[int, float, float]]:
    chance = random.Random(name)
    found = []
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=120, trust_env=False) as client:
        answer = await client.post("/login", data={"name": name, "password": password(name)})
        assert answer.status_code == 303, answer.text
        turn = (await client.get("/api/turn")).json()
        await asyncio.sleep(chance.uniform(0, 2 * think))
        for _ in range(votes):
            if turn["now"] is None:
                break
            await asyncio.sleep(chance.expovariate(1 / think) if think else 0)
            start = time.perf_counter()
            answer = await client.post(
                "/api/vote", json={"token": turn["now"]["token"], "choice": chance.choice(CHOICES)}
            )
            saved = time.perf_counter() - start
            turn = answer.json()
            assert answer.status_code == 200, turn
            if turn["now"] is not None and turn["now"]["kind"] == "image":
                sides = (client.get(f"/api/image/{turn['now']['token']}/{side}") for side in ("left", "right"))
                assert all(image.status_code == 200 for image in await asyncio.gather(*sides))
            found.append((turn["vote"], saved, time.perf_counter() - start))
    return found


async def main(url: str, votes: str, think: str, *names: str) -> None:
    said = await asyncio.gather(*(rate(url, name, int(votes), float(think)) for name in names))
    rows = [row for rows in said for row in rows]
    print(json.dumps({"votes": [r[0] for r in rows], "saved": [r[1] for r in rows], "shown": [r[2] for r in rows]}))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
