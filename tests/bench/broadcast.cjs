// A rival for viewers: Node `ws`. As lean as it can be: no compression, no pings, no tracking beyond its own.
//
//     node broadcast.cjs <folder of ws> <port> plain|frame
//
// `POST /send?bytes=N` sends a JSON text of N bytes to all, and is answered 201. `plain` is `send` in a loop; `frame`
// makes the frame once and writes it to each socket, behind the library's back, which is as quick as Node gets.

const http = require('node:http');
const [, , folder, port, mode] = process.argv;
const { WebSocketServer, WebSocket } = require(folder);
const { Sender } = WebSocket;

function text(number, size) {
  const data = { dropId: '0190a5a0-0000-7000-8000-000000000001', availableStock: 100000000 - number };
  const at = new Date().toISOString();
  return JSON.stringify({ type: 'event', event: 'STOCK_UPDATED', seq: number, at, data }).padEnd(size);
}

let number = 0;
const server = http.createServer((request, answer) => {
  const size = Number(/bytes=(\d+)/.exec(request.url)?.[1] ?? 0);
  tell(text(++number, size));
  answer.writeHead(201, { 'Content-Type': 'application/json', 'Content-Length': 2 });
  answer.end('{}');
});
server.keepAliveTimeout = 0;
const wss = new WebSocketServer({ server, perMessageDeflate: false });
const tell = mode === 'plain' ? plain : frame;

function plain(message) {
  for (const client of wss.clients) {
    if (client.readyState === WebSocket.OPEN) client.send(message);
  }
}

function frame(message) {
  const options = { fin: true, opcode: 1, mask: false, readOnly: false, rsv1: false };
  const prepared = Buffer.concat(Sender.frame(Buffer.from(message), options));
  for (const client of wss.clients) {
    if (client.readyState === WebSocket.OPEN) client._socket.write(prepared);
  }
}

wss.on('connection', (client) => client.on('error', () => client.terminate()));
server.listen({ port: Number(port), host: '127.0.0.1', backlog: 4096 });
