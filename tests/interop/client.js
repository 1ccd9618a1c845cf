// A client that is not ours: reads health, describes a model, streams its leaves, and goes
// on where a stream broke. Prints what it found as JSON.
//
//     node client.js ADDRESS MODEL PATH [OTHER ADDRESSES]

import { createHash } from "node:crypto";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

import { windows } from "./stream.js";

const here = dirname(fileURLToPath(import.meta.url));
const options = { longs: Number, enums: String, oneofs: true, defaults: true };

function load(folder, name) {
  const definition = loader.loadSync(name, { ...options, includeDirs: [folder] });
  return grpc.loadPackageDefinition(definition);
}

function unary(client, method, request) {
  return new Promise((resolve, reject) => {
    const deadline = new Date(Date.now() + 30000);
    client[method](request, { deadline }, (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

const [address, model, path, ...others] = process.argv.slice(2);
const { shardinit } = load(join(here, "../../protos"), "shardinit/v1/service.proto");
const standard = load(here, "health.proto");
const open = grpc.credentials.createInsecure();
const service = new shardinit.v1.InitService(address, open);
const health = new standard.grpc.health.v1.Health(address, open);
const spec = { named: { model, config: { fields: {} } } };

const found = { parts: "" };
const about = { service: "shardinit.v1.InitService" };
found.health = (await unary(health, "Check", about)).status;
found.leaves = (await unary(service, "DescribeModel", { spec })).leaves.map((x) => x.path);

// The grammar of one stream, as it comes.
const wanted = [{ path, start: [1, 0], shape: [40, 96] }];
const key = { seed: 7 };
for await (const message of service.StreamShards({ spec, key, windows: wanted })) {
  found.parts += message.part[0];
  if (message.part === "header") found.header = message.header;
}

// All leaves, from all addresses in turns, whatever breaks.
const services = [address, ...others].map((at) => new shardinit.v1.InitService(at, open));
const request = { spec, key, windows: found.leaves.map((leaf) => ({ path: leaf })) };
found.resumed = [];
found.sha256 = [];
const resumed = (place) => found.resumed.push([place.window, place.offset]);
for await (const data of windows(services, request, resumed)) {
  found.sha256.push(createHash("sha256").update(data).digest("hex"));
}
for (const each of services) each.close();

try {
  await unary(service, "DescribeModel", { spec: { named: { model: "no-such" } } });
} catch (error) {
  found.code = grpc.status[error.code];
  found.details = error.metadata.get("grpc-status-details-bin").length;
}
service.close();
health.close();
console.log(JSON.stringify(found));
