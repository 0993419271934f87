/** The live page: channels, messages, and every frame. What it knows comes from Rowcast alone. */

import { Position, RowcastClient } from "./rowcast-client.js";

const seconds = (number) => number * 1000;

/* Rows */

/** How many rows of each table are kept per topic, newest first. Tables that are not here are ignored. */
const MAX_ROWS = {
  users: 5000, user_status: 5000, channels: 1, channel_members: 1000, messages: 500, reactions: 2000, files: 500,
};

/** The rows of the followed topics: topic -> table -> key -> {key, row, seq, mark, live, time}. */
class Rows {
  #topics = new Map();

  /** Apply a change of a topic, unless the row is as new already. */
  apply(topic, change, live) {
    const limit = MAX_ROWS[change.table];
    if (limit === undefined) return;
    const rows = this.#table(topic, change.table);
    const key = JSON.stringify(change.key);
    const before = rows.get(key);
    if (before && before.seq >= change.seq) return;
    if (change.kind === "delete" || !change.record) {
      rows.delete(key);
      return;
    }
    let mark = before?.mark ?? "";
    if (change.kind === "restore") mark = "restored";
    if (change.kind === "update" && change.changed?.includes("content")) mark = "edited";
    const time = parseTime(change.record.created_at);
    rows.set(key, { key, row: change.record, seq: change.seq, mark, live, time });
    if (rows.size > limit) rows.delete(rows.keys().next().value);
  }

  reset(topic) {
    this.#topics.delete(topic);
  }

  all(topic, table) {
    return [...(this.#topics.get(topic)?.get(table)?.values() ?? [])];
  }

  first(topic, table) {
    return this.#topics.get(topic)?.get(table)?.values().next().value?.row;
  }

  size(topic, table) {
    return this.#topics.get(topic)?.get(table)?.size ?? 0;
  }

  #table(topic, table) {
    const tables = this.#topics.get(topic) ?? this.#topics.set(topic, new Map()).get(topic);
    return tables.get(table) ?? tables.set(table, new Map()).get(table);
  }
}

/* State */

const app = {
  client: null,
  user: null,
  rows: new Rows(),
  names: new Map(), // of users and channels, by id; they outlive the rows, since messages do
  joined: new Set(), // the topics of the user's channels
  deleted: new Set(), // those of them whose channel was deleted
  unread: new Map(), // topic -> number of messages
  selected: null, // a topic
  session: "",
  latency: null,
  entries: [], // of the frame log, not yet drawn
  paused: false,
  counts: {
    changes: 0, inserts: 0, updates: 0, deletes: 0, restores: 0,
    replayed: 0, repeats: 0, reconnects: -1, resets: 0, gaps: 0,
  },
};

const COUNTS = { insert: "inserts", update: "updates", delete: "deletes", restore: "restores" };
const MAX_ENTRIES = 500;
const MAX_NAMES = 10000;
const MAX_SHOWN = 4000; // characters of a value

const nameOf = (id) => app.names.get(id) ?? short(id);
const statuses = () => new Map(app.rows.all("users", "user_status").map(({ row }) => [row.user_id, row]));
const channelTopic = (id) => `channel:${id}`;
const channelId = (topic) => topic.slice("channel:".length);

function channels() {
  return [...app.joined].filter((topic) => !app.deleted.has(topic))
    .map((topic) => ({ topic, name: nameOf(channelId(topic)) }))
    .sort((a, b) => a.name.localeCompare(b.name));
}

/* Text and elements */

const $ = (id) => document.getElementById(id);
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

/** An element. Children that are strings become text, never markup. */
function el(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const clipped = (value) => typeof value === "string" && value.length > MAX_SHOWN
  ? `${value.slice(0, MAX_SHOWN)}… (${value.length.toLocaleString()} characters)` : value;

const timeFormat = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });
const dayFormat = new Intl.DateTimeFormat(undefined, {
  day: "numeric", month: "short", hour: "numeric", minute: "2-digit",
});
const secondFormat = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
/** The milliseconds of a time as Postgres writes it: in any year, before Christ too, or infinite. */
function parseTime(text = "") {
  const [, digits, rest, beforeChrist] = /^(\d{4,})(-.*?)( BC)?$/.exec(text) ?? [];
  if (!digits) return text.startsWith("-") ? -Infinity : Infinity;
  const year = beforeChrist ? 1 - Number(digits) : Number(digits);
  const time = Date.parse(`${year < 0 ? "-" : "+"}${String(Math.abs(year)).padStart(6, "0")}${rest}`);
  return Number.isNaN(time) ? Infinity : time; // past the last year of JavaScript
}

