/** What the chat knows: collections of the JavaScript client, and what follows from their rows. */

import { parseTime } from "../shared/time.js";
import { Typing } from "./typing.js";

const RECENT = { limit: 200 }; // rows of each table that a channel begins with
const DIRECTORY = { limit: 5000 }; // people
const MAX_SHOWN = 300; // messages

const byTime = (one, other) => {
  const [early, late] = [parseTime(one.created_at), parseTime(other.created_at)];
  return early < late ? -1 : early > late ? 1 : one.id < other.id ? -1 : 1;
};

/** One channel that the user is a member of. */
class Channel {
  #tables;
  #live;

  constructor(rowcast, id, onChange) {
    this.id = id;
    this.topic = `channel:${id}`;
    const open = (table, order) => {
      const collection = rowcast.collection(this.topic, { table, snapshot: RECENT, order });
      collection.subscribe(onChange);
      return collection;
    };
    this.#tables = {
      channels: open("channels"),
      members: open("channel_members"),
      messages: open("messages", byTime),
      reactions: open("reactions"),
      files: open("files"),
      reads: open("message_reads"),
    };
    this.#live = rowcast.channel(this.topic);
    this.typing = new Typing(this.#live, onChange);
    this.#tables.messages.subscribe(() => this.typing.stop(this.#tables.messages.rows.at(-1)?.user_id));
  }

  get row() {
    return this.#tables.channels.rows[0];
  }

  get name() {
    return this.row?.name ?? "";
  }

  get isReady() {
    return this.#tables.messages.ready;
  }

  /** Whether the right to read it has ended, or it is gone. */
  get isGone() {
    return this.#tables.messages.error !== null;
  }

  get members() {
    return this.#tables.members.rows;
  }

  /** The newest messages, oldest first. */
  get messages() {
    return this.#tables.messages.rows.slice(-MAX_SHOWN);
  }

  message(id) {
    return this.#tables.messages.get({ id });
  }

  /** Reactions: id of the message -> emoji -> ids of users. */
  get reactions() {
    const found = new Map();
    for (const { message_id: message, emoji, user_id: user } of this.#tables.reactions.rows) {
      const ofMessage = found.get(message) ?? found.set(message, new Map()).get(message);
      (ofMessage.get(emoji) ?? ofMessage.set(emoji, []).get(emoji)).push(user);
    }
    return found;
  }

  get files() {
    const found = new Map();
    for (const file of this.#tables.files.rows) {
      (found.get(file.message_id) ?? found.set(file.message_id, []).get(file.message_id)).push(file);
    }
    return found;
  }

  /** Up to which message everybody has read: id of the user -> the newest message with a receipt. */
  get readUpTo() {
    const found = new Map();
    for (const { message_id: id, user_id: user } of this.#tables.reads.rows) {
      const message = this.message(id);
      if (message && (!found.has(user) || byTime(found.get(user), message) < 0)) found.set(user, message);
    }
    return found;
  }

  /** The messages of others that are newer than the user's last receipt, and than what it said itself. */
  unread(user) {
    const { messages } = this;
    const read = this.readUpTo.get(user);
    let count = 0;
    for (let index = messages.length - 1; index >= 0; index--) {
      const message = messages[index];
      if (message.user_id === user || message.id === read?.id) break;
      if (read && byTime(message, read) < 0) break;
      count++;
    }
    return messages.slice(messages.length - count);
  }

  close() {
    for (const collection of Object.values(this.#tables)) collection.close();
    this.#live.close();
  }
}

/** Everything that one user sees. `onChange` is called after each change. */
export class Store {
  #rowcast;
  #onChange;
  #users;
  #status;
  #everybody; // who has this page open
  #memberships = null;
  #channels = new Map();

  constructor(rowcast, onChange) {
    this.#rowcast = rowcast;
    this.#onChange = onChange;
    this.user = "";
    const open = (table) => rowcast.collection("users", { table, snapshot: DIRECTORY });
    this.#users = open("users");
    this.#status = open("user_status");
    for (const collection of [this.#users, this.#status]) collection.subscribe(onChange);
    this.#everybody = rowcast.channel("users", { presence: {} });
    this.#everybody.on("presence", onChange);
    rowcast.on("welcome", ({ user }) => this.#follow(user));
  }

  /** The channels of the user, by name. */
  get channels() {
    return [...this.#channels.values()].filter((channel) => !channel.isGone && channel.name)
      .sort((one, other) => one.name.localeCompare(other.name));
  }

  /** Whether the memberships are known, and every channel's rows. */
  get isReady() {
    return Boolean(this.#memberships?.ready)
      && [...this.#channels.values()].every((channel) => channel.isReady || channel.isGone);
  }

  /** Whether this database has no chat at all. */
  get isMissing() {
    return this.#users.error?.code === "no_such_topic";
  }

  channel(id) {
    return this.channels.find((channel) => channel.id === id);
  }

  get people() {
    return this.#users.rows.slice(-200).map(({ id }) => ({ id, name: this.nameOf(id), ...this.statusOf(id) }))
      .sort((one, other) => one.name.localeCompare(other.name));
  }

  nameOf(id) {
    const user = this.#users.get({ id });
    return user?.full_name || user?.username || `…${id.slice(-6)}`;
  }

  statusOf(id) {
    const row = this.#status.get({ user_id: id });
    const status = row?.status ?? "offline";
    const isHere = Boolean(this.#everybody.presence[id]?.length);
    return { status: isHere && status === "offline" ? "online" : status, note: row?.custom_status ?? "" };
  }

  #follow(user) {
    if (this.#memberships) return;
    this.user = user;
    this.#memberships = this.#rowcast.collection(`user:${user}`, { table: "channel_members", snapshot: DIRECTORY });
    this.#memberships.subscribe(() => this.#syncChannels());
  }

  #syncChannels() {
    if (this.#memberships.ready) {
      const joined = new Set(this.#memberships.rows.map(({ channel_id: id }) => id));
      for (const [id, channel] of this.#channels) {
        if (joined.has(id)) continue;
        channel.close();
        this.#channels.delete(id);
      }
      for (const id of joined) {
        if (!this.#channels.has(id)) this.#channels.set(id, new Channel(this.#rowcast, id, this.#onChange));
      }
    }
    this.#onChange();
  }
}
