// One question, its answer as it comes, and the route that it took.

import { call, events, json } from "./api.js";
import { count, element, find, notice, table } from "./dom.js";

const COLOURS = 6;
let running = null; // AbortController

export function start() {
  const form = find("ask");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask(new FormData(form));
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  find("stop").addEventListener("click", () => running?.abort());
}

export async function refresh() {
  const models = await json("GET", "v1/models");
  const names = models.data.map((model) => model.id);
  let routers = [];
  try {
    routers = (await json("GET", "admin/v1/routers")).data.map((router) => `auto:${router.name}`);
  } catch { /* a tenant's key may use them and not list them */ }
  const options = [...names, "auto", ...routers].map((name) => element("option", { value: name }));
  find("models").replaceChildren(...options);
  const model = find("ask").elements.model;
  if (!model.value) model.value = names[0];
}

async function ask(given) {
  running?.abort();
  const own = running = new AbortController();
  const answer = find("answer");
  answer.replaceChildren();
  answer.setAttribute("aria-busy", "true");
  find("timing").textContent = "";
  find("route").replaceChildren();
  find("stop").disabled = false;
  notice("");
  const started = performance.now();
  let first = null;
  let pieces = 0;
  try {
    const response = await call("POST", "v1/chat/completions", {
      model: given.get("model"),
      messages: [{ role: "user", content: given.get("prompt") }],
      max_tokens: Number(given.get("max_tokens")),
      temperature: Number(given.get("temperature")),
      stream: true,
      lora: { explain: true },
    }, own.signal);
    const header = response.headers.get("x-loramux-route");
    if (header !== null) route(JSON.parse(header));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const text = chunk.choices[0]?.delta?.content;
      if (text) {
        first ??= performance.now() - started;
        pieces += 1;
        answer.append(text);
      }
      if (chunk.lora) {
        route(chunk.lora);
        if (chunk.lora.tokens) colour(answer, chunk.lora);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message, true);
  }
  if (running === own) {
    running = null;
    find("stop").disabled = true;
    answer.setAttribute("aria-busy", "false");
    if (first !== null) {
      const seconds = (performance.now() - started) / 1000;
      find("timing").textContent = `${count(pieces)} pieces in ${seconds.toFixed(2)} s, the first after ${first.toFixed(0)} ms`;
    }
  }
}

function ordered(lora) {
  return [...lora.adapters].sort((one, other) => (other.share ?? other.weight) - (one.share ?? one.weight));
}

// Tokens in the colour of the adapter that leads them.
function colour(answer, lora) {
  const place = new Map(ordered(lora).map(({ name }, index) => [name, index % COLOURS]));
  const marks = lora.tokens[0].map(({ text, adapter }) =>
    element("mark", { className: adapter === null ? "base" : `c${place.get(adapter)}`, title: adapter ?? "base model" }, text));
  answer.replaceChildren(...marks);
}

function route(lora) {
  const chosen = { null: "The base model was named", explicit: "Named in the request" }[lora.router] ?? `Chosen by ${lora.router}`;
  const router = `${chosen}, ${lora.composition}, ${lora.route_ms.toFixed(1)} ms${lora.cached ? ", remembered" : ""}.`;
  const reason = lora.outcome ? ` Nothing was chosen: ${lora.outcome.replaceAll("_", " ")}.` : "";
  const parts = [element("p", {}, router + reason)];
  const decimals = (value) => (value === undefined || value === null ? "" : value.toFixed(3));
  const rows = ordered(lora).map((row, index) => ({ ...row, colour: index % COLOURS }));
  const columns = [
    { title: "Adapter", cell: ({ name, colour }) => (lora.tokens ? element("mark", { className: `c${colour}` }, name) : name) },
    { title: "Weight", right: true, cell: (row) => decimals(row.weight) },
    { title: "Score", of: "score", right: true, cell: (row) => decimals(row.score) },
    { title: "Share of the answer", of: "share", right: true, cell: (row) => `${(100 * row.share).toFixed(1)} %` },
  ];
  const known = columns.filter(({ of }) => of === undefined || rows.some((row) => row[of] !== undefined));
  parts.push(table(known, rows, "The base model answered."));
  if (lora.scores?.length) {
    const candidates = table([
      { title: "Candidate", name: true, cell: (row) => row.name },
      { title: "Score", right: true, cell: (row) => decimals(row.score) },
    ], lora.scores, "");
    parts.push(element("details", {}, element("summary", {}, `All ${count(lora.scores.length)} candidates`), candidates));
  }
  find("route").replaceChildren(...parts);
}
