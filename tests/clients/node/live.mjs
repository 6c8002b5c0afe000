// A viewer of the native live feed, with the real `ws` or a browser's `EventSource`: prints what it hears, a JSON line
// each, and comes back after every end, where it was.
//
//   node live.mjs ws URL DROP
//   node live.mjs eventsource URL
//
// Out: {heard, id?} a message of the feed; {life: "open" | "close", code?, retryInMs?} of the connection.

import WebSocket from "ws";
import { EventSource } from "eventsource";

const [kind, url, drop] = process.argv.slice(2);
const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");
const NAMES = ["snapshot", "STOCK_UPDATED", "ACTIVITY_UPDATED", "PURCHASE_COMPLETED", "DROP_CREATED", "DROP_UPDATED"];

let seq = 0;

function watch() {
  const socket = new WebSocket(url);
  let retryInMs = 100;
  socket.on("open", () => {
    say({ life: "open" });
    socket.send(JSON.stringify({ type: "subscribe", drops: [drop], ...(seq ? { resume: { [drop]: seq } } : {}) }));
  });
  socket.on("message", (data) => {
    const heard = JSON.parse(data);
    seq = heard.seq ?? seq;
    say({ heard });
  });
  socket.on("close", (code, reason) => {
    if (code === 1001) retryInMs = JSON.parse(reason).retryInMs;
    say({ life: "close", code, retryInMs });
    setTimeout(watch, Math.min(retryInMs, 200));
  });
  socket.on("error", () => {}); // a close follows
}

function listen() {
  const source = new EventSource(url);
  source.addEventListener("open", () => say({ life: "open" }));
  source.addEventListener("error", (event) => say({ life: "close", code: event.code ?? null }));
  for (const name of NAMES) {
    source.addEventListener(name, (event) => say({ heard: JSON.parse(event.data), id: event.lastEventId }));
  }
}

if (kind === "ws") watch();
else listen();
