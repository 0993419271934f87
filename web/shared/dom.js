/** Elements, text and drawing: what both pages share. */

export const $ = (/** @type {string} */ id) => document.getElementById(id);

/** An element. Children that are strings become text, never markup. */
export function el(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** A button that does not submit a form. */
export function button(className, label, onClick, ...children) {
  const element = el("button", className, ...(children.length ? children : [label]));
  element.type = "button";
  if (children.length) element.setAttribute("aria-label", label);
  element.addEventListener("click", onClick);
  return element;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Make the children of `list` match `items`, in their order. Children whose key is still there are reused. */
export function syncChildren(list, items, key, create, update) {
  const unused = new Map([...list.children].map((child) => [child.dataset.key, child]));
  let cursor = list.firstElementChild;
  for (const item of items) {
    const child = unused.get(key(item)) ?? create(item);
    child.dataset.key = key(item);
    unused.delete(key(item));
    if (child === cursor) cursor = cursor.nextElementSibling;
    else list.insertBefore(child, cursor);
    update(child, item);
  }
  for (const child of unused.values()) child.remove();
}

/** A function that draws at the next animation frame, once, however often it is called. A hidden page draws nothing. */
export function drawing(draw) {
  let isDue = false;
  return () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      draw();
    });
  };
}

export const isAtEnd = (pane) => pane.scrollHeight - pane.scrollTop - pane.clientHeight < 48;

/** Change a pane. If it was scrolled to its end it stays there, otherwise it stays where it is. */
export function keepScroll(pane, change) {
  const stay = isAtEnd(pane);
  change();
  if (stay) pane.scrollTop = pane.scrollHeight;
}

export const plural = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

export const short = (id) => (id.length > 14 ? `…${id.slice(-8)}` : id);

export const prefersReducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
