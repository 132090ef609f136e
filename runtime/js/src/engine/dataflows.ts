/**
 * Which stage of a phase can run, which values can travel, and which can be forgotten.
 *
 * Pure bookkeeping on names, driven by the manifest's phase alone: it holds no tensor, runs nothing
 * and sends nothing.
 */

import type { Phase, Stage } from "../manifests.js";
import { traceWires } from "../pipelines.js";

/**
 * What one party's phase needs and provides: computed once, valid for every task.
 *
 * `receives` and `sends` name the wires towards this party and away from it.  `stages` are in the
 * manifest's order, which decides among several that are ready.
 */
export class Dataflow {
  readonly stages: readonly Stage[];
  readonly receives: ReadonlySet<string>;
  readonly sends: readonly string[];
  /** Stage name to the values that it needs, without its state. */
  readonly needs: ReadonlyMap<string, readonly string[]>;
  /** Values that outlive the stages: results and the state's replacements. */
  readonly kept: ReadonlySet<string>;
  /** How many stages and outgoing wires need a value, until a stage makes it again. */
  readonly uses: ReadonlyMap<string, number>;
  /** For each stage that makes values again: how many stages need each of them from then on. */
  readonly later: ReadonlyMap<string, ReadonlyMap<string, number>>;
  /** The state that is read again, with the values that it had when it was first read. */
  readonly reread: ReadonlySet<string>;

  constructor(phase: Phase, party: string) {
    this.stages = phase.stages;
    this.receives = new Set(namesOf(phase.wires.filter((wire) => wire.receiver === party)));
    this.sends = namesOf(phase.wires.filter((wire) => wire.sender === party));
    this.needs = new Map(phase.stages.map((stage) => [stage.name, listNeeds(stage)]));
    this.kept = new Set([...phase.results, ...phase.commits.values()]);
    const uses = count([...[...this.needs.values()].flat(), ...this.sends]);
    const again = this.stages.filter((stage) => stage.after.length);
    this.later = new Map(again.map((stage) => [stage.name, this.#countLater(stage)]));
    for (const later of this.later.values()) add(uses, later, -1);
    this.uses = uses;
    const read = again.flatMap((stage) => stage.inputs.filter(({ source }) => source === "state"));
    this.reread = new Set(read.map(({ name }) => name));
  }

  #countLater(stage: Stage): ReadonlyMap<string, number> {
    const after = this.stages.slice(this.stages.indexOf(stage) + 1);
    const uses = count(after.flatMap(({ name }) => this.needs.get(name)!));
    return new Map(stage.outputs.map((name) => [name, uses.get(name) ?? 0]));
  }

  /** Begin one task, in which nothing is there yet. */
  start(): Progress {
    return new Progress(this);
  }
}

/** How far one task has come. */
export class Progress {
  readonly #flow: Dataflow;
  readonly #present = new Set<string>();
  readonly #waiting: Stage[];
  #unsent: readonly string[];
  readonly #uses: Map<string, number>;

  constructor(flow: Dataflow) {
    this.#flow = flow;
    this.#waiting = [...flow.stages];
    this.#unsent = flow.sends;
    this.#uses = new Map(flow.uses);
  }

  /** Whether every stage ran, every wire arrived and every wire was sent. */
  get isFinished(): boolean {
    return !this.#waiting.length && !this.#unsent.length && !this.missing.length;
  }

  /** Wires that have not arrived. */
  get missing(): readonly string[] {
    return [...this.#flow.receives].filter((name) => !this.#present.has(name));
  }

  /** Note that these values are there: data, scalars, wires, or what a stage gave. */
  arrive(names: Iterable<string>): void {
    for (const name of names) this.#present.add(name);
  }

  /**
   * Return the first stage whose inputs are all there, if any, and count it as running.
   *
   * `hasState` says whether the state that a stage reads is there, too.
   */
  nextStage(hasState: (stage: Stage) => boolean = () => true): Stage | undefined {
    const needs = (stage: Stage) => this.#flow.needs.get(stage.name)!;
    const index = this.#waiting.findIndex(
      (stage) => needs(stage).every((name) => this.#present.has(name)) && hasState(stage),
    );
    const stage = index < 0 ? undefined : this.#waiting.splice(index, 1)[0];
    if (stage) add(this.#uses, this.#flow.later.get(stage.name) ?? new Map(), 1);
    return stage;
  }

  /**
   * Check whether anything needs this value, so that it must be kept.
   *
   * What needs it after a stage that makes it again counts only once that stage was returned.
   */
  wants(name: string): boolean {
    return (this.#uses.get(name) ?? 0) > 0 || this.#flow.kept.has(name);
  }

  /** Check whether a stage that has not run reads this state. */
  willRead(state: string): boolean {
    return this.#waiting.some((stage) => readsState(stage, state));
  }

  /** Return the outgoing wires that are there and were not returned before. */
  nextWires(): readonly string[] {
    const ready = this.#unsent.filter((name) => this.#present.has(name));
    this.#unsent = this.#unsent.filter((name) => !this.#present.has(name));
    return ready;
  }

  /** Note one use of each value as done; return those that nothing needs any more. */
  release(names: readonly string[]): readonly string[] {
    for (const name of names) this.#uses.set(name, (this.#uses.get(name) ?? 0) - 1);
    return names.filter((name) => this.#uses.get(name)! <= 0 && !this.#flow.kept.has(name));
  }
}

/**
 * Check whether tasks of a phase that follow each other can make progress side by side.
 *
 * A stage that reads a state which the phase replaces waits for the stage of the task before that
 * replaces it.  If that one needs a received wire that the reading stage does not need, the one task
 * would have to wait for the other's next message.
 */
export function canOverlap(phase: Phase, party: string): boolean {
  const { stages, values } = traceWires(phase, party);
  return [...phase.commits].every(([state, value]) => {
    const readers = phase.stages.filter((stage) => readsState(stage, state));
    const behind = [...(values.get(value) ?? [])];
    return readers.every(({ name }) => behind.every((wire) => stages.get(name)!.has(wire)));
  });
}

function readsState({ inputs }: Stage, state: string): boolean {
  return inputs.some(({ name, source }) => source === "state" && name === state);
}

function namesOf(wires: Phase["wires"]): string[] {
  return wires.map((wire) => wire.tensor.name);
}

function listNeeds(stage: Stage): readonly string[] {
  const taken = stage.inputs.filter((input) => input.source !== "state");
  return [...new Set([...taken.map((input) => input.name), ...stage.after])];
}

function add(uses: Map<string, number>, others: ReadonlyMap<string, number>, factor: number): void {
  for (const [name, number] of others) uses.set(name, (uses.get(name) ?? 0) + factor * number);
}

function count(names: readonly string[]): Map<string, number> {
  const counts = new Map<string, number>();
  for (const name of names) counts.set(name, (counts.get(name) ?? 0) + 1);
  return counts;
}
