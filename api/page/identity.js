// Who is shopping here, in the three ways that a server may want to know it.
//
// - visitor (development): an id that this browser made once and keeps, with a name if one was given. The server learns
//   the name with the first request of an id, and keeps it: after that, another name is another id.
// - proxy (production, AUTH_MODE=header): a proxy in front says who we are; we say nothing, and ask.
// - token (AUTH_MODE=jwt): a bearer token, kept until the tab is closed.

const VISITOR = "holdfast.visitor";
const TOKEN = "holdfast.token";

export class Identity {
  constructor(env, auth) {
    this.mode = auth === "jwt" ? "token" : env === "production" ? "proxy" : "visitor";
    this.user = null; // {id, username} as the server knows us
    this.id = null;
    this.name = "";
    this.isIntroduced = false; // the server knows this id
    this.token = "";
    this.reload();
  }

  // Read again what is kept: another tab may have changed it.
  reload() {
    if (this.mode === "token") this.token = read("sessionStorage", TOKEN) ?? "";
    if (this.mode !== "visitor") return;
    const kept = parsed(read("localStorage", VISITOR));
    if (kept && typeof kept.id === "string") {
      if (kept.id !== this.id) this.user = null;
      this.id = kept.id;
      this.name = String(kept.name ?? "");
      this.isIntroduced = kept.isIntroduced === true;
    } else {
      this.becomeSomebodyElse();
    }
  }

  becomeSomebodyElse() {
    this.id = newId();
    this.name = "";
    this.isIntroduced = false;
    this.user = null;
    this.#keep();
  }

  setName(name) {
    this.name = name;
    this.#keep();
  }

  setToken(token) {
    this.token = token;
    this.user = null;
    write("sessionStorage", TOKEN, token);
  }

  introducedAs(user) {
    this.user = user;
    if (this.mode === "visitor") {
      this.isIntroduced = true;
      this.name = user.username;
      this.#keep();
    }
  }

  get mayAct() {
    return this.mode !== "token" || this.token !== "";
  }

  // Whether the server can have anything of ours: asking would otherwise make a user of each passer-by.
  get isWorthAsking() {
    return this.mode === "proxy" || (this.mode === "token" ? this.token !== "" : this.isIntroduced);
  }

  get displayName() {
    return this.user?.username ?? (this.name || (this.mode === "visitor" ? "Guest" : "Sign in"));
  }

  headers() {
    if (this.mode === "token") return this.token ? { Authorization: `Bearer ${this.token}` } : {};
    if (this.mode === "proxy") return {};
    const headers = { "X-User-Id": this.id };
    if (this.name && !this.isIntroduced) headers["X-User-Name"] = utf8(this.name);
    return headers;
  }

  // What the live feed is told, so that it sends us what is ours; null where there is nothing to say.
  introduction() {
    if (this.mode === "token") return this.token ? { type: "identify", token: this.token } : null;
    // Behind a proxy the handshake has said it; and whom the server does not know yet has nothing to hear of.
    return this.mode === "visitor" && this.isIntroduced ? { type: "identify", userId: this.id } : null;
  }

  #keep() {
    const { id, name, isIntroduced } = this;
    write("localStorage", VISITOR, JSON.stringify({ id, name, isIntroduced }));
  }
}

// A random UUID; `crypto.randomUUID` is there on secure pages only, and a phone on the same network sees no such page.
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

// Header text is bytes, one a character.
function utf8(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

// A browser may forbid all storage: then what we know lasts as long as the page.
function read(storage, name) {
  try {
    return globalThis[storage].getItem(name);
  } catch {
    return null;
  }
}

function write(storage, name, value) {
  try {
    globalThis[storage].setItem(name, value);
  } catch {
    // see read
  }
}

function parsed(text) {
  try {
    return JSON.parse(text ?? "null");
  } catch {
    return null;
  }
}
