// What this page knows: each drop as the server last said it is, and what is ours of it. No DOM, no network.
//
// A drop's `seq` is that of the newest frame about it, and where we go on after a break. A frame that is older says
// nothing new; one with the same seq may, since one change can take two frames. So a frame that is not the last of its
// change (RESERVATION_EXPIRED), or does not say all of it (PURCHASE_COMPLETED), moves it not. What came without a seq (by
// polling) gives way to any frame.

const OVER = new Set(["ended", "cancelled"]);

export class Board {
  constructor() {
    this.entries = new Map(); // by the drop's id
    this.onChange = () => {}; // (entry)
    this.onAppear = () => {}; // ()
  }

  // A frame of the live feed; the entry that it is about, if it is news.
  apply(frame) {
    if (frame.type === "snapshot") return this.#put(frame.drop, frame.seq);
    if (frame.type !== "event") return null;
    const data = frame.data ?? {};
    if (data.drop) {
      const known = this.entries.get(data.drop.id);
      return known && frame.seq < known.seq ? null : this.#put(data.drop, frame.seq);
    }
    const entry = this.entries.get(data.dropId);
    if (!entry || frame.seq < entry.seq) return null;
    if (frame.event === "STOCK_UPDATED") entry.drop.available_stock = data.availableStock;
    else if (frame.event === "ACTIVITY_UPDATED") entry.buyers = data.latestPurchasers.map(fromFeed);
    else return entry;
    entry.seq = frame.seq ?? entry.seq;
    this.onChange(entry);
    return entry;
  }

  // The list as GET /drops gives it. `isNewer`: newer than anything the feed has said.
  listed(drops, isNewer, isWhole) {
    const seen = new Set();
    for (const drop of drops) {
      seen.add(drop.id);
      if (isNewer || !this.entries.has(drop.id)) this.#put(drop, -1);
    }
    if (!isNewer || !isWhole) return;
    for (const entry of this.entries.values()) {
      if (seen.has(entry.drop.id) || entry.isUnlisted) continue;
      entry.isUnlisted = true;
      this.onChange(entry);
    }
  }

  // One drop, asked for.
  shown(drop) {
    return this.#put(drop, this.entries.get(drop.id)?.seq ?? -1);
  }

  // Where to go on, by drop. Not of drops that are over: there is little to miss, and a page that has been open for weeks
  // would know of more of them than the feed takes.
  positions() {
    const positions = {};
    for (const [id, { seq, drop }] of this.entries) if (seq > 0 && !OVER.has(drop.status)) positions[id] = seq;
    return positions;
  }

  // The id of one that the server has not said it has no more; undefined where there is none.
  anyDrop() {
    for (const [id, entry] of this.entries) if (!entry.isUnlisted) return id;
    return undefined;
  }

  // Newest first.
  sorted() {
    return [...this.entries.values()].sort((a, b) =>
      a.drop.created_at === b.drop.created_at
        ? Number(a.drop.id < b.drop.id) - Number(a.drop.id > b.drop.id)
        : Date.parse(b.drop.created_at) - Date.parse(a.drop.created_at),
    );
  }

  // Every hold of ours, as GET /reservations/me gives them; the entries that hold something no longer.
  holding(items) {
    const byDrop = new Map(items.map((item) => [item.drop_id, item]));
    const lost = [];
    for (const [id, entry] of this.entries) {
      const hold = byDrop.get(id) ?? null;
      if (entry.hold && !hold) lost.push({ entry, hold: entry.hold });
      if (entry.hold?.id === hold?.id) continue;
      entry.hold = hold;
      this.onChange(entry);
    }
    return lost;
  }

  bought(items) {
    const counts = new Map();
    for (const item of items) counts.set(item.drop_id, (counts.get(item.drop_id) ?? 0) + item.qty);
    for (const [id, entry] of this.entries) {
      entry.bought = counts.get(id) ?? 0;
      this.onChange(entry);
    }
  }

  #put(drop, seq) {
    const { activity_feed: feed, ...plain } = drop;
    let entry = this.entries.get(drop.id);
    const isNew = !entry;
    if (isNew) {
      entry = { drop: plain, seq, buyers: [], hold: null, bought: 0, busy: "", note: null, isUnlisted: false };
      this.entries.set(drop.id, entry);
    }
    entry.drop = plain;
    entry.seq = seq ?? -1;
    entry.isUnlisted = false;
    if (feed) entry.buyers = feed.latest_purchasers.map(fromApi);
    if (isNew) this.onAppear();
    this.onChange(entry);
    return entry;
  }
}

// What may be done with a drop now: scheduled, opening, live, sold-out, paused, over, cancelled, draft, unlisted.
export function phase(entry, now) {
  const { status, starts_at, ends_at, available_stock } = entry.drop;
  if (entry.isUnlisted) return "unlisted";
  if (status === "scheduled") return Date.parse(starts_at) > now ? "scheduled" : "opening";
  if (status === "ended") return "over";
  if (status !== "live") return status;
  if (ends_at && Date.parse(ends_at) <= now) return "over";
  return available_stock > 0 ? "live" : "sold-out";
}

function fromApi(line) {
  return { userId: line.user_id, username: line.username, qty: line.qty, at: Date.parse(line.created_at) };
}

function fromFeed(line) {
  return { userId: line.userId, username: line.username, qty: line.qty, at: Date.parse(line.createdAt) };
}
