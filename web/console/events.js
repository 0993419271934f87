/** The newest changes: which rows, and never what is in them. With a filter, and a pause that holds the view still. */

import { $, el, keepScroll, plural, setText, short, syncChildren } from "../shared/dom.js";

const MAX_LINES = 300;
const timeFormat = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

export const keyText = (key) => {
  try {
    return Object.values(JSON.parse(key)).map(String).map(short).join(" ");
  } catch {
    return key;
  }
};

/** A topic without most of a long id: its end tells it apart. */
const shortTopic = (topic) => topic.replace(/:(.{15,})$/, (_, id) => `:${short(id)}`);

/** The time of a change; its milliseconds are left out where there is no room. */
export function clock(at) {
  const time = Date.parse(at);
  if (Number.isNaN(time)) return el("time", "", at);
  return el("time", "", timeFormat.format(time), el("span", "ms", `.${String(time % 1000).padStart(3, "0")}`));
}

export class EventList {
  #held = null; // while paused: what is shown
  #isFirst = true;

  constructor(redraw) {
    $("filter").oninput = redraw;
    $("pause").onclick = () => {
      this.#held = this.#held ? null : "next";
      redraw();
    };
  }

  draw(all) {
    if (this.#held === "next") this.#held = all;
    const shown = this.#held ?? all;
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = words.length ? shown.filter((event) => matches(event, words)) : shown;
    const waiting = all.length && this.#held?.length ? all.filter(({ seq }) => seq > this.#held.at(-1).seq).length : 0;
    $("pause").setAttribute("aria-pressed", String(this.#held !== null));
    setText($("pause"), this.#held ? `Resume${waiting ? ` (${waiting})` : ""}` : "Pause");
    keepScroll($("events-pane"), () => {
      const lines = matching.slice(-MAX_LINES);
      if (!lines.length) lines.push({ seq: "none", words: words.length });
      syncChildren($("events"), lines, ({ seq }) => String(seq), (event) => this.#line(event), (element, event) => {
        if (event.seq === "none") setText(element, event.words ? "No change matches." : "Waiting for the first change…");
      });
    });
    setText($("events-foot"), words.length ? `${plural(matching.length, "change")} of ${shown.length.toLocaleString("en")}` : "Content is never shown here.");
    this.#isFirst &&= !all.length;
  }

  #line(event) {
    if (event.seq === "none") return el("li", "empty");
    const key = el("span", "key muted", event.changed.length ? event.changed.join(", ") : keyText(event.key));
    const line = el("li", `event ${event.kind}`,
      clock(event.at),
      el("b", "", event.kind),
      el("span", "what", el("span", "table-name", event.table), " ", el("span", "topic muted", shortTopic(event.topic))),
      key,
      el("span", "way number", way(event)));
    line.title = `#${event.seq} ${event.topic} ${event.key}`;
    if (!this.#isFirst) line.classList.add("arrived");
    return line;
  }
}

/** How the change got to its followers, if the console saw it happen. */
function way({ latency, followers }) {
  if (latency === undefined) return "";
  return `${latency.toLocaleString("en")} ms → ${followers.toLocaleString("en")}`;
}

function matches({ topic, table, kind, key, changed }, words) {
  const text = `${topic} ${table} ${kind} ${key} ${changed.join(" ")}`.toLowerCase();
  return words.every((word) => text.includes(word));
}
