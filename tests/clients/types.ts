// What an application may write, and what the types must refuse. tests/clients/test_packages.py checks it with tsc.
import { Rowcast, TopicEnded } from "../../clients/javascript/rowcast.js";

interface Message {
  id: string;
  content: string;
}

const stop = new AbortController();
const rowcast = new Rowcast("wss://rowcast.example.com/v1", {
  token: async ({ fresh }) => (fresh ? null : "a token"),
  numbers: "string",
  signal: stop.signal,
});
const messages = rowcast.collection<Message>("channel:42", { table: "messages", snapshot: { limit: 50 } });
const unsubscribe: () => void = messages.subscribe(() => messages.rows.map((row) => row.content.length));
rowcast.on("reset", ({ topic, reason }) => topic + reason);
rowcast.on("status", (status) => status === "live");

rowcast.collection("channel:42", {
  table: "messages",
  where: { messages: { content: { like: "%a%", ne: "b" }, or: [{ id: { in: ["1"] } }, { not: { id: { is_null: true } } }] } },
  columns: { messages: ["id"] },
});
rowcast.changes("channel:43", { where: { messages: { id: { gt: 1 } } } });
const channel = rowcast.channel("channel:42", { presence: { mood: "good" } });
channel.on("signal", ({ name, user }) => name + user);
channel.on("presence", (people) => people["ada"]?.map(({ device, since }) => device + since));
channel.signal("typing") satisfies boolean;
channel.show(null);
rowcast.ack();

async function loop(): Promise<void> {
  try {
    for await (const change of rowcast.changes<Message>("channel:42", { signal: stop.signal })) {
      if (change.kind === "reset") change.reason satisfies string;
      else change.record?.content satisfies string | undefined;
    }
  } catch (error) {
    if (error instanceof TopicEnded) error.code satisfies string;
  }
}

// @ts-expect-error: rows cannot be changed
messages.rows.push({ id: "1", content: "" });
// @ts-expect-error: there is no such event
rowcast.on("resets", () => {});
// @ts-expect-error: a collection is of one table
rowcast.collection("channel:42", {});
// @ts-expect-error: there is no such operator
rowcast.changes("channel:43", { where: { messages: { id: { regex: "1" } } } });
// @ts-expect-error: nobody but the server says who is present
channel.presence = {};
// @ts-expect-error: a token is required
new Rowcast("wss://rowcast.example.com/v1", {});

unsubscribe();
void loop();
