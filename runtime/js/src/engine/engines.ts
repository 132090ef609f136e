/**
 * Running stage graphs with the ONNX Runtime that the app brings.
 *
 * The only module that touches ONNX Runtime: its values and its exceptions stay in here.  It knows
 * graphs, arrays and options, and nothing of phases, wires or training.
 */

import type { InferenceSession, Tensor, TensorConstructor } from "onnxruntime-common";
import type { Env, InferenceSessionFactory } from "onnxruntime-common";

import { StageFailed, UnusableData, UsageError } from "../errors.js";
import { describeKernelError } from "../kernel_errors.js";
import { checkGraph, isOrtFormat } from "../gate/gates.js";
import { viewElements } from "../tensors.js";
import type { Dtype, Elements, NdArray } from "../tensors.js";

/** What an ONNX Runtime package exports: `import * as ort from "onnxruntime-web"`. */
export interface Ort {
  readonly InferenceSession: InferenceSessionFactory;
  readonly Tensor: TensorConstructor;
  readonly env?: Pick<Env, "wasm"> & Partial<Pick<Env, "webgpu">>;
}

/** What is used here of WebGPU's device. */
interface Gpu {
  pushErrorScope(filter: "validation"): void;
  popErrorScope(): Promise<{ readonly message: string } | null>;
}

/**
 * A tensor in the words of ONNX Runtime, as data are given to and taken from this package.
 *
 * `Tensor`s of ONNX Runtime are such.  Without a `type` the elements decide: `float32` for
 * a Float32Array, `int64` for a BigInt64Array, and so on.
 */
export interface TensorLike {
  readonly type?: string;
  readonly dims: readonly number[];
  readonly data: unknown;
}

/** A tensor that this package returns. */
export interface OutputTensor extends TensorLike {
  readonly type: Tensor.Type;
  readonly data: Elements;
}

/** A stage graph that is ready to run. */
export interface LoadedStage {
  readonly name: string;
  readonly outputs: readonly string[];
  readonly session: InferenceSession;
}

const TYPES: Readonly<Record<Dtype, Tensor.Type>> = {
  BOOL: "bool",
  U8: "uint8",
  I8: "int8",
  U16: "uint16",
  I16: "int16",
  F16: "float16",
  U32: "uint32",
  I32: "int32",
  F32: "float32",
  U64: "uint64",
  I64: "int64",
  F64: "float64",
};
const DTYPES = new Map(Object.entries(TYPES).map(([dtype, type]) => [type, dtype as Dtype]));
const INFERRED: Readonly<Record<string, Dtype>> = {
  Uint8Array: "U8",
  Int8Array: "I8",
  Uint16Array: "U16",
  Int16Array: "I16",
  Float16Array: "F16",
  Uint32Array: "U32",
  Int32Array: "I32",
  Float32Array: "F32",
  BigUint64Array: "U64",
  BigInt64Array: "I64",
  Float64Array: "F64",
};

/**
 * Settings without which ONNX Runtime replaces quantized operators by kernels that compute
 * something else: see splitonnx/session_settings.py.
 */
const EXACT_SETTINGS: Readonly<Record<string, string>> = {
  disable_quant_qdq: "1",
  disable_double_qdq_remover: "1",
};

/**
 * Add the settings to the app's options, which may name other ones, and other values of these.
 *
 * With memory patterns, from the second run on, all results would be in one block, beside what the
 * first run freed.
 */
function addSettings(options: InferenceSession.SessionOptions): InferenceSession.SessionOptions {
  const extra = options.extra ?? {};
  const session = { ...EXACT_SETTINGS, ...(extra["session"] as object | undefined) };
  return { logSeverityLevel: 4, enableMemPattern: false, ...options, extra: { ...extra, session } };
}

/**
 * Convert a tensor of the app; `name` is for the error.
 *
 * @throws UnusableData: it is not a tensor, or its elements are not as declared.
 */
export function takeTensor(name: string, tensor: TensorLike): NdArray {
  const { type, dims, data } = tensor;
  const inferred = ArrayBuffer.isView(data) ? INFERRED[data.constructor.name] : undefined;
  const dtype = type === undefined ? inferred : DTYPES.get(type as Tensor.Type);
  if (inferred === undefined || dtype === undefined || !Array.isArray(dims)) {
    throw new UnusableData(`'${name}' should have dims and the elements of a numeric tensor`);
  }
  const elements = bitsOf(data as Elements, dtype);
  const size = (dims as readonly number[]).reduce((product, dim) => product * dim, 1);
  if (elements.length !== size) {
    throw new UnusableData(`'${name}' has ${elements.length} elements for the shape [${dims}]`);
  }
  const own = INFERRED[elements.constructor.name];
  if (own !== dtype && !(own === "U8" && dtype === "BOOL") && !(own === "U16" && dtype === "F16")) {
    throw new UnusableData(`'${name}' is ${type}, but its elements are a ${own}`);
  }
  return { dtype, shape: dims as readonly number[], data: elements };
}

