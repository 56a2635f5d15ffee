// Pixels: decoding, whether a picture is grey, and the look-up table of window, level and inversion. What is drawn is
// made from the decoded picture each time: the picture itself is never changed.

import * as api from "./api.js";

const PROBE = 512; // pixels a side that are looked at to find colour
const TINT = 16; // levels between the colours of a pixel that a network leaves in a picture that is meant to be grey

/** No adjustment: every value as it is. Window and level in grey values from 0 to 255. */
export const PLAIN = Object.freeze({ window: 255, level: 127.5, invert: false });

/** Whether an adjustment leaves the values as they are. */
export const isPlain = (look) => look.window === PLAIN.window && look.level === PLAIN.level && !look.invert;

/** The value shown for each value of 0 to 255. */
export function table({ window, level, invert }) {
  const made = new Uint8ClampedArray(256);
  for (let value = 0; value < 256; value++) {
    const shown = ((value - (level - window / 2)) / window) * 255;
    made[value] = invert ? 255 - Math.min(255, Math.max(0, shown)) : shown;
  }
  return made;
}

function canvas(width, height) {
  const made = document.createElement("canvas");
  made.width = width;
  made.height = height;
  return made;
}

/** A decoded picture that can be drawn with adjustments. */
export class Picture {
  constructor(bitmap) {
    this.bitmap = bitmap;
    this.width = bitmap.width;
    this.height = bitmap.height;
    this.grey = this.#isGrey();
  }

  /** What is to be drawn for an adjustment, at the size of the picture; kept until another one is asked for. */
  adjusted(look) {
    if (isPlain(look)) return this.bitmap;
    const name = `${look.window} ${look.level} ${look.invert}`;
    if (this.name !== name) {
      this.shown ??= canvas(this.width, this.height);
      const context = this.shown.getContext("2d", { willReadFrequently: true });
      context.drawImage(this.bitmap, 0, 0);
      const pixels = context.getImageData(0, 0, this.width, this.height);
      const values = table(look);
      for (let i = 0; i < pixels.data.length; i += 4) {
        for (let c = 0; c < 3; c++) pixels.data[i + c] = values[pixels.data[i + c]];
      }
      context.putImageData(pixels, 0, 0);
      this.name = name;
    }
    return this.shown;
  }

  #isGrey() {
    const [width, height] = [Math.min(PROBE, this.width), Math.min(PROBE, this.height)];
    const context = canvas(width, height).getContext("2d", { willReadFrequently: true });
    context.imageSmoothingEnabled = false; // values of pixels, not mixtures
    context.drawImage(this.bitmap, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    for (let i = 0; i < data.length; i += 4) {
      const [red, green, blue] = [data[i], data[i + 1], data[i + 2]];
      if (Math.max(red, green, blue) - Math.min(red, green, blue) > TINT) return false;
    }
    return true;
  }
}

/** Both sides of an assignment, decoded. */
export async function load(token) {
  const sides = ["left", "right"].map(async (side) => {
    const blob = await api.image(token, side);
    return new Picture(await createImageBitmap(blob, { colorSpaceConversion: "none" }));
  });
  const [left, right] = await Promise.all(sides);
  return { left, right };
}
