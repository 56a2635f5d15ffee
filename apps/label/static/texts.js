// Two texts side by side, each in a sheet of its own that scrolls.

import { el } from "./dom.js";

const SIZES = [14, 16, 18, 21, 24]; // CSS pixels

export class Texts {
  constructor(onlook) {
    this.onlook = onlook;
    this.size = 1;
    this.sheets = {};
    for (const side of ["left", "right"]) {
      const name = side === "left" ? "Left text" : "Right text";
      this.sheets[side] = el("article", { class: "sheet", tabindex: 0, dir: "auto", "aria-label": name });
    }
    this.element = el("div", { class: "texts" }, this.sheets.left, this.sheets.right);
    this.resize(0);
  }

  show(left, right) {
    this.sheets.left.textContent = left;
    this.sheets.right.textContent = right;
    for (const sheet of Object.values(this.sheets)) sheet.scrollTop = 0;
    this.onlook?.();
  }

  /** Larger (1) or smaller (-1) letters. */
  resize(by) {
    this.size = Math.min(SIZES.length - 1, Math.max(0, this.size + by));
    this.element.style.fontSize = `${SIZES[this.size]}px`;
    this.onlook?.();
  }
}
