// The live page: puts the parts together, and does what the buttons say.
//
//   feed, api  ->  board (what is known)  ->  cards (what is seen), once a frame for whatever has changed
//
// What happened to us is said once, to screen readers too; what happens to others only moves numbers.

import { Api } from "./api.js";
import { Board, phase } from "./board.js";
import { Card } from "./card.js";
import { ServerClock } from "./clock.js";
import { Feed } from "./feed.js";
import { Identity, newId } from "./identity.js";
import { ABOUT_IDENTITY, CONNECTION, CONNECTION_SAID, count, minorDigits, price, refusal } from "./words.js";

const TICK_MS = 200; // a countdown is never later than this
const FRAME_MS = 50; // after which we draw although the browser has not asked for a frame
const SLEPT_MS = 2_000; // by which the device's clock and ours come apart from one tick to the next
const LIST_MAX = 100; // of one GET /drops
const CARDS_STEP = 48; // cards at first, and for each "show more"
const LATE_MS = 400; // after an instant, for the feed to say what happened at it; then we ask
const ASK_AGAIN_MS = 5_000; // what became of a purchase
const LAST_CALL_MS = 10_000; // before a hold's end, it is said once

const byId = (id) => document.getElementById(id);
const setting = (name) => document.querySelector(`meta[name="holdfast-${name}"]`).content;

const isDevelopment = setting("env") === "development";
const clock = new ServerClock();
const identity = new Identity(setting("env"), setting("auth"));
const api = new Api(identity, clock);
const board = new Board();
const cards = new Map(); // by the drop's id
const feed = new Feed(identity, () => board.positions(), () => board.anyDrop(), {
  frame: onFrame,
  state: onConnection,
  opened: onOpened,
  poll,
});
const tabs = "BroadcastChannel" in globalThis ? new BroadcastChannel("holdfast") : null;

// Drawing -----------------------------------------------------------------------------------------------------------

const changed = new Set();
let orderChanged = true;
let drawing = 0;
let cardsMax = CARDS_STEP;
let isLoaded = false;

board.onChange = (entry) => {
  changed.add(entry);
  drawSoon();
};

board.onAppear = () => {
  orderChanged = true;
  drawSoon();
};

function drawSoon() {
  if (drawing) return;
  const timer = setTimeout(draw, FRAME_MS); // no frames come while nobody looks
  drawing = requestAnimationFrame(draw);
  drawSoon.timer = timer;
}

function draw() {
  clearTimeout(drawSoon.timer);
  cancelAnimationFrame(drawing);
  drawing = 0;
  const now = clock.now();
  if (orderChanged) arrange();
  for (const entry of changed) cards.get(entry.drop.id)?.render(now);
  changed.clear();
  summarize(now);
}

function arrange() {
  orderChanged = false;
  const grid = byId("drops");
  const sorted = board.sorted();
  let place = grid.firstElementChild;
  for (const [rank, entry] of sorted.entries()) {
    let card = cards.get(entry.drop.id);
    if (!card) {
      if (rank >= cardsMax) continue;
      card = new Card(entry, { reserve, buy, back }, () => identity.user?.id ?? identity.id);
      cards.set(entry.drop.id, card);
      changed.add(entry);
    }
    if (card.root === place) place = place.nextElementSibling;
    else grid.insertBefore(card.root, place);
  }
  byId("more").hidden = cards.size >= sorted.length;
  byId("more").textContent = `Show more (${count(sorted.length - cards.size)})`;
}

function summarize(now) {
  const counts = { live: 0, scheduled: 0 };
  for (const entry of board.entries.values()) {
    const is = phase(entry, now);
    if (is in counts) counts[is] += 1;
  }
  const parts = [];
  if (counts.live) parts.push(`${count(counts.live)} open now`);
  if (counts.scheduled) parts.push(`${count(counts.scheduled)} to come`);
  const text = parts.length ? `${parts.join(", ")}.` : "Nothing is open right now.";
  byId("summary").textContent = isLoaded || board.entries.size ? text : "";
  byId("empty").hidden = board.entries.size > 0;
  if (isLoaded) {
    const invitation = isDevelopment ? "There are no drops yet. Make one with “New drop”." : "There are no drops right now. Stay: they appear here.";
    byId("empty").textContent = invitation;
  }
}

