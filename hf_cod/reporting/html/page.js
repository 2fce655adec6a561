// The controls of the page, and what they change.
"use strict";

const BITS_CHOICES = [[3, 4], [2, 3, 4], [3, 4, 5, 6, 8], [4, 8]];
const measures = [...new Set(RUNS.flatMap((run) => Object.keys(run.layers)))];
const state = {
  measure: measures[0],
  depth: null, // of the selected layer, in 0..1: half-way through it, as a share of the depth of its model
  kind: "removed",
  importance: null,
  choices: BITS_CHOICES[0],
  spread: DATA.spread,
  budgets: {},
};

const selectedLayer = (run) => (state.depth === null ? null : Math.min(run.count - 1, Math.floor(state.depth * run.count)));

function select(run, layer) {
  const depth = (layer + 0.5) / run.count;
  if (depth === state.depth) return;
  state.depth = depth;
  drawAllBars();
}

// ---- importance and plans

// Scores of a run by the chosen measure, the higher the more the layer matters; null if one is not finite.
function scoresOf(run) {
  const values = run.layers[state.importance];
  if (!values) return null;
  return state.importance === "layer_drop" && run.drop && !run.drop.lowerIsBetter ? values.map((v) => -v) : values;
}

// The plan of a run: one value per layer, the lost energy of each layer, and the bits that are stored.
function planOf(run) {
  const scores = scoresOf(run);
  if (!scores) return null;
  const weights = run.weights || Array(run.count).fill(1);
  const budget = state.budgets[state.kind];
  if (state.kind === "removed") {
    const removed = leastCosts(scores, budget);
    const values = scores.map((_, layer) => (removed.includes(layer) ? 1 : 0));
    return { values, removed, lost: values, left: values.map((value) => 1 - value), weights };
  }
  if (!scores.every(Number.isFinite)) return null;
  const values = allocate(scores, weights, { ...state, budget });
  if (state.kind === "sparsity") {
    return { values, removed: [], lost: values.map(lostBySparsity), left: values.map((v) => 1 - v), weights };
  }
  const stored = values.map((bits) => bits + DATA.scale_bits);
  return { values, removed: [], lost: values.map(lostByBits), stored, weights };
}

function bytes(count) {
  const [unit, name] = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([size]) => count >= size) || [1, "bytes"];
  return `${(count / unit).toFixed(unit === 1 ? 0 : 2)} ${name}`;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

// Bits per weight of a plan, over the bits per weight before it; NaN if the latter are not known.
function sizeOf(run, plan) {
  const mean = weightedMean(plan.stored || plan.left.map((share) => share * (run.storedBits || 1)), plan.weights);
  const before = run.storedBits || (plan.stored ? NaN : 1);
  const total = run.weights && run.storedBits ? run.weights.reduce((sum, n) => sum + n, 0) : NaN;
  return { share: mean / before, bytes: (total * mean) / 8, before: (total * before) / 8, mean };
}

function resultOf(run, plan) {
  if (!plan) return `${words(state.importance)}: not measured in all layers of this run.`;
  const size = sizeOf(run, plan);
  const parts = [];
  if (state.kind === "removed") parts.push(`Removed: ${plan.removed.join(", ") || "none"}`);
  else parts.push(`Mean ${words(state.kind)}: ${weightedMean(plan.values, plan.weights).toFixed(4)}`);
  const counted = Number.isFinite(size.bytes) ? `${bytes(size.bytes)} of ${bytes(size.before)}` : null;
  const share = Number.isFinite(size.share) ? percent(size.share) : `${size.mean.toFixed(3)} bits per weight`;
  parts.push(`Size of the layers: ${counted ? `${counted} (${share})` : share}`);
  if (run.drop) {
    const expected = expectedMetric(run.drop, plan.lost);
    const name = words(run.drop.metric);
    parts.push(`Expected ${name}: ${formatted(expected).replace("not measured", "unknown")} (intact: ${formatted(run.drop.intact)})`);
  }
  return `${parts.join(". ")}.`;
}

// ---- charts

