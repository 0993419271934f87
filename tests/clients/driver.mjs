// The driver in Node: node driver.mjs URL TOKENS BUFFER. It reads what a test says from stdin, and writes to stdout.
import { createInterface } from "node:readline";

import { Rowcast } from "../../clients/javascript/rowcast.js";
import { drive } from "./driver.js";

const [url, tokens, buffer] = process.argv.slice(2);
const tell = (...values) => process.stdout.write(`${JSON.stringify(values)}\n`);
const driver = drive(Rowcast, url, JSON.parse(tokens), Number(buffer), tell);
for await (const line of createInterface({ input: process.stdin })) driver.say(JSON.parse(line));
driver.close();
process.exit(0); // a WebSocket that waits for the answer to its close frame would keep Node running
