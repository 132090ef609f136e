/** ONNX Runtime that makes one session of each graph, for all that load it. */

import { createHash } from "node:crypto";

import type { InferenceSession } from "onnxruntime-common";

import type { Ort } from "../src/index.js";

/** What goes by the name of an ONNX Runtime, and releases all its sessions at once. */
export interface KeptSessions {
  readonly ort: Ort;
  release(): Promise<void>;
}

/**
 * Keep the sessions that are made until all are released together: what releases one leaves it to
 * the others.  All that load a graph are to give the same options.
 */
export function keepSessions(ort: Ort): KeptSessions {
  const sessions = new Map<string, InferenceSession>();
  const create = async (graph: Uint8Array, options: InferenceSession.SessionOptions) => {
    const digest = createHash("sha256").update(graph).digest("hex");
    const session = sessions.get(digest) ?? (await ort.InferenceSession.create(graph, options));
    sessions.set(digest, session);
    return Object.create(session, { release: { value: async () => {} } }) as InferenceSession;
  };
  return {
    ort: { ...ort, InferenceSession: { create } as Ort["InferenceSession"] },
    async release() {
      for (const session of sessions.values()) await session.release();
    },
  };
}
