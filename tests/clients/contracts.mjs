// Reads the contracts of a daemon and the frames that it has sent, and prints what is wrong with them.
import { readFileSync } from "node:fs";
import { Parser } from "@asyncapi/parser";
import { Ajv2020 } from "ajv/dist/2020.js";

const { asyncapi, schema, frames } = JSON.parse(readFileSync(0, "utf8"));

const parsed = await new Parser().parse(asyncapi);
const problems = parsed.diagnostics
  .filter(({ severity }) => severity <= 1)
  .map(({ message, path }) => `${path.join(".")}: ${message}`);

const ajv = new Ajv2020({ allErrors: true, strict: false, validateFormats: false });
const validate = ajv.compile(schema);
for (const frame of frames) {
  if (!validate(frame)) problems.push(`no frame: ${JSON.stringify(frame)}`);
}
console.log(JSON.stringify(problems));
process.exit(0);
