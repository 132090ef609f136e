/**
 * JSON from elsewhere, held against what it must be: small readers that put together larger ones.
 *
 * A reader checks a value of any type and returns it as its own type, or throws a
 * SyntaxError with the path to what is wrong.  Names are written `like_this` outside and
 * `likeThis` inside.  This module knows no message and no manifest.
 */

/** Returns any value as a `T`, or throws a SyntaxError. */
export type Decoder<T> = (value: unknown, path: string) => T;

/** What a decoder returns. */
export type Decoded<D> = D extends Decoder<infer T> ? T : never;

/** Check whether a value is an object other than a list. */
export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/**
 * Read UTF-8 bytes as JSON; a name that occurs twice in an object, and half a surrogate, are
 * refused.
 *
 * @throws SyntaxError: the bytes are anything else.
 */
export function parseJson(content: Uint8Array | string): unknown {
  const text = typeof content === "string" ? content : decodeText(content);
  const value: unknown = JSON.parse(text);
  checkStrings(text);
  return value;
}

/** Read bytes as UTF-8.
 *
 * @throws SyntaxError: they are not.
 */
export function decodeText(content: Uint8Array): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(content);
  } catch {
    throw new SyntaxError("it is not UTF-8");
  }
}

/** JSON.parse keeps the last of two that bear one name, where others keep the first. */
function checkStrings(text: string): void {
  const open: Set<string>[] = [];
  for (const [token, quoted, colon] of text.matchAll(/[{}]|("(?:[^"\\]|\\.)*")\s*(:?)/g)) {
    if (token === "{") open.push(new Set());
    else if (token === "}") open.pop();
    else if (quoted) {
      const name = JSON.parse(quoted) as string;
      if (/\p{Surrogate}/u.test(name)) throw new SyntaxError("half a surrogate is not text");
      if (!colon) continue;
      if (open.at(-1)!.has(name)) throw new SyntaxError("a name occurs in it twice");
      open.at(-1)!.add(name);
    }
  }
}

function refuse(path: string, expected: string, value: unknown): never {
  const came = JSON.stringify(value)?.slice(0, 40) ?? "nothing";
  throw new SyntaxError(`${path || "it"} should be ${expected}, not ${came}`);
}

export const readText: Decoder<string> = (value, path) =>
  typeof value === "string" ? value : refuse(path, "text", value);

export const readFlag: Decoder<boolean> = (value, path) =>
  typeof value === "boolean" ? value : refuse(path, "true or false", value);

export const readNumber: Decoder<number> = (value, path) =>
  typeof value === "number" ? value : refuse(path, "a number", value);

/** Integers as far as JavaScript's numbers hold them, 2^53. */
export const readInteger: Decoder<number> = (value, path) =>
  Number.isSafeInteger(value) ? (value as number) : refuse(path, "an integer", value);

export const readCount: Decoder<number> = (value, path) =>
  readInteger(value, path) >= 0 ? (value as number) : refuse(path, "a count", value);

export function readOneOf<const T extends string>(...names: readonly T[]): Decoder<T> {
  return (value, path) =>
    names.find((name) => name === value) ?? refuse(path, `one of ${names.join(", ")}`, value);
}

export function readList<T>(item: Decoder<T>): Decoder<readonly T[]> {
  return (value, path) =>
    Array.isArray(value)
      ? value.map((one, index) => item(one, `${path}[${index}]`))
      : refuse(path, "a list", value);
}

/** An object whose names are anybody's choice. */
export function readMap<T>(item: Decoder<T>): Decoder<ReadonlyMap<string, T>> {
  return (value, path) =>
    isRecord(value)
      ? new Map(Object.entries(value).map(([key, one]) => [key, item(one, `${path}.${key}`)]))
      : refuse(path, "an object", value);
}

export function readNullable<T>(item: Decoder<T>): Decoder<T | null> {
  return (value, path) => (value === null ? null : item(value, path));
}

/** What may be absent, and is `fallback` then. */
export function readOptional<T>(item: Decoder<T>, fallback: T): Decoder<T> {
  return (value, path) => (value === undefined ? fallback : item(value, path));
}

/** An object with these fields; others are ignored. */
export function readRecord<F extends Record<string, Decoder<unknown>>>(
  fields: F,
): Decoder<{ readonly [K in keyof F]: Decoded<F[K]> }> {
  return (value, path) => {
    if (!isRecord(value)) return refuse(path, "an object", value);
    const found = Object.entries(fields).map(([name, field]) => {
      const outside = spell(name);
      const own = Object.hasOwn(value, outside) ? value[outside] : undefined;
      return [name, field(own, path ? `${path}.${outside}` : outside)];
    });
    return Object.fromEntries(found) as { readonly [K in keyof F]: Decoded<F[K]> };
  };
}

/** Write a name as a JSON string. */
export function spell(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}

/** Return an object for JSON: its names are written as those outside, and maps are objects. */
export function spellNames(fields: object): Record<string, unknown> {
  const spelled = Object.entries(fields).map(([name, value]) => [
    spell(name),
    value instanceof Map ? Object.fromEntries(value) : (value as unknown),
  ]);
  return Object.fromEntries(spelled) as Record<string, unknown>;
}
