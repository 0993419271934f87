// Drives the JavaScript client for a test, in Node and in a browser. See tests/clients/drivers.py.

/**
 * Begins to connect. `tell` is called with what happens; what is returned does what a test says.
 */
export function drive(Rowcast, url, tokens, buffer, tell) {
  const rowcast = new Rowcast(url, {
    token: async ({ fresh }) => {
      tell("token", fresh);
      return tokens.length > 1 ? tokens.shift() : tokens[0];
    },
  });
  for (const name of ["status", "reset", "revoked"]) rowcast.on(name, (value) => tell(name, value.topic ?? value));
  const collections = new Map();
  const channels = new Map();
  let open = () => {};
  let gate = Promise.resolve();

  async function loop(topic, filter) {
    try {
      for await (const change of rowcast.changes(topic, { buffer, ...filter })) {
        tell("change", change.kind, change.record?.content ?? change.reason ?? null);
        await gate;
      }
      tell("ended", null);
    } catch (error) {
      tell("ended", error.code);
    }
  }

  function say([name, topic, snapshot, more]) {
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

  return { say, close: () => rowcast.close() };
}
