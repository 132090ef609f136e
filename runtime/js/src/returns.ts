/** How often a server may lose steps before a client takes it for one that never gets further. */

import type { StepsLost } from "./errors.js";

/** Times that a server may lose steps before one comes that was not made before. */
export const MOST_RETURNS = 100;

/** Counts the times that training went back without a step that is new; made anew for each fit. */
export class Returns {
  #farthest: number;
  #count = 0;

  constructor(first: number) {
    this.#farthest = first;
  }

  /**
   * Count one, of a training that had come to the step `reached`.
   *
   * @throws StepsLost: it was one too many.
   */
  count(lost: StepsLost, reached: number): void {
    this.#count = reached > this.#farthest ? 0 : this.#count + 1;
    this.#farthest = Math.max(this.#farthest, reached);
    if (this.#count === MOST_RETURNS) throw lost;
  }
}
