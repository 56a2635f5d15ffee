// The questions beside the overall one, the strength and the comment: what of an answer is not the choice itself. Each
// pair has its own draft, which outlives a reload of the page in this tab, and nothing else.

import { button, el, keys } from "./dom.js";
import { Questions } from "./questions.js";

const STRENGTHS = [["slightly", "J"], ["clearly", "K"], ["much", "L"]];
const DRAFTS = "diffalign:drafts";
const KEPT = 3; // drafts, the youngest

const empty = () => ({ strength: null, criteria: {}, points: [], comment: "" });

/** The drafts of the pairs that are open in this tab. */
export const drafts = {
  read() {
    try {
      return JSON.parse(sessionStorage.getItem(DRAFTS)) ?? [];
    } catch {
      return [];
    }
  },
  find: (token) => drafts.read().find(([name]) => name === token)?.[1],
  put(token, draft) {
    const others = drafts.read().filter(([name]) => name !== token);
    const kept = draft ? [...others, [token, draft]] : others;
    try {
      sessionStorage.setItem(DRAFTS, JSON.stringify(kept.slice(-KEPT)));
    } catch {
      // A full or forbidden storage: the draft lives as long as the page.
    }
  },
};

export class Form {
  /** `onmode(on)` hears whether digits answer questions, `onleave` that the keyboard goes back to the pair. */
  constructor(protocol, { onchange, onmode, onleave }) {
    this.protocol = protocol;
    this.onchange = onchange;
    this.draft = empty();
    const given = (name) => this.draft.criteria[name];
    this.questions = new Questions(protocol.criteria, { given, take: (name, value) => this.#answer(name, value), onmode, onleave });
    this.panel = this.#panel();
    this.strength = this.#strength();
  }

  /** Fills the form for a pair: what was written before, what was answered before an undo, or nothing. */
  show(token, answer) {
    this.token = token;
    const before = drafts.find(token) ?? answer ?? {};
    this.draft = { ...empty(), ...Object.fromEntries(Object.entries(before).filter(([key]) => key in empty())) };
    this.draft.criteria = structuredClone(this.draft.criteria ?? {});
    this.draft.points = [...(this.draft.points ?? [])];
    this.comment.value = this.draft.comment ?? "";
    this.panel.scrollTop = 0;
    this.#fill();
  }

  /** While an answer is on its way, it is not changed any more. */
  lock(locked) {
    this.locked = this.questions.locked = locked;
    this.comment.readOnly = locked;
  }

  /** After a change from outside, such as a mark in a picture. */
  changed() {
    if (this.locked) return this.#fill();
    drafts.put(this.token, this.draft);
    this.#fill();
    this.onchange();
  }

  /** Drops the draft of a pair that was answered. */
  forget(token) {
    drafts.put(token, null);
  }

  /** Questions that keep a choice from being sent: all, where they are required, and scales with one side only. */
  missing(choice) {
    const required = this.protocol.criteria_required && choice !== "cannot_judge";
    return this.protocol.criteria.filter(({ name, kind }) => {
      const given = this.draft.criteria[name];
      return given === undefined ? required : !this.complete({ name, kind });
    });
  }

  /** Whether a question is answered; on a scale both sides have to be. */
  complete({ name, kind }) {
    const given = this.draft.criteria[name];
    return given !== undefined && (kind !== "scale" || Boolean(given.left && given.right));
  }

  /** What goes to the server with a choice. */
  answer(choice) {
    const strength = choice === "left" || choice === "right" ? this.draft.strength : null;
    const { criteria, points, comment } = this.draft;
    return structuredClone({ choice, strength, criteria, points, comment });
  }

  /** Sets it, however often: who gives a refused answer again presses its key again. */
  setStrength(value) {
    if (this.locked) return;
    this.draft.strength = value;
    this.changed();
  }

  /** A press on a button of strength: the chosen one is taken back by another press. */
  #turn(value) {
    this.setStrength(this.draft.strength === value ? null : value);
  }

  // --- what is shown ---

  #strength() {
    const parts = STRENGTHS.map(([word, key], index) =>
      button({ class: "segment", "aria-pressed": "false", "aria-keyshortcuts": key, onclick: () => this.#turn(index + 1) },
        el("span", {}, word), keys(key)),
    );
    this.strengths = parts;
    return el("div", { class: "strength", role: "group", "aria-label": "How much better? Optional, before the answer" },
      el("span", { class: "hint", "aria-hidden": "true" }, "How much?"), el("div", { class: "segments" }, ...parts));
  }

  #panel() {
    const said = (event) => {
      this.draft.comment = event.target.value;
      drafts.put(this.token, this.draft);
      this.onchange();
    };
    this.comment = el("textarea", { rows: 3, maxlength: 20000, dir: "auto", id: "comment", oninput: said });
    this.comment.addEventListener("keydown", (event) => event.key === "Escape" && this.comment.blur());
    const label = el("label", { for: "comment" }, "Comment", keys("C"));
    return el("section", { class: "panel", "aria-label": "Questions and comment" },
      ...this.questions.elements, el("div", { class: "commenting" }, label, this.comment));
  }

  #answer(name, value) {
    if (this.locked) return this.#fill();
    if (value === undefined) delete this.draft.criteria[name];
    else this.draft.criteria[name] = value;
    this.changed();
  }

  #fill() {
    this.questions.fill();
    this.strengths.forEach((part, index) => part.setAttribute("aria-pressed", String(this.draft.strength === index + 1)));
  }
}