/** Convert an array to a tensor for the app. */
export function giveTensor({ dtype, shape, data }: NdArray): OutputTensor {
  return { type: TYPES[dtype], dims: shape, data };
}

/** Newer ONNX Runtimes have 16-bit floats in an array type of their own. */
function bitsOf(data: Elements, dtype: Dtype): Elements {
  if (dtype !== "F16" || data instanceof Uint16Array) return data;
  return viewElements(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), "F16");
}

/**
 * Loads stage graphs and runs them; `options` go to ONNX Runtime, with settings for exact results.
 *
 * `trusted` means that the app trusts whoever made the graphs: only then are they loaded in
 * ORT format, which no gate reads.
 */
export class Engine {
  readonly #ort: Ort;
  readonly #options: InferenceSession.SessionOptions;
  readonly #trusted: boolean;
  readonly #sessions: InferenceSession[] = [];

  /** @throws UsageError: ONNX Runtime is set to detach every tensor that it receives. */
  constructor(
    ort: Ort,
    options: InferenceSession.SessionOptions = {},
    { trusted = false }: { trusted?: boolean } = {},
  ) {
    if (ort.env?.wasm?.proxy) {
      throw new UsageError(
        "env.wasm.proxy moves tensors to ONNX Runtime's worker for good; run the client itself in " +
          "a worker instead",
      );
    }
    this.#ort = ort;
    this.#options = options;
    this.#trusted = trusted;
  }

  /**
   * Load a stage graph after the gate has checked it.
   *
   * @throws ForbiddenGraph: it is not a graph as bundles have them; ONNX Runtime has not seen it.
   * @throws StageFailed: ONNX Runtime refuses it for another reason.
   */
  async load(name: string, graph: Uint8Array): Promise<LoadedStage> {
    if (!(this.#trusted && isOrtFormat(graph))) checkGraph(name, graph);
    try {
      const options = addSettings(this.#options); // its own: ONNX Runtime adds to them
      const session = await this.#ort.InferenceSession.create(graph, options);
      this.#sessions.push(session);
      return { name, outputs: session.outputNames, session };
    } catch (error) {
      throw new StageFailed(name, describeError(error));
    }
  }

  /** Hand an array to ONNX Runtime; it must not be changed afterwards. */
  fromArray({ dtype, shape, data }: NdArray): Tensor {
    return new this.#ort.Tensor(TYPES[dtype], data as Tensor.DataType, shape);
  }

  /** View a tensor as an array; only numeric tensors in this side's memory can be. */
  toArray(tensor: Tensor): NdArray {
    return takeTensor("a stage's output", tensor);
  }

  /**
   * Run a stage and return its outputs by name, in this side's memory.
   *
   * @throws StageFailed: an operator failed, or the feeds are not the graph's inputs.
   */
  async run(stage: LoadedStage, feeds: ReadonlyMap<string, Tensor>): Promise<Map<string, Tensor>> {
    try {
      const gpu = await this.#findGpu();
      gpu?.pushErrorScope("validation");
      const running = stage.session.run(Object.fromEntries(feeds), stage.outputs);
      // ONNX Runtime continues where a GPU refuses a kernel, with whatever its memory held.
      const outputs = await running.finally(async () => {
        const refusal = await gpu?.popErrorScope();
        if (refusal) throw new Error(`the GPU refuses a kernel: ${refusal.message}`);
      });
      const tensors = new Map(Object.entries(outputs as Record<string, Tensor>));
      for (const tensor of tensors.values()) {
        if (tensor.location !== "cpu") await tensor.getData(true); // frees what the GPU holds
      }
      return tensors;
    } catch (error) {
      throw new StageFailed(stage.name, describeError(error));
    }
  }

  /** Release what ONNX Runtime holds for the loaded stages. */
  async release(): Promise<void> {
    await Promise.all(this.#sessions.splice(0).map((session) => session.release()));
  }

  /** Find the device of ONNX Runtime's WebGPU provider; only after a session was made with it. */
  async #findGpu(): Promise<Gpu | undefined> {
    const providers = this.#options.executionProviders ?? [];
    const names = providers.map((one) => (typeof one === "string" ? one : one.name));
    if (!names.includes("webgpu")) return undefined;
    return (await this.#ort.env?.webgpu?.device) as Gpu | undefined;
  }
}

/** What ONNX Runtime throws has no class of its own. */
function describeError(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return describeKernelError(text).slice(0, 400);
}
