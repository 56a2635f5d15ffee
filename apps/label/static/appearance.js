// Light or dark: what the rater chose in this browser, else what the browser prefers. It never depends on a pair, so that
// nothing jumps between two of them; pictures stand in a dark surround in both.

const NAME = "diffalign:appearance"; // login.js reads it, too
export const CHOICES = ["auto", "light", "dark"];

const light = matchMedia("(prefers-color-scheme: light)");

/** What was chosen in this browser; "auto" where nothing was. */
export function chosen() {
  try {
    const name = localStorage.getItem(NAME);
    return CHOICES.includes(name) ? name : "auto";
  } catch {
    return "auto";
  }
}

/** Keeps a choice. */
export function choose(name) {
  try {
    localStorage.setItem(NAME, name);
  } catch {
    // A forbidden storage: the choice holds for this page.
  }
}

/** Shows the page so. */
export function show(pane, name) {
  const wanted = name === "auto" ? (light.matches ? "light" : "dark") : name;
  pane.dataset.theme = wanted;
  document.documentElement.style.colorScheme = wanted;
}

/** Calls `act` when the browser prefers something else. */
export const onchange = (act) => light.addEventListener("change", act);
