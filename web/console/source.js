/**
 * What the console knows, from /console/state: asked for once a second, and not while the page is hidden.
 *
 * Each request may reach another worker process, so what each of them said last is kept and put together.
 */

const INTERVAL = 1000; // milliseconds
const FORGET = 60; // seconds after which a process that has not answered is forgotten
const HISTORY = 180; // seconds that the charts show
const MAX_EVENTS = 2000;
const OVERLAP = 100; // changes that are asked for again: processes are not equally far
const TIMEOUT = 8000; // milliseconds for an answer

/** The request was refused: a token is needed, or another one. */
export class Refused extends Error {}

export class Source {
  #token;
  #timer;
  #processes = new Map(); // by process: { state, at }
  #events = new Map(); // by seq
  #seconds = new Map(); // by second: { at, changes, frames, median, longest, waiting, clients }
  #epoch = "";
  #on;
  answeredAt = null; // milliseconds since 1970
  problem = "";

  /**
   * @param {string | null} token
   * @param {{ change: () => void, refused: (message: string) => void }} on
   */
  constructor(token, on) {
    this.#token = token;
    this.#on = on;
    document.addEventListener("visibilitychange", this.#wake);
    this.#poll();
  }

  close() {
    clearTimeout(this.#timer);
    document.removeEventListener("visibilitychange", this.#wake);
    this.#on = null;
  }

  /** The latest state of all processes, put together; null before the first answer. */
  get state() {
    const all = [...this.#processes.values()].map(({ state }) => state);
    if (!all.length) return null;
    const newest = all.reduce((one, other) => (other.now > one.now ? other : one));
    const sum = (name) => all.reduce((total, state) => total + state[name], 0);
    const followers = new Map();
    for (const { topics } of all) {
      for (const { topic, followers: count } of topics) followers.set(topic, (followers.get(topic) ?? 0) + count);
    }
    return {
      ...newest,
      ready: all.every(({ ready }) => ready),
      reasons: [...new Set(all.flatMap(({ reasons }) => reasons))],
      warnings: [...new Set(all.flatMap(({ warnings }) => warnings))],
      is_leader: all.some(({ is_leader: leads }) => leads),
      answering: all.length,
      clients: sum("clients"),
      clients_limit: newest.clients_limit * newest.workers,
      behind: sum("behind"),
      subscriptions: sum("subscriptions"),
      topics: [...followers].map(([topic, count]) => ({ topic, followers: count }))
        .sort((one, other) => other.followers - one.followers || one.topic.localeCompare(other.topic)),
      topic_count: Math.max(followers.size, ...all.map(({ topic_count: count }) => count)),
      sessions: all.flatMap(({ sessions }) => sessions)
        .sort((one, other) => other.queued - one.queued || other.seconds - one.seconds),
    };
  }

  /** The newest changes, oldest first. */
  get events() {
    return [...this.#events.values()].sort((one, other) => one.seq - other.seq);
  }

  /** One entry for each of the last seconds, oldest first; null where nothing is known. */
  seconds() {
    const last = this.#lastSecond;
    return Array.from({ length: HISTORY }, (_, index) => this.#seconds.get(last - HISTORY + 1 + index) ?? null);
  }

  /** Read anew at once. */
  refresh() {
    clearTimeout(this.#timer);
    this.#poll();
  }

  /** Replay one dead letter; the promise fails with a line for people. */
  async replay(seq) {
    const response = await fetch("console/replay", {
      method: "POST",
      headers: { ...this.#headers, "Content-Type": "application/json" },
      body: JSON.stringify({ seq }),
    });
    if (!response.ok) throw new Error((await response.text()).trim());
  }

  get #headers() {
    return this.#token ? { Authorization: `Bearer ${this.#token}` } : {};
  }

  get #lastSecond() {
    return Math.max(0, ...this.#seconds.keys());
  }

  #wake = () => {
    if (!document.hidden) this.refresh();
  };

  async #poll() {
    clearTimeout(this.#timer);
    const began = performance.now();
    try {
      const after = Math.max(0, Math.max(0, ...this.#events.keys()) - OVERLAP);
      const response = await fetch(`console/state?after=${after}&since=${Math.max(0, this.#lastSecond - 5)}`, {
        headers: this.#headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT),
      });
      if (response.status === 401 || response.status === 403) throw new Refused((await response.text()).trim());
      if (!response.ok) throw new Error((await response.text()).trim());
      this.#take(await response.json());
      this.problem = "";
    } catch (error) {
      if (!this.#on) return;
      if (error instanceof Refused) return this.#on.refused(error.message);
      this.problem = "The daemon does not answer.";
    }
    if (!this.#on) return;
    this.#on.change();
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.#poll(), Math.max(100, INTERVAL - (performance.now() - began)));
  }

  #take(state) {
    this.answeredAt = Date.now();
    if (this.#epoch !== state.epoch) this.#events.clear();
    this.#epoch = state.epoch;
    this.#processes.set(state.process, { state, at: state.now });
    for (const [process, { at }] of this.#processes) {
      if (state.now - at > (state.workers > 1 ? FORGET : 0) && process !== state.process) this.#processes.delete(process);
    }
    for (const event of state.events) if (!this.#events.has(event.seq)) this.#events.set(event.seq, event);
    for (const seq of this.#events.keys()) {
      if (this.#events.size <= MAX_EVENTS) break;
      this.#events.delete(seq);
    }
    this.#takeSeconds(state);
  }

  #takeSeconds(state) {
    const now = Math.floor(state.now);
    const known = this.state;
    this.#second(now).waiting = state.waiting;
    this.#second(now).clients = known.clients;
    for (const second of state.seconds) {
      const kept = this.#second(second.at);
      for (const name of ["changes", "frames", "median", "longest"]) {
        if (second[name] !== null) kept[name] = Math.max(kept[name] ?? 0, second[name]);
      }
    }
    for (const at of this.#seconds.keys()) if (at <= now - HISTORY) this.#seconds.delete(at);
  }

  #second(at) {
    let found = this.#seconds.get(at);
    if (!found) {
      found = { at, changes: 0, frames: 0, median: null, longest: null, waiting: null, clients: null };
      this.#seconds.set(at, found);
    }
    return found;
  }
}
