// What is said to people of refusals, of the connection, of money and of time.

const REFUSALS = {
  // The drop and its stock.
  DROP_NOT_FOUND: "This drop is not there any more.",
  DROP_NOT_ACTIVE: "This drop is not open right now.",
  OUT_OF_STOCK: "Somebody was quicker: nothing is left right now. A unit comes back whenever a hold runs out.",
  LIMIT_REACHED: "You have as many of these as one person may have.",
  STOCK_IN_USE: "That many are already held or sold.",
  // The hold.
  ALREADY_RESERVED: "You are holding one already.",
  RESERVATION_REQUIRED: "Reserve one first.",
  RESERVATION_EXPIRED: "Your hold ran out before this arrived, and the unit went back. You can reserve again.",
  RESERVATION_NOT_ACTIVE: "That hold is over already.",
  RESERVATION_NOT_FOUND: "We can't find that hold. It may be over already.",
  RESERVATION_CONFLICT: "Something else happened to your hold at the same moment. Have a look and try again.",
  ALREADY_PURCHASED: "You have bought this one already.",
  // Who is asking.
  AUTH_REQUIRED: "Sign in first.",
  INVALID_X_USER_ID: "Your id is not valid. Become somebody else in the menu at the top.",
  INVALID_TOKEN: "Your access token is not valid, or has run out. Put in a new one at the top.",
  USERNAME_TAKEN: "Somebody has that name already.",
  // The server, which did nothing.
  OVERLOADED: "Too many people are asking at this moment. Nothing happened; try again.",
  DATABASE_UNAVAILABLE: "The shop can't write anything down right now. Nothing happened; try again in a moment.",
  STORAGE_FULL: "The shop has no room to write this down. Nothing happened; try again later.",
  SERVER_STOPPING: "The shop is restarting. Nothing happened; try again in a moment.",
  DROP_RESTARTING: "This drop is being reloaded. Nothing happened; try again in a moment.",
  DROP_OWNED_ELSEWHERE: "Another server looks after this drop now. Nothing happened; reload the page.",
  DROP_OUT_OF_SERVICE: "Something is wrong with this drop, and somebody has to look at it. Nothing happened.",
  TOO_MANY_REQUESTS: "That was a little too fast. Nothing happened; wait a moment.",
  RATE_LIMITED: "That was a little too fast. Nothing happened; wait a moment.",
  // It may have happened.
  OUTCOME_UNKNOWN: "We could not find out whether this went through. Press again to find out: it can't happen twice.",
  UNREACHABLE: "The shop can't be reached. Press again to find out what happened: it can't happen twice.",
  // Our own mistakes.
  VALIDATION_ERROR: "Some of this is not right.",
  IDEMPOTENCY_KEY_REUSED: "This page got confused. Reload it and try again.",
  NOT_FOUND: "The shop doesn't know this request. Reload the page.",
  INTERNAL_ERROR: "Something went wrong in the shop. Reload the page to see what is true.",
};

// Which refusals are about the caller: after these we are as unknown to the server as before.
export const ABOUT_IDENTITY = new Set(["AUTH_REQUIRED", "INVALID_X_USER_ID", "INVALID_TOKEN"]);

// A refusal in words for buyers; of a code that is new to us, the server's own.
export function refusal(code, message) {
  return REFUSALS[code] ?? message ?? `The shop said no (${code}).`;
}

export const CONNECTION = {
  connecting: "Connecting",
  live: "Live",
  resuming: "Reconnecting",
  polling: "Every 2 s",
  offline: "No connection",
};

export const CONNECTION_SAID = {
  live: "Connected: the numbers are live.",
  resuming: "The connection was lost. Reconnecting.",
  polling: "No live connection. The numbers are updated every 2 seconds.",
  offline: "The shop can't be reached. Trying again.",
};

// Money and numbers -----------------------------------------------------------------------------------------------

// As ISO 4217 has it, where it is not 2: prices are in minor units by that list. Not as the browser has it, which follows
// what people write (CLDR): no digits for HUF or IDR, and so a hundred times the price.
const MINOR_DIGITS = new Map(
  Object.entries({
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
  }).flatMap(([digits, currencies]) => currencies.split(" ").map((currency) => [currency, Number(digits)])),
);

const formats = new Map();

function money(currency) {
  let format = formats.get(currency);
  if (!format) {
    const digits = minorDigits(currency);
    const shape = { minimumFractionDigits: digits, maximumFractionDigits: digits };
    format = new Intl.NumberFormat(undefined, { style: "currency", currency, ...shape });
    formats.set(currency, format);
  }
  return format;
}

// How many of its digits are minor units: 2 for USD, 0 for JPY.
export function minorDigits(currency) {
  return MINOR_DIGITS.get(currency) ?? 2;
}

export function price(minor, currency) {
  return money(currency).format(minor / 10 ** minorDigits(currency));
}

const plain = new Intl.NumberFormat();

export function count(number) {
  return plain.format(number);
}

// Time ------------------------------------------------------------------------------------------------------------

const SECOND = 1000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;

const two = (number) => String(number).padStart(2, "0");

// What is left, rounded up, so that 0:00 means over: `0:42`, `12:05`, `3:00:00`, `2 days`.
export function remaining(ms) {
  const s = Math.max(0, Math.ceil(ms / SECOND));
  if (s >= 2 * (DAY / SECOND)) return `${Math.floor(s / (DAY / SECOND))} days`;
  const minutes = Math.floor(s / 60) % 60;
  const hours = Math.floor(s / 3600);
  return hours ? `${hours}:${two(minutes)}:${two(s % 60)}` : `${minutes}:${two(s % 60)}`;
}

const clockTime = new Intl.DateTimeFormat(undefined, { hour: "numeric", minute: "2-digit", second: "2-digit" });
const dayAndTime = new Intl.DateTimeFormat(undefined, {
  weekday: "short", day: "numeric", month: "short", hour: "numeric", minute: "2-digit",
});

export function atTime(ms, now) {
  return Math.abs(ms - now) < 12 * HOUR ? clockTime.format(ms) : dayAndTime.format(ms);
}

const relative = new Intl.RelativeTimeFormat(undefined, { numeric: "auto", style: "short" });

export function ago(ms) {
  if (ms < 10 * SECOND) return "just now";
  if (ms < MINUTE) return relative.format(-Math.floor(ms / (10 * SECOND)) * 10, "second");
  if (ms < HOUR) return relative.format(-Math.floor(ms / MINUTE), "minute");
  if (ms < DAY) return relative.format(-Math.floor(ms / HOUR), "hour");
  return relative.format(-Math.floor(ms / DAY), "day");
}
