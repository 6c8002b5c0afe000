// The HTTP API: one request after the other until there is an answer that says what happened, or patience runs out.
//
// A 503 says that this attempt did nothing, but for OUTCOME_UNKNOWN; that one, and a connection that breaks, leave it open. All
// of them are asked again with the same Idempotency-Key, so that whatever happened happens once.

const BASE = new URL("api/v1/", document.baseURI);
const ANSWER_MS = 8_000; // the server answers within 5 s, if only that it doesn't know
const PATIENCE_MS = 12_000; // for one press of a button, all attempts together
const FIRST_WAIT_MS = 300;
const LONGEST_WAIT_MS = 3_000;

// What came of a request. `data` where it is `ok`, else `code`, `message` and `details`. `wasInDoubt`: an earlier attempt
// may have done it. `isReplay`: the first answer again. `sent` and `received` are instants of our clock.
export class Outcome {
  constructor(fields) {
    this.ok = false;
    this.data = null;
    this.code = "";
    this.message = "";
    this.details = [];
    this.retryAfterMs = 0;
    this.isReplay = false;
    this.wasInDoubt = false;
    Object.assign(this, fields);
  }

  get leavesItOpen() {
    return this.code === "UNREACHABLE" || this.code === "OUTCOME_UNKNOWN";
  }

  get isWorthRetrying() {
    return this.leavesItOpen || this.status === 503 || this.status === 429;
  }
}

export class Api {
  constructor(identity, clock) {
    this.identity = identity;
    this.clock = clock;
  }

  // One attempt.
  get(path) {
    return this.#attempt("GET", path, {});
  }

  // As many attempts as patience allows; `onWait(outcome)` is told of each one that will be followed by another.
  async act(method, path, { key = null, json = null, onWait = () => {} } = {}) {
    const until = this.clock.local() + PATIENCE_MS;
    let wasInDoubt = false;
    for (let wait = FIRST_WAIT_MS; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
      const outcome = await this.#attempt(method, path, { key, json });
      outcome.wasInDoubt = wasInDoubt;
      if (!outcome.isWorthRetrying) return outcome;
      wasInDoubt ||= outcome.leavesItOpen;
      // Full jitter: those who were refused together must not come back together.
      const pause = outcome.retryAfterMs + wait * Math.random();
      if (this.clock.local() + pause > until) return outcome;
      onWait(outcome);
      await new Promise((done) => setTimeout(done, pause));
    }
  }

  async #attempt(method, path, { key, json }) {
    const headers = { Accept: "application/json", ...this.identity.headers() };
    if (key) headers["Idempotency-Key"] = key;
    if (json) headers["Content-Type"] = "application/json";
    const giveUp = new AbortController();
    const timer = setTimeout(() => giveUp.abort(), ANSWER_MS);
    const sent = this.clock.local();
    try {
      const response = await fetch(new URL(path, BASE), {
        method, headers, body: json ? JSON.stringify(json) : undefined, signal: giveUp.signal, cache: "no-store",
      });
      const received = this.clock.local();
      this.clock.saw(Date.parse(response.headers.get("Date") ?? ""), 1000, sent, received);
      const body = await response.json();
      const error = body.error ?? {};
      return new Outcome({
        ok: body.success === true,
        status: response.status,
        data: body.data ?? null,
        code: error.code ?? "",
        message: error.message ?? "",
        details: error.details ?? [],
        retryAfterMs: 1000 * (Number(response.headers.get("Retry-After")) || 0),
        isReplay: response.headers.get("Idempotency-Replayed") === "true",
        sent,
        received,
      });
    } catch {
      // No answer, half an answer, or a proxy's page where ours should be.
      return new Outcome({ code: "UNREACHABLE", status: 0, sent, received: this.clock.local() });
    } finally {
      clearTimeout(timer);
    }
  }
}
