// The driver in Node: node driver.mjs URL BUFFER. It reads what a test says from stdin, and writes to stdout. It says
// that it has started, since tokens may be short-lived, and reads them first.
import { createInterface } from "node:readline";

import { Rowcast } from "../../clients/javascript/rowcast.js";
import { drive } from "./driver.js";

const [url, buffer] = process.argv.slice(2);
const tell = (...values) => process.stdout.write(`${JSON.stringify(values)}\n`);
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
tell("started");
const tokens = JSON.parse((await lines.next()).value);
const driver = drive(Rowcast, url, tokens, Number(buffer), tell);
for await (const line of lines) driver.say(JSON.parse(line));
driver.close();
process.exit(0); // a WebSocket that waits for the answer to its close frame would keep Node running
