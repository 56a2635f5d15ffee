// Dialogs. The browser keeps the focus inside an open one, closes it with Escape, and gives the focus back.

import { el, keys } from "./dom.js";
import { COMMANDS, MOUSE, digit } from "./keys.js";

const READ = "diffalign:guideline"; // the hash of the protocol whose guideline was read last; nothing else
const REASONS = ["A picture or text is missing or broken", "It could identify a person", "It is upsetting or offensive"];

let number = 0;

/**
 * Opens a dialog; resolves to what it was closed with, "" for Escape. `actions` are [words, value, class]; `allowed(value)`
 * says whether it may be closed with that, `pressed(event, close)` hears of keys, `focus` is where the focus goes.
 */
function open(title, content, actions, { escape = true, name = "", focus = null, allowed = () => true, pressed = null } = {}) {
  const id = `dialog-${++number}`;
  const close = (value) => allowed(value) && dialog.close(value);
  const foot = el("footer", {}, ...actions.map(([words, value, kind]) =>
    el("button", { type: "button", class: `action ${kind ?? ""}`, onclick: () => close(value) }, words)));
  const dialog = el("dialog", { class: `dialog ${name}`, "aria-labelledby": id },
    el("h2", { id }, title), el("div", { class: "content", tabindex: content.length ? 0 : null }, ...content), foot);
  document.getElementById("pane").append(dialog);
  return new Promise((resolve) => {
    dialog.addEventListener("cancel", (event) => !escape && event.preventDefault());
    dialog.addEventListener("keydown", (event) => pressed?.(event, close));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue);
    });
    dialog.showModal();
    (focus ?? foot.querySelector(".primary") ?? foot.lastElementChild)?.focus();
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

/** All keys, and what the mouse does, of what this study has. */
export function help({ criteria, points, strength }) {
  const has = { Questions: criteria.length > 0, Marks: points.length > 0 };
  const all = [
    ...COMMANDS.filter(([name]) => strength || !["slightly", "clearly", "much"].includes(name))
      .map(([, words, pressed, group]) => [group, words, pressed.map((key) => el("kbd", {}, key))]),
    ...MOUSE.map(([gesture, words, group]) => [group, words, [el("span", { class: "gesture" }, gesture)]]),
  ];
  const groups = [...new Set(all.map(([group]) => group))].filter((group) => has[group] ?? true).map((group) =>
    el("section", {}, el("h3", {}, group), el("dl", {}, ...all.filter(([name]) => name === group)
      .flatMap(([, words, pressed]) => [el("dt", {}, ...pressed), el("dd", {}, words)]))));
  return open("Keys and mouse", [el("div", { class: "groups" }, ...groups)], [["Close", "ok", "primary"]], { name: "help" });
}

/** The whole of a long prompt. */
export const wholePrompt = (text) => open("Prompt", [prose(text)], [["Close", "ok", "primary"]], { name: "long" });

/** Why a pair is flagged; null where it is not. A reason has to be given: one key too many must not flag a pair. */
export async function flagReason() {
  const own = el("textarea", { rows: 2, maxlength: 2000, dir: "auto", id: "reason" });
  const choices = REASONS.map((reason, index) =>
    el("label", { class: "reason" }, el("input", { type: "radio", name: "reason", value: reason, "aria-keyshortcuts": index + 1 }),
      el("span", {}, reason), keys(String(index + 1))));
  const inputs = choices.map((label) => label.firstChild);
  const needed = el("p", { class: "needed", role: "alert" });
  const reason = () => [inputs.find((input) => input.checked)?.value, own.value.trim()].filter(Boolean).join(": ");
  const content = [
    el("p", {}, "A flagged pair is taken out of the study for everybody, and the answers that it has do not count. Skip a pair that you only want to see later."),
    el("div", { role: "radiogroup", "aria-label": "Reason" }, ...choices),
    el("label", { for: "reason" }, "Or in your own words"), own, needed,
  ];
  const allowed = (value) => {
    if (value !== "flag" || reason()) return true;
    needed.textContent = "Choose a reason, or write one.";
    inputs[0].focus();
    return false;
  };
  const pressed = (event, close) => {
    if (event.target === own || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    const chosen = inputs[Number(digit(event)) - 1];
    if (chosen) {
      chosen.checked = true;
      chosen.focus();
    } else if (event.key === "Enter" && inputs.includes(event.target)) close("flag");
    else return;
    event.preventDefault();
  };
  const done = await open("Flag this pair?", content, [["Cancel", ""], ["Flag it", "flag", "primary danger"]],
    { name: "flagging", focus: inputs[0], allowed, pressed });
  return done === "flag" ? reason() : null;
}

/** Waits until the rater says that they have logged in again, in another tab; `again` where they said so in vain. */
export function logInAgain(kept, again) {
  const link = el("a", { href: "/login", target: "_blank", rel: "noopener" }, "Log in in a new tab");
  const content = [
    again ? el("p", { class: "needed", role: "alert" }, "You are still logged out.") : null,
    el("p", {}, "Your session is over: its time ended, or your account was changed or removed."),
    kept ? el("p", {}, el("strong", {}, "Your answer is not saved yet. It is kept in this tab"), " and will be saved once you are logged in under the same name.") : null,
    el("ol", {}, el("li", {}, link, "."), el("li", {}, "Come back to this tab, and press the button below."),
      el("li", {}, "If your name or password is refused, ask whoever runs the study, and leave this tab open until then.")),
  ].filter(Boolean);
  return open("Please log in again", content, [["I have logged in", "ok", "primary"]], { escape: false, name: "login" });
}