byId("more").addEventListener("click", () => {
  const firstNew = cards.size;
  cardsMax = cards.size + CARDS_STEP;
  orderChanged = true;
  draw();
  byId("drops").children[firstNew]?.querySelector("button:not([hidden])")?.focus();
});

// Time --------------------------------------------------------------------------------------------------------------

const asked = new Map(); // what we asked for because its time had come, by what it is: when (our clock)

let apart = Date.now() - clock.local();

setInterval(() => {
  noticeSleep();
  const now = clock.now();
  for (const card of cards.values()) card.render(now);
  for (const entry of board.entries.values()) watch(entry, now);
}, TICK_MS);

// The device's clock goes on while it sleeps, and ours may not: then nothing that we know of the server's is true. Its
// answer tells, and whoever has slept may have a socket that is dead.
function noticeSleep() {
  const before = apart;
  apart = Date.now() - clock.local();
  if (Math.abs(apart - before) <= SLEPT_MS) return;
  readClock();
  feed.restart();
}

// Any answer tells the server's time.
function readClock() {
  return api.get("drops?limit=1");
}

function watch(entry, now) {
  const { drop, hold } = entry;
  if (hold) {
    const left = Date.parse(hold.expires_at) - now;
    if (left <= LAST_CALL_MS && left > 0 && !hold.isLastCallSaid && Date.parse(hold.expires_at) - Date.parse(hold.created_at) > 3 * LAST_CALL_MS) {
      hold.isLastCallSaid = true;
      say(`10 seconds left to buy ${drop.name}.`);
    }
    if (left < -LATE_MS) onceASecond(`hold ${hold.id}`, refreshHolds);
  }
  const is = phase(entry, now);
  const isDue = is === "opening" ? now - Date.parse(drop.starts_at) > LATE_MS : is === "over" && drop.status === "live";
  if (isDue) onceASecond(`drop ${drop.id}`, () => refreshDrop(drop.id));
}

function onceASecond(what, ask) {
  const local = clock.local();
  if (local - (asked.get(what) ?? -Infinity) < 1000) return;
  asked.set(what, local);
  ask();
}

// What comes in -------------------------------------------------------------------------------------------------------

function onFrame(frame) {
  if (frame.at && frame.type === "event") clock.heard(Date.parse(frame.at));
  if (frame.event === "RESERVATION_EXPIRED") {
    const entry = board.entries.get(frame.data.dropId);
    if (entry?.hold?.id === frame.data.reservationId) ranOut(entry);
  }
  if (frame.event === "RESERVATION_GRANTED") refreshHolds();
  if (frame.type === "error") onFeedError(frame);
  const entry = board.apply(frame);
  // After a break the server may know who bought, but not any more who the newest three were at that moment.
  if (frame.event === "PURCHASE_COMPLETED" && entry && frame.seq > entry.seq) feed.ask(entry.drop.id);
  if (frame.type === "snapshot") isLoaded = true;
}

function onFeedError(frame) {
  const entry = board.entries.get(frame.dropId);
  if (frame.code === "DROP_NOT_FOUND" && entry) update(entry, { isUnlisted: true });
  else if (frame.code !== "DROP_NOT_FOUND") console.warn(`live feed: ${frame.code}: ${frame.message}`);
}

function onConnection(state) {
  const pill = byId("connection");
  const wasTroubled = pill.dataset.state !== "connecting";
  pill.dataset.state = state;
  byId("connection-text").textContent = CONNECTION[state];
  clearTimeout(onConnection.timer);
  // A blink is not worth a word.
  if (wasTroubled || state !== "live") {
    onConnection.timer = setTimeout(() => {
      if (CONNECTION_SAID[state] && onConnection.said !== state) say(CONNECTION_SAID[state]);
      onConnection.said = state;
    }, 1500);
  } else {
    onConnection.said = state;
  }
}

