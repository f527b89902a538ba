// The page: loads the model, writes on request, draws which experts worked.
const at = (id) => document.getElementById(id);
let decoder = null;
let stopped = false;

async function load() {
  at("write").disabled = true;
  at("loading").hidden = false;
  const { Decoder } = await import("./decoder.js");
  const began = performance.now();
  decoder = await Decoder.load(at("weights").value, (share) => (at("loading").value = share));
  const facts = decoder.facts;
  at("facts").textContent =
    `${facts.model_type}, ${(facts.num_parameters / 1e6).toFixed(1)} M parameters, ` +
    `${facts.num_moe_layers} layers of ${facts.num_experts} experts, ${(decoder.numBytes / 1e6).toFixed(1)} MB, ` +
    `loaded in ${((performance.now() - began) / 1000).toFixed(1)} s`;
  at("count").max = facts.context_length;
  drawLayers(facts);
  at("loading").hidden = true;
  at("write").disabled = false;
  window.decoder = decoder; // for the console
}

function drawLayers(facts) {
  at("experts").hidden = facts.num_moe_layers === 0;
  const rows = Array.from({ length: facts.num_moe_layers }, (_, layer) => {
    const row = document.createElement("div");
    row.className = "layer";
    const name = document.createElement("span");
    name.textContent = `layer ${layer + 1}`;
    const cells = document.createElement("div");
    cells.className = "cells";
    for (let expert = 0; expert < facts.num_experts; expert++) {
      const cell = document.createElement("div");
      cell.className = "cell";
      cell.title = `layer ${layer + 1}, expert ${expert}`;
      cell.append(document.createElement("i"));
      cells.append(cell);
    }
    row.append(name, cells);
    return row;
  });
  at("layers").replaceChildren(...rows);
}

/** Add a step's weights to the sums and color the squares, the largest sum of a layer darkest. */
function drawExperts(tensor, sums) {
  const [layers, , tokens, experts] = tensor.dims;
  const weights = tensor.data;
  for (let layer = 0; layer < layers; layer++) {
    const row = sums[layer];
    const last = ((layer + 1) * tokens - 1) * experts;
    for (let token = 0; token < tokens; token++)
      for (let expert = 0; expert < experts; expert++) row[expert] += weights[(layer * tokens + token) * experts + expert];
    const most = Math.max(...row);
    const total = row.reduce((sum, weight) => sum + weight, 0);
    at("layers").children[layer].lastChild.childNodes.forEach((cell, expert) => {
      cell.firstChild.style.opacity = most > 0 ? row[expert] / most : 0;
      cell.classList.toggle("now", weights[last + expert] > 0);
      cell.title = `layer ${layer + 1}, expert ${expert}: ${((100 * row[expert]) / total).toFixed(0)} % of the weight`;
    });
  }
}

async function write() {
  const prompt = at("prompt").value;
  const ids = decoder.encode(prompt);
  const room = decoder.facts.context_length - ids.length;
  if (!ids.length || room < 1) {
    const wanted = `1 to ${decoder.facts.context_length - 1}`;
    at("speed").textContent = `The prompt has ${ids.length} tokens; the model takes ${wanted}.`;
    return;
  }
  stopped = false;
  at("write").disabled = at("weights").disabled = true;
  at("stop").disabled = false;
  at("given").textContent = prompt;
  at("written").textContent = "";
  at("speed").textContent = `Reading ${ids.length} tokens …`;
  const { num_moe_layers: layers, num_experts: experts } = decoder.facts;
  const sums = Array.from({ length: layers }, () => new Float64Array(experts));
  const written = [];
  let began = 0;
  try {
    for await (const step of decoder.generate(ids, Number(at("count").value), Number(at("temperature").value), () => stopped)) {
      written.push(step.id);
      at("written").textContent = decoder.decode(written).replace(/\ufffd+$/, "");
      drawExperts(step.experts, sums);
      if (written.length === 1) began = performance.now();
      else {
        const speed = (1000 * (written.length - 1)) / (performance.now() - began);
        at("speed").textContent = `${written.length} tokens, ${speed.toFixed(0)} tokens per second`;
      }
      await new Promise((resume) => setTimeout(resume)); // let the page be drawn
    }
    if (!written.length) at("speed").textContent = "The model ends the text here.";
  } finally {
    at("write").disabled = at("weights").disabled = false;
    at("stop").disabled = true;
  }
}

const told = (work) => work().catch((error) => window.showTrouble(`The model does not run here: ${error.message}`));

if (!window.cannotRun) {
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (decoder && !at("write").disabled) told(write);
  });
  at("stop").addEventListener("click", () => (stopped = true));
  at("weights").addEventListener("change", () => told(load));
  told(load);
} else {
  at("loading").hidden = true;
}
