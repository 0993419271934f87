/** Channels with their unread counts, and people with their status. */

import { $, button, el, plural, setText, syncChildren } from "../shared/dom.js";
import { avatar, statusDot } from "../shared/people.js";

export class Sidebar {
  #onSelect;

  constructor(onSelect) {
    this.#onSelect = onSelect;
    $("menu").onclick = () => this.#toggle();
    $("backdrop").onclick = () => this.close();
    $("chat").onkeydown = (event) => {
      if (event.key === "Escape" && this.#isOpen) {
        this.close();
        $("menu").focus();
      }
    };
  }

  draw(store, selected) {
    const { channels } = store;
    const counts = channels.map((channel) => channel.unread(store.user).length);
    const create = (channel) => el("li", "", this.#channelButton(channel));
    syncChildren($("channels"), channels, ({ id }) => id, create, (item, channel) => {
      this.#updateChannel(item.firstChild, channel, counts[channels.indexOf(channel)], channel.id === selected);
    });
    const others = counts.reduce((sum, count, index) => sum + (channels[index].id === selected ? 0 : count), 0);
    $("menu-unread").hidden = others === 0;
    setText($("menu-unread"), String(Math.min(others, 99)));
    syncChildren($("people"), store.people, ({ id }) => id, (person) => el("li", "person", personAvatar(person), el("span")),
      (item, person) => updatePerson(item, person, person.id === store.user));
    return counts.reduce((sum, count) => sum + count, 0);
  }

  close() {
    delete $("chat").dataset.menu;
    $("menu").setAttribute("aria-expanded", "false");
  }

  get #isOpen() {
    return $("chat").dataset.menu === "open";
  }

  #toggle() {
    if (this.#isOpen) return this.close();
    $("chat").dataset.menu = "open";
    $("menu").setAttribute("aria-expanded", "true");
    $("channels").querySelector("button")?.focus();
  }

  #channelButton({ id }) {
    const element = button("channel", "", () => {
      this.close();
      this.#onSelect(id);
    });
    element.append(el("span", "name"), el("span", "badge"));
    return element;
  }

  #updateChannel(element, channel, unread, isSelected) {
    const [name, badge] = element.children;
    setText(name, channel.name);
    badge.hidden = unread === 0;
    setText(badge, unread > 99 ? "99+" : String(unread));
    element.classList.toggle("unread", unread > 0);
    if (isSelected) element.setAttribute("aria-current", "page");
    else element.removeAttribute("aria-current");
    element.setAttribute("aria-label", unread ? `${channel.name}, ${plural(unread, "new message")}` : channel.name);
  }
}

function personAvatar({ id, name }) {
  return el("span", "with-dot", avatar(id, name, "avatar-small"));
}

function updatePerson(item, { name, status, note }, isSelf) {
  const signature = JSON.stringify([name, status, note, isSelf]);
  if (item.signature === signature) return;
  item.signature = signature;
  const [picture, label] = item.children;
  picture.querySelector(".dot")?.remove();
  picture.append(statusDot(status));
  label.replaceChildren(name, ...(isSelf ? [el("em", "", "you")] : []), ...(note ? [el("em", "", note)] : []));
}