function onOpened() {
  readClock(); // a guest asks for nothing else, and frames say only what time it is not before
  refreshMine();
}

async function poll() {
  const isGood = await list();
  if (isGood) refreshHolds();
  return isGood;
}

async function list() {
  const outcome = await api.get(`drops?limit=${LIST_MAX}`);
  if (!outcome.ok) return false;
  const { items, pagination } = outcome.data;
  isLoaded = true;
  board.listed(items, !feed.isLive, pagination.total <= LIST_MAX);
  drawSoon();
  return true;
}

async function refreshDrop(id) {
  // By the feed where there is one: an answer without a seq may be older than what we know.
  if (feed.isLive && board.entries.has(id)) return feed.ask(id);
  const outcome = await api.get(`drops/${id}`);
  const entry = board.entries.get(id);
  if (outcome.ok) board.shown(outcome.data);
  else if (outcome.code === "DROP_NOT_FOUND" && entry) update(entry, { isUnlisted: true });
  return null;
}

async function refreshMine() {
  if (!identity.isWorthAsking) return;
  if (!identity.user) await refreshMe();
  await Promise.all([refreshHolds(), refreshPurchases()]);
}

async function refreshMe() {
  const { id, token } = identity;
  const outcome = await api.get("me");
  if (!outcome.ok || identity.id !== id || identity.token !== token) return outcome; // of somebody whom we are no longer
  identity.introducedAs(outcome.data.user);
  drawPerson();
  for (const entry of board.entries.values()) board.onChange(entry);
  return outcome;
}

let holdsAsked = 0;

async function refreshHolds() {
  if (!identity.isWorthAsking) return;
  holdsAsked += 1;
  const number = holdsAsked;
  const outcome = await api.get("reservations/me");
  // Not the newest question, or we are in the middle of something that changes the answer.
  if (!outcome.ok || number !== holdsAsked) return;
  if ([...board.entries.values()].some((entry) => entry.busy)) return;
  const missing = outcome.data.items.filter((item) => !board.entries.has(item.drop_id));
  await Promise.all(missing.map((item) => refreshDrop(item.drop_id)));
  // What we hold is what came of our last reservation: its key has done its work.
  for (const item of outcome.data.items) openKeys.delete(reserveSlot(item.drop_id));
  const lost = board.holding(outcome.data.items).map(({ entry, hold }) => {
    return { entry, hold, isOver: Date.parse(hold.expires_at) <= clock.now() + LATE_MS };
  });
  await sayWhatBecameOf(lost.filter(({ hold, isOver }) => isOver || openKeys.has(purchaseSlot(hold.id))));
}

// Of holds that are gone: it may be that they ran out, or that a purchase went through whose answer was lost.
async function sayWhatBecameOf(lost) {
  if (!lost.length) return;
  const before = beginnings;
  const bought = await refreshPurchases();
  if (before !== beginnings) return; // they are somebody else's
  for (const { entry, hold, isOver } of lost) {
    const slot = purchaseSlot(hold.id);
    if (bought?.has(hold.id) || entry.hold || entry.busy) continue;
    // To press again, as was said last, is not possible any more.
    if (!bought && openKeys.has(slot)) {
      sayInDoubt(entry);
      setTimeout(() => before === beginnings && sayWhatBecameOf([{ entry, hold, isOver }]), ASK_AGAIN_MS);
      continue;
    }
    openKeys.delete(slot);
    if (isOver) sayRanOut(entry);
  }
}

// The ids of the holds that we have bought; null where we could not find out.
async function refreshPurchases() {
  if (!identity.isWorthAsking) return null;
  const outcome = await api.get("purchases/me?limit=100");
  if (!outcome.ok) return null;
  const { items } = outcome.data;
  board.bought(items);
  for (const item of items) {
    const entry = board.entries.get(item.drop_id);
    // A press that goes on says itself what comes of it.
    if (entry && !entry.busy && openKeys.delete(purchaseSlot(item.reservation_id))) sayBought(entry);
  }
  return new Set(items.map((item) => item.reservation_id));
}

