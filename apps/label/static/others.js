// What raters answered, for an adjudicator: in terms of the sides as they stand now.

import { el } from "./dom.js";

const WORDS = { left: "Left better", right: "Right better", tie: "Same", tie_good: "Both good", tie_bad: "Both bad", cannot_judge: "Cannot judge" };
const STRENGTHS = ["slightly", "clearly", "much"];

function value(given) {
  if (typeof given === "string") return WORDS[given] ?? given;
  return `left ${given.left}, right ${given.right}`;
}

/** The verdicts as a list of cards. */
export function others(verdicts, protocol) {
  const cards = verdicts.map(({ rater, choice, strength, criteria, comment }) => {
    const asked = protocol.criteria.filter(({ name }) => criteria?.[name] !== undefined);
    const rows = asked.flatMap(({ name }) => [el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, value(criteria[name]))]);
    return el("li", { class: `verdict ${choice}` },
      el("p", { class: "who" }, el("bdi", {}, rater)),
      el("p", { class: "said" }, WORDS[choice] ?? choice, strength ? el("span", { class: "quiet" }, ` ${STRENGTHS[strength - 1]}`) : null),
      rows.length ? el("dl", {}, ...rows) : null,
      comment ? el("p", { class: "comment", dir: "auto" }, comment) : null);
  });
  return el("section", { class: "others", "aria-label": "What raters answered" }, el("h3", {}, "Raters disagree"), el("ul", {}, ...cards));
}
