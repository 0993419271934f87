/** Tables and lists of the console. */

import { $, button, el, plural, setText, short, syncChildren } from "../shared/dom.js";
import { duration } from "../shared/time.js";

export function bytes(count) {
  if (count < 1024) return `${count} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let unit = -1;
  do {
    count /= 1024;
    unit++;
  } while (count >= 1024 && unit < units.length - 1);
  return `${count < 10 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

/** A text with a longer one as its title. */
function titled(text, title) {
  const element = el("span", "nowrap", text);
  element.title = title;
  element.dataset.key = title;
  return element;
}

/** Fill a table: `columns` are [heading, class, cell of a row]; `empty` is shown without rows. */
function fillTable(table, columns, rows, key, empty) {
  if (!table.tHead) {
    table.append(el("thead", "", el("tr", "", ...columns.map(([heading, className]) => {
      const cell = el("th", className.replace("mono", ""), heading);
      cell.scope = "col";
      return cell;
    }))), el("tbody"));
  }
  table.tHead.hidden = rows.length === 0;
  const items = rows.length ? rows : [null];
  syncChildren(table.tBodies[0], items, (row) => (row ? key(row) : "empty"), () => el("tr"), (element, row) => {
    const cells = row ? columns.map(([, className, cell]) => ({ className, content: cell(row) })) : [];
    const signature = JSON.stringify(cells.map(({ content }) => (typeof content === "string" ? content : content.dataset?.key)));
    if (element.signature === signature) return;
    element.signature = signature;
    if (row) return element.replaceChildren(...cells.map(({ className, content }) => el("td", className, content)));
    const cell = el("td", "muted", empty);
    cell.colSpan = columns.length;
    element.replaceChildren(cell);
  });
}

export function drawTopics(state, onFollow) {
  const topic = (row) => {
    const follow = button("link mono", row.topic, () => onFollow(row.topic));
    follow.title = "Follow it below";
    follow.dataset.key = row.topic;
    return follow;
  };
  setText($("topics-count"), state.topic_count ? plural(state.topic_count, "topic") : "");
  fillTable($("topics"), [
    ["Topic", "", topic],
    ["Followers", "number right", (row) => row.followers.toLocaleString("en")],
  ], state.topics.slice(0, 50), (row) => row.topic, "Nobody follows anything at the moment.");
}

export function drawSessions(state) {
  setText($("sessions-count"), state.clients ? plural(state.clients, "client") : "");
  fillTable($("sessions"), [
    ["User", "mono", (row) => titled(short(row.user), row.user)],
    ["Address", "mono optional nowrap", (row) => row.peer],
    ["Since", "number right", (row) => duration(row.seconds)],
    ["Sent", "number right", (row) => bytes(row.sent)],
    ["Queued", "number right", (row) => (row.queued ? bytes(row.queued) : "–")],
  ], state.sessions.slice(0, 100), (row) => row.session, "Nobody is connected.");
}

export function drawWatches(state) {
  setText($("watches-count"), plural(state.watches.length, "table"));
  fillTable($("watches"), [
    ["Table", "mono", (row) => `${row.schema_name}.${row.table_name}`],
    ["Topic", "mono expression", (row) => row.topic],
    ["Key", "mono optional", (row) => row.key.join(", ")],
    ["Columns", "mono expression", (row) => row.columns.join(", ")],
    ["Errors", "optional", (row) => row.on_error],
  ], state.watches, (row) => `${row.schema_name}.${row.table_name}`, "No table is watched: run `daemon --apply-ddl`.");
}

/** `onReplay` gets the number of a dead letter. */
export function drawDeadLetters(state, busy, onReplay) {
  const all = state.dead_letters;
  $("dead-letters-card").dataset.level = all.length ? "bad" : "good";
  $("dead-letters-count").hidden = all.length === 0;
  setText($("dead-letters-count"), `${all.length}${state.more_dead_letters ? "+" : ""}`);
  const items = all.length ? all : [{ seq: "none" }];
  syncChildren($("dead-letters"), items, ({ seq }) => String(seq), () => el("li"), (element, letter) => {
    const isBusy = busy.has(letter.seq);
    const signature = `${letter.seq} ${isBusy}`;
    if (element.signature === signature) return;
    element.signature = signature;
    if (letter.seq === "none") {
      element.replaceChildren(el("span", "muted", "None: every change could be sent."));
      return;
    }
    const replay = button("small", `Replay ${letter.seq}`, () => onReplay(letter.seq), isBusy ? "Replaying…" : "Replay");
    replay.disabled = isBusy;
    element.replaceChildren(
      el("div", "letter",
        el("p", "mono", el("b", letter.kind, letter.kind), ` ${letter.pack}.${letter.table_name} `, el("span", "muted", `#${letter.seq}`)),
        el("p", "reason", letter.reason),
        el("p", "mono muted clip", `${letter.topic} ${letter.key}`)),
      replay,
    );
  });
}
