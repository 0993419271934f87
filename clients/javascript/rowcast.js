// @ts-check
/**
 * The JavaScript client of Rowcast, for browsers and Node: one file without dependencies.
 *
 *     const rowcast = new Rowcast("wss://rowcast.example.com/v1", { token: async () => fetchToken() });
 *     const messages = rowcast.collection("channel:42", { table: "messages" });
 *     messages.subscribe(() => render(messages.rows));
 *
 * `Engine` follows the rules of docs/protocol.md and does no I/O; `Rowcast` gives it a WebSocket and a timer. The
 * types are in rowcast.d.ts. The Python client has the same engine, and both pass the cases of clients/behaviour.
 *
 * @module
 */

const seconds = (/** @type {number} */ number) => number * 1000;
const clock = () => performance.now(); // unlike the time of day, it never jumps back

const ANSWER_TIMEOUT = seconds(10);
const MAX_BACKOFF = seconds(30);
const LATE = seconds(2); // a timer that fires so late was held up: the machine slept, or the tab was in the background
const BUFFER = 10_000; // changes that may wait in a stream before the client disconnects

/**
 * What to do after each close code: see "Close codes" in the protocol. Other codes: reconnect at once, with jitter.
 *
 * @type {Record<number, "later" | "never">}
 */
const AFTER_CLOSE = {
  1002: "never", 1003: "never", 1007: "never", 1009: "never", 4400: "never", 4403: "never",
  1011: "later", 1013: "later", 4409: "later", 4429: "later",
};

/** Any error of this client. */
export class RowcastError extends Error {
  get name() {
    return this.constructor.name;
  }
}

/** A topic is not followed any more: `code` is `revoked`, or the code of the error that refused it. */
export class TopicEnded extends RowcastError {
  /**
   * @param {string} topic
   * @param {string} code
   * @param {string} message
   */
  constructor(topic, code, message) {
    super(message);
    this.topic = topic;
    this.code = code;
  }
}

/** The connection ended for a reason that reconnecting would not change. `code` is the close code, or 0. */
export class ConnectionStopped extends RowcastError {
  /**
   * @param {number} code
   * @param {string} reason
   */
  constructor(code, reason) {
    super(`The connection ended and cannot be resumed: ${reason || code}.`);
    this.code = code;
    this.reason = reason;
  }
}

/** A position in the log: "<epoch>:<seq>". Only numbers of the same epoch can be compared. */
class Position {
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

  /** @param {Position | null} other */
  isBeyond(other) {
    return other === null || this.epoch !== other.epoch || this.seq > other.seq;
  }

  toString() {
    return `${this.epoch}:${this.seq}`;
  }
}

/**
 * @param {Position | null} before
 * @param {Position} position
 */
const greatest = (before, position) => (position.isBeyond(before) ? position : /** @type {Position} */ (before));

/**
 * @template T
 * @param {T} value
 * @returns {T}
 */
function frozen(value) {
  if (typeof value === "object" && value !== null && !Object.isFrozen(value)) {
    Object.values(value).forEach(frozen);
    Object.freeze(value);
  }
  return value;
}

/**
 * Call back to the application. Its errors are reported as uncaught, and do not keep others from being called.
 *
 * @param {() => void} callback
 */
function isolated(callback) {
  try {
    callback();
  } catch (error) {
    queueMicrotask(() => {
      throw error;
    });
  }
}

/** @param {Record<string, any>} key */
const values = (key) => Object.keys(key).sort().map((column) => key[column]);

/** @typedef {{ key: Record<string, any>, record: Record<string, any> }} Row */

/**
 * By the values of the key: numbers by size, strings by their characters.
 *
 * @param {Row} one
 * @param {Row} other
 */
function byKey(one, other) {
  const theirs = values(other.key);
  for (const [place, mine] of values(one.key).entries()) {
    if (mine < theirs[place]) return -1;
    if (mine > theirs[place]) return 1;
  }
  return 0;
}

/** The rows of a topic, by table. */
class TopicRows {
  /** @type {Map<string, Map<string, Row>>} */
  #tables = new Map();

  /** @param {string} table */
  of(table) {
    let rows = this.#tables.get(table);
    if (!rows) this.#tables.set(table, (rows = new Map()));
    return rows;
  }

  /** @param {Record<string, any>} change */
  apply({ table, kind, key, record }) {
    if (kind === "delete") this.of(table).delete(JSON.stringify(values(key)));
    else this.of(table).set(JSON.stringify(values(key)), frozen({ key, record }));
  }

  clear() {
    this.#tables.clear();
  }
}

/**
 * The rows of one table in one topic: see rowcast.d.ts. Rows are frozen, and `rows` is the same array until one changes.
 */
export class Collection {
  ready = false;
  /** @type {RowcastError | null} */
  error = null;
  keepsRows = true;
  /** @type {TopicRows | null} */
  source = null;
  /** @type {Record<string, any> | null} */
  shown = null;
  #table;
  #order;
  /** @type {readonly Record<string, any>[] | null} */
  #rows = null;
  /** @type {Set<() => void>} */
  #callbacks = new Set();

