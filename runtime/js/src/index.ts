/**
 * `@splitonnx/client`: trains a device's part of a split model in a browser, in React Native or
 * in Node, on the ONNX Runtime that the app brings.
 */

export { SplitClient } from "./clients.js";
export type { BundleSource, ReadFile } from "./bundles.js";
export type { Batch, DataSource } from "./datasets.js";
export type { Ort, OutputTensor, TensorLike } from "./engines.js";
export * from "./errors.js";
export type { WhenUnsaved } from "./halves.js";
export { History } from "./histories.js";
export type { Evaluation, StepRecord } from "./histories.js";
export type { PartyManifest, Phase, Wire } from "./manifests.js";
export type { ConnectOptions, FitOptions, LearningRate, Outputs } from "./plans.js";
export type { SocketOptions, WebSocketLike } from "./sockets.js";
export { IndexedDbStorage, MemoryStorage } from "./storages.js";
export type { StateStorage, StorageLock } from "./storages.js";
