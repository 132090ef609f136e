/**
 * A client's greeting, and the check of the server's answer to it.
 *
 * The server is not trusted: its answer may only name a step whose state the client has kept, and
 * ask the client to share its parameters only if the client's user permits it.
 */

import { RemoteProtocolError, SharingNotPermitted } from "../errors.js";
import { SHARE, findPhase } from "../manifests.js";
import type { PartyManifest } from "../manifests.js";
import { PROTOCOL } from "../messages.js";
import type { MessageOf } from "../messages.js";
import { listWires } from "../wire/protocols.js";

const LONGEST = 40; // characters of a name that the server chose

/** What a session resumes from: the client's step, and the checkpoints that it has. */
export interface ResumePoint {
  readonly origin: string;
  readonly start: number;
  readonly step: number;
  readonly kept: readonly number[];
}

/** Who greets. */
export interface Greeter {
  readonly manifest: PartyManifest;
  readonly session: string;
  /** Returns from where the client can resume; called for each greeting. */
  readonly findResumePoint: () => ResumePoint;
  /** Whether the client may share its parameters, if the server joins what its clients learn. */
  readonly canShare: boolean;
}

/** How the server joins what its clients learn. */
export interface SharingTerms {
  /** A name that is only shown. */
  readonly policy: string;
  /** The steps after which the client shares its parameters; 0 if it shares nothing. */
  readonly localSteps: number;
  /** The rounds after which training ends; 0 if the client decides. */
  readonly rounds: number;
  /** Whether the client has to share its parameters. */
  readonly joins: boolean;
  /** Whether a step may consist of several micro-batches. */
  readonly canAccumulate: boolean;
}

/** Make the greeting of a client. */
export function makeHello(
  { manifest, session, findResumePoint, canShare }: Greeter,
  more: Pick<
    MessageOf<"Hello">,
    "generation" | "isOpen" | "canRepeat" | "microBatch" | "inFlight"
  >,
): MessageOf<"Hello"> {
  return {
    type: "Hello",
    protocol: PROTOCOL,
    digest: manifest.digest,
    session,
    ...findResumePoint(),
    ...more,
    canShare,
    wires: listWires(manifest),
  };
}

/**
 * Check the server's answer to a greeting, and return how it joins what clients learn: as it did at
 * the greeting before, which gave `known`.
 *
 * @throws RemoteProtocolError: it names another session, or a step whose state was not kept, or
 *   asks for parameters where the bundle does not declare how they are shared, or joins otherwise
 *   than it did before.
 * @throws SharingNotPermitted: it asks for parameters, and the user does not permit to share them.
 */
export function checkWelcome(
  welcome: MessageOf<"Welcome">,
  { session, findResumePoint, manifest, canShare }: Greeter,
  known: SharingTerms | undefined,
): SharingTerms {
  const { step, kept, start } = findResumePoint();
  if (welcome.session !== session) {
    throw new RemoteProtocolError(`it welcomed session '${welcome.session.slice(0, LONGEST)}'`);
  }
  if (![step, ...(kept.length ? kept : [start])].includes(welcome.step)) {
    throw new RemoteProtocolError(
      `it would continue at step ${welcome.step}, but no state of that step was kept`,
    );
  }
  const { localSteps, rounds, canAccumulate } = welcome;
  const [policy, joins] = [welcome.policy.slice(0, LONGEST), localSteps > 0];
  if (joins && !canShare) throw new SharingNotPermitted(policy);
  if (joins && !findPhase(manifest, SHARE).wires.length) {
    throw new RemoteProtocolError("it asks for parameters, which this bundle does not share");
  }
  const terms = { policy, localSteps, rounds, joins, canAccumulate };
  const before = { ...(known ?? terms), canAccumulate }; // another version may differ in it
  const [found, expected] = [terms, before].map((one) => JSON.stringify(one));
  if (found !== expected) {
    throw new RemoteProtocolError(`it has other terms, ${found}, not ${expected}`);
  }
  return terms;
}