// What we do ----------------------------------------------------------------------------------------------------------

// By what was to be done: the key of a request of which we don't know what became. A purchase is that of a hold: with the
// key of another hold's purchase, the server would tell us once more of that one, and buy nothing.
const openKeys = new Map();
const reserveSlot = (dropId) => `reserve ${dropId} ${identity.id}`;
const purchaseSlot = (holdId) => `purchase ${holdId}`;

async function reserve(entry) {
  const { drop } = entry;
  const outcome = await act(entry, "Reserving …", "POST", `drops/${drop.id}/reserve`, reserveSlot(drop.id));
  if (!outcome) return;
  if (outcome.ok) {
    const { reservation, drop: after } = outcome.data;
    if (!outcome.isReplay) clock.saw(Date.parse(reservation.created_at), 1, outcome.sent, outcome.received);
    takeStock(entry, after.available_stock);
    const until = Date.parse(reservation.expires_at);
    update(entry, { hold: reservation });
    say(`${drop.name} is held for you for ${Math.round((until - clock.now()) / 1000)} seconds. Buy it, or give it back.`);
  } else {
    refuse(entry, outcome);
  }
  settled();
}

async function buy(entry) {
  const { drop, hold } = entry;
  if (!hold) return;
  const outcome = await act(entry, "Buying …", "POST", `drops/${drop.id}/purchase`, purchaseSlot(hold.id));
  if (!outcome) return;
  const isBought = outcome.ok || (outcome.code === "ALREADY_PURCHASED" && outcome.wasInDoubt);
  if (isBought) {
    update(entry, { hold: null, bought: entry.bought + 1 });
    sayBought(entry);
    if (!feed.isLive) refreshDrop(drop.id);
  } else {
    refuse(entry, outcome);
  }
  settled();
}

async function back(entry) {
  const { drop, hold } = entry;
  if (!hold) return;
  const outcome = await act(entry, "Giving back …", "DELETE", `reservations/${hold.id}/cancel`, null);
  if (!outcome) return;
  if (outcome.ok || (outcome.code === "RESERVATION_NOT_ACTIVE" && outcome.wasInDoubt)) {
    if (outcome.ok) takeStock(entry, outcome.data.availableStock);
    update(entry, { hold: null, note: { kind: "info", text: "Given back. Somebody else can have it now." } });
    say(`You gave ${drop.name} back.`);
  } else {
    refuse(entry, outcome);
  }
  settled();
}

// One press of a button, to its answer; null where there was nobody to act for. `slot` is where its key is kept.
async function act(entry, busy, method, path, slot) {
  if (!identity.mayAct) {
    openPerson();
    return null;
  }
  if (entry.busy) return null;
  update(entry, { busy, note: null });
  holdsAsked += 1; // what was asked before this says nothing about after it
  let key = slot && (openKeys.get(slot) ?? newId());
  const onWait = (outcome) => update(entry, { busy: outcome.leavesItOpen ? "Checking …" : "Still trying …" });
  let outcome = await api.act(method, path, { key, onWait });
  if (key && isPast(outcome)) {
    key = newId();
    outcome = await api.act(method, path, { key, onWait });
  }
  if (key && outcome.isWorthRetrying) openKeys.set(slot, key);
  else openKeys.delete(slot);
  update(entry, { busy: "" });
  if (outcome.status && !ABOUT_IDENTITY.has(outcome.code) && !identity.user) {
    identity.isIntroduced = identity.mode === "visitor";
    // Beside it: what came of the press is to be seen now.
    refreshMe().then(() => feed.identify());
  }
  return outcome;
}

// What became of an earlier press, and is of no use to this one: it was refused then, or what it reserved is over.
function isPast({ isReplay, wasInDoubt, ok, data }) {
  if (!isReplay || wasInDoubt) return false;
  return !ok || (!data.purchase && Date.parse(data.reservation?.expires_at) <= clock.now());
}

