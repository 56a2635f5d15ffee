// What is on the screen: puts the parts together and shows what `rating.js` decides.

import * as appearance from "./appearance.js";
import { answers, actions, Head, PromptBar } from "./frame.js";
import { button, el, icon, keys } from "./dom.js";
import { Form } from "./form.js";
import { PictureTools, textTools } from "./tools.js";
import { Texts } from "./texts.js";
import { Viewer } from "./viewer.js";
import { others } from "./others.js";

const QUIET = 2500; // ms that "Saved" stays
const HIDDEN = 16; // CSS pixels below the panel's edge: its padding, and no more

export class Screen {
  constructor(pane, study, queue, act) {
    const { protocol } = study;
    this.pane = pane;
    this.study = study;
    this.queue = queue;
    this.act = act;
    this.kind = "image";
    this.answering = false; // whether digits answer questions, not the pair
    this.form = new Form(protocol, {
      onchange: () => this.#marked(), onmode: (on) => this.#mode(on), onleave: () => this.stage.focus({ preventScroll: true }),
    });
    this.texts = new Texts();
    this.viewer = new Viewer(protocol.points, { onlook: () => this.pictureTools?.show(), onmark: () => this.form.changed() });
    this.opener = this.#opener(protocol);
    this.pictureTools = new PictureTools(this.viewer);
    this.textTools = textTools(this.texts);
    this.prompt = new PromptBar();
    this.head = new Head(study, queue, (theme) => appearance.show(pane, theme));
    this.votes = answers((choice, event) => act(choice, event));
    this.actions = actions((name) => act(name));
    this.notice = el("div", { class: "notice", role: "alert", hidden: true });
    this.hold = el("p", { class: "hold", role: "status", hidden: true });
    this.mode = el("p", { class: "mode", role: "status" });
    this.sheet = el("div", { class: "asking" });
    this.side = el("aside", { class: "side", id: "side", "aria-label": "Questions" }, el("div", { class: "side-head" }, this.mode), this.sheet);
    this.stage = el("section", { class: "stage", "aria-label": "Pair", tabindex: -1 });
    this.tools = el("div", { class: "tooling" });
    this.judging = el("div", { class: "judging" }, this.notice, this.hold, this.votes,
      el("div", { class: "quiet-row" }, protocol.strength ? this.form.strength : el("span"), this.actions));
    this.body = el("div", { class: "body" }, this.stage, this.side, this.judging);
    this.top = el("div", { class: "top" }, this.prompt.element, this.tools);
    pane.replaceChildren(this.head.element, this.top, this.body);
    this.top.hidden = this.judging.hidden = true;
    this.#mode(false);
    this.panel((protocol.criteria.length > 0 || queue === "disputed") && !matchMedia("(max-width: 640px)").matches);
    appearance.onchange(() => appearance.show(pane, this.head.name));
    this.side.addEventListener("scroll", () => this.#fade(), { passive: true });
    const sizes = new ResizeObserver(() => this.#fade());
    for (const one of [this.side, this.sheet]) sizes.observe(one);
  }

  #opener(protocol) {
    const words = protocol.criteria.length ? "Questions" : "Comment";
    this.count = el("span", { class: "answered" });
    return button({ class: "tool panel-opener", "aria-controls": "side", "aria-keyshortcuts": "D", "aria-label": `${words}, key D`, onclick: () => this.act("panel") },
      icon("panel"), el("span", { class: "words" }, words), this.count, keys("D"));
  }

  /** Opens (true), closes (false) or turns over the panel of questions; it stays so for the pairs that follow. */
  panel(open = !this.open) {
    this.open = open;
    this.#showSide(open);
  }

  /** The button of the panel stands at its head while it is open, else beside the other tools. */
  #showSide(open) {
    const focused = document.activeElement === this.opener;
    if (open) this.side.firstChild.append(this.opener);
    else this.tools.lastChild?.append(this.opener);
    if (focused) this.opener.focus();
    this.side.hidden = !open;
    this.body.classList.toggle("with-side", open);
    this.opener.setAttribute("aria-expanded", String(open));
  }

  /** The keys go into the questions. */
  questions() {
    if (!this.study.protocol.criteria.length || this.judging.hidden || this.top.hidden) return;
    this.panel(true);
    this.form.questions.enter();
  }

