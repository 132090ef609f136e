// Prints how large the package is without ONNX Runtime, and fails where it is too large.

import { gzipSync } from "node:zlib";
import { build } from "esbuild";

// Bytes, minified and gzipped; sharing weights took 0.9 kB, micro-batches 2 kB, decoding 0.1 kB, and
// pipelining 2.6 kB (a client's core without input and output, schedules, and states in chains),
// recomputation 0.3 kB.
const LIMIT = 37_200;

const { outputFiles } = await build({
  entryPoints: ["src/index.ts"],
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  external: ["onnxruntime-common"],
  write: false,
});
const content = outputFiles[0].contents;
const size = gzipSync(content, { level: 9 }).length;
console.log(`@splitonnx/client: ${content.length} bytes minified, ${size} gzipped, of ${LIMIT}`);
process.exitCode = size > LIMIT ? 1 : 0;
