// Builds the page into dist/: everything that it needs, so that one server serves all of it.
//
//     node build.mjs [DIST]
//
// Its tools and ONNX Runtime are those of ../../runtime/js, which `npm ci` puts there.

import { copyFile, mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { gzip } from "node:zlib";

const here = dirname(fileURLToPath(import.meta.url));
const js = join(here, "../../runtime/js");
const require = createRequire(join(js, "package.json"));
const { build } = require("esbuild");

const dist = process.argv[2] ?? join(here, "dist");
const wasm = "ort-wasm-simd-threaded.wasm";
const packed = ["page.js", "worker.js", "page.css", "index.html", "digits.bin", wasm];

await rm(dist, { recursive: true, force: true });
await mkdir(dist, { recursive: true });
await build({
  entryPoints: [join(here, "src/page.ts"), join(here, "src/worker.ts")],
  outdir: dist,
  bundle: true,
  format: "esm",
  target: "es2022",
  minify: true,
  alias: { "@splitonnx/client": join(js, "src/index.ts") },
  nodePaths: [join(js, "node_modules")],
  logLevel: "warning",
});
for (const name of ["index.html", "page.css", "icon.svg", "digits.bin"]) {
  await copyFile(join(here, name), join(dist, name));
}
await copyFile(join(js, "node_modules/onnxruntime-web/dist", wasm), join(dist, wasm));
for (const name of packed) {
  const content = await promisify(gzip)(await readFile(join(dist, name)), { level: 9 });
  await writeFile(join(dist, `${name}.gz`), content);
}
