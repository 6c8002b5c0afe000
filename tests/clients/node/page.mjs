// A page of the earlier systems: connects with the real socket.io-client, prints what it hears and does what it is told.
//
//   node page.mjs URL '{"transports": ["websocket"]}'
//
// Out, a JSON line each: {event, data} of the namespace /; {life, ...} of the connection.
// In, a JSON line each: {emit: [name, ...], ask: true?} {namespace: "/admin"} {connect: true} {disconnect: true}

import { createInterface } from "node:readline";
import { io } from "socket.io-client";

const [url, options] = [process.argv[2], JSON.parse(process.argv[3] ?? "{}")];
const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");
const socket = io(url, { reconnectionDelay: 50, reconnectionDelayMax: 300, ...options });

socket.on("connect", () => {
  const { engine } = socket.io;
  say({ life: "connect", transport: engine.transport.name, recovered: socket.recovered });
  engine.once("upgrade", (transport) => say({ life: "upgrade", transport: transport.name }));
});
socket.on("disconnect", (reason) => say({ life: "disconnect", reason }));
socket.on("connect_error", (error) => say({ life: "connect_error", message: error.message }));
socket.onAny((event, ...data) => say({ event, data }));

createInterface({ input: process.stdin }).on("line", (line) => {
  const told = JSON.parse(line);
  if (told.ask) {
    socket.timeout(5000).emit(...told.emit, (error, answer) => say({ life: "ack", error: error?.message, answer }));
  } else if (told.emit) {
    socket.emit(...told.emit);
  } else if (told.namespace) {
    const other = socket.io.socket(told.namespace);
    other.on("connect", () => say({ life: "connect", namespace: told.namespace }));
    other.on("connect_error", (error) => {
      say({ life: "connect_error", namespace: told.namespace, message: error.message });
    });
    other.connect();
  } else if (told.connect) {
    socket.connect();
  } else if (told.disconnect) {
    socket.disconnect();
  }
}).on("close", () => process.exit(0));
