/** What the signed-in user does: one POST for each action. Rows come back through Rowcast, like everybody else's. */

/** An action was refused, or could not be delivered: then `isOffline`, and it can be sent again. */
export class WriteFailed extends Error {
  constructor(message, isOffline) {
    super(message);
    this.isOffline = isOffline;
  }
}

const DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/** A new ULID: ids of messages sort by the time at which they were written. */
export function ulid(now = Date.now()) {
  let time = "";
  for (let rest = now, place = 0; place < 10; place++, rest = Math.floor(rest / 32)) time = DIGITS[rest % 32] + time;
  return time + [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => DIGITS[byte % 32]).join("");
}

export class Writes {
  #token;

  /** @param {(wanted: { fresh: boolean }) => Promise<string | null>} token the same as for Rowcast */
  constructor(token) {
    this.#token = token;
  }

  say = (id, channel, content) => this.#post("say", { id, channel, content });
  edit = (message, content) => this.#post("edit", { message, content });
  delete = (message) => this.#post("delete", { message });
  react = (message, emoji) => this.#post("react", { message, emoji });
  read = (message) => this.#post("read", { message });

  async #post(name, body, fresh = false) {
    let response;
    try {
      response = await fetch(`demo/${name}`, {
        method: "POST",
        headers: { Authorization: `Bearer ${await this.#token({ fresh })}`, "Content-Type": "application/json" },
        body: JSON.stringify(body),
      });
    } catch {
      throw new WriteFailed("The server cannot be reached.", true);
    }
    if (response.status === 401 && !fresh) return this.#post(name, body, true);
    if (!response.ok) throw new WriteFailed((await response.text()).trim(), response.status >= 500);
  }
}
