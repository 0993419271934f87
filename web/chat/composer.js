/** The field below the messages: Enter sends, Shift+Enter begins a line, the up arrow edits the last message. */

import { $ } from "../shared/dom.js";

export class Composer {
  #input = $("input");
  #drafts = new Map(); // by channel
  #channel = null;

  /** @param {{ send: (text: string) => void, editLast: () => void, typing: () => void }} on */
  constructor(on) {
    const send = () => {
      const text = this.#input.value.trim();
      if (!text) return;
      this.#input.value = "";
      this.#fit();
      on.send(text);
    };
    $("compose").onsubmit = (event) => {
      event.preventDefault();
      send();
      this.#input.focus();
    };
    this.#input.onkeydown = (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
      if (event.key === "ArrowUp" && !this.#input.value) {
        event.preventDefault();
        on.editLast();
      }
    };
    this.#input.oninput = () => {
      this.#fit();
      on.typing();
    };
  }

  /** Show the draft of this channel. */
  select(channel) {
    if (channel?.id !== this.#channel) {
      if (this.#channel) this.#drafts.set(this.#channel, this.#input.value);
      this.#channel = channel?.id;
      this.#input.value = this.#drafts.get(this.#channel) ?? "";
      this.#fit();
    }
    this.#input.disabled = !channel;
    const hint = channel ? `Message #${channel.name}` : "Message";
    if (this.#input.placeholder !== hint) this.#input.placeholder = hint;
  }

  focus() {
    this.#input.focus();
  }

  #fit() {
    this.#input.style.height = "auto";
    this.#input.style.height = `${Math.min(this.#input.scrollHeight + 2, 180)}px`;
  }
}
