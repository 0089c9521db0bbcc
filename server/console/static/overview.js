// What the server does now: rates over the last readings, memory, latency by adapter.

import { call, json } from "./api.js";
import { bytes, count, element, find, milliseconds, spark, table } from "./dom.js";
import { parse, quantile, sum, values } from "./metrics.js";

const WINDOW = 30; // readings that rates and percentiles look back on, 2 s each
const FIRST = "loramux_time_to_first_token_seconds";
const GAP = "loramux_inter_token_latency_seconds";
const MOST_ADAPTERS = 25;

const readings = []; // { at, metrics }, the oldest first
const history = { tokens: [], running: [] };

export async function refresh() {
  const [state, response] = await Promise.all([json("GET", "admin/v1/state"), call("GET", "metrics")]);
  const now = { at: performance.now() / 1000, metrics: parse(await response.text()) };
  const last = readings.at(-1) ?? null;
  if (last !== null && sum(now.metrics, `${FIRST}_count`) < sum(last.metrics, `${FIRST}_count`)) {
    readings.length = 0; // the server started again
  }
  readings.push(now);
  if (readings.length > WINDOW) readings.shift();
  show(state, now);
}

function rate(name) {
  const [first, last] = [readings.at(0), readings.at(-1)];
  return readings.length < 2 ? 0 : (sum(last.metrics, name) - sum(first.metrics, name)) / (last.at - first.at);
}

function show(state, now) {
  const before = readings.length > 1 ? readings[0].metrics : null;
  // A token is generated when it is sent, not when its request has ended: gaps and first tokens count them.
  const tokens = rate(`${GAP}_count`) + rate(`${FIRST}_count`);
  remember(history.tokens, tokens);
  remember(history.running, state.running);
  const percentiles = (name) => [0.5, 0.99].map((share) => milliseconds(quantile(now.metrics, before, name, share))).join(" / ");
  const steps = rate("loramux_batch_rows_count");
  const rows = steps > 0 ? rate("loramux_batch_rows_sum") / steps : 0;
  const waited = state.oldest_waiting_seconds;
  find("cards").replaceChildren(
    card("Tokens a second", tokens.toFixed(1), `${steps.toFixed(1)} steps a second`, spark(history.tokens)),
    card("Sequences running", count(state.running), `${count(state.waiting)} waiting`, spark(history.running)),
    card("First token, ms", percentiles(FIRST), "median / 99 %, last minute"),
    card("Between tokens, ms", percentiles(GAP), "median / 99 %, last minute"),
    card("Batch rows", rows.toFixed(1), "tokens in a step, on average"),
    card("Oldest waiting", waited === null ? "–" : `${waited.toFixed(1)} s`, state.draining ? "draining: takes no new requests" : `${count(state.requests)} requests open`),
    card("Preemptions", count(state.engines.reduce((total, engine) => total + engine.preemptions, 0)), state.engines.length > 1 ? "since each engine started" : "since the engine started"),
  );
  const several = state.engines.length > 1;
  find("meters").replaceChildren(...state.engines.flatMap((engine) => [
    ...(several ? [heading(engine)] : []),
    ...(several && !engine.alive ? [] : meters(engine)),
  ]));
  find("by-adapter").replaceChildren(byAdapter(now.metrics));
  find("server").textContent = serverLine(state);
}

function remember(points, value) {
  points.push(value);
  if (points.length > WINDOW) points.shift();
}

function card(title, value, small, ...more) {
  return element("div", { className: "card" }, element("h3", {}, title), element("p", {}, value), element("small", {}, small), ...more);
}

function serverLine(state) {
  const living = state.engines.filter((engine) => engine.alive);
  const all = state.engines.length;
  if (!living.length) return all > 1 ? `all ${all} engines are down` : "the engine is down";
  const devices = [...new Set(living.map((engine) => engine.device))].join(" ");
  const number = living.length < all ? `${living.length} of ${all} engines live, ` : all > 1 ? `${all} engines, ` : "";
  return `${number}${devices}, ${living[0].dtype}, up ${duration(state.uptime_seconds)}`;
}

function heading(engine) {
  const does = engine.alive ? `${count(engine.running)} running, ${count(engine.waiting)} waiting` : "is down, and is being restarted";
  return element("h4", {}, `Engine ${engine.id} `, element("small", {}, does));
}

function meters(engine) {
  const pages = engine.pages;
  const all = Object.values(pages).reduce((total, value) => total + value, 0);
  const kv = engine.kv_used_blocks;
  return [
    meter("KV cache", [[kv, ""]], engine.kv_blocks, `${count(kv)} of ${count(engine.kv_blocks)} blocks`),
    meter("Adapter pages", [[pages.used ?? 0, ""], [pages.cached ?? 0, "cached"]], all,
      `${count(pages.used ?? 0)} used, ${count(pages.cached ?? 0)} cached, ${count(pages.free ?? 0)} free`),
    element("div", { className: "meter" }, element("span", {}, "Adapters"),
      element("span", {}, `${count(engine.adapters.device ?? 0)} on the device, ${count(engine.adapters.host ?? 0)} in host memory`)),
    element("div", { className: "meter" }, element("span", {}, "Planned"),
      element("span", {}, Object.entries(engine.memory).filter(([, size]) => size).map(([name, size]) => `${name} ${bytes(size)}`).join(", "))),
  ];
}

function meter(title, parts, all, text) {
  const bar = element("div", { className: "bar", role: "img", "aria-label": `${title}: ${text}` });
  for (const [value, kind] of parts) {
    const part = element("i", { className: kind });
    part.style.width = `${all ? (100 * value) / all : 0}%`;
    bar.append(part);
  }
  return element("div", { className: "meter" }, element("span", {}, title), bar, element("small", {}, text));
}

function byAdapter(metrics) {
  const rows = values(metrics, `${FIRST}_count`, "adapter").map((adapter) => {
    const where = { adapter };
    const pair = (name) => [0.5, 0.99].map((share) => milliseconds(quantile(metrics, null, name, share, where))).join(" / ");
    return {
      adapter,
      requests: sum(metrics, "loramux_request_success_total", where),
      tokens: sum(metrics, "loramux_generation_tokens_total", where),
      first: pair(FIRST),
      gap: pair(GAP),
      whole: pair("loramux_e2e_request_latency_seconds"),
    };
  });
  rows.sort((one, other) => other.requests - one.requests);
  return table([
    { title: "Adapter", name: true, cell: (row) => row.adapter || "(base model)" },
    { title: "Requests", right: true, cell: (row) => count(row.requests) },
    { title: "Tokens", right: true, cell: (row) => count(row.tokens) },
    { title: "First token", right: true, cell: (row) => row.first },
    { title: "Between tokens", right: true, cell: (row) => row.gap },
    { title: "Whole request", right: true, cell: (row) => row.whole },
  ], rows.slice(0, MOST_ADAPTERS), "No request has been answered yet.");
}

function duration(seconds) {
  const [days, hours, minutes] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : `${minutes} min`;
}
