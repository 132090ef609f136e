/** What Node has beyond browsers: bundles and state in folders. */

export { FolderStorage, openFolder } from "./storage/folders.js";