const isToday = (time) => new Date(time).toDateString() === new Date().toDateString();
const formatTime = (time) => (isToday(time) ? timeFormat : dayFormat).format(time);
const formatLatency = (ms) => (ms === null ? "–" : ms < seconds(1) ? `${ms} ms` : `${(ms / 1000).toFixed(1)} s`);
const short = (id) => id.length > 12 ? `…${id.slice(-7)}` : id;
const initials = (name) => name.split(/\s+/).slice(0, 2).map((word) => [...word][0] ?? "").join("").toUpperCase();
const plural = (number, word) => `${number.toLocaleString()} ${word}${number === 1 ? "" : "s"}`;

const STATUS_LABELS = { online: "online", away: "away", busy: "busy", dnd: "do not disturb", offline: "offline" };
function statusDot(status = "offline") {
  const element = el("i", `dot ${status}`, el("span", "visually-hidden", STATUS_LABELS[status]));
  element.title = STATUS_LABELS[status];
  return element;
}

/* Drawing */

/** Draw these parts at the next animation frame, each once. A hidden page draws nothing. */
const pending = new Set();
function redraw(...parts) {
  if (pending.size === 0) requestAnimationFrame(() => {
    const drawn = [...pending];
    pending.clear();
    for (const part of drawn) draw[part]();
  });
  parts.forEach((part) => pending.add(part));
}

/** Change a pane. If it was scrolled to its end it stays there, otherwise it stays where it is. */
function keepScroll(pane, change) {
  const stay = isAtEnd(pane);
  change();
  if (stay) pane.scrollTop = pane.scrollHeight;
}

const isAtEnd = (pane) => pane.scrollHeight - pane.scrollTop - pane.clientHeight < 40;

/** Make the children of `list` match `items`, in their order. Children whose key is still there are reused. */
function syncChildren(list, items, key, create, update) {
  const unused = new Map([...list.children].map((child) => [child.dataset.key, child]));
  let cursor = list.firstElementChild;
  for (const item of items) {
    const child = unused.get(key(item)) ?? create(item);
    child.dataset.key = key(item);
    unused.delete(key(item));
    if (child === cursor) cursor = cursor.nextElementSibling;
    else list.insertBefore(child, cursor);
    update(child, item);
  }
  for (const child of unused.values()) child.remove();
}

const draw = {
  stats() {
    const { position } = app.client ?? {};
    setText($("position"), position ? String(position.seq) : "–");
    $("position").title = position ? String(position) : "";
    setText($("session"), app.session ? short(app.session) : "–");
    $("session").title = app.session;
    setText($("latency"), formatLatency(app.latency));
    for (const [name, count] of Object.entries(app.counts)) {
      setText($(`count-${name}`), Math.max(0, count).toLocaleString());
    }
  },

  channels() {
    const all = channels();
    if (!all.some(({ topic }) => topic === app.selected)) {
      const first = all.find(({ topic }) => app.names.has(channelId(topic)));
      if (first) select(first.topic);
      else if (app.selected) select(null);
    }
    syncChildren($("channels"), all, ({ topic }) => topic, createChannel, updateChannel);
  },

  people() {
    const status = statuses();
    const people = app.rows.all("users", "users").map(({ row }) => row).slice(-200)
      .sort((a, b) => nameOf(a.id).localeCompare(nameOf(b.id)));
    const create = () => el("li", "person", statusDot(), el("span"));
    const update = (item, { id }) => updatePerson(item, id, status.get(id));
    syncChildren($("people"), people, ({ id }) => id, create, update);
  },

  messages() {
    const topic = app.selected;
    drawChannelHead(topic);
    const messages = topic ? sortedMessages(topic) : [];
    let added = false;
    keepScroll($("message-pane"), () => {
      removeOldMessages(messages);
      added = placeMessages(messages, messageDetails(topic));
      if (!messages.length && $("state").dataset.state === "live") {
        $("messages").append(el("li", "empty", topic ? "Nothing has been said here yet." : "You are in no channel."));
      }
    });
    if (added && !isAtEnd($("message-pane"))) $("newer").hidden = false;
  },

  entries() {
    setText($("pause"), app.paused ? (app.entries.length ? `Resume (${app.entries.length})` : "Resume") : "Pause");
    if (app.paused) return;
    const list = $("lines");
    keepScroll($("frame-pane"), () => {
      list.append(...app.entries.splice(0).map(entryElement));
      while (list.childElementCount > MAX_ENTRIES) list.firstElementChild.remove();
    });
  },
};

