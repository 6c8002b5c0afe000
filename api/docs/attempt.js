// The form that sends a request to this server, and shows what came back.

import { code, element, json } from "./elements.js";

const ANSWER_MS = 15_000;
const EVENTS_MS = 5_000; // of an answer without an end, so much is shown
const SHOWN_MAX = 50_000; // characters of an answer
// What a browser sends by itself, or lets nobody set.
const OF_THE_BROWSER = new Set(["if-none-match"]);

export function attempt({ method, path, parameters, body, needsUser, identity, announce }) {
  const inputs = parameters
    .filter((parameter) => !OF_THE_BROWSER.has(parameter.name.toLowerCase()))
    .map((parameter) => ({ parameter, input: input(parameter) }));
  const text = body ? element("textarea", { rows: 6, spellcheck: "false", autocomplete: "off" }, body.text) : null;
  const send = element("button", { type: "submit", class: "primary" }, "Send");
  const result = element("div", { class: "result", hidden: true });
  const form = element(
    "form",
    { class: "attempt", autocomplete: "off" },
    ...inputs.map(({ parameter, input: made }) => labelled(parameter.name, parameter.required, made)),
    text ? labelled("Body", body.required, text) : null,
    element("p", { class: "buttons" }, send),
    result,
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (send.getAttribute("aria-disabled") === "true") return;
    send.setAttribute("aria-disabled", "true");
    const asked = request(method, path, inputs, text?.value ?? "", needsUser ? identity.headers() : {});
    const told = await ask(asked);
    result.replaceChildren(...shown(asked, told));
    result.hidden = false;
    send.removeAttribute("aria-disabled");
    announce(told.failure ?? `The answer is ${told.status}`);
  });
  return form;
}

function input(parameter) {
  const { schema = {}, example } = parameter;
  const value = parameter.in === "path" || (parameter.in === "query" && parameter.required) ? example ?? "" : "";
  const shown = schema.default ?? example ?? schema.examples?.[0] ?? "";
  return element("input", { value, placeholder: String(shown), required: parameter.required, spellcheck: "false" });
}

function labelled(name, isRequired, control) {
  return element("label", { class: "field" }, element("span", {}, name, isRequired ? " (required)" : ""), control);
}

function request(method, path, inputs, body, identity) {
  const headers = { ...identity };
  const query = new URLSearchParams();
  let target = path;
  for (const { parameter, input: made } of inputs) {
    const value = made.value.trim();
    if (parameter.in === "path") target = target.replace(`{${parameter.name}}`, encodeURIComponent(value));
    else if (value !== "" && parameter.in === "query") query.set(parameter.name, value);
    else if (value !== "") headers[parameter.name] = value;
  }
  if (body.trim()) headers["Content-Type"] = "application/json";
  const url = new URL(target + (query.size ? `?${query}` : ""), location.origin);
  return { method, url, headers, body: body.trim() ? body : undefined };
}

async function ask({ method, url, headers, body }) {
  const giveUp = new AbortController();
  const timer = setTimeout(() => giveUp.abort(), ANSWER_MS);
  const began = performance.now();
  try {
    const response = await fetch(url, { method, headers, body, signal: giveUp.signal, cache: "no-store" });
    const ms = performance.now() - began;
    const isEndless = response.headers.get("Content-Type")?.startsWith("text/event-stream");
    const text = isEndless ? await beginning(response) : await response.text();
    return { status: response.status, ms, headers: [...response.headers], text };
  } catch (failure) {
    return { failure: failure.name === "AbortError" ? "No answer came in time." : `The request could not be sent: ${failure.message}.` };
  } finally {
    clearTimeout(timer);
  }
}

// What comes of an answer without an end, for a while.
async function beginning(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const timer = setTimeout(() => reader.cancel(), EVENTS_MS);
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    text += part.value;
    if (text.length > SHOWN_MAX) break;
  }
  clearTimeout(timer);
  reader.cancel();
  return text;
}

function shown(asked, told) {
  const command = code(curl(asked), "The same request with curl");
  if (told.failure) return [element("p", { class: "status bad" }, told.failure), command];
  const kind = told.status < 400 ? "good" : "bad";
  return [
    element("p", { class: `status ${kind}` }, `${told.status}`, element("span", {}, ` after ${told.ms.toFixed(1)} ms`)),
    code(pretty(told.text).slice(0, SHOWN_MAX) || "(no body)", "Body of the answer"),
    element("details", {}, element("summary", {}, "Headers"), code(told.headers.map((pair) => pair.join(": ")).join("\n"), "Headers of the answer")),
    element("details", {}, element("summary", {}, "curl"), command),
  ];
}

function pretty(text) {
  try {
    return json(JSON.parse(text));
  } catch {
    return text;
  }
}

function curl({ method, url, headers, body }) {
  const lines = [`curl -i -X ${method} ${quoted(url.href)}`];
  for (const [name, value] of Object.entries(headers)) lines.push(`-H ${quoted(`${name}: ${value}`)}`);
  if (body) lines.push(`-d ${quoted(body)}`);
  return lines.join(" \\\n  ");
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
