// Runs the cases of clients/behaviour with the JavaScript engine: node behaviour.mjs FILE...
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

import { Collection, Engine } from "../../clients/javascript/rowcast.js";

class Case {
  now = 1_000_000;
  out = [];
  events = [];
  collections = {};
  got = {};

  constructor(numbers) {
    const outputs = {
      open: ({ fresh }) => this.out.push({ open: { fresh } }),
      send: (frame) => this.out.push(frame),
      close: () => this.out.push("close"),
      emit: (name, value) => this.events.push([name, name === "error" ? value.code : value]),
    };
    this.engine = new Engine(outputs, { numbers, now: () => this.now, random: () => 0.5 });
  }

  run(step) {
    const [[name, value]] = Object.entries(step);
    switch (name) {
      case "follow": return this.follow(...value);
      case "unfollow": return this.engine.unfollow(value, this.collections[value]);
      case "opened": this.engine.dialing(); return this.engine.opened("t");
      case "in": return this.engine.receive(value);
      case "closed": return this.engine.closed(...value);
      case "advance": return this.advance(value * 1000);
      case "sleep": this.now += value * 1000; return this.engine.tick();
      case "out": return assert.deepEqual(this.out.splice(0), value);
      case "events": {
        const told = this.events.splice(0).filter(([event]) => event !== "status" && event !== "welcome");
        return assert.deepEqual(told, value);
      }
      case "is": return Object.entries(value).forEach(([what, wanted]) => this.check(what, wanted));
      default: return this.engine[name]();
    }
  }

  follow(topic, snapshot, filter) {
    const collection = (this.collections[topic] = new Collection("rows"));
    const got = (this.got[topic] = []);
    const receive = collection.receive.bind(collection);
    collection.receive = (changes) => {
      got.push(...changes.map((change) => change.seq ?? change.reason));
      receive(changes);
    };
    this.engine.follow(topic, collection, snapshot, filter);
  }

  advance(time) {
    const end = this.now + time;
    while (this.engine.deadline <= end) {
      this.now = Math.max(this.now, this.engine.deadline);
      this.engine.tick();
    }
    this.now = end;
  }

  check(what, wanted) {
    if (["position", "status", "stale"].includes(what)) {
      const found = this.engine[what];
      return assert.deepEqual(what === "position" ? String(found) : found, wanted);
    }
    for (const [topic, expected] of Object.entries(wanted)) {
      const found = what === "got" ? this.got[topic].splice(0) : this.collections[topic][what];
      assert.deepEqual(found, expected, `${what} of ${topic}`);
    }
  }
}

for (const file of process.argv.slice(2)) {
  for (const { name, numbers, steps } of JSON.parse(await readFile(file, "utf8"))) {
    test(name, () => {
      const run = new Case(numbers);
      steps.forEach((step, number) => {
        try {
          run.run(step);
        } catch (error) {
          error.message = `step ${number + 1}, ${JSON.stringify(step)}: ${error.message}`;
          throw error;
        }
      });
    });
  }
}
