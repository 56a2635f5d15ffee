// Places that a rater marks in the pictures: numbered, with a label from the protocol. A click sets one, a click on it
// takes it away; its ring says of which kind it is, and its name does while it is looked at. By keyboard a cross is moved with the arrows and Enter sets the mark.

import { button, el } from "./dom.js";

const MOST = 500; // that the server takes
const COLOURS = 7; // in stage.css
const STEP = 0.02; // of the picture, for one press of an arrow

export class Marks {
  /** `toBox(side, x, y)` says where a place of a picture lies in its box. */
  constructor(labels, onchange, toBox) {
    this.labels = labels;
    this.label = labels[0] ?? "";
    this.on = labels.length > 0;
    this.onchange = onchange;
    this.toBox = toBox;
    this.points = [];
    this.layers = {};
    this.crosses = {};
  }

  /** The layer over a picture that carries its marks. */
  layer(side) {
    const cross = el("div", { class: "cross", hidden: true });
    this.crosses[side] = { element: cross, x: 0.5, y: 0.5 };
    this.layers[side] = el("div", { class: "marks" }, cross);
    return this.layers[side];
  }

  /** The class that gives a kind of mark its colour. */
  kind(label) {
    return `kind-${Math.max(0, this.labels.indexOf(label)) % COLOURS}`;
  }

  show(points) {
    this.points = points;
    this.#redraw();
  }

  add(side, x, y) {
    if (!this.on || !(x >= 0 && x <= 1 && y >= 0 && y <= 1) || this.points.length >= MOST) return;
    this.points.push({ side, x, y, label: this.label });
    this.#redraw();
    this.onchange();
  }

  /** Puts marks back as they were. */
  restore(points) {
    if (points.length === this.points.length) return;
    this.points.splice(0, Infinity, ...points);
    this.#redraw();
    this.onchange();
  }

  /** Takes the next label, for the marks that follow. */
  next() {
    if (this.on) this.label = this.labels[(this.labels.indexOf(this.label) + 1) % this.labels.length];
  }

  /** Shows or hides the cross of a side. */
  cross(side, shown) {
    this.crosses[side].element.hidden = !shown;
    this.place();
  }

  key(side, event) {
    const cross = this.crosses[side];
    const step = event.shiftKey ? STEP / 4 : STEP;
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (event.target !== event.currentTarget || event.ctrlKey || event.altKey || event.metaKey) return;
    if (dx || dy) {
      cross.x = Math.min(1, Math.max(0, cross.x + dx * step));
      cross.y = Math.min(1, Math.max(0, cross.y + dy * step));
      this.cross(side, true);
    } else if (event.key === "Enter" && !event.repeat) {
      this.add(side, cross.x, cross.y);
    } else if (event.key === "Escape") {
      event.currentTarget.blur();
    } else {
      return;
    }
    event.preventDefault();
  }

  #redraw() {
    for (const layer of Object.values(this.layers)) layer.querySelectorAll("button").forEach((one) => one.remove());
    this.buttons = this.points.map((point, index) => {
      const name = `Mark ${index + 1}, ${point.label || "no label"}, ${point.side} image. Press to remove.`;
      const remove = () => {
        this.points.splice(this.points.indexOf(point), 1);
        this.#redraw();
        this.onchange();
      };
      const made = button(
        { class: `mark ${this.kind(point.label)}`, "aria-label": name, title: `${point.label}: press to remove`, onclick: remove },
        el("span", { class: "number" }, String(index + 1)),
        point.label ? el("span", { class: "name", dir: "auto" }, point.label) : null,
      );
      this.layers[point.side].append(made);
      return made;
    });
    this.place();
  }

  /** Moves marks and crosses to where their places are shown now. */
  place() {
    const put = (element, { side, x, y }) => {
      const at = this.toBox(side, x, y);
      if (!at) return;
      element.style.left = `${at.left}px`;
      element.style.top = `${at.top}px`;
      element.classList.toggle("outside", !at.inside);
    };
    this.points.forEach((point, index) => put(this.buttons[index], point));
    for (const [side, cross] of Object.entries(this.crosses)) put(cross.element, { side, x: cross.x, y: cross.y });
  }
}
