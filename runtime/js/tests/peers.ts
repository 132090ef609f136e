/** The Python side as real processes: servers, and what else the tests need of it. */

import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { existsSync, readFileSync, readdirSync } from "node:fs";
import { cp, mkdtemp, rm } from "node:fs/promises";
import { createServer, connect as connectTcp } from "node:net";
import type { Socket } from "node:net";
import { once } from "node:events";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";

import { WebSocket } from "ws";

import type { WebSocketLike } from "../src/index.js";
import { ROOT, VECTORS } from "./fixtures.js";

/** Node has a websocket of its own from version 22 on. */
export const openSocket = (url: string): WebSocketLike =>
  new WebSocket(url, { perMessageDeflate: false }) as unknown as WebSocketLike;

function findPython(): string {
  const own = join(ROOT, ".venv/bin/python");
  return process.env["SPLITONNX_PYTHON"] ?? (existsSync(own) ? own : "python3");
}

/** List the processes that one started in which this stands on the command line; on Linux. */
function findChildren(pid: number, word: string): number[] {
  const threads = readdirSync(`/proc/${pid}/task`); // each has the children that it started
  const found = threads.flatMap((thread) => {
    return readFileSync(`/proc/${pid}/task/${thread}/children`, "utf-8").split(" ");
  });
  const children = found.filter(Boolean).map(Number);
  return children.filter((child) => readFileSync(`/proc/${child}/cmdline`, "utf-8").includes(word));
}

/** A Python process, to which lines can be said and which says lines. */
export class PythonPeer {
  readonly #process: ChildProcess;
  readonly #lines: AsyncIterator<string>;

  constructor(args: readonly string[]) {
    this.#process = spawn(findPython(), args, { cwd: ROOT, stdio: ["pipe", "pipe", "inherit"] });
    const lines = createInterface({ input: this.#process.stdout! });
    this.#lines = lines[Symbol.asyncIterator]();
  }

  say(line: string): void {
    this.#process.stdin!.write(`${line}\n`);
  }

  /** Read its next line. */
  async hear(): Promise<string> {
    const { done, value } = await this.#lines.next();
    if (done) throw new Error("the Python process ended");
    return value;
  }

  async end(signal: NodeJS.Signals = "SIGTERM"): Promise<void> {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return;
    this.#process.kill(signal);
    await once(this.#process, "exit");
  }
}

/**
 * A Python process from which servers are forked, so that none has to import everything again; see
 * `tests/support/forked_servers.py`.
 */
class Forks {
  readonly #process: ChildProcess;
  readonly #told: AsyncIterator<string>;
  readonly #logged: AsyncIterator<string>;
  readonly #ended = new Set<number>();

  constructor() {
    const single = { ...process.env, OPENBLAS_NUM_THREADS: "1" }; // one of several does not fork well
    const args = ["-m", "tests.support.forked_servers"];
    this.#process = spawn(findPython(), args, { cwd: ROOT, env: single, stdio: "pipe" });
    const [told, logged] = [this.#process.stdout!, this.#process.stderr!];
    this.#told = createInterface({ input: told })[Symbol.asyncIterator]();
    this.#logged = createInterface({ input: logged })[Symbol.asyncIterator]();
  }

  /** Fork a server; give its process and where it serves. */
  async start(words: readonly string[]): Promise<readonly [number, string]> {
    this.#process.stdin!.write(`${JSON.stringify(words)}\n`);
    const [, pid] = await this.#hearOf(this.#told, /^started (\d+)$/);
    const [url] = await this.#hearOf(this.#logged, /ws:\/\/127.0.0.1:\d+/);
    return [Number(pid), url];
  }

  async end(pid: number, signal: NodeJS.Signals): Promise<void> {
    if (this.#ended.has(pid)) return;
    try {
      process.kill(pid, signal);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error; // it has ended by itself
    }
    while (!this.#ended.has(pid)) await this.#hearOf(this.#told, /^ended/);
  }

  async close(): Promise<void> {
    this.#process.stdin!.end();
    await once(this.#process, "exit");
  }

  /** Read on up to a line that matches, and note which servers have ended. */
  async #hearOf(lines: AsyncIterator<string>, pattern: RegExp): Promise<RegExpExecArray> {
    for (;;) {
      const { done, value } = await lines.next();
      if (done) throw new Error("the Python process ended");
      const ended = /^ended (\d+)$/.exec(value);
      if (ended) this.#ended.add(Number(ended[1]));
      const found = pattern.exec(value);
      if (found) return found;
    }
  }
}

let forks: Forks | undefined;

/** End the process from which servers were forked; those have to have ended. */
export async function closeForks(): Promise<void> {
  await forks?.close();
  forks = undefined;
}

/** `splitonnx serve` as a process of its own, on a copy of a bundle of the vectors. */
export class ServerProcess {
  readonly folder: string;
  url = "";
  #pid: number | undefined;

  private constructor(folder: string) {
    this.folder = folder;
  }

  static async start(name: string, ...options: string[]): Promise<ServerProcess> {
    const folder = await mkdtemp(join(tmpdir(), "splitonnx-"));
    await cp(join(VECTORS, name), folder, { recursive: true });
    const server = new ServerProcess(folder);
    await server.run(...options);
    return server;
  }

  /** Begin to serve, on the same port as before if there was one. */
  async run(...options: string[]): Promise<void> {
    const port = this.url ? new URL(this.url).port : "0";
    const words = [join(this.folder, "server"), "--port", port, "--threads", "1", ...options];
    forks ??= new Forks();
    [this.#pid, this.url] = await forks.start(words);
  }

  async end(signal: NodeJS.Signals = "SIGTERM"): Promise<void> {
    if (this.#pid !== undefined) await forks!.end(this.#pid, signal);
  }

  /** Kill the processes that run its sessions' stages; return how many there were. */
  killWorkers(): number {
    const workers = findChildren(this.#pid!, "worker");
    for (const worker of workers) process.kill(worker, "SIGKILL");
    return workers.length;
  }

  async remove(): Promise<void> {
    await this.end();
    await rm(this.folder, { recursive: true });
  }
}

/** Stands between client and server, and breaks connections as it is told. */
export class Proxy {
  url = "";
  connections = 0;
  /** Gives how many bytes the next connection lets through, both ways together. */
  budget: () => number = () => Infinity;
  readonly #target: () => string;
  readonly #open = new Set<Socket>();
  readonly #server = createServer((near) => this.#join(near));

  constructor(target: () => string) {
    this.#target = target;
  }

  static async start(target: () => string): Promise<Proxy> {
    const proxy = new Proxy(target);
    proxy.#server.listen(0, "127.0.0.1");
    await once(proxy.#server, "listening");
    const address = proxy.#server.address();
    proxy.url = `ws://127.0.0.1:${(address as { port: number }).port}`;
    return proxy;
  }

  /** Break all connections. */
  cut(): void {
    for (const socket of this.#open) socket.destroy();
  }

  async end(): Promise<void> {
    this.cut();
    this.#server.close();
    await once(this.#server, "close");
  }

  #join(near: Socket): void {
    this.connections += 1;
    let left = this.budget();
    const far = connectTcp(Number(new URL(this.#target()).port), "127.0.0.1");
    for (const [from, to] of [[near, far], [far, near]] as const) {
      this.#open.add(from);
      from.on("data", (content) => {
        to.write(content.subarray(0, Math.max(0, left)));
        left -= content.length;
        if (left > 0) return;
        near.destroy();
        far.destroy();
      });
      from.on("error", () => to.destroy());
      from.on("close", () => {
        this.#open.delete(from);
        to.destroy();
      });
    }
  }
}