  /** Says whose the digits are: on the panel, and by the keys that are printed on the buttons. */
  #mode(on) {
    this.answering = on;
    this.pane.dataset.digits = on ? "questions" : "pair";
    if (!this.study.protocol.criteria.length) return;
    const parts = on ? [el("b", {}, "Digits answer here"), keys("Esc"), "back"] : [keys("Q"), "answer by keys"];
    this.mode.replaceChildren(...parts);
  }

  comment() {
    this.panel(true);
    this.form.comment.focus();
  }

  // --- what rating.js calls ---

  /** A pair; `content` null is one that cannot be shown. */
  show(now, content) {
    this.kind = now.kind;
    this.pane.dataset.kind = now.kind;
    this.pane.dataset.token = now.token;
    this.form.show(now.token, now.answer);
    this.prompt.show(this.study.protocol.question, now.prompt);
    const [view, tools] = now.kind === "text" ? [this.texts.element, this.textTools] : [this.viewer.element, this.pictureTools.element];
    if (this.stage.firstChild !== view) this.stage.replaceChildren(view);
    this.tools.replaceChildren(tools);
    this.sheet.replaceChildren(...(now.others?.length ? [others(now.others, this.study.protocol)] : []), this.form.panel);
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
    this.notice.hidden = this.hold.hidden = true;
    this.#marked();
  }

  /** How long until the pair can be answered, in ms, as a line that fills; `least` of it are asked for by the study. */
  wait(ms, least) {
    this.least = least;
    this.until = performance.now() + ms;
    this.votes.style.setProperty("--wait", `${ms}ms`);
    for (const ring of this.votes.querySelectorAll(".ring")) ring.replaceWith(el("span", { class: "ring running" }));
  }

  /** An answer came too early: says so at the buttons, and counts down. */
  early(choice) {
    if (!this.least) return; // a second press of the key before
    const { token } = this.pane.dataset;
    const left = el("span", { class: "left", "aria-hidden": "true" });
    this.#refuse(choice, "Not taken yet: look at both first. ", left);
    const count = () => {
      const seconds = Math.ceil((this.until - performance.now()) / 1000);
      if (this.pane.dataset.token !== token || seconds < 0) {
        this.hold.hidden = true;
        clearInterval(this.counting);
      } else left.textContent = seconds ? `You can answer in ${seconds} s` : "You can answer now";
    };
    count();
    this.counting = setInterval(count, 100);
  }

  /** A digit came right after the one that answered the last question: says so at the buttons. True: it was used. */
  surplus(choice) {
    const { token } = this.pane.dataset;
    this.#refuse(choice, "Not taken: it came right after the last question. ", el("span", { class: "left" }, "Press it again"));
    const until = performance.now() + QUIET;
    this.counting = setInterval(() => {
      if (this.pane.dataset.token === token && performance.now() < until) return;
      this.hold.hidden = true;
      clearInterval(this.counting);
    }, 100);
    return true;
  }

  /** The button of a choice that was not taken shakes; why stands over the buttons. */
  #refuse(choice, ...why) {
    clearInterval(this.counting);
    const pressed = [...this.votes.children].find((one) => one.dataset.choice === choice);
    pressed?.classList.add("early");
    setTimeout(() => pressed?.classList.remove("early"), 400);
    this.hold.replaceChildren(...why);
    this.hold.hidden = false;
  }

  /** Whether undo takes back a flag, an answer, or nothing: there is none yet. */
  undoes(flag, any) {
    this.undoable = any;
    const one = this.actions.firstChild;
    const words = flag ? "Undo flag" : "Undo";
    one.querySelector(".words").textContent = words;
    one.setAttribute("aria-label", `${words}, key U`);
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
      const off = (action === "undo" && !(resting && this.undoable)) || ((action === "skip" || action === "flag") && (!resting || name === "over"));
      one.setAttribute("aria-disabled", String(off));
    }
  }

  progress(progress) {
    this.head.progress(progress);
  }

  say(words, kind = "saved") {
    this.asked = false;
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
    this.asked = true;
    this.form.questions.enter(criteria[0].name);
    for (const box of this.form.panel.querySelectorAll("[data-criterion]")) {
      box.toggleAttribute("data-missing", criteria.some(({ name }) => name === box.dataset.criterion));
    }
  }

  /** Nothing is left in this queue; `study` says what else there is for this role. */
  end({ done, why }, study) {
    delete this.pane.dataset.token;
    this.top.hidden = true;
    this.judging.hidden = false;
    this.hold.hidden = true;
    this.#showSide(false);
    const { queues, disputed, rater } = study;
    const pairs = this.queue === "pairs";
    const wait = pairs && queues.includes("disputed") && disputed > 0;
    const links = [
      wait ? el("a", { class: "action primary", href: "#disputed" }, "Judge the disputed pairs") : null,
      pairs ? null : el("a", { class: "action", href: "#" }, "Back to the pairs"),
      rater.role === "admin" ? el("a", { class: "action", href: "/results" }, "See the results") : null,
    ].filter(Boolean);
    const disputes = disputed === 1 ? "On 1 pair raters disagree: it waits for your verdict." : `On ${disputed} pairs raters disagree: they wait for your verdict.`;
    this.stage.replaceChildren(el("div", { class: "over" }, icon(done ? "good" : "book"),
      el("h2", {}, done ? "All done, thank you" : pairs ? "No pairs to compare now" : "No disputed pairs now"),
      done ? el("p", {}, done === 1 ? "You have answered 1 pair." : `You have answered ${done} pairs.`) : null,
      why ? el("p", { class: "quiet", dir: "auto" }, why) : null, wait ? el("p", {}, disputes) : null,
      links.length ? el("p", { class: "links" }, ...links) : null));
  }

  // --- small ---

  /** The focus leaves what was asked about the pair before: else an arrow would answer a question, not the pair. */
  #leaveOldPair() {
    const { activeElement } = document;
    const nowhere = activeElement === document.body; // Tab then goes on from the pair
    if (nowhere || this.side.contains(activeElement) || this.stage.contains(activeElement)) this.stage.focus({ preventScroll: true });
  }

  #marked() {
    const { comment, criteria, points } = this.form.draft;
    const { length } = this.study.protocol.criteria;
    const answered = this.study.protocol.criteria.filter((one) => this.form.complete(one)).map(({ name }) => name);
    this.count.textContent = length ? `${answered.length}/${length}` : "";
    this.opener.toggleAttribute("data-filled", Boolean(comment.trim() || Object.keys(criteria).length || points.length));
    for (const box of this.form.panel.querySelectorAll("[data-missing]")) {
      if (answered.includes(box.dataset.criterion)) box.removeAttribute("data-missing");
    }
    if (this.asked && !this.form.panel.querySelector("[data-missing]")) this.say("");
  }

  /** The panel fades out at its lower edge while it goes on below it. */
  #fade() {
    const { scrollHeight, clientHeight, scrollTop } = this.side;
    this.side.toggleAttribute("data-more", scrollHeight - clientHeight - scrollTop > HIDDEN);
  }
}
