// Adapters: where they are, how they are used; register, pin, delete.

import { call, json } from "./api.js";
import { ago, bytes, count, element, find, notice, redraw, table } from "./dom.js";

const PAGE = 100;
let shown = [];
let next = null;
let asked = null; // AbortController of the last question

export function start() {
  find("register-form").addEventListener("submit", register);
  find("filter").addEventListener("input", draw);
  find("more").addEventListener("click", () => reporting(() => load(next)));
}

export async function refresh() {
  await load(null);
}

async function load(cursor) {
  const query = new URLSearchParams({ limit: PAGE, ...(cursor === null ? {} : { cursor }) });
  const page = await json("GET", `admin/v1/adapters?${query}`);
  shown = cursor === null ? page.data : [...shown, ...page.data];
  next = page.next;
  find("more").hidden = next === null;
  draw();
}

function draw() {
  const wanted = find("filter").value.trim().toLowerCase();
  const rows = shown.filter((row) => [row.name, row.description, ...row.tags].some((text) => text.toLowerCase().includes(wanted)));
  const columns = [
    { title: "Name", name: true, cell: (row) => element("span", { title: row.description }, row.name) },
    { title: "Where", cell: (row) => element("span", { className: `tag ${row.residency}` }, row.residency) },
    { title: "Rank", right: true, cell: (row) => row.rank },
    { title: "Size", right: true, cell: (row) => bytes(row.bytes) },
    { title: "For", cell: (row) => (row.public ? "all tenants" : row.tenant) },
    { title: "In use", right: true, cell: (row) => count(row.leases) },
    { title: "Requests", right: true, cell: (row) => count(row.requests) },
    { title: "Last used", cell: (row) => ago(row.last_used) },
    { title: "", cell: actions },
  ];
  redraw(find("adapter-table"), table(columns, rows, wanted ? "No adapter matches." : "No adapter is registered yet."));
}

function actions(row) {
  const pin = element("button", { type: "button", name: `pin ${row.name}` }, row.pinned ? "Unpin" : "Pin");
  pin.setAttribute("aria-label", `${pin.textContent} ${row.name}`);
  pin.addEventListener("click", () => change(row, "PATCH", { pinned: !row.pinned }, row.pinned ? "is no longer pinned" : "is pinned"));
  const remove = element("button", { type: "button", name: `delete ${row.name}`, className: "danger" }, "Delete");
  remove.setAttribute("aria-label", `Delete ${row.name}`);
  remove.addEventListener("click", async () => {
    if (await confirmed(`Delete the adapter ${row.name}? Requests that use it now are finished.`)) {
      await change(row, "DELETE", undefined, "is deleted");
    }
  });
  return element("span", {}, pin, " ", remove);
}

async function change(row, method, body, done) {
  await reporting(async () => {
    await call(method, `admin/v1/adapters/${encodeURIComponent(row.name)}?tenant=${encodeURIComponent(row.tenant)}`, body);
    notice(`${row.name} ${done}.`);
    await refresh();
  });
}

async function register(event) {
  event.preventDefault();
  const form = event.target;
  const given = new FormData(form);
  const body = new FormData();
  body.append("name", given.get("name"));
  for (const part of ["archive", "config", "weights"]) {
    if (given.get(part)?.size) body.append(part, given.get(part));
  }
  if (given.get("description")) body.append("description", given.get("description"));
  const samples = given.get("samples").split("\n").map((line) => line.trim()).filter(Boolean);
  if (samples.length) body.append("samples", JSON.stringify(samples));
  for (const option of ["public", "pinned", "replace"]) {
    if (given.get(option)) body.append(option, "true");
  }
  const button = form.querySelector("button");
  button.disabled = true;
  await reporting(async () => {
    notice(`Uploading ${given.get("name")} …`);
    const added = await json("POST", "admin/v1/adapters", body);
    const warnings = added.warnings.length ? ` ${added.warnings.join(" ")}` : "";
    notice(`${added.name} is registered: rank ${added.rank}, ${added.modules} linears.${warnings}`);
    form.reset();
    find("register").open = false;
    await refresh();
  });
  button.disabled = false;
}

async function reporting(work) {
  try {
    await work();
  } catch (error) {
    notice(error.message, true);
  }
}

// The dialog tells that it was closed with a later frame only, when another question may be open already.
function confirmed(question) {
  const dialog = find("confirm");
  asked?.abort();
  const own = asked = new AbortController();
  find("confirm-text").textContent = question;
  dialog.showModal();
  return new Promise((resolve) => {
    own.signal.addEventListener("abort", () => resolve(false));
    dialog.addEventListener("submit", ({ submitter }) => {
      resolve(submitter?.value === "yes");
      own.abort();
    }, { signal: own.signal });
    dialog.addEventListener("cancel", () => own.abort(), { signal: own.signal });
  });
}
