/** The client's side of a session as an event machine: no connection, no clock, no waiting. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { before, beforeEach, describe, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import { Exchange } from "../src/channels/exchanges.js";
import type { ExchangeOptions } from "../src/channels/exchanges.js";
import { spell } from "../src/decoders.js";
import { ConnectionLost, LocalProtocolError, SessionLost, StaleConnection } from "../src/errors.js";
import { ACCUMULATE, TRAIN, UPDATE, decodeManifest, findPhase } from "../src/manifests.js";
import type { PartyManifest } from "../src/manifests.js";
import { REPLACED, decodeMessage, encodeMessage } from "../src/messages.js";
import type { Message, MessageOf, TaskKey, TensorsMessage } from "../src/messages.js";
import { openFolder } from "../src/node.js";
import type { NdArrays } from "../src/tensors.js";
import { listWires } from "../src/wire/protocols.js";
import { VECTORS, makeArray, readVectors } from "./fixtures.js";

const SESSION = "s";
const LOST = new ConnectionLost("the server", "cut");
let manifest: PartyManifest;
let exchange: Exchange;
let point: { origin: string; start: number; step: number; kept: number[] };

before(async () => {
  ({ manifest } = await loadBundle(openFolder(join(VECTORS, "dropout/client"))));
});

beforeEach(() => {
  point = { origin: "", start: 0, step: 0, kept: [] };
  exchange = make();
});

function make(more: Partial<ExchangeOptions> = {}): Exchange {
  return new Exchange({
    manifest,
    session: SESSION,
    findResumePoint: () => point,
    canShare: false,
    random: () => 1,
    ...more,
  });
}

function name(microBatch: number, phase: string = ACCUMULATE): TaskKey {
  return { session: SESSION, phase, step: point.step, microBatch };
}

/** Make wires of one row, of these names. */
function fill(phase: string, ...names: string[]): NdArrays {
  const wires = findPhase(manifest, phase).wires.filter(({ tensor }) => names.includes(tensor.name));
  assert.equal(wires.length, names.length);
  return new Map(
    wires.map(({ tensor }) => {
      const shape = tensor.shape.map((dim) => (typeof dim === "number" ? dim : 1));
      const size = shape.reduce((product, dim) => product * dim, 1);
      return [tensor.name, makeArray(tensor.dtype as "F32", shape, Array<number>(size).fill(1))];
    }),
  );
}

/** Take the effects, with what is transmitted as messages; describe each by its kind, and a task's turn. */
function hear(): string[] {
  return exchange.takeEffects().map((effect) => {
    if (effect.type !== "Transmit") return effect.type;
    const { message } = decodeMessage(effect.content);
    last = message;
    return message.type === "Tensors" ? `${message.microBatch}:${message.turn}` : message.type;
  });
}
let last: Message; // the last one that was heard

function say(message: Message, tensors?: NdArrays): void {
  exchange.receive(encodeMessage(message, tensors), 0);
}

function answer(key: TaskKey, turn: number, ...wires: string[]): void {
  const numbers = { turn, seed: 0, learningRate: 0.1 };
  say({ type: "Tensors", ...key, ...numbers } as TensorsMessage, fill(key.phase, ...wires));
}

function welcome(changes: Partial<MessageOf<"Welcome">> = {}): void {
  say({
    type: "Welcome", session: SESSION, digest: manifest.digest, step: point.step, wantsRepeat: false,
    canAccumulate: true, restarts: false, inFlight: 16, policy: "per-client", localSteps: 0, rounds: 0,
    wires: listWires(manifest), ...changes,
  });
}

/** Take the outcomes; describe each by its kind, or the error's, or the task that was replied to. */
function learn(): string[] {
  const found: string[] = [];
  for (let outcome; (outcome = exchange.takeOutcome()); ) {
    if (outcome.type === "Failed") found.push(outcome.error.name);
    else if (outcome.type === "Replied") found.push(`${outcome.key.microBatch}`);
    else found.push(outcome.type);
  }
  return found;
}

