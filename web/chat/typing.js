/** Who is typing: a signal every few seconds, which nobody stores. */

const SEND_EVERY = 2000; // milliseconds
const SHOWN = 5000; // milliseconds after the last signal

export class Typing {
  #live;
  #onChange;
  #seen = new Map(); // id of the user -> when to stop showing it
  #sentAt = -Infinity;

  /** @param live the channel of the JavaScript client */
  constructor(live, onChange) {
    this.#live = live;
    this.#onChange = onChange;
    live.on("signal", ({ name, user }) => name === "typing" && this.#see(user));
  }

  /** The ids of those who are typing. */
  get users() {
    const now = performance.now();
    for (const [user, until] of this.#seen) if (until <= now) this.#seen.delete(user);
    return [...this.#seen.keys()];
  }

  /** The signed-in user types. */
  send() {
    const now = performance.now();
    if (now - this.#sentAt < SEND_EVERY) return;
    if (this.#live.signal("typing", {})) this.#sentAt = now;
  }

  /** The user has sent a message. */
  stop(user) {
    this.#seen.delete(user);
  }

  #see(user) {
    this.#seen.set(user, performance.now() + SHOWN);
    this.#onChange();
    setTimeout(this.#onChange, SHOWN + 50);
  }
}
