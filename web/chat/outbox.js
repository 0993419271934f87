/** Messages on their way: shown at once, sent again when the connection is back, and kept until their row arrives. */

import { ulid } from "./writes.js";

export class Outbox {
  #writes;
  #onChange;
  #pending = new Map(); // id -> { id, channel, content, problem, isOffline }

  constructor(writes, onChange) {
    this.#writes = writes;
    this.#onChange = onChange;
  }

  of(channel) {
    return [...this.#pending.values()].filter((message) => message.channel === channel);
  }

  say(channel, content) {
    const id = ulid();
    this.#pending.set(id, { id, channel, content, problem: "", isOffline: false });
    return this.#send(id);
  }

  retry = (id) => this.#send(id);

  discard(id) {
    this.#pending.delete(id);
    this.#onChange();
  }

  /** Send what could not be sent before. */
  resume() {
    for (const message of this.#pending.values()) if (message.isOffline) this.#send(message.id);
  }

  /** Forget messages whose rows have arrived. */
  settle(isStored) {
    for (const [id, { channel }] of this.#pending) if (isStored(channel, id)) this.#pending.delete(id);
  }

  async #send(id) {
    const message = this.#pending.get(id);
    if (!message) return;
    Object.assign(message, { problem: "", isOffline: false });
    this.#onChange();
    try {
      await this.#writes.say(id, message.channel, message.content);
    } catch (error) {
      Object.assign(message, { problem: error.message, isOffline: Boolean(error.isOffline) });
      this.#onChange();
    }
  }
}