function refuse(entry, outcome) {
  const text = refusal(outcome.code, outcome.message);
  update(entry, { note: { kind: "bad", text } });
  say(`${entry.drop.name}: ${text}`);
  if (outcome.code === "DROP_NOT_FOUND") update(entry, { isUnlisted: true });
  // Also with a live feed: it may have had no frame of what the refusal knows.
  if (outcome.code === "DROP_NOT_ACTIVE") refreshDrop(entry.drop.id);
}

// After each of our actions: what is ours, as the server says; and the other tabs of this browser ask as well.
function settled() {
  refreshHolds();
  tabs?.postMessage("mine");
}

// Answers carry no seq: while the feed is there it says the same, in the right order.
function takeStock(entry, stock) {
  if (!feed.isLive) update(entry, { drop: { ...entry.drop, available_stock: stock } });
}

function ranOut(entry) {
  openKeys.delete(purchaseSlot(entry.hold.id)); // what has run out was not bought
  entry.hold = null;
  sayRanOut(entry);
}

function sayRanOut(entry) {
  update(entry, { note: { kind: "info", text: "Your hold ran out, and the unit went back. You can reserve again." } });
  say(`Your hold on ${entry.drop.name} ran out.`);
}

function sayBought(entry) {
  const { drop } = entry;
  update(entry, { note: { kind: "good", text: `Bought for ${price(drop.price, drop.currency)}. It is yours.` } });
  say(`You bought ${drop.name}.`);
}

function sayInDoubt(entry) {
  const text = "Your hold is over, and we could not find out whether you bought it. We will say so once we know.";
  if (entry.note?.text === text) return;
  update(entry, { note: { kind: "info", text } });
  say(`${entry.drop.name}: ${text}`);
}

function update(entry, fields) {
  Object.assign(entry, fields);
  board.onChange(entry);
}

// To a screen reader, after what it is saying now.
function say(text) {
  byId("announcer").textContent = text;
}

tabs?.addEventListener("message", catchUpWithOtherTabs);

// What another tab keeps may reach us after the message that speaks of it: then who we are was news to us.
addEventListener("storage", catchUpWithOtherTabs);

function catchUpWithOtherTabs() {
  const before = identity.id;
  identity.reload();
  drawPerson();
  if (identity.id !== before) startOver();
  else refreshMine();
}

// Who we are ------------------------------------------------------------------------------------------------------------

function drawPerson() {
  byId("person-name").textContent = identity.displayName;
}

function openPerson() {
  const isVisitor = identity.mode === "visitor";
  const isFixed = isVisitor && identity.isIntroduced;
  byId("name-field").hidden = !isVisitor;
  byId("token-field").hidden = identity.mode !== "token";
  byId("proxy-hint").hidden = identity.mode !== "proxy";
  byId("person-save").hidden = identity.mode === "proxy" || isFixed;
  byId("somebody-else").hidden = !isFixed;
  byId("name").readOnly = isFixed;
  byId("name").value = identity.name;
  byId("name-hint").textContent = isFixed
    ? "The shop knows you by this name, and keeps it. With another name you are somebody else."
    : "3 to 50 characters. Leave it empty to get a made-up one.";
  byId("token").value = identity.token;
  const id = identity.user?.id ?? identity.id;
  byId("id-line").hidden = !id;
  byId("user-id").textContent = id ?? "";
  complain("name", "");
  complain("token", "");
  if (!byId("person-dialog").open) byId("person-dialog").showModal();
}

byId("person").addEventListener("click", openPerson);

byId("somebody-else").addEventListener("click", () => {
  identity.becomeSomebodyElse();
  becameSomebody();
  openPerson();
  byId("name").focus();
});

byId("person-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (identity.mode === "token") {
    identity.setToken(byId("token").value.trim());
    const outcome = identity.token ? await refreshMe() : null;
    if (outcome && !outcome.ok) return complain("token", refusal(outcome.code, outcome.message));
  } else {
    const name = byId("name").value.trim();
    if (name && [...name].length < 3) return complain("name", "At least 3 characters, please.");
    identity.setName(name);
    const outcome = name ? await refreshMe() : null; // so that the name is ours from now on
    if (outcome && !outcome.ok) {
      identity.setName("");
      return complain("name", outcome.code === "VALIDATION_ERROR" ? "This can't be a name here." : refusal(outcome.code, outcome.message));
    }
  }
  byId("person-dialog").close();
  becameSomebody();
});

