/** Bundles and state in folders, in Node alone: no module but the entry `node` imports it. */

import { randomUUID } from "node:crypto";
import { constants } from "node:fs";
import { link, mkdir, open, readFile, readdir, rename, rm, writeFile } from "node:fs/promises";
import { hostname } from "node:os";
import { dirname, join } from "node:path";

import type { ReadFile } from "../bundles.js";
import { BundleError } from "../errors.js";
import type { StateStorage, StorageLock } from "./storages.js";

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
 * @throws BundleError: it is not a regular file, or a larger one.
 */
async function readRegular(path: string, limit: number): Promise<Uint8Array> {
  // A FIFO would be waited for at once without O_NONBLOCK, which Windows has not.
  const file = await open(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0));
  try {
    const facts = await file.stat();
    if (!facts.isFile()) throw new BundleError(path, "it is not a regular file; pass one");
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

  /**
   * A file that names the process; that of a process which ended is taken over.
   *
   * Node has no locks of the system's.  Processes of other machines cannot be looked at, and count
   * as alive.
   */
  async lock(
    name: string,
    { takeOver }: { takeOver: boolean },
  ): Promise<StorageLock | undefined> {
    const path = join(this.#folder, name);
    const own = { id: randomUUID(), host: hostname(), pid: process.pid, started: "" };
    own.started = await findStart(own.pid);
    await mkdir(dirname(path), { recursive: true });
    const fresh = `${path}.${own.id}`;
    await writeFile(fresh, JSON.stringify(own), { flag: "wx" });
    const isHeld = async () => (await readHolder(path))?.id === own.id;
    try {
      if (takeOver) await rename(fresh, path);
      while (!(await isHeld())) {
        if (takeOver) return undefined; // somebody else did as well, and later
        try {
          await link(fresh, path); // it fails where there is one
        } catch (error) {
          if (!hasCode(error, "EEXIST")) throw error;
          if (!(await removeStale(path, own.id))) return undefined;
        }
      }
    } finally {
      await rm(fresh, { force: true });
    }
    const release = async () => {
      if (await isHeld()) await rm(path, { force: true });
    };
    return { isHeld, release };
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
  return hasCode(error, "ENOENT");
}

function hasCode(error: unknown, code: string): boolean {
  return error instanceof Error && "code" in error && error.code === code;
}

interface Holder {
  readonly id: string;
  readonly host: string;
  readonly pid: number;
  /** When the process began, where that is known: numbers of processes are used again. */
  readonly started: string;
}

const MAX_HOLDER = 1024; // bytes

async function readHolder(path: string): Promise<Holder | undefined> {
  try {
    const text = new TextDecoder().decode(await readRegular(path, MAX_HOLDER));
    return JSON.parse(text) as Holder;
  } catch (error) {
    if (isMissing(error) || error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** Remove a lock if its process has ended; return whether it is free now. */
async function removeStale(path: string, own: string): Promise<boolean> {
  const holder = await readHolder(path);
  if (holder && (await isAlive(holder))) return false;
  const aside = `${path}.${own}.stale`;
  try {
    await rename(path, aside);
    const moved = await readHolder(aside);
    // Another client may have put its own there meanwhile: that goes back.
    if (moved?.id !== holder?.id) await link(aside, path);
  } catch (error) {
    if (!isMissing(error) && !hasCode(error, "EEXIST")) throw error;
  } finally {
    await rm(aside, { force: true });
  }
  return true;
}

async function isAlive({ host, pid, started }: Holder): Promise<boolean> {
  if (host !== hostname()) return true;
  try {
    process.kill(pid, 0); // nothing is sent
  } catch (error) {
    if (hasCode(error, "ESRCH")) return false;
  }
  const now = await findStart(pid);
  return !now || !started || now === started;
}

/** Find when a process began, in ticks since the machine did; on Linux alone. */
async function findStart(pid: number): Promise<string> {
  try {
    const facts = await readFile(`/proc/${pid}/stat`, "utf-8");
    return facts.slice(facts.lastIndexOf(")")).split(" ")[20] ?? "";
  } catch {
    return "";
  }
}
