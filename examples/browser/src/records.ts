/**
 * Keeps a run in the browser's IndexedDB, step by step.
 *
 * It is apart from the client's own database, and is written before the client's checkpoint of
 * the same step: after a reload no step that is trained lacks its place in the curves.
 */

import type { Check, Course, Mark, Run, Traffic } from "./runs.js";

const NAME = "splitonnx-page";
const [MARKS, CHECKS, HEAD] = ["marks", "checks", "head"] as const;
const ALL = [MARKS, CHECKS, HEAD];

/** The part of a run that is written again each time. */
export interface Head {
  readonly course: Course | null;
  readonly traffic: Traffic;
}

export class Records {
  #opened: Promise<IDBDatabase> | undefined;

  async read(): Promise<Run> {
    return this.#act(ALL, "readonly", (transaction) => {
      const head = transaction.objectStore(HEAD).get(HEAD) as IDBRequest<Head | undefined>;
      const marks = transaction.objectStore(MARKS).getAll() as IDBRequest<Mark[]>;
      const checks = transaction.objectStore(CHECKS).getAll() as IDBRequest<Check[]>;
      return () => {
        const { course = null, traffic = { up: 0, down: 0 } } = head.result ?? {};
        return { course, traffic, marks: marks.result, checks: checks.result };
      };
    });
  }

  async keepMark(mark: Mark, head: Head): Promise<void> {
    return this.#act([MARKS, HEAD], "readwrite", (transaction) => {
      transaction.objectStore(MARKS).put(mark);
      transaction.objectStore(HEAD).put(head, HEAD);
      return () => undefined;
    });
  }

  async keepCheck(check: Check): Promise<void> {
    return this.#act([CHECKS], "readwrite", (transaction) => {
      transaction.objectStore(CHECKS).put(check);
      return () => undefined;
    });
  }

  async keepHead(head: Head): Promise<void> {
    return this.#act([HEAD], "readwrite", (transaction) => {
      transaction.objectStore(HEAD).put(head, HEAD);
      return () => undefined;
    });
  }

  /** Forget what is noted of steps after this one, which were lost. */
  async forgetAfter(step: number): Promise<void> {
    return this.#act([MARKS, CHECKS], "readwrite", (transaction) => {
      for (const store of [MARKS, CHECKS]) {
        transaction.objectStore(store).delete(IDBKeyRange.lowerBound(step, true));
      }
      return () => undefined;
    });
  }

  async clear(): Promise<void> {
    return this.#act(ALL, "readwrite", (transaction) => {
      for (const store of ALL) transaction.objectStore(store).clear();
      return () => undefined;
    });
  }

  /** Act in one transaction; once it is complete `act`'s function gives the result. */
  async #act<T>(
    stores: readonly string[],
    mode: IDBTransactionMode,
    act: (transaction: IDBTransaction) => () => T,
  ): Promise<T> {
    const database = await this.#open();
    return new Promise((resolve, reject) => {
      const transaction = database.transaction(stores, mode);
      const give = act(transaction);
      transaction.oncomplete = () => resolve(give());
      transaction.onabort = () => reject(transaction.error);
    });
  }

  #open(): Promise<IDBDatabase> {
    this.#opened ??= new Promise((resolve, reject) => {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => {
        request.result.createObjectStore(MARKS, { keyPath: "step" });
        request.result.createObjectStore(CHECKS, { keyPath: "step" });
        request.result.createObjectStore(HEAD);
      };
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
    return this.#opened;
  }
}
