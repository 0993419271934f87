// @ts-check
/**
 * A client of the protocol `rowcast.v1`: it connects, follows topics, and resumes after a broken connection without
 * missing or repeating a change. It is the reference for docs/protocol.md: one file without dependencies that you can
 * copy into your application. It needs a global `WebSocket`.
 *
 *     const client = new RowcastClient("wss://rowcast.example.com/v1", {
 *       token: async () => (await fetch("/rowcast-token")).text(),
 *       on: {
 *         changes: (topic, changes) => changes.forEach((change) => rows.apply(topic, change)),
 *         reset: (topic) => rows.reload(topic),
 *       },
 *     });
 *     client.subscribe("channel:42");
 *     client.connect();
 *
 * @module
 */

/**
 * One change of a row; see "Changes" in the protocol.
 *
 * @typedef {object} Change
 * @property {number} seq the change's number in the log
 * @property {string} tx the transaction that made it
 * @property {string} at when its statement began
 * @property {string} table
 * @property {"insert" | "update" | "delete" | "restore"} kind
 * @property {Record<string, any>} key the columns that identify the row, in the form that `numbers` chose
 * @property {Record<string, any>} [record] the published row, unless `kind` is `delete`
 * @property {string[]} [changed] the columns that an `update` changed
 * @property {boolean} [left] in a `delete`: the row still exists, but not in this topic
 * @property {{ actor?: string }} [meta]
 */

/**
 * What the client is doing:
 *
 * - `idle`: nothing; call `connect()`.
 * - `connecting`: fetching a token, opening a WebSocket, waiting for `welcome`.
 * - `resuming`: connected, and some topic is still catching up. `since` is the position it resumes from, or null.
 * - `live`: every topic is up to date. `stale` is true while the server cannot read the log.
 * - `waiting`: disconnected. It reconnects at `until`, in milliseconds since 1970.
 * - `stopped`: the server closed the connection for a reason that reconnecting would not change.
 *
 * @typedef {{ name: "idle" }
 *   | { name: "connecting" }
 *   | { name: "resuming", since: string | null, stale?: boolean }
 *   | { name: "live", stale: boolean }
 *   | { name: "waiting", until: number }
 *   | { name: "stopped", code: number, reason: string }} State
 */

/**
 * Your callbacks. All are optional and synchronous: a frame counts as processed when its callback has returned.
 *
 * @typedef {object} Callbacks
 * @property {(topic: string, changes: Change[], live: boolean, repeated: number) => void} [changes]
 *   Apply these changes, in this order. `live` is false during a replay. `repeated` is how many changes of the frame
 *   you have seen already; they are left out.
 * @property {(topic: string, table: string, rows: { key: Record<string, any>, record: Record<string, any> }[]) => void} [snapshot]
 *   Store these rows. They are not all yet: more may follow, and then changes.
 * @property {(topic: string, reason: string) => void} [reset]
 *   Discard the topic's rows and read its state anew. `reason` is one of the protocol's, `start_over`, or `snapshot` if
 *   the rows of a snapshot follow.
 * @property {(topic: string, reason: string) => void} [removed]
 *   The topic is not followed any more: `reason` is `revoked`, or the code of the error that refused it.
 * @property {(state: State) => void} [state]
 * @property {(frame: Record<string, any>) => void} [welcome] Connected: `frame.user` and `frame.session` say as whom.
 * @property {(direction: "in" | "out", frame: Record<string, any>) => void} [frame]
 *   For logs: every frame except `changes` and `snapshot`, without the token. Two are made up by the client: `closed`, when a
 *   connection ends, and `gap`, when a frame is missing.
 */

/**
 * Returns a token, or null if there is none. `fresh` is true if the server refused the last one.
 *
 * @typedef {(wanted: { fresh: boolean }) => Promise<string | null>} GetToken
 */

/**
 * A topic is `idle` without a connection, `asked` until the server answers `subscribe`, `replaying` from then until
 * `resumed`, and `live` afterwards.
 *
 * @typedef {object} Topic
 * @property {"idle" | "asked" | "replaying" | "live"} phase
 * @property {boolean} history whether it was subscribed with its history
 * @property {boolean} fromStart whether the next subscribe starts at the beginning of the log
 * @property {true | { limit: number } | null} snapshot the rows that it begins with
 * @property {boolean} needsSnapshot whether the next subscribe asks for them
 * @property {number} seq how far it has been processed; -1 if not at all
 * @property {string | null} since where its last subscribe started
 * @property {number | null} id the `id` of its last subscribe
 */

