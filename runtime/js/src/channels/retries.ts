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
