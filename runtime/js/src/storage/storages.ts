/**
 * Where a client keeps its state from visit to visit: bytes by name.
 *
 * What the bytes are is not known here.
 */

/**
 * Bytes by name.  What is put is kept completely or not at all, and is kept for good once the promise is
 * fulfilled; what cannot be kept rejects it with any error.
 */
export interface StateStorage {
  get(name: string): Promise<Uint8Array | undefined>;
  put(name: string, content: Uint8Array): Promise<void>;
  delete(name: string): Promise<void>;
  /** List the names that begin so. */
  list(prefix: string): Promise<readonly string[]>;
  /**
   * Acquire a lock; return `undefined` where another client holds it.  With `takeOver` it is
   * taken from whoever has it.  What only one client can reach needs none.
   */
  lock?(name: string, options: { takeOver: boolean }): Promise<StorageLock | undefined>;
}

/** A lock of a storage, until it is released, taken over, or its page or process ends. */
export interface StorageLock {
  isHeld(): Promise<boolean>;
  release(): Promise<void>;
}

/** Keeps state as long as the page or process lives. */
export class MemoryStorage implements StateStorage {
  readonly #files = new Map<string, Uint8Array>();

  async get(name: string): Promise<Uint8Array | undefined> {
    return this.#files.get(name);
  }

  async put(name: string, content: Uint8Array): Promise<void> {
    this.#files.set(name, content.slice());
  }

  async delete(name: string): Promise<void> {
    this.#files.delete(name);
  }

  async list(prefix: string): Promise<readonly string[]> {
    return [...this.#files.keys()].filter((name) => name.startsWith(prefix));
  }
}

const FILES = "files";

/**
 * Keeps state in the browser's IndexedDB, for pages of this origin alone.
 *
 * A browser may clear it when space is short; `navigator.storage.persist()` asks it not to.
 */
export class IndexedDbStorage implements StateStorage {
  readonly #name: string;
  #opened: Promise<IDBDatabase> | undefined;

  /** `name` is the database's. */
  constructor(name = "splitonnx") {
    this.#name = name;
  }

  async get(name: string): Promise<Uint8Array | undefined> {
    return this.#act("readonly", (files) => files.get(name) as IDBRequest<Uint8Array | undefined>);
  }

  async put(name: string, content: Uint8Array): Promise<void> {
    await this.#act("readwrite", (files) => files.put(content, name));
  }

  async delete(name: string): Promise<void> {
    await this.#act("readwrite", (files) => files.delete(name));
  }

  async list(prefix: string): Promise<readonly string[]> {
    const range = IDBKeyRange.bound(prefix, `${prefix}\uffff`);
    return this.#act("readonly", (files) => files.getAllKeys(range) as IDBRequest<string[]>);
  }

  /** Acquire a Web Lock; pages over plain HTTP have none, and continue without. */
  async lock(
    name: string,
    { takeOver }: { takeOver: boolean },
  ): Promise<StorageLock | undefined> {
    const locks = globalThis.navigator?.locks as LockManager | undefined;
    let isHeld = true;
    if (!locks) return { isHeld: async () => true, release: async () => {} };
    return new Promise((resolve, reject) => {
      const options = takeOver ? { steal: true } : { ifAvailable: true };
      const ended = locks.request(`splitonnx/${this.#name}/${name}`, options, (lock) => {
        if (!lock) return resolve(undefined);
        return new Promise<void>((letGo) => {
          const release = async () => {
            isHeld = false;
            letGo();
            await ended.catch(() => {}); // it was taken over
          };
          resolve({ isHeld: async () => isHeld, release });
        });
      });
      ended.catch((error: unknown) => {
        isHeld = false;
        reject(error as Error); // without effect where the lock was had
      });
    });
  }

  async #act<T>(
    mode: IDBTransactionMode,
    ask: (files: IDBObjectStore) => IDBRequest<T>,
  ): Promise<T> {
    const database = await this.#open();
    return new Promise((resolve, reject) => {
      const transaction = database.transaction(FILES, mode, { durability: "strict" });
      const request = ask(transaction.objectStore(FILES));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error);
      transaction.onerror = () => reject(transaction.error ?? request.error);
    });
  }

  #open(): Promise<IDBDatabase> {
    this.#opened ??= new Promise((resolve, reject) => {
      const request = indexedDB.open(this.#name, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(FILES);
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
      request.onblocked = () => reject(new Error("another page holds an older database open"));
    });
    return this.#opened;
  }
}

/** Choose the storage that there is: IndexedDB in a browser, elsewhere memory. */
export function defaultStorage(): StateStorage {
  return typeof indexedDB === "undefined" ? new MemoryStorage() : new IndexedDbStorage();
}