/** Connect, with so many tasks of a step to be open at once. */
function open(inFlight: number, changes: Partial<MessageOf<"Welcome">> = {}): void {
  exchange.start(0, { isPatient: false });
  assert.deepEqual(hear(), ["Connect"]);
  exchange.connected();
  assert.deepEqual(hear(), ["Hello"]);
  welcome(changes);
  assert.deepEqual(learn(), ["Greeted"]);
  assert.ok(!exchange.widen(1));
  if (!exchange.widen(inFlight)) return;
  exchange.returnToStep(0);
  exchange.wake(0);
  assert.deepEqual(hear(), ["HangUp", "Connect"]);
  exchange.connected();
  assert.deepEqual(hear(), ["Hello"]);
  assert.equal((last as MessageOf<"Hello">).inFlight, inFlight);
  welcome(changes);
  assert.deepEqual(learn(), ["Greeted"]);
}

/** Send a task's first message. */
function begin(key: TaskKey): void {
  const wires = key.phase === UPDATE ? ["splitonnx.micro_batches"] : ["r1@server"];
  exchange.send(key, fill(key.phase, ...wires), 0, 0.1);
}

function finishForward(key: TaskKey): void {
  exchange.send(key, fill(key.phase, "flat@client_grad"), 0, 0.1);
}

/** Cut the connection, make another one, and return the greeting. */
function cut(): MessageOf<"Hello"> {
  exchange.lost(LOST, 0);
  exchange.wake(exchange.wakeAt!);
  assert.deepEqual(hear(), ["HangUp", "Connect"]);
  exchange.connected();
  assert.deepEqual(hear(), ["Hello"]);
  return last as MessageOf<"Hello">;
}

describe("several tasks of a step", () => {
  test("are open at once, and their replies come as they come", () => {
    open(3);
    for (const number of [0, 1, 2]) begin(name(number));
    assert.deepEqual(hear(), ["0:0", "1:0", "2:0"]);
    answer(name(0), 0, "flat@client");
    finishForward(name(0));
    answer(name(1), 0, "flat@client");
    answer(name(0), 1, "r1@server_grad");
    exchange.end(name(0));
    begin(name(3, UPDATE));
    answer(name(2), 0, "flat@client");
    assert.deepEqual(learn(), ["0", "1", "0", "2"]);
    assert.deepEqual(hear(), ["0:1", "3:0"]);
  });

  test("go out again whole after a cut, in the order in which they were sent", () => {
    open(3);
    for (const number of [0, 1, 2]) begin(name(number));
    answer(name(0), 0, "flat@client");
    answer(name(1), 0, "flat@client");
    finishForward(name(1));
    finishForward(name(0));
    answer(name(0), 1, "r1@server_grad");
    exchange.end(name(0));
    begin(name(3, UPDATE));
    assert.deepEqual(learn(), ["0", "1", "0"]);
    hear();
    const { microBatch, isOpen, canRepeat } = cut();
    assert.deepEqual({ microBatch, isOpen, canRepeat }, { microBatch: 1, isOpen: true, canRepeat: true });
    welcome();
    assert.deepEqual(hear(), ["1:0", "2:0", "1:1", "3:0"]);
    answer(name(1), 0, "flat@client"); // again
    answer(name(2), 0, "flat@client");
    answer(name(1), 1, "r1@server_grad");
    assert.deepEqual(learn(), ["2", "1"]);
    assert.equal(exchange.reconnects, 1);
  });

  test("may go out while there is no connection, and are sent once there is one", () => {
    open(3);
    begin(name(0));
    exchange.lost(LOST, 0);
    begin(name(1));
    exchange.wake(0);
    assert.deepEqual(hear(), ["HangUp", "Connect"]);
    exchange.connected();
    begin(name(2));
    welcome();
    assert.deepEqual(hear(), ["Hello", "0:0", "1:0", "2:0"]);
  });

  test("begin again where the server has forgotten them", () => {
    open(3);
    for (const number of [0, 1]) begin(name(number));
    answer(name(0), 0, "flat@client");
    exchange.end(name(0));
    cut();
    welcome({ restarts: true });
    assert.deepEqual(learn(), ["0", "StepRestarted"]);
    exchange.endAll();
    begin(name(0));
    assert.deepEqual(hear(), ["0:0"]);
    assert.equal(cut().microBatch, 0);
  });

  test("begin again where another server permits fewer at once", () => {
    open(3);
    for (const number of [0, 1]) begin(name(number));
    hear();
    cut();
    welcome({ inFlight: 1 });
    assert.deepEqual(learn(), ["StepRestarted"]);
    assert.deepEqual(hear(), []);
    assert.equal(exchange.inFlight, 1);
  });

  test("are as many as both sides permit", () => {
    open(5, { inFlight: 3 });
    assert.equal(exchange.inFlight, 3);
    exchange = make();
    open(5, { inFlight: 1 });
    assert.equal(exchange.inFlight, 1);
  });

  test("that are complete are counted at a cut before the next one begins", () => {
    open(2);
    for (const number of [0, 1]) {
      begin(name(number));
      exchange.end(name(number));
    }
    const { microBatch, isOpen } = cut();
    assert.deepEqual([microBatch, isOpen], [2, false]);
    welcome();
    begin(name(2, UPDATE));
    exchange.end(name(2, UPDATE));
    point.step = 1;
    assert.equal(cut().microBatch, 0);
  });

  test("take no reply of another task, and none that came before", () => {
    for (const reply of [() => answer(name(1), 0, "flat@client"), () => answer(name(0), 1, "flat@client")]) {
      exchange = make();
      open(2);
      begin(name(0));
      reply();
      assert.deepEqual(learn(), ["RemoteProtocolError"]);
    }
  });
});

