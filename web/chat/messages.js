/** The messages of the selected channel: days, authors, edits, reactions, files, and who has read how far. */

import { $, button, el, isAtEnd, keepScroll, plural, prefersReducedMotion, setText, syncChildren } from "../shared/dom.js";
import { avatar } from "../shared/people.js";
import { clockTime, dayOf, parseTime } from "../shared/time.js";

const TOGETHER = 5 * 60_000; // milliseconds between two messages of one author that are shown as one block
const MAX_TEXT = 4000; // characters
export const EMOJI = ["👍", "🎉", "😄", "❤️", "👀"];

const clipped = (text) => (text.length > MAX_TEXT ? `${text.slice(0, MAX_TEXT)}…` : text);

/**
 * Draws messages, and lets their author edit and delete them, and everybody react.
 *
 * `outbox` holds messages that are not stored yet; `actions` does what the buttons say, or is null if nobody can write.
 */
export class Messages {
  #store;
  #outbox;
  #actions;
  #pane = $("pane");
  #list = $("messages");
  #channel = null; // of the last drawing
  #firstUnread = null; // where the line is drawn: it stays while the channel is open
  #editing = null; // id of a message
  #seen = new Set(); // ids that have been drawn

  constructor(store, outbox, actions) {
    this.#store = store;
    this.#outbox = outbox;
    this.#actions = actions;
    this.#pane.onscroll = () => this.#updateNewer();
    this.#pane.onkeydown = (event) => this.#onKey(event);
    $("newer").onclick = () => this.scrollToEnd();
  }

  scrollToEnd() {
    this.#pane.scrollTop = this.#pane.scrollHeight;
  }

