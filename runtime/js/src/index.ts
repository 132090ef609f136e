/**
 * `@splitonnx/client`: trains a device's part of a split model in a browser, in React Native or
 * in Node, on the ONNX Runtime that the app brings.
 */

export type { BundleSource, ReadFile } from "./bundles.js";
export type { SharingTerms } from "./channels/greetings.js";
export type { SocketOptions, WebSocketLike } from "./channels/websockets.js";
export { SplitClient } from "./client/clients.js";
export type { Batch, DataSource } from "./client/datasets.js";
export { History } from "./client/histories.js";
export type { Evaluation, StepRecord } from "./client/histories.js";
export type {
  ConnectOptions,
  FitOptions,
  LearningRate,
  Outputs,
  StepOptions,
} from "./client/options.js";
export type { Duration, Schedule } from "./schedules.js";
export type { WhenUnsaved } from "./client/runners.js";
export type { Ort, OutputTensor, TensorLike } from "./engine/engines.js";
export * from "./errors.js";
export type { PartyManifest, Phase, Wire } from "./manifests.js";
export { IndexedDbStorage, MemoryStorage } from "./storage/storages.js";
export type { StateStorage, StorageLock } from "./storage/storages.js";
