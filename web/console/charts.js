/** Small charts in SVG: a value, what it was in the last minutes, and its scale. */

import { el, setText } from "../shared/dom.js";

const WIDTH = 180;
const HEIGHT = 46;
const MAX_GAP = 12; // seconds
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The next 1, 2 or 5 times a power of ten. */
export function niceMaximum(value, least) {
  const wanted = Math.max(value, least);
  const power = 10 ** Math.floor(Math.log10(wanted));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= wanted * 0.999);
}

/** A tile with a chart. `draw` gets values, oldest first; null leaves a gap. */
export class Tile {
  #value = el("strong", "value number");
  #note = el("span", "tile-note muted");
  #scale = el("span", "scale number");
  #area = svg("path", { class: "area" });
  #line = svg("path", { class: "line" });
  #peak = svg("path", { class: "peak" });
  #chart;
  #name;
  #least;
  #format;

  /** @param {{ name: string, least: number, format: (value: number) => string }} options `least` is the smallest scale */
  constructor(parent, { name, least, format }) {
    this.#name = name;
    this.#least = least;
    this.#format = format;
    this.#chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      svg("path", { class: "base", d: `M0 ${HEIGHT - 0.5}H${WIDTH}` }), this.#area, this.#peak, this.#line);
    this.element = el("div", "card tile", el("h2", "label", name),
      el("p", "", this.#value, " ", this.#note), el("div", "chart", this.#chart, this.#scale));
    parent.append(this.element);
  }

  /**
   * @param {{ value: string, note: string, level: "good" | "warn" | "bad", series: (number | null)[],
   *   peaks?: (number | null)[] }} shown
   */
  draw({ value, note, level, series, peaks = [] }) {
    setText(this.#value, value);
    setText(this.#note, note);
    this.element.dataset.level = level;
    const known = [...series, ...peaks].filter((each) => each !== null);
    const highest = known.length ? Math.max(...known) : 0;
    const top = niceMaximum(highest, this.#least);
    setText(this.#scale, this.#format(top));
    const line = path(series, top);
    this.#line.setAttribute("d", line);
    this.#area.setAttribute("d", areaUnder(series, top));
    this.#peak.setAttribute("d", path(peaks, top));
    this.#chart.setAttribute("aria-label", `${this.#name}: ${value}; at most ${this.#format(highest)} in the last three minutes`);
  }
}

const x = (index, length) => (WIDTH * index) / (length - 1);
const y = (value, top) => HEIGHT - 1 - (HEIGHT - 3) * Math.min(1, value / top);

/** The known values with their places, in runs: a gap of a few seconds only means that nothing was measured. */
function runs(series) {
  const found = [];
  let last = -Infinity;
  for (const [index, value] of series.entries()) {
    if (value === null) continue;
    if (index - last > MAX_GAP) found.push([]);
    found.at(-1).push([index, value]);
    last = index;
  }
  return found;
}

function points(run, length, top) {
  return run.map(([index, value]) => `${x(index, length).toFixed(1)} ${y(value, top).toFixed(1)}`);
}

function path(series, top) {
  return runs(series).map((run) => {
    const at = points(run, series.length, top);
    return `M${at.join("L")}${at.length === 1 ? "h.8" : ""}`;
  }).join("");
}

function areaUnder(series, top) {
  return runs(series).filter((run) => run.length > 1).map((run) => {
    const [first, last] = [run[0][0], run.at(-1)[0]].map((index) => x(index, series.length).toFixed(1));
    return `M${first} ${HEIGHT}L${points(run, series.length, top).join("L")}L${last} ${HEIGHT}Z`;
  }).join("");
}