/* Channels and people */

function createChannel({ topic }) {
  const button = el("button", "channel", el("span"), el("small"));
  button.type = "button";
  button.addEventListener("click", () => select(topic));
  return el("li", "", button);
}

function updateChannel(item, { topic, name }) {
  const button = item.firstChild;
  const [label, count] = button.children;
  const members = app.rows.size(topic, "channel_members");
  const unread = app.unread.get(topic) ?? 0;
  button.setAttribute("aria-current", String(topic === app.selected));
  setText(label, name);
  setText(count, String(unread ? Math.min(unread, 999) : members));
  count.className = unread ? "unread" : "";
  const description = unread ? plural(unread, "new message") : plural(members, "member");
  button.setAttribute("aria-label", `${name}, ${description}`);
}

function updatePerson(item, id, { status, custom_status: note } = {}) {
  if (item.firstChild.title !== STATUS_LABELS[status ?? "offline"]) item.firstChild.replaceWith(statusDot(status));
  const name = nameOf(id);
  if (item.lastChild.textContent === name + (note ?? "")) return;
  item.lastChild.replaceChildren(name, ...(note ? [el("em", "", note)] : []));
}

function select(topic) {
  app.selected = topic;
  app.unread.delete(topic);
  messageElements.clear();
  $("messages").replaceChildren();
  redraw("channels", "messages");
}

/* Messages */

const messageElements = new Map(); // by key, of the selected channel

function drawChannelHead(topic) {
  const id = topic && channelId(topic);
  const about = topic && app.rows.first(topic, "channels")?.description;
  const members = topic && plural(app.rows.size(topic, "channel_members"), "member");
  setText($("channel-name"), topic ? `# ${nameOf(id)}` : " ");
  setText($("channel-about"), topic ? [members, about].filter(Boolean).join(" · ") : "");
  setText($("statement"), topic ? exampleStatement(id) : " \n ");
}

const exampleStatement = (channel) => `insert into chatgenius.messages (channel_id, user_id, content)
values ('${channel}', '${app.user}', 'Hello from SQL');`;

function sortedMessages(topic) {
  return app.rows.all(topic, "messages").sort((a, b) => a.time - b.time || (a.row.id < b.row.id ? -1 : 1));
}

/** What is shown beside the text of a topic's messages: a function from a message to its details. */
function messageDetails(topic) {
  const status = statuses();
  const reactions = new Map(); // id of the message -> emoji -> ids of users
  const files = new Map(); // id of the message -> rows
  for (const { row } of topic ? app.rows.all(topic, "reactions") : []) {
    const emoji = reactions.get(row.message_id) ?? reactions.set(row.message_id, new Map()).get(row.message_id);
    (emoji.get(row.emoji) ?? emoji.set(row.emoji, []).get(row.emoji)).push(row.user_id);
  }
  for (const { row } of topic ? app.rows.all(topic, "files") : []) {
    (files.get(row.message_id) ?? files.set(row.message_id, []).get(row.message_id)).push(row);
  }
  return ({ row }) => ({
    status: status.get(row.user_id)?.status,
    reactions: reactions.get(row.id) ?? new Map(),
    files: files.get(row.id) ?? [],
  });
}

function removeOldMessages(messages) {
  const keys = new Set(messages.map(({ key }) => key));
  for (const [key, item] of messageElements) {
    if (keys.has(key)) continue;
    messageElements.delete(key);
    removeWithAnimation(item, $("message-pane"));
  }
  $("messages").querySelector(".empty")?.remove();
}

