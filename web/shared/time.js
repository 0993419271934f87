/** Times: as Postgres writes them, and as people read them. */

/** The milliseconds of a time as Postgres writes it: in any year, before Christ too, or infinite. */
export function parseTime(text = "") {
  const [, digits, rest, beforeChrist] = /^(\d{4,})(-.*?)( BC)?$/.exec(text) ?? [];
  if (!digits) return text.startsWith("-") ? -Infinity : Infinity;
  const year = beforeChrist ? 1 - Number(digits) : Number(digits);
  const time = Date.parse(`${year < 0 ? "-" : "+"}${String(Math.abs(year)).padStart(6, "0")}${rest}`);
  return Number.isNaN(time) ? Infinity : time; // past the last year of JavaScript
}

const clockFormat = new Intl.DateTimeFormat(undefined, { timeStyle: "short" });
const dayFormat = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });
const yearFormat = new Intl.DateTimeFormat(undefined, { dateStyle: "long" });

export const clockTime = (time) => clockFormat.format(time);

/** The day of a time: "Today", "Yesterday", or its date. */
export function dayOf(time, now = new Date()) {
  const day = new Date(time);
  const days = Math.round((new Date(now).setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / 86400000);
  if (days === 0) return "Today";
  if (days === 1) return "Yesterday";
  return (day.getFullYear() === now.getFullYear() ? dayFormat : yearFormat).format(day);
}

/** A duration in seconds, in its largest unit: "8 s", "3 min", "2 h", "5 d". */
export function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}
