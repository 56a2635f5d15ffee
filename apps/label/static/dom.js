// Makes elements. Whatever comes from the server goes in as text: nothing here, or in any file beside it, reads HTML.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  left: "M14 5 7 12l7 7M7 12h12",
  right: "M10 5l7 7-7 7M17 12H5",
  good: "M5 12.5l4.5 4.5L19 7.5",
  bad: "M6 6l12 12M18 6 6 18",
  unknown: "M9 9.2a3 3 0 1 1 4.4 2.7c-.9.5-1.4 1.1-1.4 2.3M12 17.6v.2",
  plus: "M12 6v12M6 12h12",
  minus: "M6 12h12",
  invert: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  crisp: "M5 5h7v7H5zM12 12h7v7h-7z",
  reset: "M6 8a8 8 0 1 1-1.6 6M6 3.5V8h4.5",
  mark: "M12 21s-6-5.6-6-11a6 6 0 1 1 12 0c0 5.4-6 11-6 11zM12 12.2v-.1",
  panel: "M4 5h16v14H4zM14 5v14",
  undo: "M8 5 4 9l4 4M4 9h9a6 6 0 0 1 0 12h-3",
  skip: "M5 6l7 6-7 6zM13 6l6 6-6 6z",
  flag: "M6 21V4M6 5h11l-2 4 2 4H6",
  book: "M12 6c-2-1.4-4.600-1.700-8-1.500v13.500c3.400-.2 6 .1 8 1.500 2-1.400 4.600-1.700 8-1.500V4.500c-3.400-.2-6 .1-8 1.500zM12 6v13.500",
  theme: "M12 4v2M12 18v2M4 12h2M18 12h2M6.500 6.500l1.300 1.300M16.200 16.200l1.300 1.300M17.500 6.500l-1.300 1.300M7.800 16.200l-1.300 1.300M12 8.500a3.500 3.500 0 1 0 0 7 3.500 3.500 0 0 0 0-7z",
  person: "M12 12a4 4 0 1 0 0-8 4 4 0 0 0 0 8zM4.500 20c1-3.500 4-5 7.500-5s6.500 1.500 7.500 5",
};

/** An element with a class, attributes, listeners (`onclick`), and children; a text among them is shown as it is. */
export function el(tag, { class: names = "", ...rest } = {}, ...children) {
  const made = document.createElement(tag);
  if (names) made.className = names;
  for (const [name, value] of Object.entries(rest)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A line drawing of 24 units, in the colour of the text; says nothing to a screen reader. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" })) {
    drawing.setAttribute(key, value);
  }
  path.setAttribute("d", ICONS[name]);
  drawing.append(path);
  return drawing;
}

/** The keys of a button, as they are printed on it. */
export function keys(...names) {
  return el("span", { class: "keys", "aria-hidden": "true" }, ...names.map((name) => el("kbd", {}, name)));
}

/**
 * A button that does not take the focus from where it was when a pointer presses it: else the next space bar or Enter
 * would press it again, and arrows would go to it.
 */
export function button(options, ...children) {
  const made = el("button", { type: "button", ...options }, ...children);
  made.addEventListener("pointerdown", (event) => event.button === 0 && event.preventDefault());
  made.addEventListener("mousedown", (event) => event.preventDefault());
  return made;
}

/** Waits until what was changed is on the screen: the frame after the next one has begun. */
export function painted() {
  return new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
}

/** The beginning of a text, cut between characters, never within one. */
export function beginning(text, length) {
  if (text.length <= length) return text;
  const last = text.charCodeAt(length - 1);
  return text.slice(0, last >= 0xd800 && last < 0xdc00 ? length - 1 : length);
}
