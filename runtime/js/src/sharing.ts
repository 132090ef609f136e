/**
 * The phase in which clients share parameters: the names of what is sent and received in it.
 *
 * A client sends its trained parameters and its running statistics, and the server replies with
 * the joined ones.  The manifest declares the phase; this module neither sends nor averages.
 */

import { SHARE, findPhase } from "./manifests.js";
import type { PartyManifest } from "./manifests.js";

/**
 * The name of a wire, I64[]: the number of samples that the client trained with since it last
 * shared; 0 if it only asks for the joined parameters.
 */
export const SAMPLES = "splitonnx.samples";
/** The name of a wire, I64[]: 1 if the client shares nothing after this, otherwise 0. */
export const LEAVES = "splitonnx.leaves";
/** The name of a wire, I64[]: the number of the round whose joined parameters are sent. */
export const ROUND = "splitonnx.round";

/** Return the name of the wire with a client's own value of a state tensor. */
export function nameOwn(state: string): string {
  return `${state}@own`;
}

/** List the tensors of a party's state that are joined; none in bundles of earlier versions. */
export function listJoined(manifest: PartyManifest): string[] {
  return [...findPhase(manifest, SHARE).commits.keys()];
}