const seconds = (/** @type {number} */ number) => number * 1000;

const ANSWER_TIMEOUT = seconds(10);
const MAX_BACKOFF = seconds(30);

/**
 * What to do after each close code: see "Close codes" in the protocol. Unknown codes: reconnect now.
 *
 * @type {Map<number, "now" | "later" | "with a fresh token" | "never">}
 */
const RECONNECT = new Map([
  [1001, "now"], [1012, "now"], [4408, "now"],
  [1011, "later"], [1013, "later"], [4409, "later"], [4429, "later"],
  [4401, "with a fresh token"],
  [1002, "never"], [1003, "never"], [1007, "never"], [1009, "never"], [4400, "never"], [4403, "never"],
]);

/** Resets after which the log can be replayed. The others are in the log: a replay would end at the same reset. */
const REPLAYABLE = new Set(["epoch", "crash"]);

/** A position in the log: "<epoch>:<seq>". Only numbers of the same epoch can be compared. */
export class Position {
  /**
   * @param {string} epoch
   * @param {number} seq
   */
  constructor(epoch, seq) {
    this.epoch = epoch;
    this.seq = seq;
  }

  /** @param {string} text */
  static parse(text) {
    const colon = text.lastIndexOf(":");
    return new Position(text.slice(0, colon), Number(text.slice(colon + 1)));
  }

  toString() {
    return `${this.epoch}:${this.seq}`;
  }
}

/**
 * One user's connection to Rowcast.
 *
 * Its invariant: every topic has been processed up to `position`. The position therefore stands still while any topic
 * is pending: topics catch up one after another, and a number from the middle would skip what the others still miss.
 * A change that is replayed twice is recognized by its seq and left out.
 */
export class RowcastClient {
  /**
   * Where the next connection resumes; null until the first topics are live.
   *
   * @type {Position | null}
   */
  position = null;

  #url;
  #getToken;
  #numbers;
  #on;
  /** @type {Map<string, Topic>} */
  #topics = new Map();
  #epoch = "";
  /** @type {string | null} */
  #session = null; // sent in the next hello: its welcome says why the server closed this connection
  /** @type {string | null} */
  #helloSince = null;
  #stale = false;
  /** @type {WebSocket | null} */
  #socket = null;
  #generation = 0; // counts connections: asynchronous work of an earlier one checks it and stops
  #failures = 0;
  #tokenRefused = false;
  /** @type {number | null} */
  #retryMs = null; // from the last `bye`
  #maxSilence = ANSWER_TIMEOUT; // `welcome` sets it
  #lastId = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #silenceTimer;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #retryTimer;
  /** @type {State} */
  #state = { name: "idle" };

  /**
   * With `numbers: "string"`, values of bigint and numeric columns are strings with all their digits. Otherwise they
   * are numbers, and `JSON.parse` rounds those that no double holds.
   *
   * @param {string} url the WebSocket URL, which ends in `/v1`
   * @param {{ token: GetToken, numbers?: "json" | "string", on?: Callbacks }} options
   */
  constructor(url, { token, numbers, on = {} }) {
    this.#url = url;
    this.#getToken = token;
    this.#numbers = numbers;
    this.#on = on;
  }

