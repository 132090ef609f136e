/** The client's side of a session as an event machine: no connection, no clock, no waiting. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { before, beforeEach, describe, test } from "node:test";

import { loadBundle } from "../src/bundles.js";
import { Exchange } from "../src/channels/exchanges.js";
import type { ExchangeOptions } from "../src/channels/exchanges.js";
import { ConnectionLost, LocalProtocolError, StaleConnection } from "../src/errors.js";
import { ACCUMULATE, TRAIN, UPDATE, findPhase } from "../src/manifests.js";
import type { PartyManifest } from "../src/manifests.js";
import { REPLACED, decodeMessage, encodeMessage } from "../src/messages.js";
import type { Message, MessageOf, TaskKey, TensorsMessage } from "../src/messages.js";
import { openFolder } from "../src/node.js";
import type { NdArrays } from "../src/tensors.js";
import { listWires } from "../src/wire/protocols.js";
import { VECTORS, makeArray } from "./fixtures.js";

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

/** Take the effects; describe each by its kind, and a message of a task by micro-batch and turn. */
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
    assert.deepEqual([microBatch, isOpen, canRepeat], [1, true, true]);
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
    for (const [task, turn] of [[1, 0], [0, 1]] as const) {
      exchange = make();
      open(2);
      begin(name(0));
      answer(name(task), turn, "flat@client");
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
    const more = { reason: "", newest, subject: "", needed: 0, limit: 0 };
    say({ type: "Fault", code: "StaleConnection", ...more });
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
  const wires = fill(UPDATE, "splitonnx.micro_batches");
  assert.throws(() => exchange.send(name(0), wires, 0, 0.1), LocalProtocolError);
  assert.deepEqual(hear(), []);
});
