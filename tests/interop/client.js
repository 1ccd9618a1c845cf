// A client that is not ours: reads health, describes a model, fetches its program, streams
// its leaves, and goes on where a stream broke. Prints what it found as JSON.
//
//     node client.js ADDRESS MODEL PATH [OTHER ADDRESSES]

import { createHash, randomUUID } from "node:crypto";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

import { program } from "./program.js";
import { retried } from "./retry.js";
import { whole, windows } from "./stream.js";

const here = dirname(fileURLToPath(import.meta.url));
const options = { longs: Number, enums: String, oneofs: true, defaults: true };

function load(folder, name) {
  const definition = loader.loadSync(name, { ...options, includeDirs: [folder] });
  return grpc.loadPackageDefinition(definition);
}

const CHANNEL = {
  "grpc.max_receive_message_length": 8 * 2 ** 20, // `response_bytes`
  "grpc.keepalive_time_ms": 30000, // a server that is gone is noticed
};

// One's own id of a call, which the server's log has too.
function metadata(id = randomUUID()) {
  const made = new grpc.Metadata();
  made.set("x-request-id", id);
  return made;
}

const soon = () => new Date(Date.now() + 30000);

function unary(client, method, request, told = () => {}) {
  return retried(
    () =>
      new Promise((resolve, reject) => {
        const deadline = soon();
        const sent = metadata();
        const done = (error, response) => (error ? reject(error) : resolve(response));
        const call = client[method](request, sent, { deadline }, done);
        call.on("status", (status) => told(sent, status.metadata));
      }),
  );
}

const [address, model, path, ...others] = process.argv.slice(2);
const { shardinit } = load(join(here, "../../protos"), "shardinit/v1/service.proto");
const standard = load(here, "health.proto");
const open = grpc.credentials.createInsecure();
const service = new shardinit.v1.InitService(address, open, CHANNEL);
const health = new standard.grpc.health.v1.Health(address, open);
const spec = { named: { model, config: { fields: {} } } };

const found = { parts: "" };
const about = { service: "shardinit.v1.InitService" };
found.health = (await unary(health, "Check", about)).status;
found.version = (await unary(service, "GetVersion", { min: 1, max: 1 })).version;
const described = await unary(service, "DescribeModel", { spec }, (sent, came) => {
  found.id = String(came.get("x-request-id")) === String(sent.get("x-request-id"));
});
found.leaves = described.leaves.map((leaf) => leaf.path);
const kinds = described.leaves.map((leaf) => whole(described.kinds[leaf.kind]));

// Its program, and again where it is held.
const fetched = await retried(() => program(service.GetProgram({ spec }, metadata())));
found.program = fetched.digest.toString("hex");
const again = { spec, knownSha256: fetched.digest };
found.held = (await program(service.GetProgram(again, metadata()), fetched.digest)) === null;

// The grammar of one stream, as it comes.
const wanted = [{ path, start: [1, 0], shape: [40, 96] }];
const key = { seed: 7 };
for await (const message of service.StreamShards({ spec, key, windows: wanted })) {
  found.parts += message.part[0];
  if (message.part === "header") found.header = message.header;
}

// All leaves, from all addresses in turns, whatever breaks.
const services = [address, ...others].map(
  (at) => new shardinit.v1.InitService(at, open, CHANNEL),
);
const streams = services.map(
  (each) => (request) => each.StreamShards(request, metadata(), { deadline: soon() }),
);
const request = { spec, key, windows: found.leaves.map((leaf) => ({ path: leaf })) };
found.resumed = [];
found.sha256 = [];
const resumed = (place) => found.resumed.push([place.window, place.offset]);
for await (const data of windows(streams, request, kinds, resumed)) {
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