describe("the last task", () => {
  test("is sent again first where the server has not made it, and its replies are not new", () => {
    open(1);
    begin(name(0, TRAIN));
    answer(name(0, TRAIN), 0, "flat@client");
    finishForward(name(0, TRAIN));
    answer(name(0, TRAIN), 1, "r1@server_grad");
    exchange.end(name(0, TRAIN));
    point.step = 1;
    begin(name(0, TRAIN));
    learn();
    hear();
    assert.ok(cut().canRepeat);
    welcome({ wantsRepeat: true });
    assert.deepEqual(hear(), ["0:0", "0:1"]);
    const before = { ...name(0, TRAIN), step: 0 };
    answer(before, 0, "flat@client");
    assert.deepEqual(hear(), []);
    answer(before, 1, "r1@server_grad");
    assert.deepEqual(hear(), ["0:0"]);
    assert.deepEqual(learn(), []);
    answer(name(0, TRAIN), 0, "flat@client");
    assert.deepEqual(learn(), ["0"]);
    assert.ok(!cut().canRepeat); // the server is beyond it
  });

  test("is kept until a reply comes to a task that began after it", () => {
    open(2);
    for (const number of [0, 1]) begin(name(number));
    exchange.end(name(0));
    answer(name(1), 0, "flat@client");
    hear();
    assert.ok(cut().canRepeat);
    welcome();
    begin(name(2));
    answer(name(1), 0, "flat@client");
    answer(name(2), 0, "flat@client");
    hear();
    assert.ok(!cut().canRepeat);
  });

  test("that is not there cannot be asked for", () => {
    open(1);
    cut();
    welcome({ wantsRepeat: true });
    assert.deepEqual(learn(), ["RemoteProtocolError"]);
  });
});

test("a save goes out again after a cut, and its answer comes once", () => {
  open(1);
  exchange.save(0, { publish: false, keep: true });
  assert.deepEqual(hear(), ["Save"]);
  cut();
  welcome();
  assert.deepEqual(hear(), ["Save"]);
  say({ type: "Saved", session: SESSION, step: 0, keep: false });
  const outcome = exchange.takeOutcome();
  assert.ok(outcome?.type === "SaveAnswered");
  assert.match(outcome.reason, /cannot keep/);
  assert.deepEqual(learn(), []);
});

test("steps that are lost are told, and the connection serves on", () => {
  point = { ...point, step: 4, kept: [2] };
  open(1);
  begin(name(0, TRAIN));
  hear();
  cut();
  welcome({ step: 2 });
  assert.deepEqual(learn(), ["StepsLost"]);
  assert.equal(exchange.step, 2);
  exchange.endAll();
  point.step = 2;
  begin(name(0, TRAIN));
  assert.deepEqual(hear(), ["0:0"]);
});

