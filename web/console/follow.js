/** Follows one topic as one user, with the JavaScript client: what that user receives. */

import { Rowcast } from "../rowcast.js";
import { $, el, keepScroll, setText } from "../shared/dom.js";
import { clock } from "./events.js";

const MAX_LINES = 200;
const MAX_TEXT = 2000; // characters of a record

const STATES = {
  idle: "Not connected", connecting: "Connecting", resuming: "Catching up", live: "Live", waiting: "Offline, reconnecting",
  paused: "Catching up", stopped: "Stopped", closed: "Not connected",
};

export class Follow {
  #rowcast = null;
  #users = [];

  constructor() {
    $("follow").onsubmit = (event) => {
      event.preventDefault();
      if (this.#rowcast) this.stop();
      else this.#start();
    };
  }

  /** Offer the sample users of this daemon, which has some. */
  async offerSamples() {
    const response = await fetch("demo.json", { cache: "no-store" });
    if (!response.ok) return;
    this.#users = (await response.json()).users;
    $("follow-user").replaceChildren(...this.#users.map(({ id, name }) => new Option(name, id)));
    $("follow-user-label").hidden = this.#users.length === 0;
    $("follow-token-label").hidden = this.#users.length > 0;
  }

  /** Show this topic in the form. */
  choose(topic) {
    if (this.#rowcast) this.stop();
    $("follow-topic").value = topic;
    $("follow").scrollIntoView({ block: "center" });
    $("follow-button").focus();
  }

  stop() {
    this.#rowcast?.close();
    this.#rowcast = null;
    setText($("follow-button"), "Follow");
    this.#show("closed");
  }

  #start() {
    const sample = this.#users.find(({ id }) => id === $("follow-user").value);
    const token = sample?.token ?? $("follow-token").value.trim();
    const url = new URL("v1", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const rowcast = (this.#rowcast = new Rowcast(url.href, {
      token: ({ fresh }) => (fresh ? null : token), numbers: "string",
    }));
    rowcast.on("status", (status) => rowcast === this.#rowcast && this.#show(status));
    setText($("follow-button"), "Stop");
    $("followed-pane").hidden = false;
    $("followed").replaceChildren(el("li", "empty", "Waiting for a change…"));
    this.#read(rowcast, $("follow-topic").value.trim());
  }

  async #read(rowcast, topic) {
    try {
      for await (const change of rowcast.changes(topic)) this.#add(change);
    } catch (error) {
      if (rowcast !== this.#rowcast) return;
      rowcast.close();
      this.#rowcast = null;
      setText($("follow-button"), "Follow");
      this.#show("stopped", error.code === 4401 ? "The token is invalid or has expired." : error.message);
    }
  }

  #add(change) {
    const text = change.record ? JSON.stringify(change.record) : JSON.stringify(change.key ?? { reason: change.reason });
    const line = el("li", `event ${change.kind} arrived`,
      clock(change.at ?? ""), el("b", "", change.kind), el("span", "what", change.table ?? ""),
      el("code", "record", text.length > MAX_TEXT ? `${text.slice(0, MAX_TEXT)}…` : text));
    keepScroll($("followed-pane"), () => {
      $("followed").querySelector(".empty")?.remove();
      $("followed").append(line);
      while ($("followed").childElementCount > MAX_LINES) $("followed").firstElementChild.remove();
    });
  }

  #show(status, text = STATES[status]) {
    $("follow-state").hidden = false;
    $("follow-state").dataset.state = status;
    setText($("follow-state").lastElementChild, text);
  }
}
