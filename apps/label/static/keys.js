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
  ["undo", "Take back the last answer", ["U"], "Pair"],
  ["skip", "Skip: this pair comes again later", ["S"], "Pair"],
  ["flag", "Flag: this pair is broken", ["F"], "Pair"],
  ["comment", "Write a comment", ["C"], "Pair"],
  ["panel", "Show or hide the questions", ["D"], "Pair"],
  ["guideline", "Read the guideline", ["G"], "Pair"],
  ["help", "This list", ["?"], "Pair"],
  ["zoomIn", "Closer", ["+"], "View"],
  ["zoomOut", "Further away", ["−"], "View"],
  ["zoomReset", "Whole picture", ["Z"], "View"],
  ["invert", "Invert the greys", ["I"], "View"],
  ["crisp", "Smooth, or single pixels", ["X"], "View"],
  ["nextLabel", "Next kind of mark", ["P"], "View"],
  ["reset", "Everything as it was", ["R"], "View"],
];

const BY_KEY = {
  ArrowLeft: "left", ArrowRight: "right", "?": "help", "+": "zoomIn", "=": "zoomIn", "-": "zoomOut", "−": "zoomOut",
  j: "slightly", k: "clearly", l: "much", u: "undo", s: "skip", f: "flag", c: "comment", d: "panel", g: "guideline",
  z: "zoomReset", i: "invert", x: "crisp", p: "nextLabel", r: "reset",
};
const BY_DIGIT = { 1: "left", 2: "right", 3: "tie_good", 4: "tie_bad", 0: "cannot_judge" };

/** The command of a key press, or undefined. A digit counts by its place, so that French keyboards need no Shift. */
export function command(event) {
  if (event.repeat || event.isComposing || event.ctrlKey || event.altKey || event.metaKey) return undefined;
  const target = event.composedPath()[0];
  if (target instanceof Element && target.closest("textarea, select, [contenteditable], input:not([type=radio])")) {
    return undefined;
  }
  if (document.querySelector("dialog[open]")) return undefined;
  // Arrows move within a group of choices, and the cross in a picture that has the focus.
  if (event.key.startsWith("Arrow") && target instanceof Element && target.closest("input, [data-arrows]")) {
    return undefined;
  }
  const digit = /^[0-9]$/.test(event.key) ? event.key : /^Digit([0-9])$/.exec(event.shiftKey ? "" : event.code)?.[1];
  if (digit !== undefined && !(event.key in BY_KEY)) return BY_DIGIT[digit];
  return BY_KEY[event.key.length === 1 ? event.key.toLowerCase() : event.key];
}

/** Calls `act` with every command; true means that the key was used. */
export function listen(act) {
  document.addEventListener("keydown", (event) => {
    const name = command(event);
    if (name !== undefined && act(name)) event.preventDefault();
  });
}
