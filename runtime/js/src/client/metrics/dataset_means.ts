/**
 * Combine the means of batches into the means of a dataset.
 *
 * A result `r` of a batch is a mean, and `r@counted` says how much it weighs: what counted, such as
 * the labels that are not ignored.  Without it, the mean weighs as much as the batch has labels.
 * The result `r@total` is the sum that the batch adds; without it, the sum is the mean multiplied by
 * what counted.  If several losses are added up, `loss.a@weight` is the factor of `loss.a`.
 */

import { COUNTED, LOSS, TOTAL, WEIGHT } from "../../manifests.js";
import type { NdArray, NdArrays } from "../../tensors.js";

/** The means of all results over the batches that were added so far. */
export class DatasetMeans {
  readonly #totals = new Map<string, number>();
  readonly #counted = new Map<string, number>();
  readonly #weights = new Map<string, number>();

  /** Add the results of a batch with `size` labels. */
  add(results: ReadonlyMap<string, number>, size: number): void {
    for (const [name, value] of results) {
      if (name.endsWith(WEIGHT)) {
        this.#weights.set(name.slice(0, -WEIGHT.length), value);
      } else if (!name.endsWith(COUNTED) && !name.endsWith(TOTAL)) {
        const counted = results.get(name + COUNTED) ?? size;
        const added = results.get(name + TOTAL) ?? value * counted;
        this.#totals.set(name, (this.#totals.get(name) ?? 0) + added);
        this.#counted.set(name, (this.#counted.get(name) ?? 0) + counted);
      }
    }
  }

  /** Return the mean of each result; it is 0 if nothing counted. */
  compute(): Record<string, number> {
    const means = new Map(
      [...this.#totals].map(([name, total]) => [name, total / (this.#counted.get(name) || 1)]),
    );
    if (this.#weights.size) {
      const terms = [...this.#weights].map(([name, weight]) => weight * (means.get(name) ?? 0));
      means.set(LOSS, terms.reduce((sum, term) => sum + term, 0));
    }
    return Object.fromEntries(means);
  }
}

/** Return the results that are numbers. */
export function readNumbers(results: NdArrays): Map<string, number> {
  const scalars = [...results].filter(([, { shape }]) => !shape.length);
  return new Map(scalars.map(([name, { data }]) => [name, Number(data[0])]));
}

/** Compute a step's results from those of its micro-batches, and from what `counts` in each. */
export function averageResults(
  results: readonly NdArrays[],
  counts: readonly ReadonlyMap<string, number>[],
): NdArrays {
  const means = new DatasetMeans();
  for (const [index, counted] of counts.entries()) {
    means.add(new Map([...readNumbers(results[index]!), ...counted]), 1);
  }
  return new Map(
    Object.entries(means.compute()).map(([name, value]): [string, NdArray] => {
      return [name, { dtype: "F64", shape: [], data: Float64Array.of(value) }];
    }),
  );
}
