// Drives the JavaScript client for a test: node driver.mjs URL TOKENS BUFFER. See tests/clients/drivers.py.
import { createInterface } from "node:readline";

import { Rowcast } from "../../clients/javascript/rowcast.js";

const [url, tokens, buffer] = process.argv.slice(2);
const waiting = JSON.parse(tokens);
const tell = (...values) => process.stdout.write(`${JSON.stringify(values)}\n`);

const rowcast = new Rowcast(url, {
  token: async ({ fresh }) => {
    tell("token", fresh);
    return waiting.length > 1 ? waiting.shift() : waiting[0];
  },
});
for (const name of ["status", "reset", "revoked"]) rowcast.on(name, (value) => tell(name, value.topic ?? value));
const collections = new Map();
const channels = new Map();
let open = () => {};
let gate = Promise.resolve();

async function loop(topic, filter) {
  try {
    for await (const change of rowcast.changes(topic, { buffer: Number(buffer), ...filter })) {
      tell("change", change.kind, change.record?.content ?? change.reason ?? null);
      await gate;
    }
    tell("ended", null);
  } catch (error) {
    tell("ended", error.code);
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const [name, topic, snapshot, more] = JSON.parse(line);
  if (name === "follow") {
    const collection = rowcast.collection(topic, { table: "messages", snapshot, ...more });
    collections.set(topic, collection);
    collection.subscribe(() => collection.ready && tell("ready"));
    loop(topic, more);
  }
  if (name === "channel") {
    const channel = rowcast.channel(topic, { presence: snapshot });
    channels.set(topic, channel);
    channel.on("signal", (signal) => tell("signal", signal.name, signal.data));
    channel.on("presence", (people) => tell("present", Object.keys(people).sort()));
  }
  if (name === "signal") channels.get(topic).signal(snapshot, more);
  if (name === "rows") tell("rows", collections.get(topic).rows.map((row) => row.content));
  if (name === "hold") gate = new Promise((resolve) => (open = resolve));
  if (name === "go") open();
}
rowcast.close();
process.exit(0); // a WebSocket that waits for the answer to its close frame would keep Node running
