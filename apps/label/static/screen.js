// What is on the screen: puts the parts together and shows what `rating.js` decides.

import { answers, actions, Head, PromptBar } from "./frame.js";
import { button, el, icon, keys } from "./dom.js";
import { Form } from "./form.js";
import { PictureTools, textTools } from "./tools.js";
import { Texts } from "./texts.js";
import { Viewer } from "./viewer.js";
import { others } from "./others.js";

const QUIET = 2500; // ms that "Saved" stays

export class Screen {
  constructor(pane, study, queue, act) {
    const { protocol } = study;
    this.pane = pane;
    this.study = study;
    this.act = act;
    this.kind = "image";
    this.form = new Form(protocol, () => this.#marked());
    this.texts = new Texts();
    this.viewer = new Viewer(protocol.points, { onlook: () => this.pictureTools?.show(), onmark: () => this.form.changed() });
    this.opener = this.#opener(protocol);
    this.pictureTools = new PictureTools(this.viewer);
    this.textTools = textTools(this.texts);
    this.prompt = new PromptBar();
    this.head = new Head(study, queue, (theme) => this.#appearance(theme));
    this.votes = answers((choice, event) => act(choice, event));
    this.actions = actions((name) => act(name));
    this.notice = el("div", { class: "notice", role: "alert", hidden: true });
    this.side = el("aside", { class: "side", id: "side", "aria-label": "Questions" });
    this.stage = el("section", { class: "stage", "aria-label": "Pair", tabindex: -1 });
    this.tools = el("div", { class: "tooling" });
    this.judging = el("div", { class: "judging" }, this.notice, this.votes,
      el("div", { class: "quiet-row" }, protocol.strength ? this.form.strength : el("span"), this.actions));
    this.body = el("div", { class: "body" }, this.stage, this.side, this.judging);
    this.top = el("div", { class: "top" }, this.prompt.element, this.tools);
    pane.replaceChildren(this.head.element, this.top, this.body);
    this.top.hidden = this.judging.hidden = true;
    this.panel((protocol.criteria.length > 0 || queue === "disputed") && !matchMedia("(max-width: 640px)").matches);
    matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => this.#appearance(this.head.name));
  }

  #opener(protocol) {
    const words = protocol.criteria.length ? "Questions" : "Comment";
    return button({ class: "tool panel-opener", "aria-controls": "side", "aria-keyshortcuts": "D", "aria-label": `${words}, key D`, onclick: () => this.act("panel") },
      icon("panel"), el("span", { class: "words" }, words), keys("D"));
  }

  /** Opens (true), closes (false) or turns over the panel of questions; it stays so for the pairs that follow. */
  panel(open = !this.open) {
    this.open = open;
    this.#showSide(open);
  }

  #showSide(open) {
    this.side.hidden = !open;
    this.body.classList.toggle("with-side", open);
    this.opener.setAttribute("aria-expanded", String(open));
  }

  comment() {
    this.panel(true);
    this.form.comment.focus();
  }

  // --- what rating.js calls ---

  /** A pair; `content` null is one that cannot be shown. */
  show(now, content) {
    this.kind = now.kind;
    this.sawImage ||= now.kind === "image";
    this.pane.dataset.kind = now.kind;
    this.pane.dataset.token = now.token;
    this.#appearance(this.head.name);
    this.form.show(now.token, now.answer);
    this.prompt.show(this.study.protocol.question, now.prompt);
    const [view, tools] = now.kind === "text" ? [this.texts.element, this.textTools] : [this.viewer.element, this.pictureTools.element];
    if (this.stage.firstChild !== view) this.stage.replaceChildren(view);
    tools.append(this.opener);
    this.tools.replaceChildren(tools);
    this.side.replaceChildren(...(now.others?.length ? [others(now.others, this.study.protocol)] : []), this.form.panel);
    this.side.scrollTop = 0;
    this.top.hidden = this.judging.hidden = false;
    this.#showSide(this.open);
    this.#leaveOldPair();
    if (!content) {
      this.stage.replaceChildren(el("p", { class: "broken" }, "This pair cannot be shown."));
    } else if (now.kind === "text") {
      this.texts.show(content.left, content.right);
    } else {
      this.viewer.show(content, this.form.draft.points);
    }
    const before = now.answer?.choice;
    for (const one of this.votes.children) {
      one.toggleAttribute("data-before", one.dataset.choice === before);
      one.setAttribute("aria-description", one.dataset.choice === before ? "Your earlier answer" : "");
    }
    this.notice.hidden = true;
    this.#marked();
  }