/** Create, move and update the elements of messages. Returns whether any was created. */
function placeMessages(messages, detailsOf) {
  const list = $("messages");
  let cursor = list.firstElementChild;
  let previous = null;
  let added = false;
  for (const message of messages) {
    while (cursor?.classList.contains("leaving")) cursor = cursor.nextElementSibling;
    let item = messageElements.get(message.key);
    if (!item) {
      item = el("li", message.live ? "message arrived" : "message");
      item.dataset.id = message.row.id;
      messageElements.set(message.key, item);
      added = true;
    }
    if (item === cursor) cursor = cursor.nextElementSibling;
    else list.insertBefore(item, cursor);
    item.classList.toggle("continued", continues(message, previous));
    previous = message;
    updateMessage(item, message, detailsOf(message));
  }
  return added;
}

/** Whether a message follows another of the same user within five minutes. */
function continues(message, previous) {
  if (previous === null || previous.row.user_id !== message.row.user_id) return false;
  return message.time - previous.time < seconds(300);
}

function updateMessage(item, message, details) {
  const { status, reactions, files } = details;
  const signature = JSON.stringify([message.seq, nameOf(message.row.user_id), status, [...reactions], files.length]);
  if (item.signature === signature) return;
  item.signature = signature;
  item.replaceChildren(...messageParts(message, details));
}

function messageParts({ row, mark, time }, { status, reactions, files }) {
  const name = nameOf(row.user_id);
  const stamp = el("time", "", Number.isFinite(time) ? formatTime(time) : row.created_at);
  stamp.dateTime = row.created_at;
  stamp.title = Number.isFinite(time) ? new Date(time).toLocaleString() : row.created_at;
  const avatar = el("div", "avatar", initials(name), statusDot(status));
  const text = el("p", "text", row.content);
  if (mark) text.append(el("span", "mark", `(${mark})`));
  const body = el("div", "message-body", el("div", "author", el("strong", "", name), stamp), text);
  for (const file of files) {
    const size = (BigInt(file.size) + 1023n) / 1024n; // a bigint column: no double holds all its values
    body.append(el("span", "file", `${file.name} · ${size.toLocaleString()} kB`));
  }
  if (reactions.size) body.append(el("ul", "reactions", ...[...reactions].map(reactionElement)));
  return [avatar, body];
}

function reactionElement([emoji, users]) {
  const element = el("li", users.includes(app.user) ? "mine" : "", `${emoji} ${users.length}`);
  element.title = users.map(nameOf).join(", ");
  return element;
}

/** Remove a message from its pane, with an animation if it is in view. */
function removeWithAnimation(item, pane) {
  const place = item.getBoundingClientRect();
  const view = pane.getBoundingClientRect();
  if (reducedMotion.matches || place.bottom < view.top || place.top > view.bottom) return item.remove();
  item.classList.add("leaving");
  const { paddingTop } = getComputedStyle(item);
  item.animate([
    { height: `${place.height}px`, paddingTop, opacity: 1 },
    { height: `${place.height}px`, paddingTop, opacity: .55, offset: .5 },
    { height: 0, paddingTop: 0, opacity: 0 },
  ], { duration: 480, easing: "ease-in-out" }).onfinish = () => item.remove();
}

/* The frame log */

function addEntry(entry) {
  app.entries.push({ at: Date.now(), ...entry });
  if (app.entries.length > MAX_ENTRIES) app.entries.shift();
  redraw("entries");
}

function entryElement({ at, kind, subject, detail, aside, raw }) {
  const milliseconds = `.${String(at % 1000).padStart(3, "0")}`;
  const time = el("time", "", secondFormat.format(at), el("span", "", milliseconds));
  const text = el("span", "", subject, " ", el("span", "muted", detail));
  const summary = el("summary", "", time, el("b", "", kind), text, el("small", "number", aside));
  const details = el("details", "", summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) {
      details.append(el("pre", "", JSON.stringify(raw, (_, value) => clipped(value), 1)));
      details.scrollIntoView({ block: "nearest" });
    }
  });
  return el("li", kind in COUNTS ? kind : "control", details);
}

function addChangeEntry(topic, change) {
  addEntry({
    kind: change.kind,
    subject: change.table,
    detail: change.left ? "left the topic" : change.kind === "update" ? change.changed.join(", ") : summaryOf(change),
    aside: String(change.seq),
    raw: { topic, ...change },
  });
}

