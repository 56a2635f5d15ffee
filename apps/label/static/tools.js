// The buttons over the pair that change how it is seen, never what is saved.

import { PLAIN } from "./pictures.js";
import { button, el, icon, keys } from "./dom.js";

function tool(name, words, key, drawing, act) {
  const label = `${words}, key ${key}`;
  return button({ class: "tool", "data-tool": name, "aria-label": label, title: words, "aria-keyshortcuts": key, onclick: act },
    drawing ? icon(drawing) : null, "+−Z".includes(key) ? null : keys(key)); // the drawing is the key
}

function slider(name, low, high, change) {
  const input = el("input", { type: "range", min: low, max: high, step: 1, "aria-label": name });
  input.addEventListener("input", () => change(Number(input.value)));
  return [input, el("label", { class: "slider" }, el("span", {}, name), input)];
}

/** Zoom, inversion, window and level, kinds of marks. */
export class PictureTools {
  constructor(viewer) {
    this.viewer = viewer;
    const { marks } = viewer;
    this.scale = tool("fit", "Whole picture", "Z", null, () => viewer.zoomTo(1));
    this.scale.classList.add("scale");
    this.invert = tool("invert", "Invert", "I", "invert", () => viewer.adjust({ invert: !viewer.look.invert }));
    this.crisp = tool("crisp", "Single pixels", "X", "crisp", () => viewer.toggleSmooth());
    this.reset = tool("reset", "Everything as it was", "R", "reset", () => viewer.reset());
    // A wide window is a soft picture; so the slider runs from soft to hard.
    const [contrast, first] = slider("Window", 1, 255, (value) => viewer.adjust({ window: value }));
    const [level, second] = slider("Level", 0, 255, (value) => viewer.adjust({ level: value }));
    Object.assign(this, { contrast, level });
    this.grey = el("div", { class: "group sliders" }, first, second);
    this.kinds = el("select", { "aria-label": "What the next mark says, key P" }, ...marks.labels.map((label) => el("option", {}, label)));
    this.kinds.addEventListener("change", () => {
      marks.label = marks.labels[this.kinds.selectedIndex];
      this.kinds.blur(); // so that the keys answer the pair again
      this.show();
    });
    const marking = el("label", { class: "group marking", title: "Click in a picture to mark a place" }, icon("mark"), this.kinds, keys("P"));
    marking.hidden = !marks.on;
    this.legend = el("ul", { class: "legend", "aria-label": "Kinds of marks" },
      ...marks.labels.map((label) => el("li", { class: marks.kind(label), dir: "auto" }, label)));
    this.legend.hidden = marks.labels.length < 2;
    this.element = el("div", { class: "tools", role: "toolbar", "aria-label": "View" }, marking,
      el("div", { class: "group zooming" }, tool("out", "Further away", "−", "minus", () => viewer.zoom(0.8)), this.scale,
        tool("in", "Closer", "+", "plus", () => viewer.zoom(1.25))),
      this.grey, el("div", { class: "group" }, this.invert, this.crisp, this.reset), this.legend);
  }

  /** After any change of the view. */
  show() {
    const { look, view, smooth, marks, grey, plain } = this.viewer;
    const percent = `${Math.round(view.scale * 100)} %`;
    this.scale.textContent = percent;
    this.scale.setAttribute("aria-label", `Zoom ${percent}. Whole picture, key Z`);
    this.invert.setAttribute("aria-pressed", String(look.invert));
    this.crisp.setAttribute("aria-pressed", String(!smooth));
    this.contrast.value = look.window ?? PLAIN.window;
    this.level.value = Math.round(look.level);
    this.contrast.disabled = this.level.disabled = !grey;
    this.grey.hidden = !grey;
    this.reset.classList.toggle("changed", !plain || !smooth);
    this.kinds.selectedIndex = marks.labels.indexOf(marks.label);
    [...this.legend.children].forEach((one, index) => one.toggleAttribute("data-now", marks.labels[index] === marks.label));
  }
}

/** The size of letters. */
export function textTools(texts) {
  const size = (words, by, drawing, key) => tool(by > 0 ? "in" : "out", words, key, drawing, () => texts.resize(by));
  return el("div", { class: "tools", role: "toolbar", "aria-label": "View" },
    el("div", { class: "group" }, el("span", { class: "scale letters" }, "Text size"), size("Smaller text", -1, "minus", "−"), size("Larger text", 1, "plus", "+")));
}