  /** How long until the pair can be answered, in ms, as a thin line that fills. */
  wait(ms) {
    this.votes.style.setProperty("--wait", `${ms}ms`);
    for (const ring of this.votes.querySelectorAll(".ring")) ring.replaceWith(el("span", { class: "ring running" }));
  }

  state(name, choice = null) {
    this.pane.dataset.state = name;
    this.form.lock(name === "saving" || name === "loading");
    for (const one of this.votes.children) {
      one.setAttribute("aria-disabled", String(name !== "ready"));
      one.toggleAttribute("data-chosen", one.dataset.choice === choice);
    }
    const resting = name === "ready" || name === "waiting" || name === "broken" || name === "over";
    for (const one of this.actions.children) {
      const { action } = one.dataset;
      const off = (action === "undo" && !resting) || ((action === "skip" || action === "flag") && (!resting || name === "over"));
      one.setAttribute("aria-disabled", String(off));
    }
  }

  progress(progress) {
    this.head.progress(progress);
  }

  say(words, kind = "saved") {
    clearTimeout(this.quiet);
    this.head.say(words, kind);
    this.quiet = setTimeout(() => this.head.say(""), kind === "problem" ? 4 * QUIET : QUIET);
  }

  /** Says that the server cannot be reached, with a way to try now; null when it can again. */
  retrying(words, now) {
    if (!words) {
      this.notice.hidden = true;
      return;
    }
    if (this.notice.hidden || this.notice.dataset.words !== words) {
      this.notice.dataset.words = words;
      this.notice.replaceChildren(el("span", {}, words), button({ class: "action", onclick: () => this.tryNow() }, "Try now"));
    }
    this.tryNow = now;
    this.notice.hidden = this.judging.hidden = false; // also before the first pair is there
  }

  /** Names the questions that must be answered first. */
  missing(criteria) {
    this.panel(true);
    this.say(`Answer first: ${criteria.map(({ name }) => name.replaceAll("_", " ")).join(", ")}`, "problem");
    this.form.focusOn(criteria[0]);
    for (const box of this.form.panel.querySelectorAll("[data-criterion]")) {
      box.toggleAttribute("data-missing", criteria.some(({ name }) => name === box.dataset.criterion));
    }
  }

  end({ done, why }) {
    delete this.pane.dataset.token;
    this.top.hidden = true;
    this.judging.hidden = false;
    this.side.replaceChildren();
    this.#showSide(false);
    this.stage.replaceChildren(el("div", { class: "over" }, icon("good"), el("h2", {}, done ? "All done, thank you" : "Nothing to judge"),
      el("p", {}, done === 1 ? "You have answered 1 pair." : `You have answered ${done} pairs.`), why ? el("p", { class: "quiet", dir: "auto" }, why) : null));
  }

  // --- small ---

  /** The focus leaves what was asked about the pair before: else an arrow would answer a question, not the pair. */
  #leaveOldPair() {
    const { activeElement } = document;
    if (this.side.contains(activeElement) || this.stage.contains(activeElement)) this.stage.focus({ preventScroll: true });
  }

  #marked() {
    const { comment, criteria, points } = this.form.draft;
    const { length } = this.study.protocol.criteria;
    const answered = this.study.protocol.criteria.filter(({ name }) => criteria[name] !== undefined).length;
    this.opener.querySelector(".words").textContent = length ? `Questions ${answered}/${length}` : "Comment";
    this.opener.toggleAttribute("data-filled", Boolean(comment.trim() || answered || points.length));
    for (const box of this.form.panel.querySelectorAll("[data-missing]")) {
      if (criteria[box.dataset.criterion] !== undefined) box.removeAttribute("data-missing");
    }
  }

  /** Pictures are seen in a dark room; a study of texts is light or dark as the rater's system is. */
  #appearance(theme) {
    const light = matchMedia("(prefers-color-scheme: light)").matches;
    const wanted = theme === "auto" ? (light && this.kind === "text" && !this.sawImage ? "light" : "dark") : theme;
    this.pane.dataset.theme = wanted;
    document.documentElement.style.colorScheme = wanted;
  }
}