  /** Connect now, whatever the state. */
  async connect() {
    const generation = this.#disconnect();
    this.#setState({ name: "connecting" });
    let token;
    try {
      token = await this.#getToken({ fresh: this.#tokenRefused });
    } catch {
      if (generation === this.#generation) this.#reconnect(1006, "");
      return;
    }
    if (generation !== this.#generation) return;
    if (!token) return this.#setState({ name: "stopped", code: 4401, reason: "token" });
    const socket = this.#socket = new WebSocket(this.#url, "rowcast.v1");
    socket.onopen = () => this.#hello(token);
    socket.onmessage = (event) => socket === this.#socket && this.#receive(JSON.parse(event.data));
    socket.onclose = (event) => socket === this.#socket && this.#reconnect(event.code, event.reason);
    this.#restartSilenceTimer(ANSWER_TIMEOUT);
  }

  /** Disconnect for good. */
  close() {
    this.#disconnect();
    this.#setState({ name: "idle" });
  }

  /**
   * Disconnect, and reconnect after a pause.
   *
   * @param {number} pause in milliseconds
   */
  reconnectAfter(pause) {
    this.#disconnect();
    this.#wait(pause);
  }

  /** While waiting, reconnect now: call it when the network is back. */
  retryNow() {
    if (this.#state.name === "waiting") this.connect();
  }

  /** Forget the position, reset every topic, and replay those with history from the beginning. */
  startOver() {
    this.position = null;
    for (const [name, topic] of this.#topics) this.#resetTopic(name, topic, "start_over");
    this.connect();
  }

  /**
   * Follow a topic, also after reconnects. With `history`, first replay everything that the log has of it. With
   * `snapshot`, begin with its rows, and again whenever it is reset.
   *
   * @param {string} name
   * @param {{ history?: boolean, snapshot?: true | { limit: number } | null }} [options]
   */
  subscribe(name, { history = false, snapshot = null } = {}) {
    if (this.#topics.has(name)) return;
    /** @type {Topic} */
    const topic = {
      phase: "idle", history, fromStart: history, snapshot, needsSnapshot: snapshot !== null, seq: -1, since: null, id: null,
    };
    this.#topics.set(name, topic);
    if (this.#isWelcomed) this.#sendSubscribe(name, topic);
  }

  /** @param {string} name */
  unsubscribe(name) {
    if (this.#topics.delete(name) && this.#isWelcomed) this.#send({ op: "unsubscribe", topic: name });
    this.#checkLive();
  }

  get #isWelcomed() {
    return this.#state.name === "live" || this.#state.name === "resuming";
  }

  /** @param {State} state */
  #setState(state) {
    this.#state = state;
    this.#on.state?.(state);
  }

  /** @param {Record<string, any>} frame */
  #send(frame) {
    this.#socket?.send(JSON.stringify(frame));
    this.#on.frame?.("out", frame.op === "hello" ? { ...frame, token: "…" } : frame);
  }

  /** @param {string} token */
  #hello(token) {
    this.#helloSince = this.position?.toString() ?? null;
    const session = this.#session ?? undefined;
    const since = this.#helloSince ?? undefined;
    this.#send({ op: "hello", token, since, seen: this.#seen, session, numbers: this.#numbers });
  }

  /** How far any topic is ahead of the position, because another was pending. */
  get #seen() {
    const seq = Math.max(-1, ...[...this.#topics.values()].map((topic) => topic.seq));
    return this.position && seq > this.position.seq ? new Position(this.#epoch, seq).toString() : undefined;
  }

  // Topics

  /**
   * @param {string} name
   * @param {Topic} topic
   */
  #sendSubscribe(name, topic) {
    const since = topic.fromStart ? new Position(this.#epoch, 0) : this.position;
    topic.phase = "asked";
    topic.id = ++this.#lastId;
    if (topic.needsSnapshot) {
      topic.since = null;
      return this.#send({ op: "subscribe", id: topic.id, topic: name, snapshot: topic.snapshot });
    }
    topic.since = since?.toString() ?? null;
    // A subscribe without a `since` starts where the hello said.
    const ownSince = topic.since === this.#helloSince ? undefined : topic.since ?? undefined;
    this.#send({ op: "subscribe", id: topic.id, topic: name, since: ownSince });
  }

  /**
   * Forget how far a topic has been processed; the next subscribe starts anew.
   *
   * @param {string} name
   * @param {Topic} topic
   * @param {string} reason
   */
  #resetTopic(name, topic, reason) {
    topic.fromStart = topic.history;
    topic.needsSnapshot = topic.snapshot !== null;
    topic.seq = -1;
    this.#on.reset?.(name, reason);
  }

  get #allLive() {
    return [...this.#topics.values()].every((topic) => topic.phase === "live");
  }

  /**
   * Move the position, unless a topic is pending.
   *
   * @param {Position} position
   */
  #advance(position) {
    if (this.#allLive) this.position = position;
  }

  /** Enter the state `live`, and move the position, unless a topic is pending. */
  #checkLive(position = this.position) {
    if (!this.#isWelcomed || !this.#allLive) return;
    this.position = position;
    this.#failures = 0;
    if (this.#state.name !== "live") this.#setState({ name: "live", stale: this.#stale });
  }

  // Frames

  /** @param {Record<string, any>} frame */
  #receive(frame) {
    this.#restartSilenceTimer(this.#maxSilence);
    if (frame.op !== "changes" && frame.op !== "snapshot") this.#on.frame?.("in", frame);
    switch (frame.op) {
      case "welcome": return this.#onWelcome(frame);
      case "subscribed": return this.#onSubscribed(frame);
      case "snapshot": return this.#onSnapshot(frame);
      case "changes": return this.#onChanges(frame);
      case "resumed": return this.#onResumed(frame);
      case "reset": return this.#onReset(frame);
      case "revoked": return this.#onRevoked(frame);
      case "head": return this.#onHead(frame);
      case "error": return this.#onError(frame);
      case "bye": this.#retryMs = frame.retry_ms;
    }
  }

  /** @param {Record<string, any>} frame */
  #onWelcome(frame) {
    const { epoch } = Position.parse(frame.pos);
    this.#session = frame.session;
    this.#tokenRefused = false;
    this.#retryMs = null;
    this.#maxSilence = seconds(frame.heartbeat) * 1.5 + seconds(2);
    this.#restartSilenceTimer(this.#maxSilence);
    if (this.#epoch && epoch !== this.#epoch) {
      this.position = null;
      for (const [name, topic] of this.#topics) this.#resetTopic(name, topic, "epoch");
    }
    this.#epoch = epoch;
    this.#on.welcome?.(frame);
    this.#setState({ name: "resuming", since: this.position?.toString() ?? null });
    for (const [name, topic] of this.#topics) if (topic.phase === "idle") this.#sendSubscribe(name, topic);
  }

  /** @param {Record<string, any>} frame */
  #onSubscribed(frame) {
    const topic = this.#topics.get(frame.topic);
    if (!topic || topic.id !== frame.id) return;
    if (frame.snapshot) {
      topic.phase = "replaying";
      topic.seq = -1;
      this.#on.reset?.(frame.topic, "snapshot");
      return;
    }
    if (frame.pos === topic.since) {
      topic.phase = "replaying";
      return;
    }
    // Live from here. If it was to start earlier, a reset follows.
    const position = Position.parse(frame.pos);
    topic.phase = "live";
    if (topic.since !== null) return;
    topic.seq = position.seq;
    this.#checkLive(this.position ?? position); // other topics may still receive changes from before this position
  }

  /** @param {Record<string, any>} frame */
  #onSnapshot(frame) {
    if (this.#topics.get(frame.topic)?.phase !== "replaying") return;
    this.#on.snapshot?.(frame.topic, frame.table, frame.rows);
  }

  /** @param {Record<string, any>} frame */
  #onChanges(frame) {
    const topic = this.#topics.get(frame.topic);
    if (!topic || topic.phase === "asked") return; // sent before the server received our last unsubscribe
    const live = topic.phase === "live";
    const position = Position.parse(frame.pos);
    if (live && Position.parse(frame.prev).seq > topic.seq) {
      // A frame is missing. Leave this one: the position is still before the gap.
      this.#on.frame?.("in", { op: "gap", topic: frame.topic, prev: frame.prev });
      return this.reconnectAfter(0);
    }
    /** @type {Change[]} */
    const changes = frame.changes;
    const fresh = changes.filter((change) => change.seq > topic.seq);
    topic.seq = Math.max(topic.seq, position.seq);
    this.#on.changes?.(frame.topic, fresh, live, changes.length - fresh.length);
    this.#advance(position);
  }

  /** @param {Record<string, any>} frame */
  #onResumed(frame) {
    const position = Position.parse(frame.pos);
    for (const topic of this.#topics.values()) {
      if (topic.phase === "replaying") {
        topic.phase = "live";
        topic.fromStart = false;
        topic.needsSnapshot = false;
      }
      if (topic.phase === "live") topic.seq = Math.max(topic.seq, position.seq); // also those of a slow client
    }
    this.#checkLive(position);
  }

  /** @param {Record<string, any>} frame */
  #onReset(frame) {
    const topic = this.#topics.get(frame.topic);
    if (!topic || topic.phase === "asked") return;
    const position = Position.parse(frame.pos);
    const replay = REPLAYABLE.has(frame.reason) && topic.history && !topic.fromStart;
    this.#on.reset?.(frame.topic, frame.reason);
    this.#epoch = position.epoch;
    topic.seq = position.seq;
    topic.needsSnapshot = topic.snapshot !== null;
    if (replay || topic.needsSnapshot) {
      topic.fromStart = topic.history;
      topic.seq = -1;
      this.#send({ op: "unsubscribe", topic: frame.topic });
      this.#sendSubscribe(frame.topic, topic);
    } else if (topic.phase === "live") {
      topic.fromStart = false; // the log does not have its beginning any more
      this.#checkLive(); // without `position`: resets of other topics may still come
    }
  }

  /** @param {Record<string, any>} frame */
  #onRevoked(frame) {
    this.#removeTopic(frame.topic, "revoked");
  }