describe("a client whose server is away", () => {
  test("waits longer and longer, and tries at once when something new came", () => {
    open(1);
    begin(name(0));
    const waits: number[] = [];
    exchange.lost(LOST, 10);
    for (let now = 10; waits.length < 11; exchange.lost(LOST, now)) {
      waits.push(exchange.wakeAt! - now);
      now = exchange.wakeAt!;
      exchange.wake(now - 0.01);
      hear();
      exchange.wake(now);
      assert.deepEqual(hear(), ["Connect"]);
    }
    const expected = [0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10];
    assert.deepEqual(waits.map((wait) => Math.round(wait * 1000) / 1000), expected);
    exchange.wake(exchange.wakeAt!);
    exchange.connected();
    welcome();
    answer(name(0), 0, "flat@client");
    exchange.lost(LOST, 100);
    assert.equal(exchange.wakeAt, 100);
  });

  test("gives up in time, with the last cause", () => {
    exchange = make({ giveUpAfter: 1 });
    open(1);
    exchange.lost(LOST, 10);
    exchange.wake(10);
    exchange.lost(LOST, 10.9);
    assert.ok(Math.abs(exchange.wakeAt! - 10.95) < 1e-9);
    exchange.wake(11);
    exchange.lost(LOST, 11);
    assert.deepEqual(learn(), ["ConnectionLost"]);
    assert.equal(exchange.wakeAt, undefined);
  });

  test("fails at once at the first connection, unless it is patient", () => {
    exchange.start(0, { isPatient: false });
    exchange.lost(LOST, 0);
    assert.deepEqual(learn(), ["ConnectionLost"]);
    exchange = make();
    exchange.start(0, { isPatient: true });
    exchange.wake(0);
    exchange.lost(LOST, 0);
    assert.deepEqual(learn(), []);
    assert.equal(exchange.wakeAt, 0.05);
  });
});

describe("a connection that is too old", () => {
  const refuse = (newest: number) => {
    say({ type: "Fault", code: "StaleConnection", reason: "", newest, subject: "", needed: 0, limit: 0 });
  };

  test("is made again with a larger number, some times", () => {
    exchange.start(0, { isPatient: false });
    for (let attempt = 1; attempt < 10; attempt++) {
      hear();
      exchange.connected();
      hear();
      assert.equal((last as MessageOf<"Hello">).generation, attempt === 1 ? 1 : attempt * 10 - 9);
      refuse(attempt * 10);
      assert.deepEqual(hear(), ["HangUp", "Connect"]);
    }
    exchange.connected();
    refuse(200);
    assert.deepEqual(learn(), ["StaleConnection"]);
  });

  test("is not made again after another client took its place", () => {
    open(1);
    exchange.lost(new ConnectionLost("the server", "replaced", REPLACED), 0);
    assert.deepEqual(hear(), ["HangUp"]);
    const outcome = exchange.takeOutcome();
    assert.ok(outcome?.type === "Failed" && outcome.error instanceof StaleConnection);
  });
});

describe("what is closed", () => {
  test("says so to the server, and hangs up", () => {
    open(1);
    exchange.close({ forGood: true });
    assert.deepEqual(hear(), ["Bye", "HangUp"]);
    exchange.close({ forGood: true });
    assert.deepEqual(hear(), []);
  });

  test("fails whoever waits, and a connection that comes then is not used", () => {
    exchange.start(0, { isPatient: false });
    hear();
    exchange.close({ forGood: false });
    assert.deepEqual(learn(), ["ConnectionLost"]);
    assert.deepEqual(hear(), ["HangUp"]);
    exchange.connected();
    assert.deepEqual(hear(), ["HangUp"]);
  });
});

test("only wires of the phase can be sent", () => {
  open(1);
  assert.throws(() => exchange.send(name(0), fill(UPDATE, "splitonnx.micro_batches"), 0, 0.1), LocalProtocolError);
  assert.deepEqual(hear(), []);
});

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
