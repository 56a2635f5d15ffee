// The questions beside the overall one. By keyboard each is a step, a scale two of them: left, then right. While the
// focus is in a step, a digit answers it and goes on to the next one; after the last the keys are the pair's again.

import { el, keys } from "./dom.js";
import { digit } from "./keys.js";

const SETTLE = 250; // ms after the last question in which a digit, pressed once too often, is not yet a vote
// The digits say the same here as for the pair.
const SIDES = [["left", "Left", "1"], ["tie", "Same", "3"], ["right", "Right", "2"]];
const NONE = "0";

export class Questions {
  /** `given(name)` is the answer to a criterion; `take(name, value)` sets it, undefined takes it back; `onmode(on)` hears
   * whether digits answer questions; `onleave` is asked to put the focus back to the pair. */
  constructor(criteria, { given, take, onmode, onleave }) {
    Object.assign(this, { criteria, given, take, onmode, onleave });
    this.locked = false;
    this.steps = [];
    this.elements = criteria.map((one, index) => (one.kind === "scale" ? this.#scale(one, index) : this.#prefer(one, index)));
    for (const box of this.elements) {
      box.addEventListener("keydown", (event) => this.#key(event));
      box.addEventListener("focusin", () => this.#mode(true));
      box.addEventListener("focusout", (event) => this.#inside(event.relatedTarget) || this.#mode(false));
      // A pointer answers without the keyboard: it neither takes the focus nor leaves it here.
      box.addEventListener("pointerdown", () => box.contains(document.activeElement) && this.onleave());
    }
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.settling && this.#mode(false));
  }

  #inside(element) {
    return this.elements.some((box) => box.contains(element));
  }

  /** Goes into the first question that has no answer, or into the first; false where there is none. */
  enter(name = null) {
    const open = this.steps.filter((step) => step.value() === undefined && (name === null || step.name === name));
    const step = open[0] ?? this.steps.find((one) => one.name === name) ?? this.steps[0];
    step?.focus();
    return Boolean(step);
  }

  /** Shows the answers as they are now. */
  fill() {
    for (const step of this.steps) {
      for (const { input, value } of step.choices) {
        input.checked = step.value() === value;
        input.dataset.was = input.checked ? "on" : "";
      }
    }
  }

  #mode(on) {
    clearTimeout(this.settling);
    this.settling = null;
    this.onmode(on);
  }

  /** After the digit that answered the last question: another one that comes at once is not a vote. Whoever leaves in
   * another way, by Escape, Enter, Tab or a pointer, means it, and is not held up. */
  #settle() {
    this.onleave();
    this.onmode(true);
    this.settling = setTimeout(() => this.#mode(false), SETTLE);
  }

  #key(event) {
    const at = this.steps.findIndex(({ choices }) => choices.some(({ input }) => input === event.target));
    if (at < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    const step = this.steps[at];
    const pressed = digit(event);
    if (pressed !== undefined) {
      const choice = step.choices.find(({ key }) => key === pressed);
      if (!event.repeat && !this.locked && (choice || pressed === NONE)) {
        step.answer(choice?.value);
        if (at + 1 < this.steps.length) this.#go(at + 1);
        else this.#settle();
      }
    } else if (event.key === "Enter") this.#go(at + 1);
    else if (event.key === "Backspace" || event.key === "Delete") step.answer(undefined);
    else if (event.key === "Escape") this.onleave();
    else return;
    event.preventDefault();
  }

  #go(at) {
    if (at < this.steps.length) this.steps[at].focus();
    else this.onleave();
  }

  /** A step: `value` and `answer` read and write it, `choices` are [{input, value, key}]. */
  #step(name, value, answer) {
    const step = { name, value, answer, choices: [] };
    step.focus = () => {
      const { input } = step.choices.find((one) => one.input.checked) ?? step.choices[0];
      input.focus({ preventScroll: true });
      input.closest(".criterion").scrollIntoView({ block: "nearest" });
    };
    this.steps.push(step);
    return step;
  }

  #radio(step, group, value, name, key) {
    const shortcut = key.length === 1 ? key : null;
    const input = el("input", { type: "radio", name: group, "aria-label": name, "aria-keyshortcuts": shortcut });
    input.addEventListener("change", () => step.answer(value));
    // A second press takes the answer back: a radio button alone cannot.
    input.addEventListener("click", () => {
      if (step.value() === value && input.dataset.was === "on") step.answer(undefined);
      input.dataset.was = step.value() === value ? "on" : "";
    });
    step.choices.push({ input, value, key });
    return input;
  }

  #question(criterion, index, ...rows) {
    return el("fieldset", { class: `criterion ${criterion.kind}`, "data-criterion": criterion.name },
      el("legend", {}, el("span", { class: "number", "aria-hidden": "true" }, `${index + 1}.`), criterion.question), ...rows);
  }

  #prefer(criterion, index) {
    const step = this.#step(criterion.name, () => this.given(criterion.name), (value) => this.take(criterion.name, value));
    const parts = SIDES.map(([value, word, key]) => {
      const radio = this.#radio(step, `c${index}`, value, `${criterion.question} ${word}`, key);
      return unfocused(el("label", { class: "segment" }, radio, el("span", {}, word), keys(key)));
    });
    return this.#question(criterion, index, el("div", { class: "segments" }, ...parts));
  }

  #scale(criterion, index) {
    const { name, question, anchors } = criterion;
    const [left, right] = ["left", "right"].map((side) =>
      this.#step(name, () => this.given(name)?.[side], (value) => {
        const now = { ...this.given(name), [side]: value };
        this.take(name, now.left || now.right ? now : undefined);
      }));
    const cell = (step, side, word, at, words) => {
      const radio = this.#radio(step, `c${index}${side}`, at, `${question} ${word}: ${at}, ${words}`, String(at));
      return unfocused(el("label", { class: `cell ${side}` }, radio, el("span", { class: "dot", "aria-hidden": "true" }, String(at))));
    };
    const rows = anchors.map((words, at) =>
      [cell(left, "left", "Left", at + 1, words), el("span", { class: "anchor", "aria-hidden": "true" }, words), cell(right, "right", "Right", at + 1, words)]);
    const heads = el("div", { class: "heads", "aria-hidden": "true" }, el("span", {}, "Left"), el("span", {}, "Right"));
    return this.#question(criterion, index, heads, el("div", { class: "ladder" }, ...rows.flat()));
  }
}

/** A pointer chooses without taking the focus, so that the arrows still answer the pair. */
function unfocused(label) {
  label.addEventListener("mousedown", (event) => event.preventDefault());
  return label;
}
