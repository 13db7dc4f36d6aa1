// Greedy text generation with a bundle in JavaScript: token ids in, token ids out.
//
//   npm install onnxruntime-node                     (or onnxruntime-web, which runs in browsers and in Node)
//   python graph_for_npm.py BUNDLE graph.onnx        (says why)
//   node generate.mjs BUNDLE graph.onnx IDS COUNT [PACKAGE]
//   node generate.mjs ../../models/edgelm_models/stories-6m-int8 graph.onnx 424,437,259,396 20 onnxruntime-web
//
// IDS are the prompt's token ids with commas between them. The new ids go to standard output. The graph's inputs and
// outputs are described in docs/bundle-format.md; the bundle's hashes are not checked here.
import { readFile } from "node:fs/promises";
import { join } from "node:path";

const [folder, graphFile, prompt, count, library = "onnxruntime-node"] = process.argv.slice(2);
if (count === undefined) {
  console.error("usage: node generate.mjs BUNDLE GRAPH IDS COUNT [onnxruntime-node | onnxruntime-web]");
  process.exit(2);
}
const imported = await import(library);
const ort = imported.default ?? imported;
const { graph, architecture } = JSON.parse(await readFile(join(folder, "bundle.json"), "utf8"));

const session = await ort.InferenceSession.create(await readFile(graphFile), {
  executionProviders: [library === "onnxruntime-web" ? "wasm" : "cpu"],
  // Without it, x86 CPUs without VNNI compute wrong products of 8-bit weights with 8-bit activations (the recipe w8a8).
  extra: { session: { x64quantprecision: "1" } },
  externalData: [{ path: graph.weights_file, data: await readFile(join(folder, graph.weights_file)) }],
});

const ids = prompt.split(",").map(Number);
const capacity = ids.length + Number(count);
if (capacity > architecture.context_length) {
  console.error(`${capacity} tokens do not fit the context of ${architecture.context_length}`);
  process.exit(1);
}
const cacheShape = [1, architecture.num_key_value_heads, capacity, architecture.head_dim];
const cacheSize = cacheShape.reduce((product, size) => product * size);
let cache = {}; // past_key_values.0.key, past_key_values.0.value, ... -> keys or values of all tokens so far
for (const [name] of layers(graph.past_names, graph.present_names)) {
  cache[name] = new ort.Tensor("float32", new Float32Array(cacheSize), cacheShape);
}

let past = 0;
let fed = ids;
const made = [];
while (made.length < Number(count)) {
  const total = past + fed.length;
  const inputs = {
    [graph.input_ids]: int64(fed, [1, fed.length]),
    [graph.seqlens_k]: int32([total - 1], [1]),
    [graph.total_sequence_length]: int32([total], []),
    [graph.logits_index]: int64([fed.length - 1], [1]),
    ...cache,
  };
  if (graph.position_ids !== null) {
    inputs[graph.position_ids] = int64(fed.map((_, i) => past + i), [1, fed.length]);
  }
  const wanted = [graph.logits, ...layers(graph.present_names).map(([name]) => name)];
  const outputs = await session.run(inputs, wanted);
  cache = Object.fromEntries(
    layers(graph.past_names, graph.present_names).map(([before, after]) => [before, outputs[after]]),
  );
  const logits = outputs[graph.logits].data;
  const next = logits.reduce((best, value, id) => (value > logits[best] ? id : best), 0);
  made.push(next);
  past = total;
  fed = [next];
}
console.log(made.join(","));

/** The names of every layer's key and value, once for each of `patterns`. */
function layers(...patterns) {
  const numbers = Array.from({ length: architecture.num_layers }, (_, layer) => layer);
  return numbers.flatMap((layer) =>
    [0, 1].map((part) => patterns.map((pattern) => pattern[part].replace("{layer}", layer))),
  );
}

function int64(values, shape) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
}

function int32(values, shape) {
  return new ort.Tensor("int32", Int32Array.from(values), shape);
}
