/** The chat at `/`: signs in, follows the user's channels, and draws what the store knows. */

import { Rowcast } from "../rowcast.js";
import { $, drawing, setText } from "../shared/dom.js";
import { avatar } from "../shared/people.js";
import { Composer } from "./composer.js";
import { Messages, aboutChannel } from "./messages.js";
import { Outbox } from "./outbox.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { Writes } from "./writes.js";

const SAMPLE_RETRY = 2000; // milliseconds until the sample users are asked for again
const PROBLEM_SHOWN = 6000; // milliseconds

const STATES = {
  idle: "Not connected", connecting: "Connecting", resuming: "Catching up", live: "Live", waiting: "Offline, reconnecting",
  paused: "Catching up", stopped: "Disconnected", closed: "Not connected",
};

/** One user's session on this page. `canWrite`: this daemon has sample users, who may write. */
class Session {
  #rowcast;
  #store;
  #outbox;
  #messages;
  #sidebar;
  #composer;
  #selected = sessionStorage.getItem("rowcast.channel");
  #reported = null; // id of the message that was last reported as read
  #problemTimer;
  #onRefused;
  #canWrite;
  draw = drawing(() => this.#draw());

  constructor(token, { canWrite, onRefused }) {
    this.#onRefused = onRefused;
    this.#canWrite = canWrite;
    const url = new URL("v1", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    this.#rowcast = new Rowcast(url.href, { token, numbers: "string" });
    this.#rowcast.on("status", () => this.#onStatus());
    this.#rowcast.on("stale", () => this.#onStatus());
    this.#rowcast.on("error", (error) => this.#onError(error));
    this.#store = new Store(this.#rowcast, this.draw);
    this.writes = new Writes(token);
    this.#outbox = new Outbox(this.writes, this.draw);
    this.#messages = new Messages(this.#store, this.#outbox, canWrite ? this.#actions() : null);
    this.#sidebar = new Sidebar((id) => this.#select(id));
    this.#composer = new Composer({
      send: (text) => this.#send(text),
      editLast: () => this.#messages.editLast(this.#channel),
      typing: () => this.#channel?.typing.send(),
    });
    $("compose").hidden = !canWrite;
    $("listen").hidden = canWrite;
    document.onvisibilitychange = this.draw;
    this.#onStatus();
  }

  close() {
    this.#rowcast.close();
    clearTimeout(this.#problemTimer);
    $("messages").replaceChildren();
  }

  get #channel() {
    return this.#store.channel(this.#selected);
  }

  #actions() {
    const attempt = (promise) => promise.catch((error) => this.#showProblem(error.message));
    return {
      react: (id, emoji) => attempt(this.writes.react(id, emoji)),
      edit: (id, content) => attempt(this.writes.edit(id, content)),
      delete: (id) => attempt(this.writes.delete(id)),
      reachedEnd: () => this.#reportRead(),
      redraw: this.draw,
    };
  }

  #select(id) {
    this.#selected = id;
    sessionStorage.setItem("rowcast.channel", id);
    this.#showProblem("");
    this.#draw();
    if (matchMedia("(pointer: fine)").matches && this.#canWrite) this.#composer.focus();
  }

