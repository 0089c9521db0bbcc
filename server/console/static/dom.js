// Elements. Text is only ever set as text: names come from tenants.

export const find = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Puts new content in its place; who is at a button there stays at the one of the same name.
export function redraw(place, content) {
  const { activeElement } = document;
  const name = place.contains(activeElement) ? activeElement.name : null;
  place.replaceChildren(content);
  if (name) [...place.querySelectorAll("button")].find((button) => button.name === name)?.focus();
}

// columns: { title, right?, cell(row) -> text or node }.
export function table(columns, rows, empty) {
  if (!rows.length) return element("p", { className: "hint" }, empty);
  const head = columns.map(({ title, right }) => element("th", { scope: "col", className: right ? "right" : "" }, title));
  const lines = rows.map((row) => element("tr", {}, ...columns.map(({ cell, right, name }) => {
    const content = cell(row);
    const made = element("td", { className: right ? "right" : name ? "name" : "" }, content);
    if (name) made.title = content.textContent ?? content;
    return made;
  })));
  return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...lines));
}

export function spark(points) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const top = Math.max(...points, 1e-9);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const step = 100 / Math.max(1, points.length - 1);
  line.setAttribute("points", points.map((value, index) => `${index * step},${29 - (28 * value) / top}`).join(" "));
  for (const [name, value] of Object.entries({ fill: "none", stroke: "currentColor", "stroke-width": 2, "vector-effect": "non-scaling-stroke" })) {
    line.setAttribute(name, value);
  }
  svg.append(line);
  return svg;
}

const COUNT = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const count = (value) => COUNT.format(value);
export const milliseconds = (seconds) => (seconds === null ? "–" : (seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0));

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (value >= 1000 && place < units.length - 1) [value, place] = [value / 1000, place + 1];
  return `${value.toFixed(place && value < 100 ? 1 : 0)} ${units[place]}`;
}

export function ago(seconds) {
  if (seconds === null) return "never";
  const passed = Math.max(0, Date.now() / 1000 - seconds);
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (passed >= length) return `${Math.floor(passed / length)} ${unit} ago`;
  }
  return "just now";
}

export function notice(text, isError = false) {
  const shown = find("notice");
  shown.textContent = text;
  shown.classList.toggle("error", isError);
  shown.hidden = !text;
}
