// The relay that people build with Node: `pg` LISTENs, and `ws` sends each payload to the sockets that follow its topic.

import pg from "pg";
import { WebSocketServer } from "ws";

const followers = new Map(); // the sockets of each topic

const database = new pg.Client({ connectionString: process.env.DATABASE_URL });
database.on("notification", ({ payload }) => {
  const topic = `channel:${JSON.parse(payload).channel_id}`;
  for (const socket of followers.get(topic) ?? []) socket.send(payload);
});
await database.connect();
await database.query("listen relay");

const server = new WebSocketServer({ host: "127.0.0.1", port: Number(process.env.PORT) });
server.on("connection", (socket) => {
  const topics = new Set();
  socket.on("message", (message) => {
    const { topic } = JSON.parse(message);
    topics.add(topic);
    if (!followers.has(topic)) followers.set(topic, new Set());
    followers.get(topic).add(socket);
    socket.send(JSON.stringify({ op: "subscribed", topic }));
  });
  socket.on("close", () => {
    for (const topic of topics) {
      const sockets = followers.get(topic);
      sockets.delete(socket);
      if (sockets.size === 0) followers.delete(topic);
    }
  });
});