  get isAtEnd() {
    return isAtEnd(this.#pane);
  }

  draw(channel) {
    const isOther = channel?.id !== this.#channel;
    if (isOther) this.#begin(channel);
    const items = channel ? this.#items(channel) : [];
    const hadFocus = this.#list.contains(document.activeElement) && document.activeElement;
    keepScroll(this.#pane, () => {
      syncChildren(this.#list, items, (item) => item.key, (item) => this.#create(item), (element, item) => {
        if (element.signature === item.signature) return;
        element.signature = item.signature;
        item.fill(element);
      });
    });
    if (hadFocus && !document.contains(hadFocus)) this.#pane.focus();
    if (isOther) this.scrollToEnd();
    this.#updateNewer();
  }

  /** Edit the user's last message, if it has written one. */
  editLast(channel) {
    const mine = channel?.messages.findLast((message) => message.user_id === this.#store.user);
    if (mine) this.#edit(mine.id);
  }

  #begin(channel) {
    this.#channel = channel?.id;
    this.#firstUnread = null;
    this.#editing = null;
    this.#seen.clear();
    this.#list.replaceChildren();
  }

  #items(channel) {
    const { messages, reactions, files } = channel;
    const seenBy = this.#seenBy(channel, messages);
    const unread = channel.unread(this.#store.user);
    // Only what was unread before the channel was opened, or arrived out of sight, gets the line.
    if (!this.#firstUnread && unread.length && (this.#seen.size === 0 || !this.isAtEnd || document.hidden)) {
      this.#firstUnread = unread[0].id;
    }
    const items = [];
    let previous = null;
    for (const message of messages) {
      const time = parseTime(message.created_at);
      const day = Number.isFinite(time) ? dayOf(time) : message.created_at.slice(0, 10);
      if (day !== previous?.day) items.push(separator(`day-${day}-${message.id}`, "day", day));
      if (message.id === this.#firstUnread) items.push(separator("unread", "unread", "New"));
      const continues = previous?.day === day && previous.user === message.user_id
        && time - previous.time < TOGETHER && message.id !== this.#firstUnread;
      const details = {
        continues, time, name: this.#store.nameOf(message.user_id), isEditing: message.id === this.#editing,
        reactions: [...(reactions.get(message.id) ?? [])], files: files.get(message.id) ?? [],
        seenBy: seenBy.get(message.id) ?? [],
      };
      items.push({
        key: message.id,
        signature: JSON.stringify([message.updated_at, message.content, details]),
        fill: (element) => this.#fill(element, message, details),
      });
      previous = { day, user: message.user_id, time };
    }
    for (const pending of this.#outbox.of(channel.id)) {
      if (!channel.message(pending.id)) items.push(this.#pendingItem(pending));
    }
    if (!messages.length && items.length === 0 && channel.isReady) items.push(EMPTY);
    return items;
  }

  /** Whom to show under which message: the id of the message -> ids of the users who have read up to there. */
  #seenBy(channel, messages) {
    const found = new Map();
    const last = messages.at(-1);
    for (const [user, message] of channel.readUpTo) {
      if (user === this.#store.user || last === undefined) continue;
      (found.get(message.id) ?? found.set(message.id, []).get(message.id)).push(user);
    }
    return found;
  }

  #create(item) {
    const element = el("li");
    if (this.#seen.size && !this.#seen.has(item.key) && item.isMessage !== false) element.classList.add("arrived");
    return element;
  }

  #fill(element, message, details) {
    const isFocused = element.contains(document.activeElement);
    this.#seen.add(message.id);
    element.className = `message${details.continues ? " continued" : ""}${element.classList.contains("arrived") ? " arrived" : ""}`;
    element.dataset.id = message.id;
    element.tabIndex = -1;
    if (details.isEditing) {
      if (!element.querySelector("form")) element.replaceChildren(...this.#editor(message, details));
      return;
    }
    const text = el("p", "text", clipped(message.content));
    if (message.updated_at !== message.created_at) text.append(el("span", "mark", "(edited)"));
    const body = el("div", "body", author(message, details), text);
    for (const file of details.files) body.append(fileChip(file));
    if (details.reactions.length) body.append(this.#reactions(message, details.reactions));
    if (details.seenBy.length) body.append(this.#seenList(details.seenBy));
    element.replaceChildren(avatar(message.user_id, details.name), body);
    if (this.#actions) element.append(this.#tools(message));
    if (isFocused) element.focus();
  }

  #reactions(message, reactions) {
    return el("ul", "reactions", ...reactions.map(([emoji, users]) => {
      const names = users.map((user) => this.#store.nameOf(user)).join(", ");
      const isMine = users.includes(this.#store.user);
      const label = `${emoji} ${users.length}`;
      if (!this.#actions) return el("li", "", el("span", "reaction", label));
      const chip = button("reaction", label, () => this.#actions.react(message.id, emoji));
      chip.setAttribute("aria-pressed", String(isMine));
      chip.title = names;
      return el("li", "", chip);
    }));
  }

  #seenList(users) {
    const names = users.map((user) => this.#store.nameOf(user));
    const list = el("div", "seen", el("span", "visually-hidden", `Seen by ${names.join(", ")}`),
      ...users.slice(0, 6).map((user, index) => avatar(user, names[index], "avatar-tiny")));
    list.title = `Seen by ${names.join(", ")}`;
    return list;
  }

  #tools(message) {
    const tools = el("div", "tools",
      ...EMOJI.map((emoji) => button("", `React with ${emoji}`, () => this.#actions.react(message.id, emoji), emoji)));
    if (message.user_id === this.#store.user) {
      tools.append(
        button("", "Edit", () => this.#edit(message.id)),
        button("danger", "Delete", () => this.#actions.delete(message.id)),
      );
    }
    return tools;
  }

  #edit(id) {
    this.#editing = id;
    this.#actions.redraw();
    requestAnimationFrame(() => this.#list.querySelector(".editor textarea")?.focus());
  }

  #editor(message, details) {
    const input = el("textarea");
    input.value = message.content;
    input.rows = Math.min(8, message.content.split("\n").length);
    input.setAttribute("aria-label", "Edit your message");
    const stop = () => {
      this.#editing = null;
      this.#actions.redraw();
      $("input").focus();
    };
    const save = () => {
      const content = input.value.trim();
      if (content && content !== message.content) this.#actions.edit(message.id, content);
      stop();
    };
    input.onkeydown = (event) => {
      if (event.key === "Escape") stop();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      }
    };
    const form = el("form", "editor", input,
      el("p", "hint", button("quiet", "Cancel", stop), " ", el("button", "primary small", "Save"),
        el("span", "muted keys", "Enter saves, Esc cancels")));
    form.onsubmit = (event) => {
      event.preventDefault();
      save();
    };
    return [avatar(message.user_id, details.name), el("div", "body", author(message, details), form)];
  }

  #pendingItem({ id, content, problem }) {
    return {
      key: id,
      signature: JSON.stringify([content, problem]),
      fill: (element) => {
        element.className = `message pending${problem ? " failed" : ""}`;
        this.#seen.add(id);
        const body = el("div", "body", el("p", "text", content));
        body.append(problem
          ? el("p", "mark", `Not sent: ${problem} `,
            button("link", "Send again", () => this.#outbox.retry(id)), " ",
            button("link", "Discard", () => this.#outbox.discard(id)))
          : el("p", "mark", "Sending…"));
        element.replaceChildren(avatar(this.#store.user, this.#store.nameOf(this.#store.user)), body);
      },
    };
  }

  #updateNewer() {
    const hidden = this.isAtEnd;
    if ($("newer").hidden !== hidden) $("newer").hidden = hidden;
    const last = this.#list.lastElementChild;
    setText($("newer"), last?.classList.contains("arrived") ? "New messages ↓" : "To the newest ↓");
    if (hidden) this.#actions?.reachedEnd();
  }

  /** The arrow keys move between messages; their tools come next in the order of Tab. */
  #onKey(event) {
    if (event.target.closest("textarea, button")) return;
    const all = [...this.#list.querySelectorAll(".message")];
    const at = all.indexOf(document.activeElement);
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const target = event.key === "Home" ? all[0] : event.key === "End" ? all.at(-1)
      : step && (at < 0 ? all.at(-1) : all[at + step]);
    if (!target) return;
    event.preventDefault();
    target.focus({ preventScroll: true });
    target.scrollIntoView({ block: "nearest", behavior: prefersReducedMotion() ? "auto" : "smooth" });
  }
}

const separator = (key, kind, label) => ({
  key, signature: label, isMessage: false,
  fill: (element) => {
    element.className = `separator ${kind}`;
    element.replaceChildren(el("span", "", label));
  },
});

const EMPTY = {
  key: "empty", signature: "empty", isMessage: false,
  fill: (element) => {
    element.className = "empty";
    element.replaceChildren(el("p", "", "Nothing has been said here yet."), el("p", "muted", "Be the first."));
  },
};

function author(message, { name, time }) {
  const stamp = el("time", "", Number.isFinite(time) ? clockTime(time) : message.created_at);
  stamp.dateTime = message.created_at;
  stamp.title = Number.isFinite(time) ? new Date(time).toLocaleString() : message.created_at;
  return el("div", "author", el("strong", "", name), stamp);
}

function fileChip({ name, size }) {
  const kilobytes = (BigInt(size) + 1023n) / 1024n; // a bigint column: no double holds all its values
  return el("span", "file", `${name} · ${kilobytes.toLocaleString("en")} kB`);
}

export const aboutChannel = (channel) =>
  [plural(channel.members.length, "member"), channel.row?.description].filter(Boolean).join(" · ");
