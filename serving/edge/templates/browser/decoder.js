// The model: onnxruntime-web's session, the tokenizer, and the loop that writes token by token.
import * as ort from "./runtime/ort.wasm.min.mjs";
import { Tokenizer } from "./runtime/tokenizers.min.mjs";

ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more would need headers that a plain server does not send
ort.env.logLevel = "error";

async function fetchJson(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: the server answers ${answer.status}`);
  return answer.json();
}

/** Return a file's bytes, and tell how much of it is there. */
async function fetchBytes(path, tell) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: the server answers ${answer.status}`);
  const total = Number(answer.headers.get("Content-Length")) || 0;
  const reader = answer.body.getReader();
  const parts = [];
  let size = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    if (total) tell(size / total);
  }
  const bytes = new Uint8Array(size);
  let place = 0;
  for (const part of parts) {
    bytes.set(part, place);
    place += part.length;
  }
  return bytes;
}

// How GPT-2's byte-level tokenizer splits text. JavaScript's \s holds U+FEFF and lacks U+0085; Unicode's white space does not.
const GPT2_SPLIT =
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+|" +
  "\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+";

/** Return a pre-tokenizer of tokenizer.json with Unicode's white space in place of JavaScript's. */
function withUnicodeSpace(part) {
  if (!part) return part;
  if (part.type === "Sequence") return { ...part, pretokenizers: part.pretokenizers.map(withUnicodeSpace) };
  if (part.type === "ByteLevel" && part.use_regex !== false) {
    const split = { type: "Split", pattern: { Regex: GPT2_SPLIT }, behavior: "Isolated", invert: false };
    // With a prefix space the split would come too early.
    return part.add_prefix_space ? part : { type: "Sequence", pretokenizers: [split, { ...part, use_regex: false }] };
  }
  if (part.type === "Split" && part.pattern.Regex) {
    const regex = part.pattern.Regex.replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}");
    return { ...part, pattern: { Regex: regex } };
  }
  return part;
}

export class Decoder {
  /** Load facts, tokenizer and one of the graphs. */
  static async load(file, tell = () => {}) {
    const report = await fetchJson("export.json");
    const words = await fetchJson("tokenizer.json");
    const settings = await fetchJson("tokenizer_config.json");
    const bytes = await fetchBytes(file, tell);
    const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    return new Decoder(session, report, new Tokenizer({ ...words, pre_tokenizer: withUnicodeSpace(words.pre_tokenizer) }, settings), bytes.length);
  }

  constructor(session, report, tokenizer, numBytes) {
    this.session = session;
    this.facts = report.model;
    this.tokenizer = tokenizer;
    this.numBytes = numBytes;
  }

  encode(text) {
    return this.tokenizer.encode(text).ids;
  }

  decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }

  emptyPast() {
    const past = {};
    this.facts.cache.forEach((layer, number) => {
      for (const [part, width] of [["key", layer.key_width], ["value", layer.value_width]]) {
        const shape = [1, layer.num_heads, 0, width];
        past[`past_key_values.${number}.${part}`] = new ort.Tensor("float32", new Float32Array(0), shape);
      }
    });
    return past;
  }

  /** Read new tokens; returns the last one's logits, the experts' weights and the cache. */
  async step(ids, numPast, past) {
    const total = numPast + ids.length;
    const output = await this.session.run({
      input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
      attention_mask: new ort.Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
      ...past,
    });
    const next = {};
    for (const name of Object.keys(past)) next[name] = output[name.replace("past_key_values", "present")];
    const width = this.facts.vocab_size;
    return { logits: output.logits.data.subarray((ids.length - 1) * width), experts: output.expert_weights, past: next };
  }

  /**
   * Yield token after token: {id, experts}; `experts` is a tensor [layer, 1, tokens read, expert] of the step that
   * led to the token. Ends at an end token, which is not yielded, at `count` tokens or at the context's end.
   */
  async *generate(ids, count, temperature = 0, isStopped = () => false) {
    let past = this.emptyPast();
    let read = 0;
    let waiting = ids;
    const most = Math.min(count, this.facts.context_length - ids.length);
    for (let written = 0; written < most; ) {
      const chunk = waiting.slice(0, this.facts.prompt_chunk);
      waiting = waiting.slice(chunk.length);
      const result = await this.step(chunk, read, past);
      read += chunk.length;
      past = result.past;
      if (waiting.length) continue;
      const id = choose(result.logits, temperature);
      if (isStopped() || this.facts.eos_token_ids.includes(id)) return;
      written += 1;
      waiting = [id];
      yield { id, experts: result.experts };
    }
  }
}

/** Return the likeliest token, or at a temperature above 0 a drawn one. */
export function choose(logits, temperature) {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  if (!(temperature > 0)) return best;
  const weights = Array.from(logits, (logit) => Math.exp((logit - logits[best]) / temperature));
  let left = Math.random() * weights.reduce((sum, weight) => sum + weight, 0);
  for (let id = 0; id < weights.length; id++) {
    left -= weights[id];
    if (left <= 0) return id;
  }
  return best;
}
