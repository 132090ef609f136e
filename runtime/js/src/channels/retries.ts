/** How long a client waits before it tries its server again; the waiting is done elsewhere. */

/** Seconds before the second attempt to reconnect; the first is made at once. */
export const FIRST_DELAY = 0.05;
/** Seconds between two attempts at the most. */
export const LONGEST_DELAY = 10;

/** How long to wait from attempt to attempt: drawn from half to the whole of a doubling bound. */
export function* listDelays(random = Math.random): Generator<number, never> {
  yield 0;
  for (let bound = FIRST_DELAY; ; bound = Math.min(2 * bound, LONGEST_DELAY)) {
    yield bound * (0.5 + random() / 2);
  }
}

/** The attempts to connect since the connection was lost; they end when something new comes. */
export class Attempts {
  readonly #giveUpAfter: number;
  readonly #random: (() => number) | undefined;
  #delays: Generator<number, never> | undefined;
  #lostAt: number | undefined;

  constructor(giveUpAfter = Infinity, random?: () => number) {
    this.#giveUpAfter = giveUpAfter;
    this.#random = random;
  }

  /** Return how many seconds to wait before the next attempt, and those that are left to give up. */
  findDelay(now: number): { readonly delay: number; readonly left: number } {
    this.#lostAt ??= now;
    this.#delays ??= listDelays(this.#random);
    const left = this.#lostAt + this.#giveUpAfter - now;
    return { delay: Math.min(this.#delays.next().value, Math.max(left, 0)), left };
  }

  /** Something new came: whatever breaks from now on is another fault than before. */
  noteProgress(): void {
    this.#delays = undefined;
    this.#lostAt = undefined;
  }

  /** Count the time before giving up from the next loss on. */
  forgetLoss(): void {
    this.#lostAt = undefined;
  }
}
