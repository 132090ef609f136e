/**
 * Reading Protocol Buffers by hand: the fields of a message, one after the other.
 *
 * It reads as much of the wire format as serializers write, and refuses the rest: fields and wire
 * types that its table does not name, groups, a second value where only one may occur (parsers
 * merge those, each in its own way), numbers beyond 64 bits, lengths beyond the message.  Nothing
 * is copied.  This module knows no ONNX.
 */

/** Where bytes start and stop. */
export type Place = readonly [start: number, stop: number];

/** The bytes are not a message of the expected kind; the text says why, in half a sentence. */
export class Malformed extends Error {}

export const NUMBER = 0;
export const FIXED64 = 1;
export const BYTES = 2;
export const FIXED32 = 5;

const WIDTHS: Readonly<Record<number, number>> = { [FIXED64]: 8, [FIXED32]: 4 };

/** A field of a message; a `refusal` is the reason why it must not occur at all. */
export interface Field {
  readonly name: string;
  readonly number: number;
  readonly wire: number;
  readonly repeated: boolean;
  readonly refusal: string;
}

/** The fields of one kind of message, by tag. */
export interface Table {
  readonly kind: string;
  readonly fields: ReadonlyMap<number, Field>;
}

/** What was read of a field: a number, or the place of its bytes. */
export interface Found {
  readonly name: string;
  readonly place: Place;
  /** The number as a signed one, exact up to 2^53; `null` where there are bytes. */
  readonly value: number | null;
}

export function field(
  name: string,
  number: number,
  wire = BYTES,
  { repeated = false, refusal = "" } = {},
): Field {
  return { name, number, wire, repeated, refusal };
}

/** Arrange the fields of a kind of message for {@link Reader.read}. */
export function makeTable(kind: string, ...fields: readonly Field[]): Table {
  return { kind, fields: new Map(fields.map((one) => [one.number * 8 + one.wire, one])) };
}

/** Reads messages out of `content`; over all of them at most `maxFields` fields. */
export class Reader {
  readonly content: Uint8Array;
  #left: number;
  #at = 0;

  constructor(content: Uint8Array, maxFields: number) {
    this.content = content;
    this.#left = maxFields;
  }

  /**
   * Yield a message's fields.
   *
   * @throws Malformed: the bytes at the place are not such a message.
   */
  *read([start, stop]: Place, table: Table): Generator<Found, void> {
    const seen = new Set<Field>();
    let at = start;
    while (at < stop) {
      this.#at = at;
      const tag = this.#readNumber(stop);
      const known = this.#check(tag, table, seen);
      const { name, wire } = known;
      if (wire === NUMBER) {
        const value = this.#readNumber(stop);
        at = this.#at;
        yield { name, place: [at, at], value };
        continue;
      }
      const size = WIDTHS[wire] ?? this.#readNumber(stop);
      const end = this.#at + size;
      if (size < 0 || end > stop) throw new Malformed(`the ${name} of a ${table.kind} is cut short`);
      const place = [this.#at, end] as const;
      at = end;
      yield { name, place, value: null };
    }
  }

  /**
   * Yield the numbers of a packed field.
   *
   * @throws Malformed: one is cut short, or longer than 64 bits.
   */
  *readNumbers([start, stop]: Place): Generator<number, void> {
    let at = start;
    while (at < stop) {
      this.#at = at;
      const value = this.#readNumber(stop);
      at = this.#at;
      yield value;
    }
  }

  /**
   * Count the numbers of a packed field, without reading them one by one.
   *
   * @throws Malformed: one is cut short, or longer than 64 bits.
   */
  countNumbers([start, stop]: Place): number {
    let [count, open] = [0, 0]; // bytes of a number that continues
    for (let at = start; at < stop && open < 10; at++) {
      if (this.content[at]! > 127) open++;
      else [count, open] = [count + 1, 0];
    }
    if (open) throw new Malformed("a list of numbers is cut short");
    return count;
  }

  /**
   * Read one line of text of at most `most` bytes.
   *
   * @throws Malformed: it is longer, not UTF-8, or holds control characters.
   */
  readText([start, stop]: Place, most: number): string {
    if (stop - start > most) throw new Malformed(`a name of ${stop - start} bytes is in it`);
    let text: string;
    try {
      const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
      text = decoder.decode(this.content.subarray(start, stop));
    } catch {
      throw new Malformed("a name in it is not UTF-8");
    }
    if (/(?! )[\p{C}\p{Z}]/u.test(text)) {
      throw new Malformed("a name in it holds control characters");
    }
    return text;
  }

  #check(tag: number, table: Table, seen: Set<Field>): Field {
    const known = table.fields.get(tag);
    if (!known) {
      const [number, wire] = [Math.floor(tag / 8), tag & 7];
      throw new Malformed(
        `field ${number} of ${table.kind} (wire type ${wire}) is not one that a bundle's graphs have`,
      );
    }
    if (known.refusal) throw new Malformed(known.refusal);
    if (seen.has(known)) throw new Malformed(`a ${table.kind} has its ${known.name} twice`);
    if (!known.repeated) seen.add(known);
    if (--this.#left < 0) throw new Malformed("it has more fields than any graph of a bundle");
    return known;
  }

  /** Read a base-128 number as a signed one of 64 bits, and move behind it. */
  #readNumber(stop: number): number {
    let [low, high] = [0, 0]; // 35 bits, and the 29 above them
    for (let index = 0; index < 10; index++) {
      if (this.#at >= stop) throw new Malformed("it is cut short within a number");
      const byte = this.content[this.#at++]!;
      if (index < 5) low += (byte & 127) * 2 ** (7 * index);
      else high += (byte & 127) * 2 ** (7 * index - 35);
      if (byte < 128) {
        if (high >= 2 ** 29) break;
        return high >= 2 ** 28 ? (high - 2 ** 29) * 2 ** 35 + low : high * 2 ** 35 + low;
      }
    }
    throw new Malformed("it holds a number of more than 64 bits");
  }
}
