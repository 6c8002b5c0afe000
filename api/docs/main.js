// The documentation page: reads /openapi.json, and shows it.

import { Identity } from "../page/identity.js";
import { element, paragraphs, words } from "./elements.js";
import { operation } from "./operation.js";
import { Document, fields, typeOf } from "./shape.js";

const byId = (id) => document.getElementById(id);
const setting = (name) => document.querySelector(`meta[name="holdfast-${name}"]`)?.content ?? "";

const identity = new Identity(setting("env"), setting("auth"));

function announce(text) {
  byId("announcer").textContent = text;
}

async function read() {
  const response = await fetch("/openapi.json");
  if (!response.ok) throw new Error(`the answer was ${response.status}`);
  return response.json();
}

function show(root) {
  const spec = new Document(root);
  byId("about").replaceChildren(...paragraphs(root.info.description));
  const entries = Object.entries(root.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, told]) => ({ method, path, told })),
  );
  for (const tag of root.tags) group(spec, tag, entries.filter(({ told }) => told.tags?.includes(tag.name)));
  shapes(spec, root.components.schemas);
  search();
}

function group(spec, tag, entries) {
  const title = tag.name[0].toUpperCase() + tag.name.slice(1);
  byId("operations").append(element(
    "section",
    { class: "group" },
    element("h2", {}, title),
    element("p", {}, ...words(tag.description ?? "")),
    ...entries.map((entry) => operation(spec, entry, { identity, announce })),
  ));
  byId("contents").append(element(
    "section",
    {},
    element("h2", {}, title),
    element("ul", {}, ...entries.map(({ method, told }) => element(
      "li",
      { "data-of": told.operationId },
      element("a", { href: `#${told.operationId}` }, element("span", { class: `method ${method}` }, method.toUpperCase()), element("span", {}, told.summary ?? told.operationId)),
    ))),
  ));
}

function shapes(spec, schemas) {
  const made = Object.entries(schemas).map(([name, schema]) => element(
    "details",
    { class: "operation shape", id: `shape-${name}` },
    element("summary", {}, element("code", { class: "path" }, name), element("span", { class: "summary" }, schema.type ?? "")),
    element(
      "div",
      { class: "inside" },
      schema.description ? element("p", {}, ...words(schema.description)) : null,
      fields(spec, schema) ?? choices(schema) ?? element("p", { class: "type" }, typeOf(spec, schema)),
    ),
  ));
  byId("operations").append(element("section", { class: "group" }, element("h2", {}, "Shapes"), element("p", {}, "What the bodies and messages are made of."), ...made));
}

function choices(schema) {
  const known = schema.oneOf?.filter((one) => one.const !== undefined && one.description);
  if (!known?.length) return null;
  return element("ul", { class: "fields" }, ...known.map((one) =>
    element("li", {}, element("code", { class: "name" }, String(one.const)), element("span", { class: "meaning" }, ...words(one.description))),
  ));
}

// Finding ----------------------------------------------------------------------------------------------------------

function search() {
  byId("search").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const one of document.querySelectorAll(".operation")) {
      const text = `${one.id} ${one.querySelector("summary").textContent}`.toLowerCase();
      one.hidden = !wanted.every((word) => text.includes(word));
      found += one.hidden ? 0 : 1;
      const entry = document.querySelector(`[data-of="${CSS.escape(one.id)}"]`);
      if (entry) entry.hidden = one.hidden;
    }
    for (const section of document.querySelectorAll(".group, .contents section")) {
      section.hidden = !section.querySelector(".operation:not([hidden]), li:not([hidden])");
    }
    byId("nothing").hidden = found > 0;
  });
}

// A link to an operation opens it.
function open() {
  const one = document.getElementById(location.hash.slice(1));
  if (!(one instanceof HTMLDetailsElement)) return;
  one.open = true;
  one.scrollIntoView();
}

// Who is asking ----------------------------------------------------------------------------------------------------

function who() {
  const input = byId("who-input");
  if (identity.mode === "proxy") {
    byId("who-text").textContent = "The proxy in front of this server says who you are.";
    byId("who-field").hidden = true;
  } else if (identity.mode === "token") {
    byId("who-text").textContent = "The token is sent with what needs a user, and kept until this tab is closed.";
    byId("who-label").textContent = "Bearer token";
    input.value = identity.token;
    input.addEventListener("change", () => identity.setToken(input.value.trim()));
  } else {
    byId("who-text").textContent = "Sent with what needs a user. Any UUID will do; the live page in this browser is the same user.";
    byId("who-label").textContent = "X-User-Id";
    input.value = identity.id;
    input.addEventListener("change", () => (identity.id = input.value.trim()));
  }
  byId("who").hidden = false;
}

who();
try {
  show(await read());
  open();
  window.addEventListener("hashchange", open);
} catch (failure) {
  byId("about").replaceChildren(element("p", { role: "alert" }, `The document could not be read: ${failure.message}. `, element("a", { href: "/docs" }, "Try again"), "."));
}
