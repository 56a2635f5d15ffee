"""``diffalign label simulate``: simulated raters that log in and vote over HTTP, as people's browsers do.

They see what a person sees: the text of the prompt and the two pictures. What they want is known (a file of
``rewards/raters``), so the loop from labels to an aligned model can be tried, and measured, without people. They are
called simulated wherever they leave a trace: in their names, in the comment of every vote, and in the study itself.
"""

from __future__ import annotations

import io
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import httpx
from PIL import Image

from apps.label.accounts import Account, Accounts
from apps.progress import Status
from diffalign.errors import ConfigError, InputError, NotFoundError, RefusedError
from diffalign.seeds import derive
from diffalign.study import Study
from diffalign.types import Prompt, Sample
from rewards.rater import SimulatedRaters
from rewards.rater_file import OVERALL

TIMEOUT = 60.0
ATTEMPTS = 5
SIDES = {1.0: "left", 0.0: "right", 0.5: "tie"}


def run(
    study: Path,
    database: str | None,
    users: Path,
    *,
    url: str,
    files: Sequence[str],
    count: int,
    votes: int | None,
    seed: int,
) -> None:
    """Lets them vote until nothing is left for them, or each has so many ``votes``; says what they did.

    ``study`` is the one that is served at ``url``: before the first vote it learns which raters are simulated.
    """
    panels = [_everybody(SimulatedRaters.load(name), count) for name in files]
    people = [f"simulated {index + 1}" for index in range(count)]
    with _accounts(url, users, people) as passwords, Status() as status:
        raters = []
        for index, name in enumerate(people):
            raters.append(Rater(url, index, panels, derive(seed, "simulated", name)))
            raters[-1].log_in(name, passwords.get(name))
        _mark(study, database, raters)
        for criterion in raters[0].unknown():
            status.say(f"the raters' files do not know {criterion!r}, so it is answered like the whole")
        _vote(raters, votes, status)
    given = sum((rater.choices for rater in raters), Counter[str]())
    click.echo(f"{given.total()} votes by {count} simulated raters: {_listed(given)}")
    for why in sorted({rater.why for rater in raters} - {""}):
        click.echo(why)
    if given.total() == given["cannot_judge"]:
        raise InputError("none of the pairs is of a world that these raters know, or the pairs are texts")


def _mark(folder: Path, database: str | None, raters: Sequence[Rater]) -> None:
    """Notes in the study that these raters are simulated: their comments alone could be anybody's."""
    study = Study.open(folder, database)
    try:
        for rater in raters:
            if rater.served != (study.title, study.protocol().sha256):
                raise RefusedError(
                    f"the server serves another study than {folder}; give the folder of the one it serves"
                )
            study.add_rater(rater.name, simulated=True)
    finally:
        study.close()


def _vote(raters: Sequence[Rater], most: int | None, status: Status) -> None:
    """One vote each in turn, as if all sat there at the same time."""
    going = list(raters)
    while going:
        going = [rater for rater in going if (most is None or rater.choices.total() < most) and rater.step()]
        status("voting", sum(rater.choices.total() for rater in raters), None)


def _everybody(panel: SimulatedRaters, count: int) -> SimulatedRaters:
    """The same panel, in which each of at least ``count`` raters judges every pair."""
    size = max(count, panel.profile.raters.count)
    sizes = panel.profile.raters.model_copy(update={"count": size, "overlap": size})
    return SimulatedRaters(panel.profile.model_copy(update={"raters": sizes}), file=panel.file, sha256=panel.sha256)


