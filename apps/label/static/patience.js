// Requests that wait out lost connections and ended sessions, so that an answer is never lost by them.

import * as api from "./api.js";
import { Refused, Unreachable } from "./api.js";
import { logInAgain } from "./dialogs.js";

const WAITS = [1, 2, 4, 8, 15]; // seconds between attempts; the last one again and again

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export class Patience {
  /** `answering` says whether a rater's answer hangs on the request. */
  constructor(study, view, answering) {
    this.study = study;
    this.view = view;
    this.answering = answering;
  }

  /** Calls until an answer comes. A refusal is thrown. `tries.count` counts requests whose fate is not known. */
  async call(request, tries = { count: 0 }) {
    for (let failed = 0, asked = 0; ; ) {
      try {
        const result = await request();
        if (failed) this.view.retrying(null);
        return result;
      } catch (error) {
        if (error instanceof Refused && error.status === 401) {
          await logInAgain(this.answering(), asked > 0);
          asked += 1;
          await this.#samePerson();
        } else if (error instanceof Unreachable || (error instanceof Refused && error.status === 429)) {
          if (error instanceof Unreachable) tries.count += 1;
          await this.#pause(Math.max(WAITS[Math.min(failed, WAITS.length - 1)], error.retryAfter ?? 0));
          failed += 1;
        } else {
          this.view.retrying(null);
          throw error;
        }
      }
    }
  }

  /** Waits before the next attempt: for its time, for the network, or for the rater who presses "Try now". */
  async #pause(seconds) {
    const now = new Promise((resolve) => {
      window.addEventListener("online", resolve, { once: true });
      this.view.retrying(this.answering() ? "Not saved yet: trying again" : "No connection: trying again", resolve);
    });
    await Promise.race([sleep(1000 * seconds), now]);
  }

  /** Somebody else who logged in here starts afresh; the answer was another person's, and is not sent as theirs. */
  async #samePerson() {
    const study = await api.study().catch(() => null);
    if (!study || study.rater.name === this.study.rater.name) return;
    sessionStorage.clear();
    location.reload();
    await new Promise(() => {});
  }
}
