/**
 * The order in which numpy's `default_rng([seed, epoch]).shuffle` puts rows, exactly.
 *
 * So that a client here trains on the same batches as one in Python with the same data and seed.
 * (Sources: numpy's SeedSequence, PCG64 and random_interval; pcg-random.org.)
 */

const MASK_64 = (1n << 64n) - 1n;
const MASK_128 = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;
const POOL = 4; // words of a seed sequence's pool

/** List the rows 0 to `size` in the order that belongs to `seed` and `epoch`. */
export function shuffleRows(size: number, seed: number, epoch: number): Uint32Array {
  const random = new Pcg64([...splitWords(seed), ...splitWords(epoch)]);
  const rows = Uint32Array.from({ length: size }, (_, index) => index);
  for (let last = size - 1; last > 0; last--) {
    const chosen = random.nextInterval(last);
    [rows[last], rows[chosen]] = [rows[chosen]!, rows[last]!];
  }
  return rows;
}

/** Split a number into its words of 32 bits, the lowest first. */
function splitWords(value: number): number[] {
  const high = Math.floor(value / 2 ** 32);
  return high ? [value >>> 0, ...splitWords(high)] : [value >>> 0];
}

/** Spread entropy over eight words of 32 bits, as numpy's SeedSequence does. */
function spreadEntropy(entropy: readonly number[]): Uint32Array {
  let constant = 0x43b0d7e5;
  const hash = (word: number) => {
    word ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    word = Math.imul(word, constant);
    return word ^ (word >>> 16);
  };
  const mix = (a: number, b: number) => {
    const mixed = Math.imul(a, 0xca01f9dd) - Math.imul(b, 0x4973f715);
    return mixed ^ (mixed >>> 16);
  };
  const pool = Array.from({ length: POOL }, (_, index) => hash(entropy[index] ?? 0));
  for (let from = 0; from < POOL; from++) {
    for (let to = 0; to < POOL; to++) {
      if (from !== to) pool[to] = mix(pool[to]!, hash(pool[from]!));
    }
  }
  for (const word of entropy.slice(POOL)) {
    for (let to = 0; to < POOL; to++) pool[to] = mix(pool[to]!, hash(word));
  }
  constant = 0x8b51f9dd;
  return Uint32Array.from({ length: 8 }, (_, index) => {
    let word = pool[index % POOL]! ^ constant;
    constant = Math.imul(constant, 0x58f38ded);
    word = Math.imul(word, constant);
    return word ^ (word >>> 16);
  });
}

/** numpy's generator, as far as shuffling needs it. */
class Pcg64 {
  #state = 0n;
  readonly #increment: bigint;
  #left: number | undefined; // the upper half of the number before

  constructor(entropy: readonly number[]) {
    const words = new BigUint64Array(spreadEntropy(entropy).buffer as ArrayBuffer);
    const [high, low, incrementHigh, incrementLow] = [...words] as [bigint, bigint, bigint, bigint];
    this.#increment = (((incrementHigh << 64n) | incrementLow) << 1n | 1n) & MASK_128;
    this.#advance();
    this.#state = (this.#state + ((high << 64n) | low)) & MASK_128;
    this.#advance();
  }

  /** Draw a number from 0 to `most`, which is below 2^32: bits until they are none too large. */
  nextInterval(most: number): number {
    const mask = 2 ** (32 - Math.clz32(most)) - 1;
    for (;;) {
      const drawn = (this.#nextWord() & mask) >>> 0;
      if (drawn <= most) return drawn;
    }
  }

  #nextWord(): number {
    const left = this.#left;
    if (left !== undefined) {
      this.#left = undefined;
      return left;
    }
    this.#advance();
    const mixed = (this.#state >> 64n) ^ (this.#state & MASK_64);
    const by = this.#state >> 122n;
    const turned = ((mixed >> by) | (mixed << (64n - by))) & MASK_64;
    this.#left = Number(turned >> 32n);
    return Number(turned & 0xffffffffn);
  }

  #advance(): void {
    this.#state = (this.#state * MULTIPLIER + this.#increment) & MASK_128;
  }
}
