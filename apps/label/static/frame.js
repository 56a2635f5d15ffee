// The frame around a pair: who and how far on top, then the prompt, the pair, the answers and the quiet buttons.

import * as api from "./api.js";
import * as appearance from "./appearance.js";
import { beginning, button, el, icon, keys } from "./dom.js";
import { wholePrompt } from "./dialogs.js";

const LONGEST_SHOWN = 600; // characters of a prompt before "more"
const COARSE = 10; // pairs: how finely what is left is told

const CHOICES = [
  ["left", "Left better", "left", ["1", "←"], "1 ArrowLeft"],
  ["tie_good", "Both good", "good", ["3"], "3"],
  ["tie_bad", "Both bad", "bad", ["4"], "4"],
  ["right", "Right better", "right", ["2", "→"], "2 ArrowRight"],
  ["cannot_judge", "Cannot judge", null, ["0"], "0"],
];
const ACTIONS = [
  ["undo", "Undo", "undo", "U"],
  ["skip", "Skip", "skip", "S"],
  ["flag", "Flag", "flag", "F"],
  ["guideline", "Guideline", "book", "G"],
  ["help", "Help", "unknown", "?"],
];

/** The row of answers. */
export function answers(act) {
  const made = CHOICES.map(([name, words, drawing, pressed, shortcuts]) =>
    button({
      class: `vote ${name}`, "data-choice": name, "aria-keyshortcuts": shortcuts, "aria-disabled": "true",
      "aria-label": `${words}, key ${pressed[0]}`, onclick: (event) => act(name, event),
    }, el("span", { class: "words" }, drawing ? icon(drawing) : null, words), keys(...pressed), el("span", { class: "ring" })));
  return el("div", { class: "votes", role: "group", "aria-label": "Your answer" }, ...made);
}

/** The quiet row. */
export function actions(act) {
  const made = ACTIONS.map(([name, words, drawing, key]) =>
    button({ class: "action", "data-action": name, "aria-keyshortcuts": key, "aria-label": `${words}, key ${key}`, onclick: () => act(name) },
      icon(drawing), el("span", { class: "words" }, words), keys(key)));
  return el("div", { class: "actions", role: "group", "aria-label": "This pair" }, ...made);
}

/** The prompt, cut to a few lines, with a way to read all of it. */
export class PromptBar {
  constructor() {
    this.question = el("p", { class: "asked", dir: "auto" });
    this.text = el("p", { class: "prompt", dir: "auto" });
    this.more = button({ class: "more", hidden: true, onclick: () => wholePrompt(this.whole) }, "more");
    this.element = el("section", { class: "prompting", "aria-label": "Prompt" }, this.question,
      el("div", { class: "line" }, this.text, this.more));
    new ResizeObserver(() => this.#fit()).observe(this.element);
  }

  show(question, prompt) {
    this.whole = prompt;
    this.question.textContent = question;
    const start = beginning(prompt, LONGEST_SHOWN);
    this.text.textContent = start === prompt ? prompt : `${start}…`;
    this.#fit();
  }

  #fit() {
    this.more.hidden = this.text.scrollHeight <= this.text.clientHeight + 1 && this.text.textContent === this.whole;
  }
}

/** Links to what else there is for a role: the other queue (`now`: only where it has something), the results. */
function ways({ rater, queues, disputed }, queue, now = false) {
  const made = [];
  if (queues.includes("disputed") && (!now || disputed || queue === "disputed")) {
    for (const [name, words] of [["pairs", "Pairs"], ["disputed", `Disputed (${disputed})`]]) {
      made.push(el("a", { class: "way", href: name === "pairs" ? "#" : `#${name}`, "aria-current": name === queue ? "page" : null }, words));
    }
  }
  if (rater.role === "admin") made.push(el("a", { class: "way", href: "/results" }, "Results"));
  return made;
}

/** Title, progress, what was saved, appearance, and who is here. */
export class Head {
  constructor(study, queue, onlook) {
    this.onlook = onlook;
    this.bar = el("div", { class: "filled" });
    this.count = el("span", { class: "count" });
    this.said = el("span", { class: "said", role: "status", "aria-live": "polite" });
    this.theme = button({ class: "quiet-button theme", onclick: () => this.nextTheme() }, icon("theme"), el("span", { class: "words" }));
    this.element = el("header", { class: "head", role: "banner" },
      el("h1", { dir: "auto", title: study.title }, study.title || "Comparison of pairs"),
      el("div", { class: "progress" }, el("div", { class: "bar", "aria-hidden": "true" }, this.bar), this.count, this.said),
      el("div", { class: "corner" }, ...ways(study, queue, true), this.theme, this.#menu(study, queue)));
    this.setTheme(appearance.chosen());
  }

  #menu({ rater, queues, disputed, accounts }, queue) {
    const entries = ways({ rater, queues, disputed }, queue);
    const leave = async () => {
      sessionStorage.clear();
      await api.logOut();
      location.assign("/login");
    };
    if (accounts !== false) entries.push(el("button", { type: "button", onclick: leave }, "Log out"));
    const list = el("div", { class: "menu", id: "menu", hidden: true }, el("p", { class: "who" }, rater.role), ...entries);
    const opener = button({ class: "quiet-button who", "aria-expanded": "false", "aria-controls": "menu" }, icon("person"),
      el("bdi", { class: "words", title: rater.name }, rater.name));
    const set = (open) => {
      list.hidden = !open;
      opener.setAttribute("aria-expanded", String(open));
    };
    opener.addEventListener("click", () => set(list.hidden));
    const box = el("div", { class: "account" }, opener, list);
    document.addEventListener("pointerdown", (event) => !box.contains(event.target) && set(false));
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || list.hidden) return;
      set(false);
      opener.focus();
    });
    box.addEventListener("focusout", (event) => event.relatedTarget && !box.contains(event.relatedTarget) && set(false));
    return box;
  }

  /** `left` is rounded up by the server: a finer number would tell which pairs are tests. So is all that is shown. */
  progress({ done, left }) {
    const words = left > COARSE ? ` · about ${left} left` : left > 0 ? ` · fewer than ${COARSE} left` : "";
    this.count.textContent = `${done} done${words}`;
    this.bar.style.width = `${done + left > 0 ? (100 * done) / (done + left) : 0}%`;
  }

  /** A quiet sentence; `kind` is saved, wait or problem. */
  say(words, kind = "saved") {
    this.said.className = `said ${kind}`;
    this.said.replaceChildren(...(words ? [...(kind === "saved" ? [icon("good")] : []), words] : []));
  }

  setTheme(name) {
    this.name = name;
    const words = { auto: "Auto", light: "Light", dark: "Dark" }[name];
    this.theme.querySelector(".words").textContent = words;
    this.theme.setAttribute("aria-label", `Appearance: ${words}. Press to change.`);
    this.onlook(name);
  }

  nextTheme() {
    const all = appearance.CHOICES;
    this.setTheme(all[(all.indexOf(this.name) + 1) % all.length]);
    appearance.choose(this.name);
  }
}
