import { Rowcast } from "rowcast";

const { SERVER, TOKEN } = process.env;
const rowcast = new Rowcast(`ws://${SERVER}/v1`, { token: TOKEN });
rowcast.on("status", (status) => console.log("status", status));
for await (const { kind, key, reason } of rowcast.changes("orders:ada")) {
  console.log(kind, key?.id ?? reason);
}
