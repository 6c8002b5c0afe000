// Elements and texts, made without markup: whatever the document says stays text.

// An element with attributes and children; a child that is text stays text, and one that is null is left out.
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

// Words with `code` in them, as elements.
export function words(text) {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

// Paragraphs, with an empty line between them. A paragraph's first word may name it: `Addresses: …`.
export function paragraphs(text) {
  return text.split(/\n\n+/).filter(Boolean).map((part) => {
    const named = /^([A-Z][a-z]+): (.*)$/s.exec(part);
    return named
      ? element("p", {}, element("strong", {}, `${named[1]}: `), ...words(named[2]))
      : element("p", {}, ...words(part));
  });
}

export function json(value) {
  return JSON.stringify(value, null, 2);
}

// A block of code, which can be scrolled with the keyboard too.
export function code(text, label) {
  return element("pre", { tabindex: "0", role: "region", "aria-label": label }, element("code", {}, text));
}