class Rater:
    """One simulated rater with a session of its own."""

    def __init__(self, url: str, index: int, panels: Sequence[SimulatedRaters], seed: int) -> None:
        origin = url.rstrip("/")
        headers = {"X-Diffalign": "1", "Origin": origin}
        self.client = httpx.Client(base_url=origin, timeout=TIMEOUT, trust_env=False, headers=headers)
        self.index, self.panels, self.seed = index, panels, seed
        self.choices: Counter[str] = Counter()
        self.why = ""
        self.rules: Mapping[str, Any] = {}
        self.name, self.served = "", ("", "")
        """As the server calls this rater; the title of the study, and the hash of its protocol."""
        self._turn: Mapping[str, Any] = {}

    def log_in(self, name: str, password: str | None) -> None:
        """Opens the session, asks for the protocol and for the first pair."""
        if password is not None:
            answer = self.client.post("/login", data={"name": name, "password": password, "next": "/rate"})
            if answer.status_code != 303 or "login" in answer.headers.get("location", ""):
                raise RefusedError(f"the server did not let {name!r} in (status {answer.status_code})")
        about = self._asked("GET", "/api/study")
        self.rules, self.name = about["protocol"], about["rater"]["name"]
        self.served = (about["title"], about["sha256"])
        self._turn = self._asked("GET", "/api/turn")

    def unknown(self) -> list[str]:
        """Criteria of the protocol that none of the files knows."""
        return [
            criterion["name"]
            for criterion in self.rules["criteria"]
            if not any(criterion["name"] in panel.criteria for panel in self.panels)
        ]

    def step(self) -> bool:
        """Judges one pair; False where there is none left."""
        now = self._turn["now"]
        if now is None:
            self.why = self._turn["progress"]["why"]
            return False
        vote = {"token": now["token"], "points": [], "strength": None, **self._answer(now)}
        response = self.client.post("/api/vote", json=vote)
        if response.status_code == 409:
            # Its time was over, or somebody else's vote ended the study: the next turn says so.
            self._turn = self._asked("GET", "/api/turn")
            return True
        self._turn = _checked(response)
        self.choices[vote["choice"]] += 1
        return True

    def _answer(self, now: Mapping[str, Any]) -> dict[str, Any]:
        if now["kind"] == "image":
            prompt = Prompt(now["prompt"])
            left, right = (self._image(prompt, now["token"], side) for side in ("left", "right"))
            # Of a repeated pair the judgement is another one: the noise is drawn anew.
            seed = derive(self.seed, self.choices.total())
            for panel in self.panels:
                try:
                    return self._judged(panel, left, right, seed)
                except InputError:
                    continue  # a prompt of another world
        return {"choice": "cannot_judge", "criteria": {}, "comment": "simulated"}

    def _judged(self, panel: SimulatedRaters, left: Sample, right: Sample, seed: int) -> dict[str, Any]:
        """The answers of this rater of a panel. Raises InputError where the prompt is none of the panel's world."""
        questions = {row["name"]: row for row in self.rules["criteria"]}
        asked = [OVERALL, *(name for name in questions if name in panel.criteria)]
        me = panel.names()[self.index]
        mine = {p.criterion: p.label for p in panel.judge([(left, right)], seed, asked) if p.rater == me}
        criteria: dict[str, Any] = {}
        for name, question in questions.items():
            like = name if name in panel.criteria else OVERALL
            if question["kind"] == "prefer":
                criteria[name] = SIDES[mine[like]]
            else:
                points = len(question["anchors"])
                seen = (panel.utilities(sample, like)[self.index] for sample in (left, right))
                criteria[name] = dict(zip(("left", "right"), (_point(u, points) for u in seen), strict=True))
        return {"choice": self._choice(panel, mine[OVERALL], left, right), "criteria": criteria, "comment": _by(panel)}

    def _choice(self, panel: SimulatedRaters, label: float, left: Sample, right: Sample) -> str:
        if label != 0.5:
            return SIDES[label]
        mean = sum(panel.utilities(sample)[self.index] for sample in (left, right)) / 2
        return "tie_good" if mean > panel.profile.good_above else "tie_bad"

    def _image(self, prompt: Prompt, token: str, side: str) -> Sample:
        response = self.client.get(f"/api/image/{token}/{side}")
        if response.status_code != 200:
            raise RefusedError(f"the server gave no image (status {response.status_code})")
        image = Image.open(io.BytesIO(response.content), formats=["PNG"])
        image.load()
        return Sample(prompt, image=image.convert("RGB"))

    def _asked(self, method: str, path: str) -> Mapping[str, Any]:
        return _checked(self.client.request(method, path))


def _point(utility: float, points: int) -> int:
    """A place on a scale, from 1: utilities are shares of what could be had."""
    return 1 + min(points - 1, max(0, int(utility * points)))


def _by(panel: SimulatedRaters) -> str:
    return f"simulated by {panel.file}"


def _checked(response: httpx.Response) -> Mapping[str, Any]:
    try:
        found = response.json()
    except ValueError:
        found = {}
    if response.status_code != 200 or not isinstance(found, dict):
        raise RefusedError(f"the server said {response.status_code}: {found.get('error', 'nothing that can be read')}")
    return found


@contextmanager
def _accounts(url: str, users: Path, people: Sequence[str]) -> Iterator[Mapping[str, str]]:
    """Accounts for as long as the raters work; none where the server asks for no login."""
    try:
        response = httpx.get(f"{url.rstrip('/')}/api/study", timeout=TIMEOUT, trust_env=False)
    except httpx.HTTPError as error:
        raise NotFoundError(f"no server answers at {url}: {error}; start it by `diffalign label serve`") from None
    if response.status_code == 200:
        if len(people) > 1:
            raise ConfigError("the server runs without accounts and knows one rater: --raters 1")
        yield {}
        return
    passwords = {name: secrets.token_urlsafe(24) for name in people}
    accounts = Accounts.load(users)
    taken = sorted({account.name for account in accounts.list()} & set(people))
    if taken:
        raise RefusedError(
            f"there is an account {taken[0]!r} already; if it was left behind by simulated raters that were stopped,"
            " remove it by `diffalign label users remove`"
        )
    for name, password in passwords.items():
        accounts.add(name, "rater", password)
    accounts.save()
    ours = [account for account in accounts.list() if account.name in passwords]
    try:
        yield passwords
    finally:
        _remove(users, ours)


def _remove(users: Path, ours: Sequence[Account]) -> None:
    """Takes the accounts away again, but for those that somebody has removed or changed meanwhile."""
    for attempt in range(ATTEMPTS):
        accounts = Accounts.load(users)
        left = [account for account in accounts.list() if account in ours]
        for account in left:
            accounts.remove(account.name)
        try:
            return accounts.save() if left else None
        except RefusedError:  # somebody else has written the file in this moment
            if attempt == ATTEMPTS - 1:
                raise


def _listed(choices: Counter[str]) -> str:
    return ", ".join(f"{count} {choice.replace('_', ' ')}" for choice, count in choices.most_common()) or "none"
