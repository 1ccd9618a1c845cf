// A client that is not ours: reads health, describes a model, streams one window, and
// checks every chunk. Prints what it found as JSON.
//
//     node client.js ADDRESS MODEL PATH

import { createHash } from "node:crypto";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const here = dirname(fileURLToPath(import.meta.url));
const options = { longs: Number, enums: String, oneofs: true, defaults: true };

function load(folder, name) {
  const definition = loader.loadSync(name, { ...options, includeDirs: [folder] });
  return grpc.loadPackageDefinition(definition);
}

function crc32c(data) {
  let crc = 0xffffffff;
  for (const byte of data) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0x82f63b78 : 0);
  }
  return (crc ^ 0xffffffff) >>> 0;
}

function unary(client, method, request) {
  return new Promise((resolve, reject) => {
    const deadline = new Date(Date.now() + 30000);
    client[method](request, { deadline }, (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

const [address, model, path] = process.argv.slice(2);
const { shardinit } = load(join(here, "../../protos"), "shardinit/v1/service.proto");
const standard = load(here, "health.proto");
const open = grpc.credentials.createInsecure();
const service = new shardinit.v1.InitService(address, open);
const health = new standard.grpc.health.v1.Health(address, open);
const spec = { named: { model, config: { fields: {} } } };

const found = { parts: "" };
const asked = { service: "shardinit.v1.InitService" };
found.health = (await unary(health, "Check", asked)).status;
found.leaves = (await unary(service, "DescribeModel", { spec })).leaves.map((x) => x.path);

const sha256 = createHash("sha256");
const windows = [{ path, start: [1, 0], shape: [40, 96] }];
let next = 0;
for await (const message of service.StreamShards({ spec, key: { seed: 7 }, windows })) {
  found.parts += message.part[0];
  if (message.part === "header") found.header = message.header;
  if (message.part !== "chunk") continue;
  const { offset, data } = message.chunk;
  if (offset !== next) throw new Error(`a chunk at ${offset}, expected ${next}`);
  if (crc32c(data) !== message.chunk.crc32c) throw new Error(`damaged at ${offset}`);
  sha256.update(data);
  next += data.length;
}
found.bytes = next;
found.sha256 = sha256.digest("hex");

try {
  await unary(service, "DescribeModel", { spec: { named: { model: "no-such" } } });
} catch (error) {
  found.code = grpc.status[error.code];
  found.details = error.metadata.get("grpc-status-details-bin").length;
}
service.close();
health.close();
console.log(JSON.stringify(found));
