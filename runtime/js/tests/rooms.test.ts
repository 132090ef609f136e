/** The folders: which may import which, and that their modules have the names of their twins. */

import assert from "node:assert/strict";
import { existsSync, readFileSync, readdirSync } from "node:fs";
import { join, relative } from "node:path";
import { test } from "node:test";

import { ROOT } from "./fixtures.js";

const SOURCE = join(ROOT, "runtime/js/src");
const MODULES = readdirSync(SOURCE, { recursive: true, encoding: "utf-8" })
  .filter((name) => name.endsWith(".ts"))
  .map((name) => name.replace(/\\/g, "/").slice(0, -".ts".length));

/** What each folder may import, beside itself and the values that all of them share. */
const USES: Readonly<Record<string, readonly string[]>> = {
  gate: [],
  wire: [],
  storage: [],
  engine: ["gate", "wire"],
  channels: ["wire"],
  client: ["channels", "engine", "storage", "wire"],
};
const ENTRIES = ["index", "node"];

/** Modules that Python has from elsewhere, in another module, or has no need of. */
const WITHOUT_TWIN: Readonly<Record<string, string>> = {
  "client/shuffles": "numpy",
  decoders: "msgspec",
  hashes: "hashlib",
  "storage/folders": "files are Python's only storage",
  "storage/storages": "files are Python's only storage",
};

/** Find the folder of a module; what lies beside the folders is nobody's, "". */
function findRoom(module: string): string {
  return module.includes("/") ? module.slice(0, module.indexOf("/")) : "";
}

function listImports(module: string): string[] {
  const text = readFileSync(join(SOURCE, `${module}.ts`), "utf-8");
  return [...text.matchAll(/\bfrom "(\.[^"]+)\.js"/g)].map(([, path]) =>
    relative(SOURCE, join(SOURCE, module, "..", path!)).replace(/\\/g, "/"),
  );
}

test("each folder imports itself, the shared values, and the folders that it may use", () => {
  const broken = MODULES.filter((module) => !ENTRIES.includes(module)).flatMap((module) => {
    const room = findRoom(module);
    const allowed = ["", room, ...(USES[room] ?? [])];
    const others = listImports(module).filter((path) => {
      return ENTRIES.includes(path) || !allowed.includes(findRoom(path));
    });
    return others.map((path) => `${module} imports ${path}`);
  });
  assert.deepEqual(broken, []);
});

test("the folders are those of the runtime in Python", () => {
  const rooms = new Set(MODULES.map(findRoom).filter((room) => room));
  assert.deepEqual([...rooms].sort(), Object.keys(USES).sort());
  for (const room of rooms) assert.ok(existsSync(join(ROOT, "runtime", room, "__init__.py")), room);
});

test("each module has its twin in Python, by the same path", () => {
  const alone = MODULES.filter((module) => {
    const path = join(ROOT, findRoom(module) ? "runtime" : "splitonnx", module);
    return !existsSync(`${path}.py`) && !existsSync(join(path, "__init__.py"));
  });
  assert.deepEqual(alone.sort(), [...ENTRIES, ...Object.keys(WITHOUT_TWIN)].sort());
});
