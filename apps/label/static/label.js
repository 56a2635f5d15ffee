// The start: waits for the place that Gradio draws, asks what is to be judged, and joins screen, keys and work.

import * as api from "./api.js";
import { Refused } from "./api.js";
import * as appearance from "./appearance.js";
import * as dialogs from "./dialogs.js";
import { el } from "./dom.js";
import { listen } from "./keys.js";
import { Rating } from "./rating.js";
import { Screen } from "./screen.js";

const CHOICES = ["left", "right", "tie_good", "tie_bad", "cannot_judge"];
const STRENGTHS = ["slightly", "clearly", "much"];

/** The pane, put into the column that Gradio draws, once it is there. */
function pane() {
  return new Promise((resolve) => {
    const seen = new MutationObserver(look);
    function look() {
      const place = document.getElementById("rating");
      if (!place) return;
      seen.disconnect();
      const made = el("div", { id: "pane" });
      place.append(made);
      resolve(made);
    }
    seen.observe(document.documentElement, { childList: true, subtree: true });
    look();
  });
}

async function about() {
  for (let wait = 1; ; wait = Math.min(15, 2 * wait)) {
    try {
      return await api.study();
    } catch (error) {
      if (error instanceof Refused && error.status === 401) location.assign("/login");
      else if (error instanceof Refused) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
    }
  }
}

/** Everything that a key or a button may ask for; true means that it was something. */
function commands(study, screen, rating) {
  const { viewer, form } = screen;
  const pictures = (act) => () => screen.kind === "image" && viewer.pictures && act();
  const all = {
    undo: () => rating.undo(),
    skip: () => rating.skip(),
    flag: async () => {
      if (rating.busy || !rating.shown) return;
      const { token } = rating.shown;
      const reason = await dialogs.flagReason();
      if (reason !== null) await rating.flag(token, reason);
    },
    questions: () => screen.questions(),
    comment: () => screen.comment(),
    panel: () => screen.panel(),
    guideline: () => dialogs.guideline({ rules: study.protocol, sha256: study.sha256 }),
    help: () => dialogs.help(study.protocol),
    zoomIn: () => (screen.kind === "text" ? screen.texts.resize(1) : viewer.zoom(1.25)),
    zoomOut: () => (screen.kind === "text" ? screen.texts.resize(-1) : viewer.zoom(0.8)),
    zoomReset: pictures(() => viewer.zoomTo(1)),
    invert: pictures(() => viewer.adjust({ invert: !viewer.look.invert })),
    crisp: pictures(() => viewer.toggleSmooth()),
    nextLabel: pictures(() => (viewer.marks.next(), screen.pictureTools.show())),
    reset: pictures(() => viewer.reset()),
  };
  return (name, event) => {
    if (CHOICES.includes(name)) rating.vote(name, event);
    else if (STRENGTHS.includes(name)) study.protocol.strength && !rating.busy && form.setStrength(STRENGTHS.indexOf(name) + 1);
    else if (all[name]) all[name]();
    else return false;
    return true;
  };
}

async function start() {
  const root = await pane();
  document.body.classList.add("diffalign");
  appearance.show(root, appearance.chosen());
  root.replaceChildren(el("p", { class: "loading", role: "status" }, "Loading…"));
  const study = await about();
  if (study.title) document.title = study.title;
  const asked = location.hash.slice(1);
  const queue = study.queues.includes(asked) ? asked : "pairs";
  window.addEventListener("hashchange", () => location.reload());
  let act = () => false;
  const screen = new Screen(root, study, queue, (name, event) => act(name, event));
  const rating = new Rating(study, queue, screen);
  act = commands(study, screen, rating);
  // A digit that comes right after the last question was one too many for it, not a vote.
  listen((name) => (CHOICES.includes(name) && screen.answering ? screen.surplus(name) : act(name)));
  window.addEventListener("unhandledrejection", () => {
    screen.say("This page has a fault. Please reload it; every saved answer is safe.", "problem");
  });
  window.addEventListener("beforeunload", (event) => rating.pending && event.preventDefault());
  if (!dialogs.guidelineRead(study.sha256)) await dialogs.guideline({ rules: study.protocol, sha256: study.sha256 }, true);
  await rating.start();
}

start().catch((error) => {
  const said = error instanceof Refused ? error.message : "This page failed. Please reload it; no saved answer is lost.";
  document.getElementById("pane")?.replaceChildren(el("p", { class: "loading", role: "alert" }, said));
  if (!(error instanceof Refused)) throw error;
});