  /**
   * @param {string} table
   * @param {((one: Record<string, any>, other: Record<string, any>) => number)} [order]
   */
  constructor(table, order) {
    this.#table = table;
    this.#order = order;
  }

  get rows() {
    if (!this.#rows) {
      const found = [...(this.source?.of(this.#table).values() ?? [])].sort(byKey).map((row) => row.record);
      this.#rows = Object.freeze(this.#order ? found.sort(this.#order) : found);
    }
    return this.#rows;
  }

  /** @param {Record<string, any>} key the columns that identify the row */
  get(key) {
    return this.source?.of(this.#table).get(JSON.stringify(values(key)))?.record;
  }

  /** @param {() => void} callback */
  subscribe = (callback) => {
    this.#callbacks.add(callback);
    return () => void this.#callbacks.delete(callback);
  };

  close() {} // `Rowcast.collection` replaces it

  /** @param {readonly Record<string, any>[]} changes */
  receive(changes) {
    if (changes.some(({ table }) => table === this.#table || table === undefined)) this.#changed();
  }

  receiveSignal() {}
  receivePeople() {}

  /** @param {boolean} ready */
  setReady(ready) {
    if (this.ready === ready) return;
    this.ready = ready;
    this.#changed();
  }

  /** @param {RowcastError | null} error */
  end(error) {
    this.error = error;
    this.ready = false;
    this.#changed();
  }

  #changed() {
    this.#rows = null;
    for (const callback of [...this.#callbacks]) isolated(callback);
  }
}

/** @typedef {Record<string, { device: string, data: any, since: string }[]>} People the devices that are present, by user */

/** What clients that follow a topic say to one another: see rowcast.d.ts. */
export class Channel {
  /** @type {Readonly<People>} */
  presence = Object.freeze({});
  /** @type {RowcastError | null} */
  error = null;
  keepsRows = false;
  /** @type {TopicRows | null} */
  source = null;
  /** @type {Record<string, any> | null} */
  shown;
  #on;
  /** @type {Map<string, Set<(value: any) => void>>} */
  #listeners = new Map();

  /**
   * @param {Record<string, any> | null} shown
   * @param {{ signal: (name: string, data: any) => boolean, show: () => void, close: () => void }} on
   */
  constructor(shown, on) {
    this.shown = shown;
    this.#on = on;
  }

  /**
   * @param {string} name
   * @param {any} [data]
   */
  signal(name, data = null) {
    return this.#on.signal(name, data);
  }

  /** @param {Record<string, any> | null} data */
  show(data) {
    this.shown = data;
    this.#on.show();
  }

  /**
   * @param {string} name
   * @param {(value: any) => void} listener
   */
  on(name, listener) {
    return listen(this.#listeners, name, listener);
  }

  close() {
    this.#on.close();
  }

  receive() {}
  setReady() {}

  /** @param {Record<string, any>} frame */
  receiveSignal({ name, data, user }) {
    emit(this.#listeners, "signal", { name, data, user });
  }

  /** @param {Readonly<People>} people */
  receivePeople(people) {
    this.presence = people;
    emit(this.#listeners, "presence", people);
  }

  /** @param {RowcastError | null} error */
  end(error) {
    this.error = error;
    this.receivePeople(Object.freeze({}));
  }
}

/**
 * @param {Map<string, Set<(value: any) => void>>} listeners
 * @param {string} name
 * @param {(value: any) => void} listener
 */
function listen(listeners, name, listener) {
  const found = listeners.get(name) ?? new Set();
  listeners.set(name, found.add(listener));
  return () => void found.delete(listener);
}

/**
 * @param {Map<string, Set<(value: any) => void>>} listeners
 * @param {string} name
 * @param {any} value
 */
function emit(listeners, name, value) {
  listeners.get(name)?.forEach((listener) => isolated(() => listener(value)));
}

/** The changes of a topic, in order, as an async iterator. */
class ChangeStream {
  keepsRows = false;
  /** @type {TopicRows | null} */
  source = null;
  /** @type {Record<string, any> | null} */
  shown = null;
  /** @type {Record<string, any>[]} */
  #waiting = [];
  #ended = false;
  /** @type {RowcastError | null} */
  #error = null;
  #limit;
  #on;
  /** @type {(() => void) | null} */
  #wake = null;

  /**
   * @param {number} limit
   * @param {{ full: () => void, drained: () => void, close: () => void }} on
   */
  constructor(limit, on) {
    this.#limit = limit;
    this.#on = on;
  }

  /** @param {readonly Record<string, any>[]} changes */
  receive(changes) {
    for (const change of changes) this.#waiting.push(change);
    this.#wake?.();
    if (this.#waiting.length > this.#limit) this.#on.full();
  }

  setReady() {}
  receiveSignal() {}
  receivePeople() {}

  /** @param {RowcastError | null} error */
  end(error) {
    this.#ended = true;
    this.#error = error;
    this.#wake?.();
  }

  async *[Symbol.asyncIterator]() {
    try {
      for (;;) {
        const changes = this.#waiting.splice(0);
        for (const change of changes) yield change;
        if (this.#waiting.length) continue;
        if (this.#ended && this.#error) throw this.#error;
        if (this.#ended) return;
        this.#on.drained();
        if (!this.#waiting.length && !this.#ended) await new Promise((/** @type {any} */ wake) => (this.#wake = wake));
        this.#wake = null;
      }
    } finally {
      this.#on.close();
    }
  }
}

/**
 * What follows a topic. `receive` gets changes, or a reset. `shown`: what others who are present see of the user; null:
 * nothing, and the user does not see them.
 *
 * @typedef {object} Sink
 * @property {boolean} keepsRows
 * @property {TopicRows | null} source
 * @property {Record<string, any> | null} shown
 * @property {(frame: Record<string, any>) => void} receiveSignal
 * @property {(people: Readonly<People>) => void} receivePeople
 * @property {(changes: readonly Record<string, any>[]) => void} receive
 * @property {(ready: boolean) => void} setReady
 * @property {(error: RowcastError | null) => void} end
 */

/**
 * What is asked for of a topic: members of `subscribe`.
 *
 * @typedef {{ where?: Record<string, any>, columns?: Record<string, string[]> }} Filter
 */

/**
 * A topic is `idle` without a connection, `asked` until the server answers `subscribe`, `replaying` from then until
 * `resumed`, and `live` afterwards.
 *
 * @typedef {object} Topic
 * @property {"idle" | "asked" | "replaying" | "live"} phase
 * @property {true | { limit: number } | null} snapshot whether it begins with its rows
 * @property {Filter} filter what of it is asked for
 * @property {boolean} loaded whether its last snapshot is complete, or it needs none
 * @property {Position | null} at how far it has been processed
 * @property {string | null} since where its last subscribe started
 * @property {number | null} id the `id` of its last subscribe
 * @property {number | null} retryAt when to subscribe again, after `unavailable`
 * @property {TopicRows | null} rows
 * @property {Record<string, any> | null} shown what the server was told to show of the user
 * @property {Readonly<People>} people who is present
 * @property {Set<Sink>} sinks
 */

/**
 * What the engine asks for. `open` fetches a token (another one than the last, if `fresh`) and opens a connection;
 * the answers are `dialing()`, `opened()` and `closed()`. `renew` fetches another token; the answer is `renew()`.
 * `close` ends the connection without an answer.
 *
 * @typedef {object} Outputs
 * @property {(options: { fresh: boolean }) => void} open
 * @property {() => void} renew
 * @property {(frame: Record<string, any>) => void} send
 * @property {() => void} close
 * @property {(name: string, value: any) => void} emit
 */

/**
 * The rules of the protocol, without I/O. Its invariant: every topic has been processed up to `position`. The position
 * therefore stands still while any topic is pending: topics catch up one after another, and a number from the middle
 * would skip what the others still miss.
 */
export class Engine {
  /** @type {Position | null} */
  position = null;
  status = "idle";
  stale = false;

  #out;
  #numbers;
  #device;
  #stored;
  /** @type {Position | null} */
  #unsentAck = null;
  #now;
  #random;
  /** @type {Map<string, Topic>} */
  #topics = new Map();
  /** @type {string | null} */
  #session = null; // sent in the next hello: its welcome says why the server closed this connection
  /** @type {string | null} */
  #helloSince = null;
  #lastId = 0;
  #failures = 0;
  #tokenRefused = false;
  /** @type {number | null} */
  #retryMs = null; // from the last `bye`
  /** @type {number | null} */
  #retryAt = null;
  /** @type {number | null} */
  #silenceAt = null; // when the connection counts as lost
  #maxSilence = ANSWER_TIMEOUT;
  #expiresAt = Infinity;
  /** @type {number | null} */
  #renewAt = null; // when to ask for a newer token

  /**
   * @param {Outputs} out
   * @param {{ numbers?: "json" | "string", device?: string, stored?: boolean, now?: () => number,
   *   random?: () => number }} [options] `stored`: begin where this device has acknowledged
   */
  constructor(out, { numbers, device, stored = false, now = clock, random = Math.random } = {}) {
    this.#out = out;
    this.#numbers = numbers;
    this.#device = device;
    this.#stored = stored;
    this.#now = now;
    this.#random = random;
  }

  /** When `tick` must be called, in milliseconds of the clock; Infinity: not at all. */
  get deadline() {
    const times = [this.#retryAt, this.#silenceAt, this.#renewAt, ...[...this.#topics.values()].map((topic) => topic.retryAt)];
    return Math.min(...times.map((time) => time ?? Infinity));
  }

  // What the application wants

  start() {
    if (this.status === "idle") this.#connect();
  }

  close() {
    this.#disconnect();
    this.#setStatus("closed");
    this.#endTopics(null);
  }

  /** Disconnect until `unpause`: the application does not keep up. */
  pause() {
    if (["idle", "paused", "stopped", "closed"].includes(this.status)) return;
    this.#disconnect();
    this.#setStatus("paused");
  }

  unpause() {
    if (this.status === "paused") this.#connect();
  }

  /** The network is back, the machine awake or the page visible: reconnect now, or find out whether we are connected. */
  wake() {
    if (this.status === "waiting") return this.#connect();
    if (!this.#isWelcomed) return;
    this.#out.send({ op: "ping" });
    this.#silenceAt = this.#now() + ANSWER_TIMEOUT;
  }

  /**
   * @param {string} name
   * @param {Sink} sink
   * @param {true | { limit: number } | null} snapshot
   * @param {Filter} filter
   */
  follow(name, sink, snapshot = null, filter = {}) {
    if (this.status === "stopped" || this.status === "closed") throw new RowcastError("This client is closed.");
    let topic = this.#topics.get(name);
    if (topic && snapshot && !topic.snapshot) {
      throw new RowcastError(`${name} is already followed without a snapshot: ask for it in the first call.`);
    }
    if (topic && JSON.stringify(topic.filter) !== JSON.stringify(filter)) {
      throw new RowcastError(`${name} is already followed with another filter: use the same, or another Rowcast.`);
    }
    if (!topic) {
      topic = {
        phase: "idle", snapshot, filter, loaded: !snapshot, at: null, since: null, id: null, retryAt: null, rows: null,
        shown: null, people: Object.freeze({}), sinks: new Set(),
      };
      this.#topics.set(name, topic);
    }
    if (sink.keepsRows || topic.snapshot) topic.rows ??= new TopicRows();
    sink.source = topic.rows;
    topic.sinks.add(sink);
    if (topic.phase === "live") sink.setReady(true);
    if (Object.keys(topic.people).length) sink.receivePeople(topic.people);
    this.#show(name, topic);
    if (topic.phase === "idle" && this.#isWelcomed) this.#subscribe(name, topic);
    this.#settle();
  }

  /**
   * @param {string} name
   * @param {Sink} sink
   */
  unfollow(name, sink) {
    const topic = this.#topics.get(name);
    if (!topic?.sinks.delete(sink)) return;
    if (topic.sinks.size) return this.#show(name, topic);
    this.#topics.delete(name);
    if (this.#isWelcomed) this.#out.send({ op: "unsubscribe", topic: name });
    this.#settle();
  }

  /**
   * What a sink shows has changed.
   *
   * @param {string} name
   * @param {Sink} sink
   */
  present(name, sink) {
    const topic = this.#topics.get(name);
    if (topic?.sinks.has(sink)) this.#show(name, topic);
  }

  /**
   * Send a signal to the other followers of a topic. False if there is no connection: then nobody gets it.
   *
   * @param {string} name
   * @param {string} signal
   * @param {any} data
   */
  signal(name, signal, data) {
    const topic = this.#topics.get(name);
    if (!topic || topic.phase === "idle" || !this.#isWelcomed) return false;
    this.#out.send({ op: "signal", topic: name, name: signal, data });
    return true;
  }

  /** Let the server keep the position for this device, now or once there is a connection. */
  ack() {
    this.#unsentAck = this.position;
    this.#sendAck();
  }

  // What happens to the connection

  /** The token is there, and the connection is being opened. */
  dialing() {
    this.#silenceAt = this.#now() + ANSWER_TIMEOUT;
  }

  /**
   * The connection is open: say hello.
   *
   * @param {string} token
   */
  opened(token) {
    this.#maxSilence = ANSWER_TIMEOUT;
    this.#silenceAt = this.#now() + ANSWER_TIMEOUT;
    this.#helloSince = this.position?.toString() ?? (this.#stored ? "stored" : null);
    this.#out.send(defined({
      op: "hello", token, since: this.#helloSince, seen: this.#seen, session: this.#session, device: this.#device,
      numbers: this.#numbers,
    }));
  }

  /**
   * There is another token for this connection; null: not yet.
   *
   * @param {string | null} token
   */
  renew(token) {
    if (!this.#isWelcomed) return;
    if (token === null) this.#scheduleRenewal();
    else this.#out.send({ op: "token", token });
  }

  /**
   * The connection is lost: reconnect as the close code demands.
   *
   * @param {number} code
   * @param {string} reason
   */
  closed(code, reason) {
    this.#disconnect();
    const action = AFTER_CLOSE[code];
    if (action === "never" || (code === 4401 && this.#tokenRefused)) return this.stop(code, reason);
    this.#tokenRefused ||= code === 4401;
    if (action === "later") this.#failures = Math.max(this.#failures, 3);
    // Full jitter: clients that were disconnected together must not reconnect together.
    const limit = Math.min(MAX_BACKOFF, seconds(1) * 2 ** this.#failures);
    this.#failures = Math.min(this.#failures + 1, 5);
    this.#retryAt = this.#now() + (this.#retryMs ?? this.#random() * limit);
    this.#retryMs = null;
    this.#setStatus("waiting");
  }

  /**
   * Give up.
   *
   * @param {number} code
   * @param {string} reason
   */
  stop(code, reason) {
    this.#disconnect();
    this.#setStatus("stopped");
    const error = new ConnectionStopped(code, reason);
    this.#endTopics(error);
    this.#out.emit("error", error);
  }

  /** The deadline has passed. */
  tick() {
    const now = this.#now();
    for (const [name, topic] of this.#topics) {
      if (topic.retryAt !== null && topic.retryAt <= now) this.#subscribe(name, topic);
    }
    if (this.#renewAt !== null && this.#renewAt <= now) {
      this.#renewAt = null;
      this.#out.renew();
    }
    if (this.#retryAt !== null && this.#retryAt <= now) return this.#connect();
    if (this.#silenceAt === null || this.#silenceAt > now) return;
    // If this call is late, so may be the frames that have arrived.
    if (this.#isWelcomed && now - this.#silenceAt > LATE) this.wake();
    else this.closed(1006, "silence");
  }

  /** @param {Record<string, any>} frame */
  receive(frame) {
    this.#silenceAt = this.#now() + this.#maxSilence;
    switch (frame.op) {
      case "welcome": this.#onWelcome(frame); break;
      case "renewed": this.#onToken(frame); break;
      case "subscribed": this.#onSubscribed(frame); break;
      case "snapshot": this.#onSnapshot(frame); break;
      case "changes": this.#onChanges(frame); break;
      case "resumed": this.#onResumed(frame); break;
      case "reset": this.#onReset(frame); break;
      case "revoked": this.#onRevoked(frame); break;
      case "head": this.#onHead(frame); break;
      case "signal": this.#onSignal(frame); break;
      case "presence": this.#onPresence(frame); break;
      case "error": this.#onError(frame); break;
      case "bye": this.#retryMs = frame.retry_ms; break;
    }
    this.#settle();
  }

  // Frames

  /** @param {Record<string, any>} frame */
  #onWelcome(frame) {
    if (this.#numbers === "string" && frame.numbers !== "string") return this.stop(0, "numbers");
    this.#session = frame.session;
    this.#tokenRefused = false;
    this.#retryMs = null;
    this.#maxSilence = seconds(frame.heartbeat) * 1.5 + LATE;
    this.#silenceAt = this.#now() + this.#maxSilence;
    this.#onToken(frame);
    if (this.#helloSince === "stored") this.#helloSince = frame.since ?? null;
    this.position ??= Position.parse(this.#helloSince ?? frame.pos);
    this.#setStatus("resuming");
    this.#out.emit("welcome", frame);
    for (const [name, topic] of this.#topics) if (topic.phase === "idle") this.#subscribe(name, topic);
    this.#sendAck();
  }

  /** @param {Record<string, any>} frame */
  #onToken({ expires_in: left = Infinity }) {
    this.#expiresAt = this.#now() + seconds(left);
    this.#scheduleRenewal();
  }

  /** Renew the token when most of its time is over, unless nearly all is. Clients spread over a fifth of it. */
  #scheduleRenewal() {
    const left = this.#expiresAt - this.#now();
    this.#renewAt = left < seconds(1) || left === Infinity ? null : this.#now() + left * (0.7 + 0.2 * this.#random());
  }

  /** @param {Record<string, any>} frame */
  #onSubscribed(frame) {
    const topic = this.#topics.get(frame.topic);
    if (!topic || topic.id !== frame.id) return;
    const position = Position.parse(frame.pos);
    if (frame.snapshot) {
      for (const sink of topic.sinks) sink.setReady(false); // until the last frame of the snapshot
      topic.rows?.clear();
      const again = topic.at !== null; // a loop has missed what happened before this snapshot
      topic.at = position;
      topic.phase = "replaying";
      if (again) this.#deliver(topic, [{ kind: "reset", topic: frame.topic, reason: "snapshot" }]);
      return;
    }
    topic.at = greatest(topic.at, position);
    // Live from here, unless it is replayed. If it was to start earlier, a reset follows.
    if (frame.pos === topic.since) topic.phase = "replaying";
    else this.#makeLive(topic);
  }

  /** @param {Record<string, any>} frame */
  #onSnapshot(frame) {
    const topic = this.#followed(frame);
    if (!topic) return;
    for (const row of frame.rows) topic.rows?.apply({ table: frame.table, kind: "insert", ...row });
    if (!frame.more) for (const sink of topic.sinks) sink.setReady(true);
  }

  /** @param {Record<string, any>} frame */
  #onChanges(frame) {
    const topic = this.#followed(frame);
    if (!topic) return;
    if (topic.phase === "live" && Position.parse(frame.prev).isBeyond(topic.at)) {
      return this.closed(1006, "gap"); // leave this frame: the position is still before the gap
    }
    const position = Position.parse(frame.pos);
    const { at } = topic;
    const fresh = frame.changes.filter(
      (/** @type {{ seq: number }} */ change) => new Position(position.epoch, change.seq).isBeyond(at),
    );
    topic.at = greatest(at, position);
    if (topic.rows) for (const change of fresh) topic.rows.apply(change);
    if (fresh.length) this.#deliver(topic, fresh);
    this.#advance(position);
  }

  /** @param {Record<string, any>} frame */
  #onResumed(frame) {
    const position = Position.parse(frame.pos);
    for (const topic of this.#topics.values()) {
      if (topic.phase === "replaying") this.#makeLive(topic);
      if (topic.phase === "live") topic.at = greatest(topic.at, position); // also those of a slow client
    }
    this.#advance(position);
  }

  /** @param {Record<string, any>} frame */
  #onReset(frame) {
    const topic = this.#followed(frame);
    if (!topic) return;
    const { topic: name, reason } = frame;
    topic.at = Position.parse(frame.pos);
    topic.rows?.clear();
    this.#deliver(topic, [{ kind: "reset", topic: name, reason }]);
    this.#out.emit("reset", { topic: name, reason });
    if (!topic.snapshot || this.#topics.get(name) !== topic || !this.#isWelcomed) return;
    topic.loaded = false;
    for (const sink of topic.sinks) sink.setReady(false);
    this.#out.send({ op: "unsubscribe", topic: name });
    this.#subscribe(name, topic);
  }

  /** @param {Record<string, any>} frame */
  #onRevoked(frame) {
    this.#endTopic(frame.topic, "revoked", "The right to read this topic has ended.");
    this.#out.emit("revoked", { topic: frame.topic });
  }

  /** @param {Record<string, any>} frame */
  #onHead(frame) {
    if (frame.pos) this.#advance(Position.parse(frame.pos));
    this.#setStale(Boolean(frame.stale));
  }

  /** @param {Record<string, any>} frame */
  #onSignal(frame) {
    for (const sink of [...(this.#followed(frame)?.sinks ?? [])]) sink.receiveSignal(frozen(frame));
  }

  /** @param {Record<string, any>} frame */
  #onPresence(frame) {
    const topic = this.#followed(frame);
    if (!topic?.shown) return;
    const { state, left = [], updated = [], joined = [] } = frame;
    /** @type {People} */
    const people = { ...(state ?? topic.people) };
    for (const { user, ...entry } of [...left, ...updated, ...joined]) {
      const rest = (people[user] ?? []).filter(({ device }) => device !== entry.device);
      people[user] = "data" in entry ? [...rest, entry] : rest;
      if (!people[user].length) delete people[user];
    }
    this.#setPeople(topic, people);
  }

  /** @param {Record<string, any>} frame */
  #onError(frame) {
    const found = [...this.#topics].find(([, topic]) => frame.id !== undefined && topic.id === frame.id);
    if (!found) return;
    const [name, topic] = found;
    if (frame.retry) topic.retryAt = this.#now() + seconds(1 + 2 * this.#random());
    else this.#out.emit("error", this.#endTopic(name, frame.code, frame.message));
  }

  // The rest

  get #isWelcomed() {
    return this.status === "live" || this.status === "resuming";
  }

  get #allLive() {
    return [...this.#topics.values()].every((topic) => topic.phase === "live");
  }

  /** How far any topic is ahead of the position, because another was pending. */
  get #seen() {
    const [epoch, seq] = [this.position?.epoch, this.position?.seq ?? 0];
    const ahead = [...this.#topics.values()].flatMap(({ at }) => (at && at.epoch === epoch && at.seq > seq ? at : []));
    return ahead.length ? new Position(/** @type {string} */ (epoch), Math.max(...ahead.map((at) => at.seq))) : null;
  }

  /**
   * The topic of a frame, unless the frame was sent before the server received our last unsubscribe.
   *
   * @param {Record<string, any>} frame
   */
  #followed(frame) {
    const topic = this.#topics.get(frame.topic);
    return topic && topic.phase !== "asked" && topic.phase !== "idle" ? topic : null;
  }

  /**
   * @param {string} name
   * @param {Topic} topic
   */
  #subscribe(name, topic) {
    topic.phase = "asked";
    topic.id = ++this.#lastId;
    topic.retryAt = null;
    topic.since = null;
    /** @type {Record<string, any>} */
    const frame = { op: "subscribe", id: topic.id, topic: name, ...topic.filter };
    if (topic.snapshot && !topic.loaded) {
      frame.snapshot = topic.snapshot;
    } else if (this.#helloSince !== null) {
      topic.since = String(this.position);
      if (topic.since !== this.#helloSince) frame.since = topic.since; // otherwise it starts where the hello said
    }
    if (topic.shown) frame.presence = { data: topic.shown };
    this.#out.send(frame);
  }

  /**
   * Be present with what the last sink that wants it says, and tell the server if that is new.
   *
   * @param {string} name
   * @param {Topic} topic
   */
  #show(name, topic) {
    const shown = [...topic.sinks].map((sink) => sink.shown).filter((one) => one !== null).at(-1) ?? null;
    if (JSON.stringify(shown) === JSON.stringify(topic.shown)) return;
    topic.shown = shown;
    if (topic.phase !== "idle" && this.#isWelcomed) this.#out.send({ op: "presence", topic: name, data: shown });
    if (!shown) this.#setPeople(topic, {});
  }

  /**
   * @param {Topic} topic
   * @param {People} people
   */
  #setPeople(topic, people) {
    topic.people = frozen(people);
    for (const sink of [...topic.sinks]) sink.receivePeople(topic.people);
  }

  #sendAck() {
    if (!this.#unsentAck || !this.#isWelcomed) return;
    this.#out.send({ op: "ack", pos: String(this.#unsentAck) });
    this.#unsentAck = null;
  }

  /**
   * @param {Topic} topic
   * @param {Record<string, any>[]} changes
   */
  #deliver(topic, changes) {
    for (const sink of [...topic.sinks]) sink.receive(frozen(changes));
  }

  /** @param {Topic} topic */
  #makeLive(topic) {
    topic.phase = "live";
    topic.loaded = true;
    for (const sink of topic.sinks) sink.setReady(true);
  }

  /**
   * Move the position, unless a topic is pending.
   *
   * @param {Position} position
   */
  #advance(position) {
    if (this.#isWelcomed && this.#allLive) this.position = position;
  }

  #settle() {
    if (!this.#isWelcomed) return;
    if (this.#allLive) this.#failures = 0;
    this.#setStatus(this.#allLive ? "live" : "resuming");
  }

  /**
   * @param {string} name
   * @param {string} code
   * @param {string} message
   */
  #endTopic(name, code, message) {
    const topic = this.#topics.get(name);
    const error = new TopicEnded(name, code, message);
    this.#topics.delete(name);
    for (const sink of topic?.sinks ?? []) sink.end(error);
    return error;
  }

  /** @param {RowcastError | null} error */
  #endTopics(error) {
    const topics = [...this.#topics.values()];
    this.#topics.clear();
    for (const topic of topics) for (const sink of topic.sinks) sink.end(error);
  }

  #connect() {
    this.#retryAt = null;
    this.#setStatus("connecting");
    this.#out.open({ fresh: this.#tokenRefused });
  }

  #disconnect() {
    this.#retryAt = this.#silenceAt = this.#renewAt = null;
    for (const topic of this.#topics.values()) {
      topic.phase = "idle";
      topic.retryAt = null;
    }
    this.#out.close();
    this.#setStale(false);
  }

  /** @param {boolean} stale */
  #setStale(stale) {
    if (this.stale === stale) return;
    this.stale = stale;
    this.#out.emit("stale", stale);
  }

  /** @param {string} status */
  #setStatus(status) {
    if (this.status === status) return;
    this.status = status;
    this.#out.emit("status", status);
  }
}

/**
 * Without the members that are null or undefined.
 *
 * @param {Record<string, any>} frame
 */
function defined(frame) {
  const members = Object.entries(frame).filter(([, value]) => value !== null && value !== undefined);
  return Object.fromEntries(members.map(([name, value]) => [name, value instanceof Position ? String(value) : value]));
}

/** One user's connection to Rowcast. It connects at once, and again whenever the connection breaks. */
export class Rowcast {
  #url;
  #token;
  #WebSocket;
  #engine;
  /** @type {WebSocket | null} */
  #socket = null;
  #attempts = 0; // asynchronous work of an earlier one checks it and stops
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** @type {Map<string, Set<(value: any) => void>>} */
  #listeners = new Map();
  /** @type {Set<ChangeStream>} */
  #full = new Set();
  #wake = () => {
    if (globalThis.document?.visibilityState !== "hidden") this.#run(() => this.#engine.wake());
  };

  /**
   * @param {string} url the WebSocket URL, which ends in `/v1`
   * @param {{ token: string | ((wanted: { fresh: boolean }) => string | null | Promise<string | null>),
   *   numbers?: "json" | "string", device?: string, stored?: boolean, signal?: AbortSignal,
   *   WebSocket?: typeof globalThis.WebSocket }} options
   */
  constructor(url, { token, numbers, device = aName(), stored, signal, WebSocket = globalThis.WebSocket }) {
    if (!WebSocket) {
      throw new RowcastError("This Node has no WebSocket: use 22, --experimental-websocket, or the option WebSocket.");
    }
    this.#url = url;
    this.#token = token;
    this.#WebSocket = WebSocket;
    this.#engine = new Engine(
      {
        open: (wanted) => void this.#open(wanted),
        renew: () => void this.#renew(),
        send: (frame) => this.#socket?.send(JSON.stringify(frame)),
        close: () => this.#drop(),
        emit: (name, value) => emit(this.#listeners, name, value),
      },
      { numbers, device, stored },
    );
    globalThis.addEventListener?.("online", this.#wake);
    globalThis.document?.addEventListener("visibilitychange", this.#wake);
    whenAborted(signal, () => this.close());
    queueMicrotask(() => this.#run(() => this.#engine.start())); // listeners can be added first
  }

  /** What it is doing: see `Status` in rowcast.d.ts. */
  get status() {
    return this.#engine.status;
  }

  /** Whether the server cannot tell what has changed at the moment. */
  get stale() {
    return this.#engine.stale;
  }

  /**
   * Call back at every such event; returns a function that ends it.
   *
   * @param {string} name
   * @param {(value: any) => void} listener
   */
  on(name, listener) {
    return listen(this.#listeners, name, listener);
  }

  /**
   * The rows of one table in a topic.
   *
   * @param {string} topic
   * @param {{ table: string, snapshot?: true | { limit: number }, signal?: AbortSignal } & Filter & {
   *   order?: (one: Record<string, any>, other: Record<string, any>) => number }} options
   */
  collection(topic, { table, snapshot, order, signal, where, columns }) {
    const collection = new Collection(table, order);
    collection.close = () => this.#run(() => this.#engine.unfollow(topic, collection));
    this.#run(() => this.#engine.follow(topic, collection, snapshot, filterOf(where, columns)));
    whenAborted(signal, collection.close);
    return collection;
  }

  /**
   * The signals of a topic, and with `presence`, which others see, who is present.
   *
   * @param {string} topic
   * @param {{ presence?: Record<string, any>, signal?: AbortSignal }} [options]
   */
  channel(topic, { presence, signal } = {}) {
    const channel = new Channel(presence ?? null, {
      signal: (name, data) => this.#engine.signal(topic, name, data),
      show: () => this.#run(() => this.#engine.present(topic, channel)),
      close: () => this.#run(() => this.#engine.unfollow(topic, channel)),
    });
    this.#run(() => this.#engine.follow(topic, channel));
    whenAborted(signal, () => channel.close());
    return channel;
  }

  /** Let the server keep how far this device is: everything received so far is processed. */
  ack() {
    this.#run(() => this.#engine.ack());
  }

  /**
   * The changes of a topic from now on, each once and in order; a reset is one of `kind` `reset`. Throws TopicEnded or
   * ConnectionStopped at the end. A loop that falls behind by `buffer` changes pauses the connection until it has
   * caught up.
   *
   * @param {string} topic
   * @param {{ signal?: AbortSignal, buffer?: number } & Filter} [options]
   */
  changes(topic, { signal, buffer = BUFFER, where, columns } = {}) {
    const stream = new ChangeStream(buffer, {
      full: () => {
        this.#full.add(stream);
        this.#engine.pause();
      },
      drained: () => this.#release(stream),
      close: () => {
        this.#run(() => this.#engine.unfollow(topic, stream));
        this.#release(stream);
      },
    });
    this.#run(() => this.#engine.follow(topic, stream, null, filterOf(where, columns)));
    whenAborted(signal, () => {
      this.#run(() => this.#engine.unfollow(topic, stream));
      this.#release(stream);
      stream.end(null);
    });
    return stream;
  }

  /** Disconnect for good. */
  close() {
    globalThis.removeEventListener?.("online", this.#wake);
    globalThis.document?.removeEventListener("visibilitychange", this.#wake);
    this.#run(() => this.#engine.close());
  }

  /** @param {ChangeStream} stream */
  #release(stream) {
    if (this.#full.delete(stream) && !this.#full.size) this.#run(() => this.#engine.unpause());
  }

  /**
   * Let the engine do something, and set the timer that it wants.
   *
   * @param {() => void} step
   */
  #run(step) {
    try {
      step();
    } finally {
      clearTimeout(this.#timer);
      const { deadline } = this.#engine;
      if (deadline < Infinity) {
        this.#timer = setTimeout(() => this.#run(() => this.#engine.tick()), Math.max(0, deadline - clock()));
      }
    }
  }

  /** @param {{ fresh: boolean }} wanted */
  async #open(wanted) {
    const attempt = ++this.#attempts;
    const current = (/** @type {() => void} */ step) => attempt === this.#attempts && this.#run(step);
    let token;
    try {
      token = typeof this.#token === "string" ? this.#token : await this.#token(wanted);
    } catch (error) {
      return current(() => this.#engine.closed(1006, `no token: ${error}`));
    }
    if (attempt !== this.#attempts) return;
    if (!token) return current(() => this.#engine.stop(4401, "there is no token"));
    current(() => this.#engine.dialing());
    const socket = (this.#socket = new this.#WebSocket(this.#url, "rowcast.v1"));
    socket.onopen = () => current(() => this.#engine.opened(token));
    socket.onmessage = ({ data }) => current(() => this.#engine.receive(JSON.parse(data)));
    socket.onclose = ({ code, reason }) => current(() => this.#engine.closed(code, reason));
    socket.onerror = () => {}; // a close event follows
  }

  /** Fetch another token for the open connection. If that fails, it is tried again, at the latest when it expires. */
  async #renew() {
    if (typeof this.#token === "string") return; // there is no other
    const attempt = this.#attempts;
    let token;
    try {
      token = (await this.#token({ fresh: true })) || undefined;
    } catch {
      token = null;
    }
    if (attempt !== this.#attempts) return;
    this.#run(() => (token === undefined ? this.#engine.stop(4401, "there is no token") : this.#engine.renew(token)));
  }

  #drop() {
    this.#attempts++; // events that still arrive are ignored
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
  }
}

const aName = () => Array.from({ length: 4 }, () => Math.random().toString(36).slice(2, 7)).join("");

/**
 * @param {Record<string, any>} [where]
 * @param {Record<string, string[]>} [columns]
 * @returns {Filter}
 */
function filterOf(where, columns) {
  return { ...(where && { where }), ...(columns && { columns }) };
}

/**
 * @param {AbortSignal | undefined} signal
 * @param {() => void} action
 */
function whenAborted(signal, action) {
  if (signal?.aborted) action();
  else signal?.addEventListener("abort", action, { once: true });
}
