/** The JavaScript client of Rowcast, for browsers and Node. docs/protocol.md says what the server promises. */

/** The columns of a row, with the values that docs/types.md lists. */
export type Row = Record<string, any>;

/** The tables of a client to which nobody has said what they are. `daemon types --typescript` does. */
export type AnyTables = Record<string, any>;

/** A change in any of these tables; `table` tells which. */
export type ChangeOf<Tables> = string extends keyof Tables
  ? Change<any>
  : { [Name in keyof Tables & string]: Change<Tables[Name]> & { table: Name } }[keyof Tables & string];

/** One change of a row. Everything is frozen. */
export interface Change<R = Row> {
  /** Its number in the log; it grows within a topic. */
  seq: number;
  /** The transaction that made it, unless the server does not tell (`ROWCAST_TRANSACTION_IDS=false`). */
  tx?: string;
  /** When its statement began; for display, not for ordering. */
  at: string;
  table: string;
  kind: "insert" | "update" | "delete" | "restore";
  /** The columns that identify the row. */
  key: Row;
  /** The published row, unless `kind` is `delete`. */
  record?: R;
  /** The columns that an `update` changed. */
  changed?: string[];
  /** In a `delete`: the row still exists, but not in this topic. */
  left?: boolean;
  meta?: { actor?: string };
}

/** What you know of the topic may be wrong: read its state anew. Changes that follow are right. */
export interface Reset {
  kind: "reset";
  topic: string;
  /** See "Resets" in the protocol; or `snapshot`, if the topic's snapshot had to be read again. */
  reason: string;
}

/**
 * - `idle`: just created.
 * - `connecting`: fetching a token, opening a WebSocket, waiting for `welcome`.
 * - `resuming`: connected, and some topic is still catching up.
 * - `live`: every topic is up to date, unless `stale`.
 * - `waiting`: disconnected, and about to reconnect.
 * - `paused`: disconnected until a loop over `changes` has caught up.
 * - `stopped`: the connection ended for a reason that reconnecting would not change.
 * - `closed`: by you.
 */
export type Status = "idle" | "connecting" | "resuming" | "live" | "waiting" | "paused" | "stopped" | "closed";

export interface Events {
  /** A topic was reset: its collections are empty, and begin again with a snapshot if you asked for one. */
  reset: { topic: string; reason: string };
  /** The right to a topic has ended; its collections and loops end with a TopicEnded. */
  revoked: { topic: string };
  /** Whether the server cannot tell what has changed at the moment. */
  stale: boolean;
  status: Status;
  /** A topic was refused, or the connection has ended for good. */
  error: RowcastError;
  /** Connected: the `welcome` of the protocol, which says as whom. */
  welcome: { user: string; session: string; schema: string; last_close?: { code: number; reason: string } };
}

export interface Options {
  /**
   * The token, or what fetches one for each connection, and before the last one expires. `fresh`: a new one is needed,
   * because the server refused the last, or it expires soon. Null ends the connection for good; if it throws, the client
   * tries again.
   */
  token: string | ((wanted: { fresh: boolean }) => string | null | Promise<string | null>);
  /**
   * With `string`, values of bigint and numeric columns are strings with all their digits. Otherwise they are numbers,
   * and those that no double holds are rounded.
   */
  numbers?: "json" | "string";
  /**
   * What you call this client among those of its user: 1 to 64 ASCII characters without blanks. By default a random name,
   * so that one who reconnects has never left. Choose one that stays if you use `stored`.
   */
  device?: string;
  /** Begin where this device has last acknowledged, if the server knows that. */
  stored?: boolean;
  /** Closes the client when it is aborted. */
  signal?: AbortSignal;
  /** The WebSocket to use instead of the global one, which Node has from version 22 on. */
  WebSocket?: new (url: string, protocol: string) => any;
}

/** Values are as in frames; see "Filters" in the protocol. */
export type Value = string | number | boolean;

/** Every member must be true. Other members than `and`, `or` and `not` are columns. */
export interface Condition {
  and?: Condition[];
  or?: Condition[];
  not?: Condition;
  [column: string]: Comparison | Condition[] | Condition | undefined;
}

/** Every member must be true. */
export interface Comparison {
  eq?: Value;
  ne?: Value;
  lt?: Value;
  lte?: Value;
  gt?: Value;
  gte?: Value;
  in?: Value[];
  is_null?: boolean;
  like?: string;
  ilike?: string;
  starts_with?: string;
}

/** What to receive of a topic: the rows of each table for which its condition is true, and these of their columns. */
export interface Filter {
  /** A condition for each table. */
  where?: Record<string, Condition>;
  /** Columns of each table. Keys are always complete. */
  columns?: Record<string, string[]>;
}

