/** What Node has beyond browsers: bundles and state in folders. */

import { mkdir, open, readFile, readdir, rename, rm } from "node:fs/promises";
import { dirname, join } from "node:path";

import type { ReadFile } from "./bundles.js";
import { BundleError } from "./errors.js";
import type { StateStorage } from "./storages.js";

/** Read the client's part from a party's folder, as `splitonnx cut` wrote it. */
export function openFolder(folder: string): ReadFile {
  return async (name) => {
    try {
      return await readFile(join(folder, name));
    } catch (error) {
      throw new BundleError(join(folder, name), `it cannot be read: ${(error as Error).message}`);
    }
  };
}

/** Keeps state in a folder, a file each; what is put survives a loss of power. */
export class FolderStorage implements StateStorage {
  readonly #folder: string;

  constructor(folder: string) {
    this.#folder = folder;
  }

  async get(name: string): Promise<Uint8Array | undefined> {
    try {
      return await readFile(this.#locate(name));
    } catch (error) {
      if (isMissing(error)) return undefined;
      throw error;
    }
  }

  async put(name: string, content: Uint8Array): Promise<void> {
    const path = this.#locate(name);
    const fresh = `${path}.${process.pid}.new`;
    await mkdir(dirname(path), { recursive: true });
    try {
      const file = await open(fresh, "w");
      try {
        await file.writeFile(content);
        await file.sync();
      } finally {
        await file.close();
      }
      await rename(fresh, path);
    } finally {
      await rm(fresh, { force: true });
    }
    const names = await open(dirname(path));
    await names.sync();
    await names.close();
  }

  async delete(name: string): Promise<void> {
    await rm(this.#locate(name), { force: true });
  }

  async list(prefix: string): Promise<readonly string[]> {
    const at = prefix.lastIndexOf("/") + 1;
    const names = await this.#walk(prefix.slice(0, at));
    return names.filter((name) => name.startsWith(prefix));
  }

  async #walk(under: string): Promise<string[]> {
    let entries;
    try {
      entries = await readdir(join(this.#folder, under), { withFileTypes: true });
    } catch (error) {
      if (isMissing(error)) return [];
      throw error;
    }
    const found = entries.map(async (entry) => {
      if (entry.isDirectory()) return this.#walk(`${under}${entry.name}/`);
      return entry.name.endsWith(SUFFIX) ? [under + entry.name.slice(0, -SUFFIX.length)] : [];
    });
    return (await Promise.all(found)).flat();
  }

  #locate(name: string): string {
    if (name.split("/").includes("..")) throw new BundleError(name, "it leads out of the folder");
    return join(this.#folder, `${name}${SUFFIX}`);
  }
}

const SUFFIX = ".safetensors";

function isMissing(error: unknown): boolean {
  return error instanceof Error && "code" in error && error.code === "ENOENT";
}