// A chart in which arrow keys move along the layers, in its figure with a heading and a readout.
function barChart(run, place, draw, valueText) {
  const svg = svgElement("svg", { role: "slider", tabindex: 0, "aria-valuemin": 0, "aria-valuemax": run.count - 1 });
  const readout = make("p", { className: "readout" });
  const result = make("p", { className: "result" });
  result.setAttribute("aria-live", "polite");
  find(place).append(make("div", { className: "chart" }, [make("h3", { textContent: run.label }), result, svg, readout]));
  const pointed = (event) => select(run, layerAt(svg, event, run.count));
  svg.addEventListener("pointermove", pointed);
  svg.addEventListener("pointerdown", pointed);
  svg.addEventListener("keydown", (event) => {
    const layer = selectedLayer(run);
    const from = layer === null ? -1 : layer;
    const to = { ArrowRight: from + 1, ArrowUp: from + 1, ArrowLeft: from - 1, ArrowDown: from - 1, Home: 0,
      End: run.count - 1, PageUp: from + 5, PageDown: from - 5 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(run, clamp(to, 0, run.count - 1));
  });
  return () => {
    const { name, text } = draw(svg, result);
    const layer = selectedLayer(run);
    const told = layer === null ? "no layer selected" : `layer ${layer}: ${valueText(layer, text)}`;
    svg.setAttribute("aria-label", `${run.label}: ${name}, by layer`);
    svg.setAttribute("aria-valuenow", layer === null ? 0 : layer);
    svg.setAttribute("aria-valuetext", told);
    readout.textContent = layer === null ? "Point at a bar, or move with the arrow keys." : told;
  };
}

function drawMeasure(run, svg) {
  const name = state.measure;
  const values = run.layers[name] || Array(run.count).fill(NaN);
  const range = RUNS.flatMap((each) => each.layers[name] || []);
  const shift = name === "layer_drop" && run.drop ? run.drop.intact : 0;
  const pairs = (run.report.results.intervals || {})[name] || [];
  const intervals = pairs.map((pair) => pair.map((end) => numberOf(end) - shift));
  drawBars(svg, { values, range, intervals, selected: selectedLayer(run) });
  const text = (layer) => {
    const [low, high] = intervals[layer] || [NaN, NaN];
    const range = Number.isFinite(low) && Number.isFinite(high) ? ` (95 %: ${formatted(low)} to ${formatted(high)})` : "";
    return `${words(name)} ${formatted(values[layer])}${range}`;
  };
  return { name: words(name), text };
}

function drawPlan(run, svg, result) {
  const plan = planOf(run);
  result.textContent = resultOf(run, plan);
  const removal = state.kind === "removed";
  const values = !plan ? Array(run.count).fill(NaN) : removal ? scoresOf(run) : plan.values;
  const reference = plan && !removal ? state.budgets[state.kind] : NaN;
  const range = removal ? RUNS.flatMap((each) => scoresOf(each) || []) : values;
  drawBars(svg, { values, range, marked: plan ? plan.removed : [], reference, selected: selectedLayer(run) });
  const shown = removal ? state.importance : state.kind;
  const removed = (layer) => (plan && plan.removed.includes(layer) ? ", removed" : "");
  return { name: words(shown), text: (layer) => `${words(shown)} ${formatted(values[layer])}${removed(layer)}` };
}

// A heat map in which arrow keys move along layers and distances.
function matrixChart(run, farthest) {
  const svg = svgElement("svg", { role: "application", tabindex: 0, "aria-roledescription": "heat map" });
  svg.setAttribute("aria-label", `${run.label}: angular distance between layers; arrow keys move`);
  const readout = make("p", { className: "readout", textContent: "No cell selected." });
  readout.setAttribute("aria-live", "polite");
  find("matrices").append(make("div", { className: "chart" }, [make("h3", { textContent: run.label }), svg, readout]));
  const count = run.matrix.length;
  let cell = null;
  const show = ([layer, next]) => {
    cell = [layer, clamp(next, 1, count - layer)];
    outlineCell(svg, count, ...cell);
    const to = cell[0] + cell[1] === count ? "the output" : `layer ${cell[0] + cell[1]}`;
    readout.textContent = `layer ${cell[0]} to ${to} (n = ${cell[1]}): ${formatted(run.matrix[cell[0]][cell[1] - 1])}`;
    if (count === run.count) select(run, cell[0]);
  };
  svg.addEventListener("pointermove", (event) => show(cellAt(svg, event, count)));
  svg.addEventListener("pointerdown", (event) => show(cellAt(svg, event, count)));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!step) return;
    event.preventDefault();
    show(cell ? [clamp(cell[0] + step[0], 0, count - 1), cell[1] + step[1]] : [0, 1]);
  });
  return () => {
    drawMatrix(svg, run.matrix, farthest);
    if (cell) outlineCell(svg, count, ...cell);
  };
}

