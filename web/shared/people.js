/** How people are shown: initials on a colour of their own, and a dot for their status. */

import { el } from "./dom.js";

const HUES = 8; // classes hue-0 … hue-7 in base.css

export const initials = (name) => name.split(/\s+/).slice(0, 2).map((word) => [...word][0] ?? "").join("").toUpperCase();

const hueOf = (id) => [...id].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 9973, 7) % HUES;

const STATUS = { online: "online", away: "away", busy: "busy", dnd: "do not disturb", offline: "offline" };

export function statusDot(status = "offline") {
  const dot = el("i", `dot ${status}`, el("span", "visually-hidden", STATUS[status] ?? status));
  dot.title = STATUS[status] ?? status;
  return dot;
}

export function avatar(id, name, className = "") {
  const element = el("span", `avatar hue-${hueOf(id)} ${className}`, initials(name));
  element.setAttribute("aria-hidden", "true");
  return element;
}
