// Tenants with their quotas, and what they used.

import { json } from "./api.js";
import { bytes, count, find, table } from "./dom.js";

const DAYS = 7;

export async function refresh() {
  const since = new Date(Date.now() - (DAYS - 1) * 86400e3).toISOString().slice(0, 10);
  const [tenants, usage] = await Promise.all([all("admin/v1/tenants"), all("admin/v1/usage", { since })]);
  const limit = (value, show = count) => (value === null ? "unlimited" : show(value));
  find("tenant-table").replaceChildren(table([
    { title: "Tenant", name: true, cell: (row) => row.id },
    { title: "Weight", right: true, cell: (row) => row.weight },
    { title: "Requests a second", right: true, cell: (row) => limit(row.quotas.requests_per_second) },
    { title: "Tokens a minute", right: true, cell: (row) => limit(row.quotas.tokens_per_minute) },
    { title: "At once", right: true, cell: (row) => limit(row.quotas.concurrency) },
    { title: "Adapters", right: true, cell: (row) => limit(row.quotas.adapters) },
    { title: "Bytes", right: true, cell: (row) => limit(row.quotas.bytes, bytes) },
    { title: "Default router", cell: (row) => row.default_router ?? "–" },
  ], tenants, "There is no tenant."));
  find("usage-table").replaceChildren(table([
    { title: "Tenant", name: true, cell: (row) => row.tenant },
    { title: "Adapters", name: true, cell: (row) => row.adapter || "(base model)" },
    { title: "Requests", right: true, cell: (row) => count(row.requests) },
    { title: "Prompt tokens", right: true, cell: (row) => count(row.prompt_tokens) },
    { title: "Generated tokens", right: true, cell: (row) => count(row.generation_tokens) },
  ], totals(usage), "Nothing was used."));
}

async function all(path, query = {}) {
  const rows = [];
  let cursor = null;
  do {
    const page = await json("GET", `${path}?${new URLSearchParams({ limit: 1000, ...query, ...(cursor === null ? {} : { cursor }) })}`);
    rows.push(...page.data);
    cursor = page.next;
  } while (cursor !== null);
  return rows;
}

function totals(lines) {
  const found = new Map();
  for (const line of lines) {
    const key = JSON.stringify([line.tenant, line.adapter]);
    const row = found.get(key) ?? { tenant: line.tenant, adapter: line.adapter, requests: 0, prompt_tokens: 0, generation_tokens: 0 };
    for (const name of ["requests", "prompt_tokens", "generation_tokens"]) row[name] += line[name];
    found.set(key, row);
  }
  return [...found.values()].sort((one, other) => other.generation_tokens - one.generation_tokens);
}
