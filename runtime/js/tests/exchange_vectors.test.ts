/** Scripts of what happens to a client's exchange with its server, as Python's exchange answered. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";

import { Exchange } from "../src/channels/exchanges.js";
import { spell } from "../src/decoders.js";
import { ConnectionLost, SessionLost } from "../src/errors.js";
import { ACCUMULATE, TRAIN, UPDATE, decodeManifest, findPhase } from "../src/manifests.js";
import { REPLACED, decodeMessage, encodeMessage } from "../src/messages.js";
import type { Message, TaskKey } from "../src/messages.js";
import { listWires } from "../src/wire/protocols.js";
import { VECTORS, readVectors } from "./fixtures.js";

describe("a script of the vectors", () => {
  type Entry = readonly [string, ...unknown[]];
  type Script = readonly { readonly entry: Entry; readonly follows: readonly (readonly unknown[])[] }[];
  const SHOWN: Readonly<Record<string, readonly string[]>> = {
    Hello: ["step", "generation", "isOpen", "canRepeat", "microBatch", "inFlight"],
    Tensors: ["phase", "step", "microBatch", "turn"],
    Save: ["step", "publish", "keep"],
    Bye: [],
  };
  const session = "5".repeat(32);
  const content = new Uint8Array(readFileSync(join(VECTORS, "tiny/manifest.json")));
  const tiny = decodeManifest(content, "tiny");
  const train = findPhase(tiny, TRAIN);
  const added = [ACCUMULATE, UPDATE].map((phase) => ({ ...train, name: phase }));
  const played = { ...tiny, phases: [...tiny.phases, ...added] };
  const key = ([phase, step, microBatch]: readonly unknown[]) => {
    return { session, phase, step, microBatch } as TaskKey;
  };

  function makeAnswer(kind: string, given: readonly unknown[]): Message {
    const [first, second, third] = given as [never, never, never];
    const wires = listWires(played);
    switch (kind) {
      case "welcome": {
        const fields = Object.entries(first as object).map(([word, value]) => {
          return [word.replace(/_(.)/g, (_, letter: string) => letter.toUpperCase()), value];
        });
        return {
          type: "Welcome", session, digest: played.digest, step: 0, wantsRepeat: false,
          canAccumulate: false, restarts: false, inFlight: 1, policy: "per-client", localSteps: 0,
          rounds: 0, wires, ...(Object.fromEntries(fields) as object),
        };
      }
      case "reply":
        return { type: "Tensors", ...key(given), turn: given[3] as number, seed: 0, learningRate: 0.1 };
      case "saved":
        return { type: "Saved", session, step: first, keep: second };
      case "unsaved":
        return { type: "Unsaved", session, step: first, reason: second };
      default:
        assert.equal(kind, "fault");
        return {
          type: "Fault", code: first, reason: second, newest: third, subject: "", needed: 0, limit: 0,
        };
    }
  }

  const scripts = Object.entries(readVectors<Record<string, Script>>("exchanges"));
  for (const [title, script] of scripts) {
    test(`is followed: ${title}`, () => {
      let [now, step] = [0, 0];
      const talk = new Exchange({
        manifest: played,
        session,
        findResumePoint: () => {
          const kept = Array.from({ length: step + 1 }, (_, index) => index);
          return { origin: "", start: 0, step, kept };
        },
        canShare: false,
        random: () => 0,
      });
      const play = (kind: string, given: readonly unknown[]): void => {
        now += 20; // longer than any wait
        const [first, second, third] = given as [never, never, never];
        if (kind === "start") talk.start(now, { isPatient: first });
        else if (kind === "connected") talk.connected();
        else if (kind === "lost") talk.lost(new ConnectionLost("the server", "it closed"), now);
        else if (kind === "replaced") talk.lost(new ConnectionLost("the server", "", REPLACED), now);
        else if (kind === "wake") talk.wake(now);
        else if (kind === "send") talk.send(key(given), new Map(), 0, 0.1);
        else if (kind === "end") talk.end(key(given));
        else if (kind === "step") step = first;
        else if (kind === "widen") void (talk.widen(first) && talk.returnToStep(now));
        else if (kind === "return_to_step") talk.returnToStep(now);
        else if (kind === "save") talk.save(first, { publish: second, keep: third });
        else if (kind === "close") talk.close({ forGood: first });
        else talk.receive(encodeMessage(makeAnswer(kind, given)), now);
      };
      const take = (): unknown[][] => {
        const found = talk.takeEffects().map((effect): unknown[] => {
          if (effect.type !== "Transmit") return [effect.type === "Connect" ? "connect" : "hang up"];
          const message = decodeMessage(effect.content).message as unknown as Record<string, unknown>;
          const type = message["type"] as string;
          const fields = SHOWN[type]!.map((field) => [spell(field), message[field]]);
          return ["transmit", { type, ...(Object.fromEntries(fields) as object) }];
        });
        for (let outcome; (outcome = talk.takeOutcome()); ) {
          if (outcome.type === "Greeted") found.push(["greeted"]);
          else if (outcome.type === "SaveAnswered") found.push(["save answered", outcome.reason]);
          else if (outcome.type === "Replied") {
            const { phase, step: at, microBatch } = outcome.key;
            found.push(["replied", phase, at, microBatch]);
          } else {
            // a class of its own here: a client with a storage may be able to go on
            const isOwn = outcome.error instanceof SessionLost;
            found.push(["failed", isOwn ? "RemoteFault" : outcome.error.name]);
          }
        }
        return found;
      };
      for (const { entry: [kind, ...given], follows } of script) {
        play(kind, given);
        assert.deepEqual(take(), follows, `${kind} ${JSON.stringify(given)}`);
      }
    });
  }

  test("is there at all", () => assert.ok(scripts.length > 20));
});