function summaryOf({ record, key }) {
  const text = record &&
    (record.content ?? record.emoji ?? record.full_name ?? record.name ?? record.status ?? record.role);
  return text ? String(text).slice(0, 120) : Object.values(key).map(short).join(" ");
}

function onFrame(direction, frame) {
  if (frame.op === "head") return redraw("stats");
  if (frame.op === "gap") app.counts.gaps++;
  const { op, topic, since, pos, replayed, reason, code, message, retry_ms: retryMs, last_close: lastClose } = frame;
  addEntry({
    kind: `${direction === "out" ? "→" : "←"} ${op}`,
    subject: topic ?? reason ?? "",
    detail: [
      since && `since ${since}`,
      replayed !== undefined && `${replayed} replayed`,
      message,
      topic && reason,
      retryMs !== undefined && `come back in ${retryMs} ms`,
      lastClose && `cut before: ${lastClose.reason} (${lastClose.code})`,
    ].filter(Boolean).join(" "),
    aside: code ? String(code) : pos && direction === "in" ? String(Position.parse(pos).seq) : "",
    raw: frame,
  });
  redraw("stats");
}

/* Callbacks of the client */

let countdown;
function onState(state) {
  clearInterval(countdown);
  $("state").dataset.state = state.name;
  $("state").toggleAttribute("data-stale", Boolean(state.stale));
  $("retry").hidden = state.name !== "stopped" || state.code === 4401;
  const text = describe(state);
  setText($("announcement"), text);
  document.title = text === "Live" ? "Rowcast" : `${text} – Rowcast`;
  setText($("state-text"), text);
  if (state.name === "waiting") {
    const count = () => {
      const left = Math.max(0, Math.ceil((state.until - Date.now()) / 1000));
      setText($("state-text"), `Offline, retrying in ${left} s`);
    };
    count();
    countdown = setInterval(count, 250);
  }
  if (state.name === "stopped" && state.code === 4401) askForToken("The token is invalid or has expired.");
  redraw("stats", "messages");
}

function describe(state) {
  switch (state.name) {
    case "idle": return "Not connected";
    case "connecting": return "Connecting";
    case "resuming": return state.since ? "Resuming" : "Reading the log";
    case "live": return state.stale ? "Live, but the database does not answer" : "Live";
    case "waiting": return "Offline";
    case "stopped": return `Stopped: ${state.reason || "the server closed the connection"} (${state.code})`;
  }
}

function onWelcome(frame) {
  app.user = frame.user;
  app.session = frame.session;
  app.counts.reconnects++;
  $("sign-in").hidden = true;
  $("room").hidden = false;
  app.client.subscribe("users", { history: true });
  app.client.subscribe(`user:${app.user}`, { history: true });
}

function onReset(topic, reason) {
  app.rows.reset(topic);
  // `rights` is expected: the page asks for the whole log, which may begin before its rights do.
  if (reason !== "start_over" && reason !== "rights") app.counts.resets++;
  redraw("stats", "channels", "people", "messages");
}

function onChanges(topic, changes, live, repeated) {
  const { counts } = app;
  counts.repeats += repeated;
  counts.changes += changes.length;
  if (!live) counts.replayed += changes.length;
  for (const change of changes) {
    counts[COUNTS[change.kind]]++;
    for (const [column, value] of Object.entries(change.record ?? {})) change.record[column] = clipped(value);
    app.rows.apply(topic, change, live);
    applySideEffects(topic, change, live);
  }
  for (const change of changes.slice(-MAX_ENTRIES)) addChangeEntry(topic, change);
  if (live && changes.length) app.latency = Math.max(0, Date.now() - Date.parse(changes.at(-1).at));
  redraw("stats", "channels", "people", "messages");
}

/** Update names, unread counts and the followed channels. */
function applySideEffects(topic, { table, kind, key, record }, live) {
  if (table === "users" && record) setName(record.id, record.full_name || record.username);
  if (table === "channels") {
    if (record) setName(record.id, record.name);
    if (kind === "delete") app.deleted.add(topic);
    else app.deleted.delete(topic);
  }
  if (table === "messages" && kind === "insert" && live && topic !== app.selected) {
    app.unread.set(topic, (app.unread.get(topic) ?? 0) + 1);
  }
  if (table === "channel_members" && topic === `user:${app.user}`) {
    if (kind === "delete") leave(channelTopic(key.channel_id));
    else join(channelTopic(key.channel_id));
  }
}