  #send(text) {
    if (!this.#channel) return;
    this.#outbox.say(this.#channel.id, text);
    requestAnimationFrame(() => requestAnimationFrame(() => this.#messages.scrollToEnd()));
  }

  #draw() {
    const store = this.#store;
    this.#outbox.settle((channel, id) => store.channel(channel)?.message(id) !== undefined);
    const { channels } = store;
    if (!this.#channel && channels.length && store.isReady) this.#selected = channels[0].id;
    const channel = this.#channel;
    setText($("channel-name"), channel ? channel.name : store.isReady ? "No channel" : " ");
    $("channel-name").classList.toggle("channel-title", Boolean(channel));
    setText($("channel-about"), channel ? aboutChannel(channel) : this.#whyEmpty());
    const unread = this.#sidebar.draw(store, this.#selected);
    this.#messages.draw(channel);
    this.#composer.select(channel);
    this.#drawSelf();
    setText($("typing"), channel ? this.#whoIsTyping(channel) : "");
    setText($("statement"), channel ? exampleStatement(channel.id, store.user) : "");
    this.#reportRead();
    const title = channel ? `#${channel.name} – Rowcast` : "Rowcast";
    document.title = unread ? `(${unread}) ${title}` : title;
  }

  #whyEmpty() {
    if (this.#store.isMissing) return "This page shows ChatGenius, which this daemon does not serve.";
    return this.#store.isReady ? "You are in no channel." : "";
  }

  #whoIsTyping(channel) {
    const names = channel.typing.users.filter((user) => user !== this.#store.user).map((user) => this.#store.nameOf(user));
    if (names.length > 2) return "Several people are typing…";
    return names.length ? `${names.join(" and ")} ${names.length > 1 ? "are" : "is"} typing…` : "";
  }

  #drawSelf() {
    const { user } = this.#store;
    const name = user && this.#store.nameOf(user);
    if (!user || $("my-avatar").title === name) return;
    const picture = avatar(user, name);
    picture.id = "my-avatar";
    picture.title = name;
    $("my-avatar").replaceWith(picture);
    setText($("my-name"), name);
    $("my-name").hidden = !$("who-label").hidden;
  }

  /** What is in view of a visible page has been read. */
  #reportRead() {
    const channel = this.#channel;
    if (!this.#canWrite || document.hidden || !channel || !this.#messages.isAtEnd) return;
    const last = channel.unread(this.#store.user).at(-1);
    if (!last || last.id === this.#reported) return;
    this.#reported = last.id;
    this.writes.read(last.id).catch(() => (this.#reported = null));
  }

  #onStatus() {
    const { status, stale } = this.#rowcast;
    const text = status === "live" && stale ? "The database does not answer" : STATES[status];
    $("state").dataset.state = status === "live" && stale ? "stale" : status;
    setText($("state-text"), text);
    if (status === "live") this.#outbox.resume();
    this.draw();
  }

  #onError(error) {
    if (this.#rowcast.status !== "stopped") return; // one topic was refused: the store knows
    if (error.code === 4401) this.#onRefused("The token is invalid or has expired.");
    else this.#showProblem(`${error.message} Reload the page to connect again.`, Infinity);
  }

  #showProblem(text, shown = PROBLEM_SHOWN) {
    clearTimeout(this.#problemTimer);
    setText($("problem"), text);
    if (text && shown < Infinity) this.#problemTimer = setTimeout(() => setText($("problem"), ""), shown);
  }
}

const exampleStatement = (channel, user) => `insert into chatgenius.messages (channel_id, user_id, content)
values ('${channel}', '${user}', 'Hello from SQL');`;

/* Signing in */

let session = null;

function signIn(token, options) {
  session?.close();
  $("sign-in").hidden = true;
  $("chat").hidden = false;
  session = new Session(token, options);
}

/** The sample users with their tokens; null if this daemon has none. */
async function fetchSampleUsers() {
  const response = await fetch("demo.json", { cache: "no-store" });
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`demo.json: ${response.status}`);
  return (await response.json()).users;
}

/** Show the form for a token; `problem` says what was wrong with the last one. */
function askForToken(problem = "") {
  session?.close();
  session = null;
  $("chat").hidden = true;
  $("sign-in").hidden = false;
  setText($("sign-in-alert"), problem);
  $("token").focus();
}

/** Sign in as a sample user. The token is fetched anew when the server refuses it. */
function startDemo(users) {
  const picker = $("who");
  picker.replaceChildren(...users.map(({ id, name }) => new Option(name, id)));
  $("who-label").hidden = false;
  const last = sessionStorage.getItem("rowcast.user");
  if (users.some(({ id }) => id === last)) picker.value = last;
  const signInAsPicked = () => {
    const id = picker.value;
    sessionStorage.setItem("rowcast.user", id);
    const token = async ({ fresh }) => {
      if (fresh) users = await fetchSampleUsers() ?? [];
      return users.find((user) => user.id === id)?.token ?? null;
    };
    signIn(token, { canWrite: true, onRefused: askForToken });
  };
  picker.addEventListener("change", signInAsPicked);
  signInAsPicked();
}

async function start() {
  let users;
  try {
    users = await fetchSampleUsers();
  } catch {
    return setTimeout(start, SAMPLE_RETRY);
  }
  if (users?.length) startDemo(users);
  else askForToken();
}

$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  $("token").value = "";
  signIn(async ({ fresh }) => (fresh ? null : token), { canWrite: false, onRefused: askForToken });
});
start();
