// Dialogs. The browser keeps the focus inside an open one, closes it with Escape, and gives the focus back.

import { button, el } from "./dom.js";
import { COMMANDS } from "./keys.js";

const READ = "diffalign:guideline"; // the hash of the protocol whose guideline was read last; nothing else
const REASONS = ["A picture or text is missing or broken", "It could identify a person", "It is upsetting or offensive"];

let number = 0;

/** Opens a dialog; resolves to what it was closed with, "" for Escape. `actions` are [words, value, class]. */
function open(title, content, actions, { escape = true, name = "" } = {}) {
  const id = `dialog-${++number}`;
  const close = (value) => dialog.close(value);
  const foot = el("footer", {}, ...actions.map(([words, value, kind]) =>
    el("button", { type: "button", class: `action ${kind ?? ""}`, onclick: () => close(value) }, words)));
  const dialog = el("dialog", { class: `dialog ${name}`, "aria-labelledby": id },
    el("h2", { id }, title), el("div", { class: "content", tabindex: content.length ? 0 : null }, ...content), foot);
  document.getElementById("pane").append(dialog);
  return new Promise((resolve) => {
    dialog.addEventListener("cancel", (event) => !escape && event.preventDefault());
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue);
    });
    dialog.showModal();
    (foot.querySelector(".primary") ?? foot.lastElementChild)?.focus();
  });
}

const prose = (text) => el("div", { class: "prose", dir: "auto" }, text);

/** A guideline as paragraphs and items: its lines were broken for an editor, not for this width. */
function reflowed(text) {
  const blocks = [];
  for (const line of text.split("\n")) {
    const words = line.trim();
    const [, mark, rest] = /^(-|\d+[.)])\s+(.*)$/.exec(words) ?? [null, "", words];
    const last = blocks.at(-1);
    if (!words) blocks.push(null);
    else if (mark || !last) blocks.push({ mark, words: rest });
    else last.words += ` ${words}`;
  }
  return blocks.filter(Boolean).map(({ mark, words }) =>
    mark
      ? el("p", { class: "item" }, el("span", {}, mark === "-" ? "•" : mark), el("span", { dir: "auto" }, words))
      : el("p", { dir: "auto" }, words),
  );
}

/** What is asked and how to decide. `first` is before any work: then it says so. */
export async function guideline({ rules, sha256 }, first = false) {
  const parts = [el("p", { class: "question", dir: "auto" }, rules.question)];
  if (rules.guideline) parts.push(...reflowed(rules.guideline));
  if (rules.criteria.length) {
    const asked = rules.criteria.map(({ question, anchors }) =>
      el("li", { dir: "auto" }, question, anchors.length ? el("span", { class: "anchors" }, anchors.join(" · ")) : null));
    parts.push(el("h3", {}, "Asked beside it"), el("ol", {}, ...asked));
  }
  if (rules.points.length) {
    parts.push(el("p", {}, `Click on a place in a picture to mark it: ${rules.points.join(", ")}. Click on a mark to remove it.`));
  }
  parts.push(el("p", { class: "quiet" }, "Which side is which is drawn at random for every pair. Every answer is kept as soon as it says Saved; you can stop and come back at any time. Press ? for the keys."));
  await open(first ? "Before you start" : "Guideline", parts, [[first ? "Start" : "Close", "ok", "primary"]], { name: "guideline" });
  try {
    localStorage.setItem(READ, sha256);
  } catch {
    // A forbidden storage: the guideline opens again next time.
  }
}

/** Whether the guideline of this protocol was read in this browser. */
export function guidelineRead(sha256) {
  try {
    return localStorage.getItem(READ) === sha256;
  } catch {
    return false;
  }
}

/** All keys. */
export function help() {
  const groups = [...new Set(COMMANDS.map(([, , , group]) => group))].map((group) => {
    const rows = COMMANDS.filter((one) => one[3] === group).flatMap(([, words, pressed]) =>
      [el("dt", {}, ...pressed.map((key) => el("kbd", {}, key))), el("dd", {}, words)]);
    return el("section", {}, el("h3", {}, group), el("dl", {}, ...rows));
  });
  const mouse = el("p", { class: "quiet" }, "Mouse: the wheel zooms, a drag moves, the right button or Shift with a drag sets window (across) and level (down) of grey pictures, a double click shows the whole picture. Both sides always follow. In a question, arrows choose and Backspace takes the answer back.");
  return open("Keys", [el("div", { class: "groups" }, ...groups), mouse], [["Close", "ok", "primary"]], { name: "help" });
}

/** The whole of a long prompt. */
export const wholePrompt = (text) => open("Prompt", [prose(text)], [["Close", "ok", "primary"]], { name: "long" });

/** Why a pair is flagged; null where it is not. */
export async function flagReason() {
  const own = el("textarea", { rows: 2, maxlength: 2000, dir: "auto", id: "reason" });
  const choices = REASONS.map((reason, index) => {
    const input = el("input", { type: "radio", name: "reason", value: reason });
    input.checked = index === 0;
    return el("label", { class: "reason" }, input, el("span", {}, reason));
  });
  const content = [
    el("p", {}, "A flagged pair is taken out of the study for everybody. Answers that it has do not count."),
    el("div", { role: "radiogroup", "aria-label": "Reason" }, ...choices),
    el("label", { for: "reason" }, "In your own words (optional)"), own,
  ];
  const done = await open("Flag this pair?", content, [["Cancel", ""], ["Flag it", "flag", "primary danger"]], { name: "flagging" });
  if (done !== "flag") return null;
  const chosen = choices.map((label) => label.firstChild).find((input) => input.checked);
  return [chosen?.value, own.value.trim()].filter(Boolean).join(": ");
}

/** Waits until the rater says that they have logged in again, in another tab. */
export function logInAgain(kept) {
  const link = el("a", { href: "/login", target: "_blank", rel: "noopener" }, "Log in in a new tab");
  const content = [
    el("p", {}, kept ? "Your session is over. Your answer is kept here and will be saved once you have logged in." : "Your session is over."),
    el("p", {}, link, ", then come back here."),
  ];
  return open("Please log in again", content, [["I have logged in", "ok", "primary"]], { escape: false, name: "login" });
}
