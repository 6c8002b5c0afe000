// One drop on the page. `render` may be called as often as one likes: it writes only what has changed.
//
// Whatever people have typed (names of drops and of buyers) goes in as text, never as markup.

import { phase } from "./board.js";
import { ago, atTime, count, price, remaining } from "./words.js";

const template = document.getElementById("card");
const stillness = matchMedia("(prefers-reduced-motion: reduce)");

const ENDS_SOON_MS = 3_600_000;
const HANDED_ON_MS = 600; // in which a press may still be meant for the button that was there before

export class Card {
  // `on` has reserve, buy and back, each called with the entry; `whoAmI` says our user id, if there is one.
  constructor(entry, on, whoAmI) {
    this.entry = entry;
    this.whoAmI = whoAmI;
    this.root = template.content.firstElementChild.cloneNode(true);
    const part = (name) => this.root.querySelector(name);
    this.parts = {
      article: part("article"), badge: part(".badge"), badgeText: part(".badge-text"), name: part(".name"),
      price: part(".price"), left: part(".left"), of: part(".of"), stockFill: part(".stock .fill"), when: part(".when"),
      hold: part(".hold"), holdTime: part(".hold-time"), holdFill: part(".hold .fill"), actions: part(".actions"),
      reserve: part(".reserve"), buy: part(".buy"), back: part(".back"), note: part(".note"),
      nobody: part(".nobody"), buyers: part(".buyers"),
    };
    this.labels = {
      reserve: part(".reserve .label"), buy: part(".buy .label"), back: part(".back .label"),
    };
    const { id } = entry.drop;
    this.root.dataset.dropId = id;
    this.parts.name.id = `name-${id}`;
    this.parts.article.setAttribute("aria-labelledby", `name-${id}`);
    this.#paint(id);
    for (const action of ["reserve", "buy", "back"]) {
      this.parts[action].addEventListener("click", () => {
        if (this.parts[action].getAttribute("aria-disabled") === "true" || this.#isMeantForAnother(action)) return;
        on[action](this.entry);
      });
    }
    // Buttons take turns under one finger: a key that is held down is one press, of the button that it began on.
    this.parts.actions.addEventListener("keydown", (event) => {
      if (event.repeat && (event.key === "Enter" || event.key === " ")) event.preventDefault();
    });
    // Who has left a button and come back means that button.
    this.parts.actions.addEventListener("focusout", () => {
      this.handedOn = null;
    });
    this.handedOn = null; // to which button, and when (our clock)
    this.drawnBuyers = "";
    this.buyerTimes = [];
    this.drawnStock = null;
  }

  render(now) {
    const { entry, parts, labels } = this;
    const { drop, hold } = entry;
    const is = phase(entry, now);
    const cost = price(drop.price, drop.currency);

    setData(this.root, "phase", is);
    setData(this.root, "held", hold ? "yes" : "no");
    setText(parts.name, drop.name);
    for (const label of this.root.querySelectorAll(".of-drop")) setText(label, drop.name);
    setText(parts.price, cost);
    setText(parts.badgeText, this.#badge(is, now));
    this.#when(drop, is, now);

    const wasFocused = parts.actions.contains(document.activeElement);
    const canReserve = is === "live" && !entry.busy;
    setHidden(parts.hold, !hold);
    setHidden(parts.reserve, Boolean(hold));
    setHidden(parts.buy, !hold);
    setHidden(parts.back, !hold);
    setDisabled(parts.reserve, !canReserve);
    setDisabled(parts.buy, Boolean(entry.busy));
    setDisabled(parts.back, Boolean(entry.busy));
    setText(labels.reserve, entry.busy || RESERVE_LABELS[is] || (entry.bought ? "Reserve another" : "Reserve"));
    setText(labels.buy, entry.busy || `Buy for ${cost}`);
    if (hold) this.#countdown(hold, now);
    // A button that is pressed and gives way to another one hands its focus on.
    if (wasFocused && (document.activeElement.hidden || !parts.actions.contains(document.activeElement))) {
      const heir = parts.actions.querySelector("button:not([hidden])");
      heir.focus();
      this.handedOn = { to: heir, at: performance.now() };
    }

    setHidden(parts.note, !entry.note);
    if (entry.note) {
      setText(parts.note, entry.note.text);
      setData(parts.note, "kind", entry.note.kind);
    }
    this.#buyers(now);
    this.#stock(drop); // last, since its animation makes the browser settle what came before
  }

  // A second press of Enter, or of the mouse, can come when the button below it is another one already: it buys nothing.
  #isMeantForAnother(action) {
    return this.handedOn?.to === this.parts[action] && performance.now() - this.handedOn.at < HANDED_ON_MS;
  }

  #badge(is, now) {
    const { drop } = this.entry;
    if (is === "scheduled") return `Opens in ${remaining(Date.parse(drop.starts_at) - now)}`;
    if (is === "live" && drop.ends_at) {
      const left = Date.parse(drop.ends_at) - now;
      if (left < ENDS_SOON_MS) return `Ends in ${remaining(left)}`;
    }
    return BADGES[is] ?? is;
  }

