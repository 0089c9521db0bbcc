// Tabs, login, and what is read again while a tab is looked at.

import { ApiError, call, session } from "./api.js";
import { find, notice } from "./dom.js";
import * as adapters from "./adapters.js";
import * as overview from "./overview.js";
import * as playground from "./playground.js";
import * as tenants from "./tenants.js";

// `admin`: only the admin key sees it. `every`: milliseconds between two readings.
const TABS = {
  overview: { module: overview, admin: true, every: 2000 },
  adapters: { module: adapters, every: 5000 },
  tenants: { module: tenants, admin: true, every: 10000 },
  playground: { module: playground },
};

let isAdmin = true;
let timer = null;

function current() {
  const asked = location.hash.slice(1);
  if (asked in TABS && (isAdmin || !TABS[asked].admin)) return asked;
  return isAdmin ? "overview" : "adapters";
}

function show() {
  const open = current();
  for (const name of Object.keys(TABS)) {
    find(name).hidden = name !== open;
    const link = document.querySelector(`nav a[href="#${name}"]`);
    link.hidden = Boolean(TABS[name].admin) && !isAdmin;
    link.toggleAttribute("aria-current", name === open);
    if (name === open) link.setAttribute("aria-current", "page");
  }
  document.title = `${find(`${open}-title`).textContent} – loramux console`;
  read(open);
}

async function read(name) {
  clearTimeout(timer);
  const { module, every } = TABS[name];
  const { key } = session;
  try {
    if (!document.hidden) await module.refresh();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) {
      if (session.key === key) login(); // not whoever has logged in since
      return;
    }
    notice(error instanceof TypeError ? "The server cannot be reached." : error.message, true);
  }
  if (every && current() === name) timer = setTimeout(() => read(name), every);
}

async function login(refused = "") {
  session.key = null;
  const dialog = find("login");
  find("login-error").textContent = refused;
  find("leave").hidden = true;
  if (!dialog.open) dialog.showModal();
}

// Sees what the key may do, then shows the tab.
async function enter() {
  try {
    await call("GET", "admin/v1/state");
    isAdmin = true;
  } catch (error) {
    if (error.status === 401) return login(session.key === null ? "" : "The server does not know this key.");
    if (error.status !== 403) notice(error.message ?? "The server cannot be reached.", true);
    isAdmin = error.status !== 403;
  }
  find("leave").hidden = session.key === null;
  show();
}

find("login-form").addEventListener("submit", (event) => {
  event.preventDefault();
  session.key = new FormData(event.target).get("key");
  event.target.reset();
  find("login").close();
  enter();
});
find("login").addEventListener("cancel", (event) => event.preventDefault());
find("leave").addEventListener("click", () => login());
addEventListener("hashchange", () => { notice(""); show(); find("main").focus({ preventScroll: true }); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) read(current()); });
adapters.start();
playground.start();
enter();
