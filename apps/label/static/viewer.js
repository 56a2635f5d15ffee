// Two pictures side by side. Zoom, place, window, level and inversion hold for both, so that they show the same region
// in the same way. Drag moves, the wheel and two fingers zoom, the right button or Shift with a drag sets the window.

import { el } from "./dom.js";
import { Marks } from "./marks.js";
import { PLAIN, isPlain } from "./pictures.js";

const SIDES = ["left", "right"];
const MOST = 32; // times the size that fits
const STEP = 1.25; // of a press on a zoom button
const STILL = 4; // CSS pixels that a click may move

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

export class Viewer {
  /** `labels` is what may be marked; `onlook` hears of every change of the view, `onmark` of changed marks. */
  constructor(labels, { onlook, onmark }) {
    this.onlook = onlook;
    this.look = { ...PLAIN };
    this.smooth = true;
    this.view = { scale: 1, x: 0.5, y: 0.5 }; // times the fitting size; the middle, as shares of the picture
    this.pictures = null;
    this.pointers = new Map();
    this.boxes = {};
    this.marks = new Marks(labels, onmark, (side, x, y) => this.#toBox(side, x, y));
    for (const side of SIDES) this.boxes[side] = this.#box(side);
    this.altered = el("p", { class: "altered", role: "status", hidden: true });
    this.element = el("div", { class: "pictures" }, this.boxes.left.element, this.boxes.right.element, this.altered);
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  #box(side) {
    const name = side === "left" ? "Left image" : "Right image";
    const canvas = el("canvas", { role: "img", "aria-label": name });
    const marks = this.marks.layer(side);
    const element = el("div", { class: `picture ${side}`, "data-side": side }, canvas, marks);
    if (this.marks.on) {
      const hint = "Arrows move the cross, with Shift in small steps; Enter marks; Escape leaves.";
      const options = { tabindex: 0, role: "application", "data-arrows": true, "aria-label": `${name}. ${hint}` };
      for (const [key, value] of Object.entries(options)) element.setAttribute(key, value === true ? "" : value);
      element.addEventListener("keydown", (event) => this.marks.key(side, event));
      element.addEventListener("focus", () => this.marks.cross(side, element.matches(":focus-visible")));
      element.addEventListener("blur", () => this.marks.cross(side, false));
    }
    const listen = (type, act) => element.addEventListener(type, (event) => act.call(this, side, event), { passive: false });
    listen("wheel", this.#wheel);
    listen("pointerdown", this.#down);
    listen("pointermove", this.#move);
    listen("pointerup", this.#up);
    listen("pointercancel", this.#up);
    listen("click", this.#click);
    element.addEventListener("click", (event) => this.#double(event), { capture: true });
    listen("contextmenu", (_, event) => event.preventDefault());
    listen("mousedown", (_, event) => event.preventDefault()); // a pointer leaves the focus where it was
    return { element, canvas };
  }

  /** Shows these pictures, whole. Window, level and inversion stay as they are while pictures are grey. */
  show(pictures, points) {
    this.pictures = pictures;
    this.grey = SIDES.every((side) => pictures[side].grey);
    if (!this.grey) this.look = { ...PLAIN };
    this.view = { scale: 1, x: 0.5, y: 0.5 };
    this.pointers.clear();
    this.marks.show(points);
    this.#changed();
  }

  /** Whether everything is shown as it came. */
  get plain() {
    return isPlain(this.look) && this.view.scale === 1;
  }

  zoom(factor, side = "left", at = null) {
    this.zoomTo(this.view.scale * factor, side, at);
  }

  /** Zooms to a scale, about a place in a box; the place in the picture under it stays there. */
  zoomTo(scale, side = "left", at = null) {
    if (!this.pictures) return;
    const next = clamp(scale, 1, MOST);
    const before = this.#frame(side);
    const place = at ?? { x: before.boxWidth / 2, y: before.boxHeight / 2 };
    const under = { x: (place.x - before.x) / before.width, y: (place.y - before.y) / before.height };
    this.view.scale = next < 1.02 ? 1 : next;
    const after = this.#frame(side);
    if (at || after.width > after.boxWidth) this.view.x = under.x + (after.boxWidth / 2 - place.x) / after.width;
    if (at || after.height > after.boxHeight) this.view.y = under.y + (after.boxHeight / 2 - place.y) / after.height;
    this.#settle(side);
    this.#changed();
  }

  adjust(change) {
    Object.assign(this.look, change);
    this.look.window = clamp(Math.round(this.look.window), 1, 255);
    this.look.level = clamp(this.look.level, 0, 255);
    this.#changed();
  }

  toggleSmooth() {
    this.smooth = !this.smooth;
    this.#changed();
  }

  reset() {
    this.look = { ...PLAIN };
    this.smooth = true;
    this.view = { scale: 1, x: 0.5, y: 0.5 };
    this.#changed();
  }

  /** Where the picture of a side lies in its box, in CSS pixels. Small ones lean to the middle of the screen. */
  #frame(side) {
    const { clientWidth: boxWidth, clientHeight: boxHeight } = this.boxes[side].element;
    const picture = this.pictures[side];
    const fit = Math.min(boxWidth / picture.width, boxHeight / picture.height) * this.view.scale;
    const [width, height] = [picture.width * fit, picture.height * fit];
    const lean = "stacked" in this.element.dataset ? 0.5 : side === "left" ? 1 : 0;
    const place = (share, size, box, rest) =>
      size <= box ? (box - size) * rest : clamp(box / 2 - share * size, box - size, 0);
    return {
      boxWidth, boxHeight, width, height,
      x: place(this.view.x, width, boxWidth, lean),
      y: place(this.view.y, height, boxHeight, 0.5),
    };
  }

  /** Keeps the middle of the view where it can be seen, so that a drag answers at once. */
  #settle(side) {
    const frame = this.#frame(side);
    for (const [axis, size, box] of [["x", frame.width, frame.boxWidth], ["y", frame.height, frame.boxHeight]]) {
      const half = box / 2 / size;
      this.view[axis] = half >= 0.5 ? 0.5 : clamp(this.view[axis], half, 1 - half);
    }
  }

  #toBox(side, x, y) {
    if (!this.pictures) return null;
    const frame = this.#frame(side);
    const [left, top] = [frame.x + x * frame.width, frame.y + y * frame.height];
    const inside = left >= 0 && top >= 0 && left <= frame.boxWidth && top <= frame.boxHeight;
    return { left, top, inside };
  }

  #changed() {
    this.draw();
    const { window, level, invert } = this.look;
    const levels = window !== PLAIN.window || level !== PLAIN.level;
    const parts = [levels ? `Window ${window}, level ${Math.round(level)}` : "", invert ? "Inverted" : ""].filter(Boolean);
    this.altered.hidden = !parts.length;
    this.altered.textContent = parts.join(" · ");
    this.onlook?.();
  }

  /** Draws both sides now. */
  draw() {
    if (!this.pictures) return;
    const first = this.boxes.left.element.getBoundingClientRect();
    const second = this.boxes.right.element.getBoundingClientRect();
    this.element.toggleAttribute("data-stacked", second.top >= first.bottom);
    for (const side of SIDES) {
      const { canvas } = this.boxes[side];
      const frame = this.#frame(side);
      const ratio = window.devicePixelRatio || 1;
      const [width, height] = [Math.round(frame.boxWidth * ratio), Math.round(frame.boxHeight * ratio)];
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      const context = canvas.getContext("2d");
      context.clearRect(0, 0, width, height);
      context.imageSmoothingEnabled = this.smooth;
      context.imageSmoothingQuality = "high";
      const place = [frame.x, frame.y, frame.width, frame.height].map((length) => length * ratio);
      context.drawImage(this.pictures[side].adjusted(this.look), ...place);
    }
    this.marks.place();
  }

  // --- pointers ---

  #at(side, event) {
    const box = this.boxes[side].element.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  #wheel(side, event) {
    event.preventDefault();
    const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
    this.zoom(Math.exp(-clamp(event.deltaY * lines, -200, 200) * (event.ctrlKey ? 0.01 : 0.002)), side, this.#at(side, event));
  }

  #down(side, event) {
    this.finger = event.pointerType === "touch";
    if (!this.pictures || event.target.closest("button")) return;
    event.preventDefault();
    if (event.isPrimary) this.pointers.clear(); // the first finger: none is left from before
    this.boxes[side].element.setPointerCapture(event.pointerId);
    const windowing = this.grey && (event.button === 2 || event.shiftKey);
    this.pointers.set(event.pointerId, { side, windowing, button: event.button, moved: 0, ...this.#at(side, event) });
  }

  #move(side, event) {
    const pointer = this.pointers.get(event.pointerId);
    if (!pointer) return;
    const at = this.#at(side, event);
    const [dx, dy] = [at.x - pointer.x, at.y - pointer.y];
    pointer.moved += Math.hypot(dx, dy);
    const others = [...this.pointers.values()].filter((other) => other !== pointer);
    if (others.length) this.#pinch(side, pointer, others[0], at);
    else if (pointer.moved <= STILL) return;
    else if (pointer.windowing) this.adjust({ window: this.look.window + dx, level: this.look.level + dy });
    else if (pointer.button === 0) this.#pan(side, dx, dy);
    Object.assign(pointer, at);
  }

  #pan(side, dx, dy) {
    const frame = this.#frame(side);
    this.view.x -= dx / frame.width;
    this.view.y -= dy / frame.height;
    this.#settle(side);
    this.#changed();
  }

  #pinch(side, pointer, other, at) {
    pointer.moved = other.moved = Infinity; // neither is a click any more
    const before = Math.hypot(pointer.x - other.x, pointer.y - other.y);
    const after = Math.hypot(at.x - other.x, at.y - other.y);
    if (before > 0) this.zoom(after / before, side, { x: (at.x + other.x) / 2, y: (at.y + other.y) / 2 });
  }

  #up(side, event) {
    const pointer = this.pointers.get(event.pointerId);
    this.pointers.delete(event.pointerId);
    const still = pointer && event.type === "pointerup" && pointer.moved <= STILL;
    this.tap = still && pointer.button === 0 && !pointer.windowing ? this.#at(side, event) : null;
  }

  /** A double click shows the whole picture. Its first click may have set a mark, or removed one: that is turned back.
   * Fingers mark and remove with two taps. */
  #double(event) {
    if (this.finger || event.detail < 2) this.before = [...this.marks.points];
    else {
      event.stopPropagation();
      if (event.detail > 2) return;
      this.marks.restore(this.before);
      this.zoomTo(1);
    }
  }

  /** Marks at the click, not before: a finger's click goes to what lies there then, and would remove a new mark. */
  #click(side, event) {
    const at = this.tap;
    this.tap = null;
    if (!at || !this.marks.on || event.target.closest("button")) return;
    const frame = this.#frame(side);
    this.marks.add(side, (at.x - frame.x) / frame.width, (at.y - frame.y) / frame.height);
  }
}