  #stock(drop) {
    const stock = drop.available_stock;
    setText(this.parts.left, count(stock));
    setText(this.parts.of, `of ${count(drop.total_stock)} left`);
    if (stock === this.drawnStock) return;
    const share = drop.total_stock ? stock / drop.total_stock : 0;
    this.parts.stockFill.style.setProperty("--share", String(Math.min(1, share)));
    setData(this.root, "few", share <= 0.2 ? "yes" : "no");
    if (this.drawnStock !== null && !stillness.matches) {
      this.parts.left.animate([{ opacity: 0.35 }, { opacity: 1 }], { duration: 450, easing: "ease-out" });
    }
    this.drawnStock = stock;
  }

  #when(drop, is, now) {
    let text = "";
    if (is === "scheduled") text = `Opens ${atTime(Date.parse(drop.starts_at), now)}`;
    else if (is === "live" && drop.ends_at) text = `Until ${atTime(Date.parse(drop.ends_at), now)}`;
    setText(this.parts.when, text);
    setHidden(this.parts.when, !text);
  }

  #countdown(hold, now) {
    const ends = Date.parse(hold.expires_at);
    const left = ends - now;
    const share = Math.max(0, Math.min(1, left / (ends - Date.parse(hold.created_at))));
    setText(this.parts.holdTime, remaining(left));
    this.parts.holdFill.style.setProperty("--share", share.toFixed(4));
    setData(this.parts.hold, "soon", left < 10_000 ? "yes" : "no");
  }

  #buyers(now) {
    const { buyers } = this.entry;
    const me = this.whoAmI();
    const drawn = JSON.stringify([buyers, me]);
    if (drawn !== this.drawnBuyers) {
      this.drawnBuyers = drawn;
      this.buyerTimes = [];
      this.parts.buyers.replaceChildren(...buyers.map((buyer) => this.#buyer(buyer, buyer.userId === me)));
      setHidden(this.parts.nobody, buyers.length > 0);
      setHidden(this.parts.buyers, buyers.length === 0);
    }
    for (const [element, at] of this.buyerTimes) setText(element, ago(now - at));
  }

  #buyer(buyer, isMe) {
    const line = document.createElement("li");
    const disc = element("span", "disc", [...buyer.username][0]?.toUpperCase() ?? "?");
    disc.setAttribute("aria-hidden", "true");
    disc.style.setProperty("--hue", String(hash(buyer.userId) % 360));
    const name = element("span", "who", buyer.username);
    const more = element("span", "what", [isMe ? "you" : "", buyer.qty > 1 ? `× ${count(buyer.qty)}` : ""].join(" ").trim());
    const time = element("time", "ago", "");
    time.dateTime = new Date(buyer.at).toISOString();
    this.buyerTimes.push([time, buyer.at]);
    line.append(disc, name, more, time);
    return line;
  }

  // A picture of the drop's own: colours and circles that follow from its id.
  #paint(id) {
    let seed = hash(id);
    const next = (most) => {
      seed = (Math.imul(seed, 1_664_525) + 1_013_904_223) >>> 0;
      return (seed >>> 8) % most;
    };
    this.root.style.setProperty("--hue", String(next(360)));
    for (const circle of this.root.querySelectorAll(".art circle")) {
      circle.setAttribute("cx", String(20 + next(290)));
      circle.setAttribute("cy", String(10 + next(140)));
      circle.setAttribute("r", String(36 + next(70)));
    }
  }
}

const BADGES = {
  opening: "Opening …", live: "Live", "sold-out": "Sold out", paused: "Paused", over: "Over", cancelled: "Cancelled",
  draft: "Draft", unlisted: "Closed",
};

const RESERVE_LABELS = {
  scheduled: "Not open yet", opening: "Opening …", "sold-out": "Sold out", paused: "Paused", over: "Over",
  cancelled: "Cancelled", draft: "Not open yet", unlisted: "Closed",
};

// Leaves ----------------------------------------------------------------------------------------------------------

// FNV-1a: ids differ at their end, and colours shall differ with them.
function hash(text) {
  let value = 0x811c9dc5;
  for (let at = 0; at < text.length; at += 1) value = Math.imul(value ^ text.charCodeAt(at), 0x01000193);
  return value >>> 0;
}

function element(kind, name, text) {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function setHidden(element, isHidden) {
  if (element.hidden !== isHidden) element.hidden = isHidden;
}

function setData(element, name, value) {
  if (element.dataset[name] !== value) element.dataset[name] = value;
}

// Not `disabled`: that would take the focus from under somebody who has just pressed it.
function setDisabled(element, isDisabled) {
  const value = isDisabled ? "true" : "false";
  if (element.getAttribute("aria-disabled") !== value) element.setAttribute("aria-disabled", value);
}
