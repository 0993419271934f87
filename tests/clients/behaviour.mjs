// The cases in Node: node behaviour.mjs FILE...
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

import * as client from "../../clients/javascript/rowcast.js";
import { runCase } from "./cases.js";

for (const file of process.argv.slice(2)) {
  for (const one of JSON.parse(await readFile(file, "utf8"))) {
    test(one.name, () => runCase(client, one, assert.deepEqual));
  }
}
