// The work itself: a pair is shown, looked at, answered, saved, and only then followed by the next one. The server's
// database is the truth; this page keeps the pair on the screen, its draft, and an answer that is on its way.

import * as api from "./api.js";
import { Refused, Unreachable } from "./api.js";
import { painted } from "./dom.js";
import { Patience } from "./patience.js";
import * as pending from "./pending.js";
import * as pictures from "./pictures.js";

const SETTLE = 120; // ms after a pair is shown before it can be answered: a second press was meant for the last one
const DOUBLE = 500; // ms in which a second click at the same place is a double click
const SLOW = 400; // ms after which a rater is told that saving takes a moment
const LOADED = 4; // pairs whose pixels are kept
const BROKEN = "This pair cannot be shown. Flag it, or skip it.";

export class Rating {
  /** `view` is the screen: see screen.js. */
  constructor(study, queue, view) {
    this.study = study;
    this.queue = queue;
    this.view = view;
    this.loaded = new Map();
    this.turn = null;
    this.shown = null; // {token, at (s since 1970), clock (ms of the page), ready}
    this.busy = true;
    this.skipped = new Set();
    this.patience = new Patience(study, view, () => Boolean(this.pending));
    this.whose = `${queue} ${study.rater.name}`;
    this.flagged = pending.storedFlag() === this.whose; // a flag was the last thing done: undo takes it back
  }

  async start() {
    const waiting = pending.stored();
    if (waiting && waiting.rater !== this.study.rater.name) pending.keep(null); // another person's is not sent as theirs
    else if (waiting?.queue === this.queue) {
      // Sent before anything is asked for: a turn might take the pair away, because its time was over.
      this.pending = waiting;
      this.#lock("saving");
      await this.#deliver(1);
    }
    if (!this.turn) {
      this.#lock("loading");
      await this.show(await this.patience.call(() => api.turn(this.queue)));
    }
    document.addEventListener("visibilitychange", () => !document.hidden && this.refresh());
    this.#keepLease();
  }

  // --- showing ---

  /** Shows what the server says is to be judged now, and loads what comes after it. */
  async show(turn) {
    this.turn = turn;
    this.view.progress(turn.progress);
    this.#undoes();
    const { now, ahead } = turn;
    if (!now) return this.#over(turn);
    if (now.protocol !== this.study.sha256 && !(await this.#sameProtocol(now))) return;
    if (this.shown?.token !== now.token) await this.#display(now);
    this.#unlock();
    if (ahead) this.#load(ahead).catch(() => null); // tried again when its turn comes
  }

  /** Nothing is left; who may do more than compare pairs is told what else there is now. */
  #over(turn) {
    this.shown = null;
    this.#lock("over");
    this.view.end(turn.progress, this.study);
    this.busy = false;
    if (this.study.queues.length === 1) return;
    api.study().then((now) => this.turn === turn && this.view.end(turn.progress, now), () => null); // the links are there
  }

  async #display(now) {
    this.#lock("loading");
    this.shown = null;
    let content = null;
    try {
      content = await this.patience.call(() => this.#load(now));
    } catch (error) {
      const turn = error instanceof Refused ? await this.patience.call(() => api.turn(this.queue)) : this.turn;
      if (turn.now?.token !== now.token) return this.show(turn); // flagged by others, or given away meanwhile
      this.view.say(BROKEN, "problem");
    }
    this.view.show(now, content);
    await painted();
    const least = 1000 * this.study.protocol.min_view_seconds;
    const wait = Math.max(SETTLE, least);
    const shown = { token: now.token, at: Date.now() / 1000, clock: performance.now(), ready: false, whole: Boolean(content) };
    this.shown = shown;
    if (shown.whole) {
      this.view.wait(wait, least);
      setTimeout(() => {
        if (this.shown !== shown) return;
        shown.ready = true;
        if (!this.busy) this.view.state("ready");
      }, wait);
    }
  }

  /** The decoded pictures, or the texts; from what was loaded in advance where it was. */
  #load(assignment) {
    const { token, kind, left, right } = assignment;
    if (kind === "text") {
      const whole = typeof left === "string" && typeof right === "string";
      return whole ? Promise.resolve({ left, right }) : Promise.reject(new Error("a text of this pair cannot be read"));
    }
    let coming = this.loaded.get(token);
    if (!coming) {
      coming = pictures.load(token);
      coming.catch(() => this.loaded.delete(token));
      this.loaded.set(token, coming);
      for (const old of [...this.loaded.keys()].slice(0, -LOADED)) this.loaded.delete(old);
    }
    return coming;
  }

