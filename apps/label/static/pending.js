// The answer that is on its way, kept so that it outlives a reload of the page in this tab.

const NAME = "diffalign:pending";

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