  /**
   * The heartbeat.
   *
   * @param {Record<string, any>} frame
   */
  #onHead(frame) {
    if (frame.pos) this.#advance(Position.parse(frame.pos));
    if (this.#stale === Boolean(frame.stale)) return;
    this.#stale = !this.#stale;
    if (this.#state.name === "live" || this.#state.name === "resuming") {
      this.#setState({ ...this.#state, stale: this.#stale });
    }
  }

  /** @param {Record<string, any>} frame */
  #onError(frame) {
    const found = [...this.#topics].find(([, topic]) => frame.id !== undefined && topic.id === frame.id);
    if (!found) return;
    const [name, topic] = found;
    if (!frame.retry) return this.#removeTopic(name, frame.code);
    const generation = this.#generation;
    setTimeout(() => {
      if (generation === this.#generation && this.#topics.get(name) === topic) this.#sendSubscribe(name, topic);
    }, seconds(1 + 2 * Math.random()));
  }

  /**
   * @param {string} name
   * @param {string} reason
   */
  #removeTopic(name, reason) {
    if (this.#topics.delete(name)) this.#on.removed?.(name, reason);
    this.#checkLive();
  }

  // The connection

  /**
   * Treat the connection as lost after this many milliseconds without a frame.
   *
   * @param {number} limit
   */
  #restartSilenceTimer(limit) {
    clearTimeout(this.#silenceTimer);
    this.#silenceTimer = setTimeout(() => this.#reconnect(1006, "silence"), limit);
  }

  /** Close the connection and stop all timers. Returns the number of the next connection. */
  #disconnect() {
    clearTimeout(this.#silenceTimer);
    clearTimeout(this.#retryTimer);
    const socket = this.#socket;
    this.#socket = null; // before close(): events that still arrive are ignored
    socket?.close();
    this.#stale = false;
    for (const topic of this.#topics.values()) topic.phase = "idle";
    return ++this.#generation;
  }

  /**
   * The connection is lost: reconnect as the close code demands.
   *
   * @param {number} code
   * @param {string} reason
   */
  #reconnect(code, reason) {
    this.#disconnect();
    this.#on.frame?.("in", { op: "closed", code, reason });
    const action = RECONNECT.get(code) ?? "now";
    if (action === "never" || (action === "with a fresh token" && this.#tokenRefused)) {
      return this.#setState({ name: "stopped", code, reason });
    }
    this.#tokenRefused = action === "with a fresh token";
    const retryMs = this.#retryMs;
    this.#retryMs = null;
    if (action === "later") this.#failures = Math.max(this.#failures, 3);
    // Full jitter: clients that were disconnected together must not reconnect together.
    const limit = Math.min(MAX_BACKOFF, seconds(1) * 2 ** this.#failures++);
    this.#wait(retryMs ?? Math.random() * limit);
  }

  /** @param {number} pause in milliseconds */
  #wait(pause) {
    this.#setState({ name: "waiting", until: Date.now() + pause });
    this.#retryTimer = setTimeout(() => this.connect(), pause);
  }
}
