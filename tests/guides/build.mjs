// Builds the pages of the recipes, as the build tools of React, Vue and Svelte do.
// node build.mjs DIRECTORY CLIENT ENTRY...: each ENTRY of DIRECTORY becomes DIRECTORY/built/ENTRY.js.
import { readFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

import { build } from "esbuild";
import { compile as compileSvelte } from "svelte/compiler";
import { compileScript, parse } from "vue/compiler-sfc";

const [directory, client, ...entries] = process.argv.slice(2);

const compilers = {
  svelte: (source) => compileSvelte(source, { generate: "client" }).js.code,
  vue: (source) => compileScript(parse(source).descriptor, { id: "recipe", inlineTemplate: true }).content,
};

const components = {
  name: "components",
  setup({ onLoad }) {
    onLoad({ filter: /\.(svelte|vue)$/ }, async ({ path }) => ({
      contents: compilers[path.split(".").at(-1)](await readFile(path, "utf8")),
      resolveDir: dirname(path),
    }));
  },
};

await build({
  absWorkingDir: directory,
  alias: { rowcast: client },
  bundle: true,
  conditions: ["browser"],
  define: { "process.env.NODE_ENV": '"production"' },
  entryPoints: entries.map((entry) => join(directory, entry)),
  format: "esm",
  jsx: "automatic",
  logLevel: "warning",
  nodePaths: [join(dirname(fileURLToPath(import.meta.url)), "node_modules")],
  outdir: join(directory, "built"),
  plugins: [components],
});