export interface CollectionOptions<R = Row> extends Filter {
  table: string;
  /** Begin with the topic's rows, or at most `limit` of each table; without it, with those that change from now on. */
  snapshot?: true | { limit: number };
  /** The order of `rows`. The default is by key: numbers by size, strings by their characters. */
  order?: (one: R, other: R) => number;
  /** Closes the collection when it is aborted. */
  signal?: AbortSignal;
}

export interface ChangesOptions extends Filter {
  /** Ends the loop when it is aborted. */
  signal?: AbortSignal;
  /** How many changes the loop may be behind. */
  buffer?: number;
}

/** The rows of one table in one topic. */
export interface Collection<R = Row> {
  /** In order, frozen, and the same array until a row changes. */
  readonly rows: readonly R[];
  /** Whether all changes, and the snapshot if you asked for one, have been received. */
  readonly ready: boolean;
  /** Why the collection is not followed any more. */
  readonly error: RowcastError | null;
  /** The row with this key. */
  get(key: Row): R | undefined;
  /** Call back after each change of rows, `ready` or `error`; returns a function that ends it. */
  subscribe(callback: () => void): () => void;
  close(): void;
}

export interface ChannelOptions {
  /** Be present, with these data: a JSON object of up to 1 KiB, which others who are present see. */
  presence?: Record<string, any>;
  /** Closes the channel when it is aborted. */
  signal?: AbortSignal;
}

/** Those who are present, by user: one entry for each device. */
export type People = Record<string, readonly { device: string; data: any; since: string }[]>;

/** What clients that follow a topic say to one another. */
export interface Channel {
  /** Who is present; empty unless you are. Frozen, and the same object until somebody comes, goes or changes. */
  readonly presence: Readonly<People>;
  /** Why the topic is not followed any more. */
  readonly error: RowcastError | null;
  /**
   * Send something to the other clients that follow the topic: at most once, and stored nowhere. False if there is no
   * connection at the moment.
   */
  signal(name: string, data?: any): boolean;
  /** Be present, and let others see this; null: be present no longer. */
  show(data: Record<string, any> | null): void;
  on(name: "signal", listener: (signal: { name: string; data: any; user: string }) => void): () => void;
  on(name: "presence", listener: (people: Readonly<People>) => void): () => void;
  close(): void;
}

/**
 * One user's connection to Rowcast. It connects at once, and again whenever the connection breaks.
 *
 * `Tables` has the type of the rows of each table, and `Topic` what can be subscribed to:
 * `new Rowcast<Tables, Topic>(…)` with the types that `daemon types --typescript` prints.
 */
export class Rowcast<Tables = AnyTables, Topic extends string = string> {
  /** `url` is the WebSocket URL, which ends in `/v1`. Throws RowcastError if there is no WebSocket. */
  constructor(url: string, options: Options);
  readonly status: Status;
  readonly stale: boolean;
  on<Name extends keyof Events>(name: Name, listener: (value: Events[Name]) => void): () => void;
  /** Throws RowcastError if the client is closed, or the topic already followed without a snapshot or otherwise filtered. */
  collection<Name extends keyof Tables & string>(
    topic: Topic,
    options: CollectionOptions<Tables[Name]> & { table: Name },
  ): Collection<Tables[Name]>;
  collection<R = Row>(
    topic: Topic,
    options: CollectionOptions<R> & (string extends keyof Tables ? unknown : never),
  ): Collection<R>;
  /** Signals, and who is present. Throws RowcastError if the client is closed. */
  channel(topic: Topic, options?: ChannelOptions): Channel;
  /** Let the server keep how far this device is: everything received so far is processed. */
  ack(): void;
  /**
   * The changes of a topic from now on, each once and in order. The loop throws TopicEnded or ConnectionStopped when
   * the topic or the connection ends, and ends quietly with `signal` or `close()`. If it falls behind by `buffer`
   * changes (10,000), the client disconnects, and resumes once the loop has caught up.
   */
  changes(topic: Topic, options?: ChangesOptions): AsyncIterable<ChangeOf<Tables> | Reset>;
  changes<R extends string extends keyof Tables ? object : never>(
    topic: Topic,
    options?: ChangesOptions,
  ): AsyncIterable<Change<R> | Reset>;
  /** Disconnect for good. */
  close(): void;
}

/** Any error of this client. */
export class RowcastError extends Error {}

/** A topic is not followed any more. */
export class TopicEnded extends RowcastError {
  readonly topic: string;
  /** `revoked`, or the code of the error that refused it: see "Error codes" in the protocol. */
  readonly code: string;
}

/** The connection ended for a reason that reconnecting would not change. */
export class ConnectionStopped extends RowcastError {
  /** The close code, or 0 if the client closed the connection itself. */
  readonly code: number;
  readonly reason: string;
}
