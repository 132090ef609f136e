/**
 * Files on a phone, by react-native-fs: the client's part as the app ships it, and its state.
 *
 * The library passes bytes as base64, so both ways cost a copy.
 */

import type { StateStorage } from "@splitonnx/client";
import * as fs from "@dr.pogodin/react-native-fs";
import { Platform } from "react-native";

// Hermes has them; the declarations of React Native do not.
declare function atob(text: string): string;
declare function btoa(bytes: string): string;

/** The folder within the app that `splitonnx export` wrote: Android's assets, iOS's resources. */
const SHIPPED = "client";
const CHUNK = 1 << 15; // characters that a call accepts as arguments

/** Read one file of the client's part out of the app; `SplitClient` asks for them by name. */
export async function readShipped(name: string): Promise<Uint8Array> {
  if (Platform.OS === "android") {
    return fromBase64(await fs.readFileAssets(`${SHIPPED}/${name}`, "base64"));
  }
  return fromBase64(await fs.readFile(`${fs.MainBundlePath}/${SHIPPED}/${name}`, "base64"));
}

/**
 * Keeps state in the app's documents, each name in a file of its own.
 *
 * A file is written beside its place and moved there.  Where the app ends between the two moves,
 * the newer file is found under its second name and moved on.
 */
export class FileStorage implements StateStorage {
  readonly #folder: string;

  constructor(folder = `${fs.DocumentDirectoryPath}/splitonnx`) {
    this.#folder = folder;
  }

  async get(name: string): Promise<Uint8Array | undefined> {
    const path = this.#locate(name);
    await this.#renameWhole(path);
    return (await fs.exists(path)) ? fromBase64(await fs.readFile(path, "base64")) : undefined;
  }

  async put(name: string, content: Uint8Array): Promise<void> {
    const path = this.#locate(name);
    await fs.mkdir(this.#folder);
    await this.#renameWhole(path);
    await fs.writeFile(`${path}.part`, toBase64(content), "base64");
    await fs.moveFile(`${path}.part`, `${path}.next`); // whole from here on
    await this.#renameWhole(path);
  }

  async delete(name: string): Promise<void> {
    const path = this.#locate(name);
    await this.#renameWhole(path);
    if (await fs.exists(path)) await fs.unlink(path);
  }

  async list(prefix: string): Promise<readonly string[]> {
    if (!(await fs.exists(this.#folder))) return [];
    const files = (await fs.readdir(this.#folder)).filter((file) => !file.endsWith(".part"));
    const names = files.map((file) => decodeURIComponent(file.replace(/\.next$/, "")));
    return [...new Set(names)].filter((name) => name.startsWith(prefix));
  }

  /** Rename a file that was written completely; not every system can replace another file so. */
  async #renameWhole(path: string): Promise<void> {
    if (!(await fs.exists(`${path}.next`))) return;
    if (await fs.exists(path)) await fs.unlink(path);
    await fs.moveFile(`${path}.next`, path);
  }

  #locate(name: string): string {
    return `${this.#folder}/${encodeURIComponent(name)}`;
  }
}

function fromBase64(text: string): Uint8Array {
  const bytes = atob(text);
  const content = new Uint8Array(bytes.length);
  for (let index = 0; index < bytes.length; index++) content[index] = bytes.charCodeAt(index);
  return content;
}

function toBase64(content: Uint8Array): string {
  let bytes = "";
  for (let start = 0; start < content.length; start += CHUNK) {
    bytes += String.fromCharCode(...content.subarray(start, start + CHUNK));
  }
  return btoa(bytes);
}
