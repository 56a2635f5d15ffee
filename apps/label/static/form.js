// The questions beside the overall one, the strength and the comment: what of an answer is not the choice itself. Each
// pair has its own draft, which outlives a reload of the page in this tab, and nothing else.

import { button, el, keys } from "./dom.js";

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
  constructor(protocol, onchange) {
    this.protocol = protocol;
    this.onchange = onchange;
    this.draft = empty();
    this.inputs = [];
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
    this.locked = locked;
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
      if (given === undefined) return required;
      return kind === "scale" && !(given.left && given.right);
    });
  }

  focusOn({ name }) {
    this.panel.querySelector(`[data-criterion="${CSS.escape(name)}"] input`)?.focus();
  }

  /** What goes to the server with a choice. */
  answer(choice) {
    const strength = choice === "left" || choice === "right" ? this.draft.strength : null;
    const { criteria, points, comment } = this.draft;
    return structuredClone({ choice, strength, criteria, points, comment });
  }

  setStrength(value) {
    if (this.locked) return;
    this.draft.strength = this.draft.strength === value ? null : value;
    this.changed();
  }

  // --- what is shown ---

  #strength() {
    const parts = STRENGTHS.map(([word, key], index) =>
      button({ class: "segment", "aria-pressed": "false", "aria-keyshortcuts": key, onclick: () => this.setStrength(index + 1) },
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
    const questions = this.protocol.criteria.map((criterion, index) =>
      criterion.kind === "scale" ? this.#scale(criterion, index) : this.#prefer(criterion, index),
    );
    return el("section", { class: "panel", "aria-label": "Questions and comment" },
      ...questions, el("div", { class: "commenting" }, label, this.comment));
  }

  #question(criterion, index, ...rows) {
    const box = el("fieldset", { class: `criterion ${criterion.kind}`, "data-criterion": criterion.name },
      el("legend", {}, el("span", { class: "number", "aria-hidden": "true" }, String(index + 1)), criterion.question), ...rows);
    // Backspace and Delete take an answer back.
    box.addEventListener("keydown", (event) => {
      if (event.key === "Backspace" || event.key === "Delete") this.#answer(criterion.name, undefined);
    });
    return box;
  }

  #radio(group, value, name, given, change) {
    const input = el("input", { type: "radio", name: group, "aria-label": name });
    input.addEventListener("change", () => change(value));
    // A second press takes the answer back: a radio button alone cannot.
    input.addEventListener("click", () => {
      if (given() === value && input.dataset.was === "on") change(undefined);
      input.dataset.was = given() === value ? "on" : "";
    });
    this.inputs.push({ input, on: () => given() === value });
    return input;
  }

  #prefer(criterion, index) {
    const given = () => this.draft.criteria[criterion.name];
    const parts = [["left", "Left"], ["tie", "Same"], ["right", "Right"]].map(([value, word]) => {
      const change = (now) => this.#answer(criterion.name, now);
      const label = el("label", { class: "segment" }, this.#radio(`c${index}`, value, `${criterion.question} ${word}`, given, change),
        el("span", {}, word));
      return this.#unfocused(label);
    });
    return this.#question(criterion, index, el("div", { class: "segments" }, ...parts));
  }

  #scale(criterion, index) {
    const heads = el("div", { class: "heads", "aria-hidden": "true" }, el("span", {}, "Left"), el("span", {}, "Right"));
    const rows = criterion.anchors.map((words, at) => {
      const cell = (side) => {
        const given = () => this.draft.criteria[criterion.name]?.[side];
        const change = (now) => this.#answer(criterion.name, { ...this.draft.criteria[criterion.name], [side]: now });
        const name = `${criterion.question} ${side === "left" ? "Left" : "Right"}: ${at + 1}, ${words}`;
        const radio = this.#radio(`c${index}${side}`, at + 1, name, given, change);
        return this.#unfocused(el("label", { class: `cell ${side}` }, radio, el("span", { class: "dot" })));
      };
      return [cell("left"), el("span", { class: "anchor", "aria-hidden": "true" }, words), cell("right")];
    });
    return this.#question(criterion, index, heads, el("div", { class: "ladder" }, ...rows.flat()));
  }

  /** A pointer chooses without taking the focus, so that the arrows still answer the pair. */
  #unfocused(label) {
    label.addEventListener("mousedown", (event) => event.preventDefault());
    return label;
  }

  #answer(name, value) {
    if (this.locked) return this.#fill();
    const none = value === undefined || (typeof value === "object" && !value.left && !value.right);
    if (none) delete this.draft.criteria[name];
    else this.draft.criteria[name] = value;
    this.changed();
  }

  #fill() {
    for (const { input, on } of this.inputs) {
      input.checked = on();
      input.dataset.was = input.checked ? "on" : "";
    }
    this.strengths.forEach((part, index) => part.setAttribute("aria-pressed", String(this.draft.strength === index + 1)));
  }
}