function setName(id, name) {
  app.names.delete(id); // so that the oldest name comes first
  app.names.set(id, name);
  if (app.names.size > MAX_NAMES) app.names.delete(app.names.keys().next().value);
}

function join(topic) {
  if (app.joined.has(topic)) return;
  app.joined.add(topic);
  app.client.subscribe(topic, { history: true });
}

function leave(topic) {
  if (!app.joined.delete(topic)) return;
  app.client.unsubscribe(topic);
  app.rows.reset(topic);
  app.unread.delete(topic);
  redraw("channels", "messages");
}

/* Signing in */

function signIn(token, user) {
  app.client?.close();
  for (const topic of ["users", `user:${app.user}`, ...app.joined]) app.rows.reset(topic);
  for (const collection of [app.joined, app.deleted, app.unread]) collection.clear();
  app.user = user;
  select(null);
  const url = new URL("v1", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  app.client = new RowcastClient(url.href, {
    token,
    numbers: "string",
    on: {
      state: onState, frame: onFrame, welcome: onWelcome, changes: onChanges, reset: onReset, removed: leave,
    },
  });
  app.client.connect();
}

/** The sample users with their tokens; null if this daemon has none. */
async function fetchSampleUsers() {
  const response = await fetch("demo.json", { cache: "no-store" });
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`demo.json: ${response.status}`);
  return (await response.json()).users;
}

/** Show the form for a token; `problem` says what was wrong with the last one. */
function askForToken(problem = "") {
  app.client?.close();
  $("room").hidden = true;
  $("sign-in").hidden = false;
  setText($("sign-in-alert"), problem);
  onState({ name: "idle" });
  $("token").focus();
}

/** Sign in as a sample user. The token is fetched anew when the server refuses it. */
function startDemo(users) {
  const picker = $("who");
  picker.replaceChildren(...users.map(({ id, name }) => new Option(name, id)));
  $("user-label").hidden = false;
  $("room").hidden = false;
  const last = sessionStorage.getItem("rowcast.user");
  if (users.some(({ id }) => id === last)) picker.value = last;
  const signInAsPicked = () => {
    const id = picker.value;
    sessionStorage.setItem("rowcast.user", id);
    signIn(async ({ fresh }) => {
      if (fresh) users = await fetchSampleUsers() ?? [];
      return users.find((user) => user.id === id)?.token ?? null;
    }, id);
  };
  picker.addEventListener("change", signInAsPicked);
  signInAsPicked();
}

async function start() {
  let users;
  try {
    users = await fetchSampleUsers();
  } catch {
    return setTimeout(start, seconds(2));
  }
  if (users?.length) startDemo(users);
  else askForToken();
}

$("counts").append(...Object.keys(app.counts).map((name) => {
  const count = el("dd", "", "0");
  count.id = `count-${name}`;
  return el("div", "", el("dt", "", name), count);
}));
$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  $("token").value = "";
  signIn(async ({ fresh }) => (fresh ? null : token), null);
});
$("retry").addEventListener("click", () => app.client.connect());
$("disconnect").addEventListener("click", () => app.client.reconnectAfter(seconds(5)));
$("start-over").addEventListener("click", () => app.client.startOver());
$("pause").addEventListener("click", () => {
  app.paused = !app.paused;
  $("pause").setAttribute("aria-pressed", String(app.paused));
  redraw("entries");
});
$("newer").addEventListener("click", () => { $("message-pane").scrollTop = $("message-pane").scrollHeight; });
$("message-pane").addEventListener("scroll", () => { if (isAtEnd($("message-pane"))) $("newer").hidden = true; });
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("statement").textContent);
    setText($("copy"), "Copied");
    setTimeout(() => setText($("copy"), "Copy"), seconds(1.5));
  } catch {
    getSelection().selectAllChildren($("statement"));
  }
});
addEventListener("online", () => app.client?.retryNow());
start();
