// Runs the cases of clients/behaviour with the JavaScript engine, in Node and in a browser.

/** Throws if the client does not behave as a case says. `equal` throws if its arguments differ. */
export function runCase(client, { name, steps, ...options }, equal) {
  const run = new Case(client, equal, options);
  steps.forEach((step, number) => {
    try {
      run.run(step);
    } catch (error) {
      error.message = `${name}, step ${number + 1}, ${JSON.stringify(step)}: ${error.message}`;
      throw error;
    }
  });
}

class Case {
  now = 1_000_000;
  out = [];
  events = [];
  collections = {};
  channels = {};
  signals = {};
  got = {};

  constructor(client, equal, { numbers, device, stored }) {
    this.client = client;
    this.equal = equal;
    const outputs = {
      open: ({ fresh }) => this.out.push({ open: { fresh } }),
      renew: () => this.out.push("renew"),
      send: (frame) => this.out.push(frame),
      close: () => this.out.push("close"),
      emit: (name, value) => this.events.push([name, name === "error" ? value.code : value]),
    };
    this.engine = new client.Engine(outputs, { numbers, device, stored, now: () => this.now, random: () => 0.5 });
  }

  run(step) {
    const [[name, value]] = Object.entries(step);
    switch (name) {
      case "follow": return this.follow(...value);
      case "channel": return this.channel(...value);
      case "signal": return this.channels[value[0]].signal(...value.slice(1));
      case "show": return this.channels[value[0]].show(value[1]);
      case "unfollow": return this.engine.unfollow(value, this.collections[value]);
      case "opened": this.engine.dialing(); return this.engine.opened("t");
      case "renew": return this.engine.renew(value);
      case "in": return this.engine.receive(value);
      case "closed": return this.engine.closed(...value);
      case "advance": return this.advance(value * 1000);
      case "sleep": this.now += value * 1000; return this.engine.tick();
      case "out": return this.equal(this.out.splice(0), value);
      case "events": {
        const told = this.events.splice(0).filter(([event]) => event !== "status" && event !== "welcome");
        return this.equal(told, value);
      }
      case "is": return Object.entries(value).forEach(([what, wanted]) => this.check(what, wanted));
      default: return this.engine[name]();
    }
  }

  follow(topic, snapshot, filter) {
    const collection = (this.collections[topic] = new this.client.Collection("rows"));
    const got = (this.got[topic] = []);
    const receive = collection.receive.bind(collection);
    collection.receive = (changes) => {
      got.push(...changes.map((change) => change.seq ?? change.reason));
      receive(changes);
    };
    this.engine.follow(topic, collection, snapshot, filter);
  }

  channel(topic, shown = null) {
    const channel = (this.channels[topic] = new this.client.Channel(shown, {
      signal: (name, data) => this.engine.signal(topic, name, data),
      show: () => this.engine.present(topic, channel),
    }));
    this.signals[topic] = [];
    channel.on("signal", (signal) => this.signals[topic].push(signal));
    this.engine.follow(topic, channel);
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
      return this.equal(what === "position" ? String(found) : found, wanted);
    }
    for (const [topic, expected] of Object.entries(wanted)) {
      const found = { got: () => this.got[topic].splice(0), signals: () => this.signals[topic].splice(0),
        presence: () => this.channels[topic].presence }[what]?.() ?? this.collections[topic][what];
      this.equal(found, expected, `${what} of ${topic}`);
    }
  }
}