  /** Whether the pair follows the protocol of this page. A pair of an earlier version goes back into the queue. */
  async #sameProtocol(now) {
    const { sha256 } = await this.patience.call(() => api.study());
    if (sha256 !== this.study.sha256) {
      location.reload();
      return false;
    }
    if (this.skipped.has(now.token)) {
      this.view.say("The questions were changed, and this pair could not be put back. Please reload the page.", "problem");
      return false;
    }
    this.skipped.add(now.token);
    await this.#act(() => api.skip(this.queue, now.token), "The questions were changed meanwhile. Here is the next pair.");
    return false;
  }

  // --- answering ---

  /** An answer to the pair on the screen. Anything that comes before the last one is saved is dropped. */
  async vote(choice, event) {
    if (this.busy || !this.shown) return;
    if (!this.shown.ready) {
      if (!this.shown.whole) this.view.say(BROKEN, "problem");
      else if (!this.#isEcho(event)) this.view.early(choice);
      return;
    }
    if (this.#isEcho(event)) return;
    const [first] = this.view.form.missing(choice);
    if (first) return this.view.missing(this.view.form.missing(choice));
    const { token, at, clock } = this.shown;
    const decided = at + (performance.now() - clock) / 1000;
    const answer = { token, ...this.view.form.answer(choice), shown_at: at, decided_at: decided };
    this.pending = { token, queue: this.queue, rater: this.study.rater.name, done: this.turn.progress.done, answer };
    pending.keep(this.pending);
    this.#lock("saving", choice);
    await this.#deliver(0);
  }

  #isEcho(event) {
    return Boolean(event && event.detail > 1 && performance.now() - (this.shown?.clock ?? 0) < DOUBLE);
  }

  /** Sends the pending answer until the server has said what became of it. */
  async #deliver(attempts) {
    const slow = setTimeout(() => this.view.say("Saving…", "wait"), SLOW);
    const tries = { count: attempts };
    try {
      const turn = await this.patience.call(() => api.vote(this.queue, this.pending.answer), tries);
      await this.#delivered(turn, "Saved");
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (error.status === 400 || error.status === 413 || error.status === 403) {
        // Not taken as it is: it stays on the screen, to be changed.
        this.pending = null;
        pending.keep(null);
        this.view.say(error.message, "problem");
        this.#unlock();
        return;
      }
      const turn = await this.patience.call(() => api.turn(this.queue));
      // An attempt whose answer got lost may have arrived: then there is one vote more, and the pair is not ours now.
      const arrived = tries.count > 0 && turn.progress.done > this.pending.done;
      await this.#delivered(turn, arrived ? "Saved" : error.message, arrived ? "saved" : "problem");
    } finally {
      clearTimeout(slow);
    }
  }

  async #delivered(turn, words, kind = "saved") {
    this.view.form.forget(this.pending.token);
    this.pending = null;
    pending.keep(null);
    this.#flag(false);
    this.view.say(words, kind);
    if (turn.now?.token === this.shown?.token) this.shown = null; // shown anew, as another question
    await this.show(turn);
  }

  // --- the other buttons ---

  async undo() {
    if (this.busy) return;
    if (!this.#undoable) return this.view.say("There is nothing to take back", "problem");
    if (!this.flagged) await this.#act(() => api.undo(this.queue), "Taken back: answer it again");
    else if (!(await this.#act(() => api.unflag(this.queue), "The flag is taken back: here is the pair again"))) this.#flag(false);
  }

  async skip() {
    if (this.busy || !this.shown) return;
    await this.#act(() => api.skip(this.queue, this.shown.token), "Skipped: it comes again later");
  }

  /** `token` is the pair that was on the screen when the rater was asked for the reason. */
  async flag(token, reason) {
    if (this.busy || this.shown?.token !== token) {
      this.view.say("Not flagged: the pair changed while you were asked why.", "problem");
      return;
    }
    await this.#act(() => api.flag(this.queue, token, reason), "Flagged: it is out of the study. Undo takes that back", true);
  }

  /** Remembers whether a flag was the last thing done. */
  #flag(last) {
    this.flagged = last;
    pending.keepFlag(last ? this.whose : null);
    this.#undoes();
  }

  get #undoable() {
    return this.flagged || (this.turn?.progress.done ?? 0) > 0;
  }

  #undoes() {
    this.view.undoes(this.flagged, this.#undoable);
  }

  /** One request, never repeated by itself: a second undo would take back one answer more. Where it got lost, the
   * server is asked how things stand, and the rater is told to press again if nothing has happened. `flags` is whether
   * it is a flag that is the last thing done after it. Returns whether it was not refused. */
  async #act(call, words, flags = false) {
    const before = this.turn?.now?.token;
    this.#lock("saving");
    try {
      const turn = await call();
      this.#flag(flags);
      this.view.say(words);
      await this.show(turn);
    } catch (error) {
      if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
      const turn = await this.patience.call(() => api.turn(this.queue));
      const refused = error instanceof Refused && error.status !== 401;
      if (refused) this.view.say(error.message, "problem");
      else if (turn.now?.token === before) this.view.say("That did not arrive. Please press it again.", "problem");
      else this.#flag(flags);
      await this.show(turn);
      return !refused;
    }
    return true;
  }

  /** Asks whether this pair is still ours, which also prolongs its time; another one replaces it with a sentence. */
  async refresh() {
    if (this.busy || !this.shown || this.refreshing) return;
    this.refreshing = true;
    try {
      const before = this.shown.token;
      const turn = await api.turn(this.queue);
      if (this.busy || this.shown?.token !== before) return;
      if (turn.now?.token !== before) this.view.say("That pair was answered elsewhere, or its time was over. Here is the next one.", "problem");
      await this.show(turn);
    } catch (error) {
      if (!(error instanceof Unreachable || error instanceof Refused)) throw error; // the next answer will tell
    } finally {
      this.refreshing = false;
    }
  }

  /** A rater who is here keeps the pair: asked for again at a third of the lease, if anything was touched since. */
  #keepLease() {
    let active = false;
    for (const type of ["pointermove", "keydown", "wheel"]) {
      document.addEventListener(type, () => { active = true; }, { passive: true });
    }
    setInterval(() => {
      if (active && !document.hidden) this.refresh();
      active = false;
    }, Math.max(10_000, 20_000 * this.study.protocol.lease_minutes));
  }

  #lock(state, choice = null) {
    this.busy = true;
    this.view.state(state, choice);
  }

  #unlock() {
    this.busy = false;
    this.view.state(this.shown?.ready ? "ready" : this.shown?.whole ? "waiting" : "broken");
  }
}
