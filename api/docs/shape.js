// JSON Schema for people: a list of fields with their types, limits and meaning. Knows what our document uses.

import { element, words } from "./elements.js";

const DEPTH_MAX = 8; // no shape of ours is nested deeper, and a circle ends here

// Finds what a reference of the document means. What stands beside the reference counts too.
export class Document {
  constructor(root) {
    this.root = root;
  }

  resolve(found) {
    if (!found || typeof found !== "object" || !found.$ref) return found;
    const { $ref, ...beside } = found;
    const steps = $ref.slice(2).split("/").map((step) => step.replaceAll("~1", "/").replaceAll("~0", "~"));
    const named = steps.reduce((inner, step) => inner?.[step], this.root);
    return { ...this.resolve(named), ...beside };
  }

  // The name of the schema that a reference is of.
  static nameOf(found) {
    return found?.$ref?.startsWith("#/components/schemas/") ? found.$ref.split("/").pop() : "";
  }
}

// The type in one line: `string, uuid`, `array of Drop`, `integer, 0 to 100`.
export function typeOf(spec, schema) {
  const name = Document.nameOf(schema);
  const found = spec.resolve(schema);
  if (!found || Object.keys(found).length === 0) return "anything";
  if (found.const !== undefined) return JSON.stringify(found.const);
  if (found.enum) return found.enum.map((value) => JSON.stringify(value)).join(" or ");
  const several = found.anyOf ?? found.oneOf;
  if (several?.every((one) => one.const !== undefined) && several.length > 6) return name || "one of many words";
  if (several) return several.map((one) => typeOf(spec, one)).join(" or ");
  if (found.type === "array") return `array of ${typeOf(spec, found.items)}`;
  if (found.type === "object") return name || "object";
  return [name || [found.type].flat().join(" or "), ...limits(found)].join(", ");
}

function limits(found) {
  const said = [];
  if (found.format) said.push(found.format);
  if (found.minLength != null || found.maxLength != null) said.push(`${range(found.minLength, found.maxLength)} characters`);
  if (found.minimum != null || found.maximum != null) said.push(range(found.minimum, found.maximum));
  if (found.default != null) said.push(`default ${JSON.stringify(found.default)}`);
  return said;
}

function range(least, most) {
  const shown = [least, most].map((value) => value?.toLocaleString("en"));
  if (least == null) return `at most ${shown[1]}`;
  return most == null ? `at least ${shown[0]}` : `${shown[0]} to ${shown[1]}`;
}

// The fields of an object, each with those inside it; null for what has none.
export function fields(spec, schema, depth = 0) {
  const found = spec.resolve(schema);
  const inner = found?.type === "array" ? spec.resolve(found.items) : found;
  if (depth > DEPTH_MAX || !inner?.properties) return variants(spec, inner, depth);
  if (Object.keys(inner.properties).length === 0) return null;
  const required = new Set(inner.required ?? []);
  return element("ul", { class: "fields" }, ...Object.entries(inner.properties).map(([name, property]) =>
    field(spec, name, property, required.has(name), depth),
  ));
}

function variants(spec, found, depth) {
  const several = (found?.oneOf ?? found?.anyOf)?.filter((one) => spec.resolve(one)?.properties);
  if (!several?.length || depth > DEPTH_MAX) return null;
  return element("ul", { class: "fields variants" }, ...several.map((one) => {
    return element("li", {}, element("span", { class: "type" }, `one of: ${Document.nameOf(one) || "object"}`), fields(spec, one, depth + 1));
  }));
}

function field(spec, name, property, isRequired, depth) {
  const found = spec.resolve(property);
  return element(
    "li",
    {},
    element("code", { class: "name" }, name),
    element("span", { class: "type" }, typeOf(spec, property)),
    isRequired ? null : element("span", { class: "optional" }, "optional"),
    found?.description ? element("span", { class: "meaning" }, ...words(found.description)) : null,
    found?.type === "object" || found?.type === "array" ? fields(spec, property, depth + 1) : null,
  );
}
