// Talks to the server. Tells apart what matters to a rater: refused (a sentence), log in again, not reached.

const LONGEST_WAIT = 20_000; // ms

/** The server said no, in a sentence. */
export class Refused extends Error {
  constructor(status, message, retryAfter = 0) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** No answer came, or none that can be understood: whether the request was carried out is not known. */
export class Unreachable extends Error {}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, {
      credentials: "same-origin",
      cache: "no-store",
      redirect: "manual",
      signal: AbortSignal.timeout(LONGEST_WAIT),
      ...options,
    });
  } catch (error) {
    throw new Unreachable(String(error));
  }
  if (response.type === "opaqueredirect") throw new Refused(401, "Please log in again.");
  if (response.status >= 500) throw new Unreachable(`the server answered ${response.status}`);
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    const sentence = typeof said.error === "string" && said.error ? said.error[0].toUpperCase() + said.error.slice(1) : `The server answered ${response.status}.`;
    throw new Refused(response.status, sentence, Number(response.headers.get("Retry-After")) || 0);
  }
  return response;
}

async function json(path, options) {
  const response = await request(path, options);
  try {
    return await response.json();
  } catch (error) {
    throw new Unreachable(String(error));
  }
}

function post(path, body) {
  const headers = { "Content-Type": "application/json", "X-Diffalign": "1" };
  return json(path, { method: "POST", headers, body: JSON.stringify(body) });
}

const from = (queue) => `?queue=${encodeURIComponent(queue)}`;

export const study = () => json("/api/study");
export const turn = (queue) => json(`/api/turn${from(queue)}`);
export const vote = (queue, body) => post(`/api/vote${from(queue)}`, body);
export const undo = (queue) => post(`/api/undo${from(queue)}`, {});
export const unflag = (queue) => post(`/api/unflag${from(queue)}`, {});
export const skip = (queue, token) => post(`/api/skip${from(queue)}`, { token });
export const flag = (queue, token, reason) => post(`/api/flag${from(queue)}`, { token, reason });

/** The bytes of one side. */
export async function image(token, side) {
  const response = await request(`/api/image/${encodeURIComponent(token)}/${side}`);
  try {
    return await response.blob();
  } catch (error) {
    throw new Unreachable(String(error));
  }
}

/** Ends the session on the server, whatever it answers. */
export async function logOut() {
  const headers = { "Content-Type": "application/json", "X-Diffalign": "1" };
  await fetch("/logout", { method: "POST", headers, body: "{}", redirect: "manual" }).catch(() => null);
}
