// The runs of the page, as `page.py` embeds them, and what the page says of them in words and tables.
// Text of foreign origin (names, notes) is only set as textContent.
"use strict";

const DATA = JSON.parse(document.getElementById("report-data").textContent);
const find = (id) => document.getElementById(id);
const words = (name) => name.replaceAll("_", " ");

// JSON has neither NaN nor infinity: report.json has null and "inf" for them.
function numberOf(value) {
  if (value === "inf") return Infinity;
  if (value === "-inf") return -Infinity;
  return typeof value === "number" ? value : NaN;
}

function make(name, properties = {}, children = []) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// One run, with numbers for null and "inf".
function runOf({ label, report, stored_bits: storedBits }) {
  const layers = Object.fromEntries(Object.entries(report.layers).map(([name, row]) => [name, row.map(numberOf)]));
  const found = report.results.layer_drop;
  const drop = found && "layer_drop" in layers && {
    metric: found.metric,
    lowerIsBetter: found.lower_is_better,
    intact: numberOf(found.intact),
    without: found.without.map(numberOf),
  };
  const matrix = report.results.angular_distance && report.results.angular_distance.map((row) => row.map(numberOf));
  const count = Math.max(0, ...Object.values(layers).map((row) => row.length));
  const counted = layers.parameters || report.results.layer_parameters;
  const weights = counted && counted.length === count && counted.some((n) => n > 0) ? counted : null;
  return { label, report, layers, drop, matrix, count, weights, storedBits };
}

const RUNS = DATA.runs.map(runOf);

// A table of all values by layer, under a heading that opens it.
function tableOf(run) {
  const names = Object.keys(run.layers);
  const head = make("tr", {}, ["layer", ...names.map(words)].map((name) => make("th", { scope: "col", textContent: name })));
  const rows = Array.from({ length: run.count }, (_, layer) => {
    const cells = names.map((name) => make("td", { textContent: formatted(run.layers[name][layer]) }));
    return make("tr", {}, [make("th", { scope: "row", textContent: layer }), ...cells]);
  });
  const table = make("table", {}, [make("thead", {}, [head]), make("tbody", {}, rows)]);
  const scrolled = make("div", { className: "wide", tabIndex: 0 }, [table]);
  scrolled.setAttribute("role", "region");
  scrolled.setAttribute("aria-label", `${run.label}: all values by layer`);
  const meanings = names.filter((name) => DATA.measures[name]);
  const legend = meanings.map((name) => make("li", { textContent: `${words(name)}: ${DATA.measures[name]}` }));
  const summary = make("summary", { textContent: `${run.label}: all values by layer` });
  return make("details", {}, [summary, scrolled, make("ul", { className: "hint" }, legend)]);
}

// Notes, settings and versions of a run.
function recordOf(run) {
  const pairs = (record) => Object.entries(record).map(([key, value]) =>
    `${key} = ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");
  const { notes, settings, environment } = run.report;
  const lines = [...notes.map((note) => `Note: ${note}`), `Settings: ${pairs(settings)}.`, `Made with ${pairs(environment)}.`];
  const list = make("ul", { className: "hint" }, lines.map((line) => make("li", { textContent: line })));
  return make("details", {}, [make("summary", { textContent: `${run.label}: notes, settings and versions` }), list]);
}

function addTables() {
  for (const run of RUNS) {
    if (run.count) find("tables").append(tableOf(run));
    find("notes").append(recordOf(run));
  }
}
