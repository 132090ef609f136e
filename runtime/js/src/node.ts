/** What Node has beyond browsers: bundles and state in folders. */

import { randomUUID } from "node:crypto";
import { constants } from "node:fs";
import { mkdir, open, readdir, rename, rm } from "node:fs/promises";
import { dirname, join } from "node:path";

import type { ReadFile } from "./bundles.js";
import { BundleError } from "./errors.js";
import type { StateStorage } from "./storages.js";

/** Read the client's part from a party's folder, as `splitonnx cut` wrote it. */
export function openFolder(folder: string): ReadFile {
  return async (name, limit) => {
    const path = join(folder, name);
    try {
      return await readRegular(path, limit);
    } catch (error) {
      if (error instanceof BundleError) throw error;
      throw new BundleError(path, `it cannot be read: ${(error as Error).message}`);
    }
  };
}

/**
 * Read a file of at most `limit` bytes; opening it never waits for another process, and a device,
 * which may have no end, is not read.
 *
 * @throws BundleError: it is no regular file, or a larger one.
 */
async function readRegular(path: string, limit: number): Promise<Uint8Array> {
  // A FIFO would be waited for at once without O_NONBLOCK, which Windows has not.
  const file = await open(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0));
  try {
    const facts = await file.stat();
    if (!facts.isFile()) throw new BundleError(path, "it is no regular file; give one");
    if (facts.size > limit) {
      throw new BundleError(path, `it takes ${facts.size} bytes, over the limit of ${limit}`);
    }
    const content = new Uint8Array(facts.size);
    let end = 0;
    while (end < content.length) {
      const { bytesRead } = await file.read(content, end, Math.min(content.length - end, PIECE));
      if (!bytesRead) throw new BundleError(path, "it became shorter while it was read");
      end += bytesRead;
    }
    return content;
  } finally {
    await file.close();
  }
}

/** Keeps state in a folder, a file each; what is put survives a loss of power. */
export class FolderStorage implements StateStorage {
  readonly #folder: string;

  constructor(folder: string) {
    this.#folder = folder;
  }

  async get(name: string): Promise<Uint8Array | undefined> {
    try {
      return await readRegular(this.#locate(name), MAX_STATE);
    } catch (error) {
      if (isMissing(error)) return undefined;
      throw error;
    }
  }

  async put(name: string, content: Uint8Array): Promise<void> {
    const path = this.#locate(name);
    const fresh = `${path}.${randomUUID()}.new`;
    await mkdir(dirname(path), { recursive: true });
    try {
      const file = await open(fresh, "wx");
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
/** Bytes that are read at a time. */
const PIECE = 1 << 30;
/** Bytes of one state; the largest array that every version of Node has. */
const MAX_STATE = 2 ** 31 - 1;

function isMissing(error: unknown): boolean {
  return error instanceof Error && "code" in error && error.code === "ENOENT";
}