function becameSomebody() {
  startOver();
  tabs?.postMessage("mine");
}

let beginnings = 0;

// Nothing that we had is ours any more.
function startOver() {
  beginnings += 1;
  holdsAsked += 1;
  board.holding([]);
  board.bought([]);
  for (const entry of board.entries.values()) update(entry, { note: null });
  drawPerson();
  feed.restart(); // and with it, everything that is ours is asked for
}

// A new drop (development) ------------------------------------------------------------------------------------------------

const FIELDS = { name: "drop-name", price: "drop-price", currency: "drop-currency", total_stock: "drop-stock", starts_at: "drop-opens" };

if (isDevelopment) {
  byId("new-drop").hidden = false;
  byId("new-drop").addEventListener("click", () => {
    byId("drop-dialog").showModal();
  });
}

let dropKey = newId();

byId("drop-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!identity.mayAct) return openPerson();
  const form = new FormData(event.target);
  for (const id of [...Object.values(FIELDS)]) complain(id, "");
  complain("drop", "");
  const wanted = wantedDrop(form);
  if (!wanted) return null;
  const button = event.submitter ?? event.target.querySelector("[type=submit]");
  setBusy(button, true);
  const outcome = await api.act("POST", "drops", { key: dropKey, json: wanted });
  setBusy(button, false);
  if (!outcome.leavesItOpen) dropKey = newId(); // else pressing again must not make a second one
  if (!outcome.ok) {
    for (const { path, message } of outcome.details) if (FIELDS[path]) complain(FIELDS[path], `It ${message}.`);
    if (!outcome.details.some(({ path }) => FIELDS[path])) complain("drop", refusal(outcome.code, outcome.message));
    return null;
  }
  byId("drop-dialog").close();
  if (!board.entries.has(outcome.data.id)) board.shown(outcome.data);
  say(`${outcome.data.name} is there.`);
  if (!identity.user) {
    identity.isIntroduced = identity.mode === "visitor";
    await refreshMe();
    feed.identify();
  }
  return null;
});

// What the form says, as the API wants it; null where it says nothing sensible.
function wantedDrop(form) {
  const name = form.get("name").trim();
  const currency = form.get("currency");
  const minor = Math.round(Number(form.get("price").replace(",", ".")) * 10 ** minorDigits(currency));
  const stock = Number(form.get("total_stock"));
  const opens = Number(form.get("opens"));
  if (name.length < 2) complain("drop-name", "At least 2 characters, please.");
  if (!(Number.isSafeInteger(minor) && minor >= 0) || form.get("price").trim() === "") complain("drop-price", "A price, such as 129.00.");
  if (!(Number.isSafeInteger(stock) && stock >= 0) || form.get("total_stock").trim() === "") complain("drop-stock", "A whole number.");
  if (byId("drop-form").querySelector("[aria-invalid=true]")) return null;
  const wanted = { name, price: minor, currency, total_stock: stock };
  if (opens) return { ...wanted, status: "scheduled", starts_at: new Date(clock.now() + opens * 1000).toISOString() };
  return { ...wanted, status: "live" };
}

function complain(id, text) {
  byId(`${id}-error`).textContent = text;
  const field = byId(id);
  if (!field) return;
  const wasFirst = text && !field.form.querySelector("[aria-invalid=true]");
  if (text) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
  if (wasFirst) field.focus();
}

function setBusy(button, isBusy) {
  button.setAttribute("aria-disabled", String(isBusy));
  button.disabled = isBusy;
}

// Dialogs close by their button, by Escape, and by a press beside them.
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}

// ------------------------------------------------------------------------------------------------------------------------

drawPerson();
list(); // at once, and beside the feed: it tells the server's clock, and whether there is anything at all
feed.start();
