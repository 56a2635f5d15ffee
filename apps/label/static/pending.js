// The answer that is on its way, and whether a flag came last: kept so that they outlive a reload of the page in this tab.

const NAME = "diffalign:pending";
const FLAGGED = "diffalign:flagged";

/** The answer that was on its way when the page was left; null where there was none. */
export function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(NAME));
  } catch {
    return null;
  }
}

/** Keeps an answer, or forgets it (null). */
export function keep(pending) {
  try {
    if (pending) sessionStorage.setItem(NAME, JSON.stringify(pending));
    else sessionStorage.removeItem(NAME);
  } catch {
    // A forbidden storage: the answer lives as long as the page.
  }
}

/** Keeps that a flag was the last thing that a rater did in a queue, so that undo takes that back; null forgets it. */
export function keepFlag(whose) {
  try {
    if (whose) sessionStorage.setItem(FLAGGED, whose);
    else sessionStorage.removeItem(FLAGGED);
  } catch {
    // A forbidden storage: it is known as long as the page lives.
  }
}

/** Whose flag, in which queue, was the last thing done before the page was left. */
export function storedFlag() {
  try {
    return sessionStorage.getItem(FLAGGED);
  } catch {
    return null;
  }
}
