// A client with the types of a daemon, which tests/clients/test_contracts.py puts into rowcast-types.ts, and what these
// must refuse.
import { Rowcast, type Change } from "../../clients/javascript/rowcast.js";
import { SCHEMA, type Messages, type Tables, type Topic } from "./rowcast-types.js";
import type { RowChange } from "./frames.js";

const rowcast = new Rowcast<Tables, Topic>("wss://rowcast.example.com/v1", { token: "a token" });
rowcast.on("welcome", ({ schema }) => schema === SCHEMA);

const channel = "01JH0000000000000000000000";
const messages = rowcast.collection(`channel:${channel}`, { table: "messages", order: (a, b) => a.id.localeCompare(b.id) });
messages.rows satisfies readonly Messages[];
messages.get({ id: "1" })?.content satisfies string | undefined;

async function loop(): Promise<void> {
  for await (const change of rowcast.changes(`channel:${channel}`)) {
    if (change.kind === "reset") continue;
    if (change.table === "files") change.record?.size satisfies number | undefined;
    if (change.table === "messages") change.record satisfies Messages | undefined;
  }
}

// @ts-expect-error: there is no such topic
rowcast.changes("chanel:1");
// @ts-expect-error: there is no such table
rowcast.collection("users", { table: "user" });
// @ts-expect-error: there is no such column
messages.rows[0]?.contents;
// @ts-expect-error: null is possible
messages.rows[0]!.metadata.colour;

// A change has the members that the protocol says, and no other.
type Same<A, B> = [A] extends [B] ? ([B] extends [A] ? true : false) : false;
true satisfies Same<keyof RowChange, keyof Change>;
({}) as RowChange satisfies Change;

void loop();
