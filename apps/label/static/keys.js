// The keyboard. A key is a command only where nobody is typing, no dialog is open and nothing but Shift is held.

/** What each command is called, its keys as they are printed, and where it is listed in the help. */
export const COMMANDS = [
  ["left", "Left is better", ["1", "←"], "Answer"],
  ["right", "Right is better", ["2", "→"], "Answer"],
  ["tie_good", "Both are good", ["3"], "Answer"],
  ["tie_bad", "Both are bad", ["4"], "Answer"],
  ["cannot_judge", "Cannot judge", ["0"], "Answer"],
  ["slightly", "Slightly better (before 1 or 2)", ["J"], "Answer"],
  ["clearly", "Clearly better", ["K"], "Answer"],
  ["much", "Much better", ["L"], "Answer"],
  ["questions", "Into the questions: digits answer them", ["Q"], "Questions"],
  ["", "There: left, right, the same; on a scale its number", ["1", "2", "3"], "Questions"],
  ["", "No answer to this one", ["0"], "Questions"],
  ["", "Next one", ["↵"], "Questions"],
  ["", "Take the answer back", ["⌫"], "Questions"],
  ["", "Back to the pair", ["Esc"], "Questions"],
  ["undo", "Take back the last answer, or flag", ["U"], "Pair"],
  ["skip", "Skip: this pair comes again later", ["S"], "Pair"],
  ["flag", "Flag: this pair is broken", ["F"], "Pair"],
  ["comment", "Write a comment", ["C"], "Pair"],
  ["panel", "Show or hide questions and comment", ["D"], "Pair"],
  ["guideline", "Read the guideline", ["G"], "Pair"],
  ["help", "This list", ["?"], "Pair"],
  ["zoomIn", "Closer, larger letters", ["+"], "View"],
  ["zoomOut", "Further away, smaller letters", ["−"], "View"],
  ["zoomReset", "Whole picture", ["Z"], "View"],
  ["invert", "Invert the greys", ["I"], "View"],
  ["crisp", "Smooth, or single pixels", ["X"], "View"],
  ["reset", "Everything as it was", ["R"], "View"],
  ["nextLabel", "Next kind of mark", ["P"], "Marks"],
];

/** The same for the mouse. */
export const MOUSE = [
  ["Wheel", "Zoom, both sides together", "Mouse"],
  ["Drag", "Move, both sides together", "Mouse"],
  ["Shift + drag", "Window (across) and level (down) of grey pictures; so does the right button", "Mouse"],
  ["Double click", "Whole picture", "Mouse"],
  ["Click", "Mark a place; on a mark: remove it", "Marks"],
];

const BY_KEY = {
  ArrowLeft: "left", ArrowRight: "right", "?": "help", "+": "zoomIn", "=": "zoomIn", "-": "zoomOut", "−": "zoomOut",
  j: "slightly", k: "clearly", l: "much", q: "questions", u: "undo", s: "skip", f: "flag", c: "comment", d: "panel",
  g: "guideline", z: "zoomReset", i: "invert", x: "crisp", p: "nextLabel", r: "reset",
};
const BY_DIGIT = { 1: "left", 2: "right", 3: "tie_good", 4: "tie_bad", 0: "cannot_judge" };

/** The digit of a key press, or undefined. It counts by its place, so that French keyboards need no Shift. */
export function digit(event) {
  if (event.key in BY_KEY) return undefined;
  return /^[0-9]$/.test(event.key) ? event.key : /^Digit([0-9])$/.exec(event.shiftKey ? "" : event.code)?.[1];
}

/** The command of a key press, or undefined. */
export function command(event) {
  if (event.defaultPrevented || event.repeat || event.isComposing || event.ctrlKey || event.altKey || event.metaKey) return undefined;
  const target = event.composedPath()[0];
  if (target instanceof Element && target.closest("textarea, select, [contenteditable], input:not([type=radio])")) {
    return undefined;
  }
  if (document.querySelector("dialog[open]")) return undefined;
  // Arrows move within a group of choices, and the cross in a picture that has the focus.
  if (event.key.startsWith("Arrow") && target instanceof Element && target.closest("input, [data-arrows]")) {
    return undefined;
  }
  const pressed = digit(event);
  if (pressed !== undefined) return BY_DIGIT[pressed];
  return BY_KEY[event.key.length === 1 ? event.key.toLowerCase() : event.key];
}

/** Calls `act` with every command; true means that the key was used. */
export function listen(act) {
  document.addEventListener("keydown", (event) => {
    const name = command(event);
    if (name !== undefined && act(name)) event.preventDefault();
  });
}
