/** The package as apps import it: built, by its name, without anything of ONNX Runtime in it. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";

import * as source from "../src/index.js";
import { ROOT } from "./fixtures.js";

const HERE = join(ROOT, "runtime/js");
/** Not a literal, so that the compiler takes no types from what is only built. */
const NAME: string = "@splitonnx/client";

test("the built package has all names, in both entries", async () => {
  const built = (await import(NAME)) as object;
  assert.deepEqual(Object.keys(built).sort(), Object.keys(source).sort());
  const node = (await import(`${NAME}/node`)) as object;
  assert.deepEqual(Object.keys(node).sort(), ["FolderStorage", "openFolder"]);
});

test("nothing is imported but the package's own files, and Node's in the entry for Node", () => {
  for (const name of readdirSync(join(HERE, "dist")).filter((file) => file.endsWith(".js"))) {
    const text = readFileSync(join(HERE, "dist", name), "utf-8");
    for (const [, from] of text.matchAll(/\bfrom "([^"]+)"/g)) {
      assert.match(from!, name === "node.js" ? /^(\.\/|node:)/ : /^\.\//, `${name}: ${from}`);
    }
  }
});

test("what is published is what is built, its types and the README", () => {
  const listed = execFileSync("npm", ["pack", "--dry-run", "--json"], { cwd: HERE });
  const [{ files }] = JSON.parse(listed.toString()) as [{ files: { path: string }[] }];
  const others = files.map(({ path }) => path).filter((path) => !path.startsWith("dist/"));
  assert.deepEqual(others.sort(), ["README.md", "package.json"]);
  assert.ok(files.some(({ path }) => path === "dist/index.d.ts"));
});
