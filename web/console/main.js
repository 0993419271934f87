/** The console at `/console`: asks once a second what the daemon is doing, and draws it. */

import { $, drawing, el, plural, setText, syncChildren } from "../shared/dom.js";
import { duration } from "../shared/time.js";
import { Tile } from "./charts.js";
import { EventList } from "./events.js";
import { Follow } from "./follow.js";
import { Source } from "./source.js";
import { bytes, drawDeadLetters, drawSessions, drawTopics, drawWatches } from "./tables.js";

const TOKEN = "rowcast.operator"; // in sessionStorage: it ends with the tab
const SLOW = 5; // seconds for which changes may wait before that is a problem
const LATE = 1000; // milliseconds of latency that deserve a look
const SILENCE = 3000; // milliseconds without an answer after which the page says so

const milliseconds = (value) => (value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`);
const count = (value) => Math.round(value).toLocaleString("en");

const tiles = {
  latency: new Tile($("tiles"), { name: "Latency", least: 10, format: milliseconds }),
  waiting: new Tile($("tiles"), { name: "Lag", least: 1, format: (value) => `${value} s` }),
  changes: new Tile($("tiles"), { name: "Changes per second", least: 5, format: count }),
  clients: new Tile($("tiles"), { name: "Clients", least: 5, format: count }),
};

let source = null;
let hasSamples = null;
const replaying = new Set();
const draw = drawing(drawAll);
const events = new EventList(draw);
const follow = new Follow();

function drawAll() {
  const state = source?.state;
  drawConnection(state);
  if (!state) return;
  if (hasSamples === null) {
    hasSamples = state.has_samples;
    if (hasSamples) follow.offerSamples().catch(() => {});
  }
  drawVerdict(state);
  drawTiles(state, source.seconds());
  events.draw(source.events);
  drawDeadLetters(state, replaying, replay);
  drawTopics(state, (topic) => follow.choose(topic));
  drawSessions(state);
  drawWatches(state);
}

function drawConnection(state) {
  const age = source?.answeredAt ? Date.now() - source.answeredAt : 0;
  const isSilent = Boolean(source?.problem) || age > SILENCE;
  $("console").classList.toggle("outdated", isSilent && Boolean(state));
  $("state").dataset.state = isSilent ? "waiting" : state ? "live" : "connecting";
  setText($("state-text"), isSilent ? (source.answeredAt ? `No answer for ${duration(age / 1000)}` : "No answer") : state ? "Live" : "Connecting");
  if (!state) return;
  const workers = state.workers > 1 ? ` · ${state.answering} of ${plural(state.workers, "worker")} seen` : "";
  setText($("about"), `${state.version} · position ${state.position.toLocaleString("en")} · ${state.is_leader ? "leads" : "follows"} · ${bytes(state.memory)}${workers}`);
}

/** What is wrong, and what deserves a look. */
function findings(state) {
  const bad = [...state.reasons];
  if (source.problem) bad.unshift(`${source.problem} What you see is what it said last.`);
  if (state.database_problem) bad.push(`The database does not answer (${state.database_problem}): dead letters and watches are as they were read last.`);
  const warn = [...state.warnings];
  if (state.dead_letters.length) warn.push(`${plural(state.dead_letters.length, "change")} could not be sent: see Dead letters.`);
  if (state.behind) warn.push(`${plural(state.behind, "client")} cannot keep up and ${state.behind === 1 ? "is" : "are"} served from the log.`);
  if (state.queue_usage > 0.5) warn.push(`The NOTIFY queue of Postgres is ${Math.round(100 * state.queue_usage)} % full.`);
  return { bad, warn };
}

function drawVerdict(state) {
  const { bad, warn } = findings(state);
  const verdict = bad.length ? "bad" : warn.length ? "warn" : "good";
  $("verdict").dataset.verdict = verdict;
  const title = {
    good: "All is well", warn: `${plural(warn.length, "thing")} to look at`, bad: `${plural(bad.length, "problem")}`,
  }[verdict];
  setText($("verdict-text"), title);
  document.title = `${verdict === "good" ? "" : `${title} – `}Console – Rowcast`;
  const lines = verdict === "good" ? ["Every part is ready, nothing waits, and every change could be sent."] : [...bad, ...warn];
  syncChildren($("verdict-lines"), lines, (line) => line, (line) => el("li", "", line), () => {});
}

function drawTiles(state, seconds) {
  const newest = (name) => seconds.findLast((second) => second && second[name] !== null)?.[name] ?? null;
  const series = (name) => seconds.map((second) => second?.[name] ?? null);
  const latency = newest("median");
  tiles.latency.draw({
    value: latency === null ? "–" : milliseconds(latency), note: latency === null ? "no change yet" : "statement to client",
    level: latency > LATE ? "warn" : "good", series: series("median"), peaks: series("longest"),
  });
  tiles.waiting.draw({
    value: `${state.waiting < 10 ? state.waiting.toFixed(1) : Math.round(state.waiting)} s`,
    note: state.waiting > 0 ? "changes wait to be numbered" : "nothing waits", level: state.waiting > SLOW ? "bad" : "good", series: series("waiting"),
  });
  const rates = seconds.slice(0, -1).filter(Boolean); // the current second is not over
  const lately = rates.slice(-5);
  const rate = lately.length ? lately.reduce((sum, { changes }) => sum + changes, 0) / lately.length : 0;
  tiles.changes.draw({
    value: rate < 10 ? rate.toFixed(1) : count(rate), note: "on average over 5 s", level: "good", series: series("changes"),
  });
  tiles.clients.draw({
    value: count(state.clients), note: `of ${count(state.clients_limit)}, ${plural(state.subscriptions, "subscription")}`,
    level: state.behind || state.clients >= state.clients_limit ? "warn" : "good", series: series("clients"),
  });
}

async function replay(seq) {
  replaying.add(seq);
  draw();
  try {
    await source.replay(seq);
    setText($("replay-note"), `${seq} was replayed as a new change.`);
  } catch (error) {
    setText($("replay-note"), error instanceof TypeError ? "The daemon does not answer." : error.message);
  }
  replaying.delete(seq);
  source?.refresh();
}

function open(token) {
  source?.close();
  $("sign-in").hidden = true;
  $("console").hidden = false;
  source = new Source(token, { change: draw, refused: (message) => askForToken(token ? message : "") });
  draw();
}

/** Show the form; `problem` says what was wrong with the last token. */
function askForToken(problem) {
  source?.close();
  source = null;
  follow.stop();
  sessionStorage.removeItem(TOKEN);
  $("console").hidden = true;
  $("sign-in").hidden = false;
  setText($("sign-in-alert"), problem);
  $("token").focus();
}

$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  $("token").value = "";
  sessionStorage.setItem(TOKEN, token);
  open(token);
});
open(sessionStorage.getItem(TOKEN));