const withMatrix = RUNS.filter((run) => run.matrix && run.matrix.length);
const farthest = Math.max(1e-9, ...withMatrix.flatMap((run) => run.matrix.flat()).filter(Number.isFinite));
const withLayers = RUNS.filter((run) => run.count > 0);
const bars = withLayers.map((run) =>
  barChart(run, "bars", (svg) => drawMeasure(run, svg), (layer, text) => text(layer)));
const plans = withLayers.map((run) =>
  barChart(run, "plans", (svg, result) => drawPlan(run, svg, result), (layer, text) => text(layer)));
const matrices = withMatrix.map((run) => matrixChart(run, farthest));

function drawAllBars() {
  for (const draw of bars) draw();
  if (state.importance) for (const draw of plans) draw();
}

// ---- controls

// The ends and the step of the slider for each kind, and where it starts.
function rangeOf(kind) {
  if (kind === "sparsity") return { min: 0, max: 0.95, step: 0.01, start: 0.5 };
  if (kind === "removed") {
    const most = Math.min(...withLayers.map((run) => run.count)) - 1;
    return { min: 0, max: most, step: 1, start: Math.min(most, Math.ceil(most / 8)) };
  }
  const [low, high] = [state.choices[0], state.choices[state.choices.length - 1]];
  return { min: low, max: high, step: 0.01, start: (low + high) / 2 };
}

function showBudget() {
  const { kind } = state;
  const range = rangeOf(kind);
  if (state.budgets[kind] === undefined) state.budgets[kind] = range.start;
  state.budgets[kind] = clamp(state.budgets[kind], range.min, range.max);
  const amount = find("amount");
  Object.assign(amount, { min: range.min, max: range.max, step: range.step });
  amount.value = state.budgets[kind];
  find("amount-name").textContent = kind === "removed" ? "removed layers" : `mean ${kind}`;
  find("amount-value").textContent = kind === "removed" ? state.budgets[kind] : state.budgets[kind].toFixed(2);
  find("spread-label").hidden = kind !== "sparsity";
  find("spread").value = state.spread;
  find("spread-value").textContent = state.spread.toFixed(2);
  find("choices-label").hidden = kind !== "bits";
  const unit = RUNS.some((run) => run.weights) ? "weighted by the layers' weights" : "each layer counted alike, as the report has no sizes";
  const told = { removed: `The layers of least ${words(state.importance)} are removed (dark).`,
    sparsity: `Zeros follow the scores linearly, within λ of the mean (dashed), ${unit}.`,
    bits: `One of the choices for each layer, ${unit}; ${DATA.scale_bits.toFixed(3)} bits per weight of scales are added to the size.` };
  const loss = RUNS.some((run) => run.drop)
    ? " The expected metric is an estimate from the layer drop, not a measurement: hf-cod fit measures." : "";
  find("budget-meaning").textContent = told[kind] + loss;
  drawAllBars();
}

function options(select, names, texts = names.map(words)) {
  select.replaceChildren(...names.map((value, i) => make("option", { value, textContent: texts[i] })));
}

function showMeasure() {
  find("measure-meaning").textContent = DATA.measures[state.measure] || "";
  drawAllBars();
}

function listen(id, event, change) {
  find(id).addEventListener(event, (happened) => change(happened.target.value));
}

function start() {
  for (const line of DATA.summary) find("summary").append(make("li", { textContent: line }));
  options(find("measure"), measures);
  listen("measure", "change", (value) => { state.measure = value; showMeasure(); });
  find("linked").hidden = withLayers.length < 2;
  find("angles").hidden = !withMatrix.length;
  const scored = DATA.importance.filter((name) => measures.includes(name));
  find("budget").hidden = !scored.length;
  if (scored.length) {
    state.importance = scored[0];
    options(find("importance"), scored);
    options(find("choices"), BITS_CHOICES.map((_, i) => String(i)), BITS_CHOICES.map((each) => each.join(", ")));
    listen("kind", "change", (value) => { state.kind = value; showBudget(); });
    listen("importance", "change", (value) => { state.importance = value; showBudget(); });
    listen("choices", "change", (value) => { state.choices = BITS_CHOICES[value]; delete state.budgets.bits; showBudget(); });
    listen("amount", "input", (value) => { state.budgets[state.kind] = Number(value); showBudget(); });
    listen("spread", "input", (value) => { state.spread = Number(value); showBudget(); });
  }
  find("layers").hidden = !withLayers.length;
  showMeasure();
  if (scored.length) showBudget();
  for (const draw of matrices) draw();
  addTables();
  window.addEventListener("resize", () => { drawAllBars(); for (const draw of matrices) draw(); });
}

start();
