// The live feed: a WebSocket that resumes where it broke off, and polling for as long as there is none.
//
// States: connecting (at first) -> live <-> resuming -> polling or offline (the socket can't be opened) -> live.
// Attempts go on in all of them, each later than the one before, at random within that, so that a server which comes
// back is not met by everybody at once.

import { newId } from "./identity.js";

const FIRST_WAIT_MS = 400;
const LONGEST_WAIT_MS = 10_000;
const OPEN_MS = 5_000; // for a socket to open
const POLL_MS = 2_000;
const POLL_AFTER_ATTEMPTS = 2; // that failed to open
const ASK_MS = 150; // in which questions about drops are collected
const RESUME_MAX = 1_000; // positions in one frame, which the server bounds
const QUIET_MS = 30_000; // without a frame: then we ask for one, since a dead socket and a quiet shop look the same
const ANSWER_MS = 5_000; // for that one to come
const AWAY_MS = 60_000; // a page hidden for so long may have slept; its socket may be dead without knowing

export class Feed {
  #socket = null;
  #failures = 0;
  #retryTimer = 0;
  #openTimer = 0;
  #pollTimer = 0;
  #quietTimer = 0;
  #isPolling = false;
  #hiddenAt = 0;
  #questions = new Set();

  // `on` is what it tells: frame(frame), state(state), opened(), and poll(), which fetches and says whether that went well.
  // `resumeFrom` says where to go on, by drop, and `anyDrop` the id of a drop that is known.
  constructor(identity, resumeFrom, anyDrop, on) {
    this.identity = identity;
    this.resumeFrom = resumeFrom;
    this.anyDrop = anyDrop;
    this.on = on;
    this.state = "";
  }

  start() {
    addEventListener("online", () => this.restart());
    addEventListener("offline", () => this.#lost());
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#hiddenAt = Date.now(); // which goes on in sleep
      else if (Date.now() - this.#hiddenAt > AWAY_MS || this.state !== "live") this.restart();
    });
    this.#set("connecting");
    this.#connect();
  }

  // Connect anew, at once: somebody else is asking, or there is a network again.
  restart() {
    this.#drop();
    this.#failures = 0;
    this.#connect();
  }

  get isLive() {
    return this.state === "live";
  }

  // Say who we are, when that has become known after the socket opened.
  identify() {
    const who = this.identity.introduction();
    if (this.isLive && who) this.#send(who);
  }

  // Ask for a drop's snapshot, which comes in its place among the events.
  ask(id) {
    this.#questions.add(id);
    if (this.#questions.size > 1) return;
    setTimeout(() => {
      const drops = [...this.#questions];
      this.#questions.clear();
      if (this.isLive) this.#send({ type: "subscribe", drops });
    }, ASK_MS);
  }

  #send(message) {
    this.#socket?.send(JSON.stringify(message));
  }

  #connect() {
    clearTimeout(this.#retryTimer);
    const address = new URL("api/v1/live", document.baseURI);
    address.protocol = address.protocol.replace("http", "ws");
    let socket;
    try {
      socket = new WebSocket(address);
    } catch {
      // Something on the way, or in the browser, forbids sockets.
      socket = null;
    }
    this.#socket = socket;
    if (!socket) return this.#closed(null, {});
    this.#openTimer = setTimeout(() => socket.close(), OPEN_MS);
    socket.addEventListener("open", () => this.#opened(socket));
    socket.addEventListener("message", (message) => this.#received(socket, message.data));
    socket.addEventListener("close", (event) => this.#closed(socket, event));
    return null;
  }

  #opened(socket) {
    if (socket !== this.#socket) return;
    clearTimeout(this.#openTimer);
    this.#stopPolling();
    this.#set("live");
    this.identify();
    const resume = this.resumeFrom();
    const known = Object.keys(resume).length;
    // Without a position there is a snapshot: what we know of too many drops is not worth its bytes.
    this.#send({ type: "subscribe", drops: "*", ...(known && known <= RESUME_MAX ? { resume } : {}) });
    this.#heard(socket);
    this.on.opened();
  }

  // The socket lives. If it says no more for a while, make it say something.
  #heard(socket) {
    clearTimeout(this.#quietTimer);
    this.#quietTimer = setTimeout(() => {
      if (socket !== this.#socket) return;
      // Of a drop that there is comes a snapshot, and of one that there isn't an error.
      this.#send({ type: "subscribe", drops: [this.anyDrop() ?? newId()] });
      this.#quietTimer = setTimeout(() => {
        if (socket === this.#socket) this.restart();
      }, ANSWER_MS);
    }, QUIET_MS);
  }

  #received(socket, text) {
    if (socket !== this.#socket) return;
    this.#heard(socket);
    this.#failures = 0; // it opens, and says something: not one that closes again at once
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return;
    }
    this.on.frame(frame);
  }

  #closed(socket, event) {
    if (socket !== this.#socket) return;
    clearTimeout(this.#quietTimer);
    clearTimeout(this.#openTimer);
    this.#socket = null;
    this.#failures += 1;
    if (this.isLive) this.#set("resuming");
    if (this.#failures >= POLL_AFTER_ATTEMPTS) this.#startPolling();
    this.#retryTimer = setTimeout(() => this.#connect(), this.#pause(event));
  }

  #pause(event) {
    const most = Math.min(FIRST_WAIT_MS * 2 ** (this.#failures - 1), LONGEST_WAIT_MS);
    const pause = 50 + most * Math.random();
    if (event.code === 1001) return pause + asked(event.reason);
    if (event.code === 1013) return pause + 2_000; // it was too slow, or we were: not at once
    return pause;
  }

  // There is no network: a socket would notice in a minute or two.
  #lost() {
    const socket = this.#socket;
    if (!socket) return;
    this.#closed(socket, {});
    socket.close();
  }

  #drop() {
    clearTimeout(this.#openTimer);
    clearTimeout(this.#quietTimer);
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
    if (this.isLive) this.#set("resuming");
  }

  // Polling -------------------------------------------------------------------------------------------------------

  #startPolling() {
    if (this.#isPolling) return;
    this.#isPolling = true;
    this.#poll();
  }

  #stopPolling() {
    this.#isPolling = false;
    clearTimeout(this.#pollTimer);
  }

  async #poll() {
    const isGood = await this.on.poll();
    if (!this.#isPolling) return;
    this.#set(isGood ? "polling" : "offline");
    this.#pollTimer = setTimeout(() => this.#poll(), POLL_MS);
  }

  #set(state) {
    if (state === this.state) return;
    this.state = state;
    this.on.state(state);
  }
}

// How long a server that stops asks to be left alone, ms.
function asked(reason) {
  try {
    const ms = Number(JSON.parse(reason).retryInMs);
    return ms > 0 ? Math.min(ms, 60_000) : 0;
  } catch {
    return 0;
  }
}
