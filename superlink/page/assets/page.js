// Keeps the page as the server has it, section by section, without a reload. What it puts in is the
// server's own HTML, in which all that comes from a run is escaped; it may run no script (the
// header Content-Security-Policy).
"use strict";

const EVERY_MS = 2000;
const away = document.getElementById("away");
const shown = new Map(sections(document));
let tag = "";

function sections(page) {
  return [...page.querySelectorAll("main > section")].map((s) => [s.id, s.outerHTML]);
}

function duration(seconds) {
  const s = Math.max(Math.floor(seconds), 0);
  const two = (n) => String(n).padStart(2, "0");
  return `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}`;
}

// The clocks go on between two answers, and moments stand in the reader's own time.
function tick() {
  const now = Date.now() / 1000;
  for (const time of document.querySelectorAll("time")) {
    const { since, until, at, clock } = time.dataset;
    if (since) time.textContent = duration(now - since);
    if (until) time.textContent = until > now ? duration(until - now) : "any moment";
    if (at) time.textContent = new Date(at * 1000).toLocaleString();
    if (clock) time.textContent = new Date(clock * 1000).toLocaleTimeString();
  }
}

function replace(section, html) {
  const fresh = new DOMParser().parseFromString(html, "text/html").body.firstElementChild;
  for (const open of section.querySelectorAll("details[open]")) {
    fresh.querySelector(`#${CSS.escape(open.id)}`)?.setAttribute("open", "");
  }
  section.replaceWith(document.adoptNode(fresh));
}

async function refresh() {
  try {
    const headers = tag ? { "If-None-Match": tag } : {};
    const answer = await fetch(location.href, { headers, cache: "no-store" });
    if (answer.status === 200) {
      tag = answer.headers.get("ETag") ?? "";
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const [id, html] of sections(page)) {
        const section = document.getElementById(id);
        if (section && shown.get(id) !== html) replace(section, html);
        shown.set(id, html);
      }
      document.body.dataset.updates = Number(document.body.dataset.updates ?? 0) + 1;
    }
    away.hidden = answer.ok || answer.status === 304;
    if (!away.hidden) away.textContent = "This run is no longer there.";
  } catch {
    away.textContent = "The page's server does not answer; this is what it said last.";
    away.hidden = false;
  }
  tick();
  setTimeout(refresh, EVERY_MS);
}

tick();
setInterval(tick, 1000);
setTimeout(refresh, EVERY_MS);
