// One operation: what it takes, what it answers, and a form to try it.

import { attempt } from "./attempt.js";
import { code, element, json, paragraphs, words } from "./elements.js";
import { Document, fields, typeOf } from "./shape.js";

export function operation(spec, { method, path, told }, { identity, announce }) {
  const parameters = (told.parameters ?? []).map((parameter) => {
    const found = spec.resolve(parameter);
    return { ...found, schema: spec.resolve(found.schema) };
  });
  const needsUser = (told.security ?? []).length > 0;
  const isOptional = (told.security ?? []).some((one) => Object.keys(one).length === 0);
  const made = element(
    "details",
    { class: "operation", id: told.operationId },
    element(
      "summary",
      {},
      element("span", { class: `method ${method}` }, method.toUpperCase()),
      element("code", { class: "path" }, ...broken(path)),
      element("span", { class: "summary" }, told.summary ?? ""),
    ),
  );
  // Filled when it is opened first: twenty forms that nobody looks at are slow on a phone.
  made.addEventListener("toggle", () => {
    if (!made.open || made.querySelector(".inside")) return;
    made.append(element(
      "div",
      { class: "inside" },
      ...paragraphs(told.description ?? ""),
      needsUser ? element("p", { class: "note" }, isOptional ? "You may say who you are." : "You must say who you are.") : null,
      ...section("Parameters", parameters.length ? table(parameters) : null),
      ...section("Body", body(spec, told.requestBody)),
      ...section("Answers", element("div", { class: "answers" }, ...Object.entries(told.responses).map(([status, answer]) => response(spec, status, answer)))),
      ...section("Try it", attempt({ method: method.toUpperCase(), path, parameters, body: example(spec, told.requestBody), needsUser, identity, announce })),
    ));
  });
  return made;
}

// A path may break behind each of its slashes.
function broken(path) {
  return path.split("/").slice(1).flatMap((part) => [element("wbr"), `/${part}`]);
}

function section(title, content) {
  return content ? [element("h3", {}, title), content] : [];
}

function table(parameters) {
  return element("ul", { class: "fields" }, ...parameters.map((parameter) =>
    element(
      "li",
      {},
      element("code", { class: "name" }, parameter.name),
      element("span", { class: "type" }, `${parameter.in}, ${typeOf(new Document({}), parameter.schema)}`),
      parameter.required ? null : element("span", { class: "optional" }, "optional"),
      parameter.description ? element("span", { class: "meaning" }, ...words(parameter.description)) : null,
    ),
  ));
}

function body(spec, asked) {
  if (!asked) return null;
  const { schema } = asked.content["application/json"];
  const found = spec.resolve(schema);
  return element(
    "div",
    {},
    found.description ? element("p", {}, ...words(found.description)) : null,
    fields(spec, schema),
  );
}

function example(spec, asked) {
  if (!asked) return null;
  const found = spec.resolve(asked.content["application/json"].schema);
  return { required: asked.required, text: asked.required ? json(found.examples?.[0] ?? {}) : "" };
}

function response(spec, status, answer) {
  const found = spec.resolve(answer);
  const [type, content] = Object.entries(found.content ?? {})[0] ?? [];
  const isError = Number(status) >= 400;
  const narrowed = content?.schema?.properties?.error?.properties?.code?.enum;
  return element(
    "details",
    { class: "answer" },
    element(
      "summary",
      {},
      element("span", { class: `code ${isError ? "bad" : "good"}` }, status),
      element("span", {}, isError && narrowed ? narrowed.join(", ") : (found.description ?? "").split(". ")[0]),
    ),
    element(
      "div",
      { class: "inside" },
      isError && content ? codes(content.examples) : element("p", {}, ...words(found.description ?? "")),
      headers(spec, found.headers),
      isError || !content ? null : fields(spec, content.schema),
      sample(type, content),
    ),
  );
}

function codes(examples) {
  return element("ul", { class: "fields" }, ...Object.entries(examples ?? {}).map(([name, { value }]) =>
    element("li", {}, element("code", { class: "name" }, name), element("span", { class: "meaning" }, ...words(value.error.message))),
  ));
}

function headers(spec, of) {
  const names = Object.keys(of ?? {});
  return names.length ? element("p", { class: "note" }, "With ", ...names.flatMap((name, index) => [index ? ", " : "", element("code", {}, name)]), ".") : null;
}

function sample(type, content) {
  const value = content?.example ?? Object.values(content?.examples ?? {})[0]?.value;
  if (value === undefined) return null;
  return code(typeof value === "string" ? value : json(value), `Example of ${type}`);
}
