// Bars and heat maps as SVG, redrawn whenever something changes. Colours come from report.css, by class.
"use strict";

const NAMESPACE = "http://www.w3.org/2000/svg";
// Above this ratio between the largest and the smallest value, a linear scale shows only the largest.
const LOG_RATIO = 20;
const MARGIN = { left: 58, right: 8, top: 10, bottom: 30 };
const BAR_HEIGHT = 190;
const LARGEST_MATRIX = 460;
// viridis at nine equidistant places, from small to large values.
const VIRIDIS = [
  [68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140],
  [40, 174, 128], [94, 201, 98], [173, 220, 48], [253, 231, 37],
];

function svgElement(name, attributes, text) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Four significant digits, all digits before the point, "not measured" for NaN.
function formatted(value) {
  if (Number.isNaN(value)) return "not measured";
  if (!Number.isFinite(value)) return value > 0 ? "infinite" : "-infinite";
  const size = Math.abs(value);
  if (size >= 10000 && size < 1e7) return Math.round(value).toLocaleString("en");
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(3);
  return String(Number(value.toPrecision(4)));
}

// The same for the left margin: at most about seven signs.
function tickText(value) {
  const size = Math.abs(value);
  if (size === 0 || (size >= 1e-3 && size < 1e5)) return String(Number(value.toPrecision(4)));
  return Number(value.toPrecision(2)).toExponential().replace("e+", "e");
}

// Distance between the numbers below or beside `count` places, of which at most `most` have room.
const everyOf = (count, most) => [1, 2, 5, 10, 20, 50, 100].find((step) => count <= step * most) || Math.ceil(count / most);

// The width of a chart, as of its place on the page; its text then has the size of the page's text.
const widthOf = (svg) => Math.max(svg.parentNode.clientWidth || 0, 240);

function resized(svg, width, height) {
  svg.replaceChildren();
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
}

function isWide(values) {
  return values.length > 0 && Math.min(...values) > 0 && Math.max(...values) > LOG_RATIO * Math.min(...values);
}

// 1, 2 or 5 times a power of ten, at least a quarter of the range.
function niceStep(range) {
  const rough = range / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough * (1 - 1e-9));
}

// Places of values on the vertical axis, and its ticks: logarithmic if the values differ by more than LOG_RATIO.
function scaleOf(values, bottom, top, extra = []) {
  const known = [...values, ...extra].filter(Number.isFinite);
  const logarithmic = isWide(values.filter(Number.isFinite)) && extra.every((value) => value > 0);
  const place = (share) => bottom - share * (bottom - top);
  if (logarithmic) {
    const [low, high] = [Math.log10(Math.min(...known)) - 0.1, Math.log10(Math.max(...known)) + 0.1];
    const step = Math.max(1, Math.ceil((high - low) / 4));
    const powers = [];
    for (let power = Math.ceil(low); power <= high; power += step) powers.push(10 ** power);
    const ticks = powers.length > 1 ? powers : [Math.min(...known), Math.max(...known)];
    return { ticks, base: bottom, y: (value) => place(clamp((Math.log10(value) - low) / (high - low), 0, 1)) };
  }
  let [low, high] = [Math.min(0, ...known), Math.max(0, ...known)];
  if (low === high) high = 1;
  [low, high] = [low < 0 ? low - 0.06 * (high - low) : 0, high > 0 ? high + 0.06 * (high - low) : 0];
  const step = niceStep(high - low);
  const ticks = [];
  for (let tick = Math.ceil(low / step); tick * step <= high; tick += 1) ticks.push(tick * step);
  const y = (value) => place(clamp((value - low) / (high - low), 0, 1));
  return { ticks, base: y(0), y };
}

function drawHorizontalAxis(svg, count, label, width, height) {
  const cell = (width - MARGIN.left - MARGIN.right) / count;
  const every = everyOf(count, Math.max(2, Math.floor((width - MARGIN.left) / 42)));
  for (let i = 0; i < count; i += every) {
    const x = MARGIN.left + (i + 0.5) * cell;
    svg.append(svgElement("text", { x, y: height - 16, "text-anchor": "middle", class: "tick" }, i));
  }
  const x = MARGIN.left + (width - MARGIN.left - MARGIN.right) / 2;
  svg.append(svgElement("text", { x, y: height - 3, "text-anchor": "middle", class: "axis" }, label));
}

function drawVerticalAxis(svg, scale, width) {
  for (const tick of scale.ticks) {
    const y = scale.y(tick);
    svg.append(svgElement("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y, class: "grid" }));
    svg.append(svgElement("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end", class: "tick" }, tickText(tick)));
  }
}

// One bar per layer. `marked` layers are dark, `selected` is outlined, `intervals` are thin lines, `reference` is a
// dashed line across; a layer without a value has no bar. Charts with the same `range` of values have the same axis.
function drawBars(svg, { values, range = values, intervals = [], marked = [], reference = NaN, selected = null }) {
  const width = widthOf(svg);
  const bottom = BAR_HEIGHT - MARGIN.bottom;
  resized(svg, width, BAR_HEIGHT);
  const scale = scaleOf(range, bottom, MARGIN.top, Number.isFinite(reference) ? [reference] : []);
  drawVerticalAxis(svg, scale, width);
  const cell = (width - MARGIN.left - MARGIN.right) / values.length;
  values.forEach((value, layer) => {
    const left = MARGIN.left + layer * cell;
    if (layer === selected) {
      const band = { x: left, y: MARGIN.top, width: cell, height: bottom - MARGIN.top, class: "band" };
      svg.append(svgElement("rect", band));
    }
    if (Number.isNaN(value)) return;
    const end = Number.isFinite(value) ? scale.y(value) : value > 0 ? MARGIN.top : bottom;
    const bar = svgElement("rect", {
      x: left + 0.1 * cell,
      y: Math.min(end, scale.base),
      width: 0.8 * cell,
      height: Math.max(Math.abs(end - scale.base), 0.5),
      class: `bar${marked.includes(layer) ? " marked" : ""}${layer === selected ? " selected" : ""}`,
    });
    svg.append(bar);
  });
  intervals.forEach(([low, high], layer) => {
    if (!Number.isFinite(low) || !Number.isFinite(high)) return;
    const x = MARGIN.left + (layer + 0.5) * cell;
    svg.append(svgElement("line", { x1: x, x2: x, y1: scale.y(low), y2: scale.y(high), class: "interval" }));
  });
  if (Number.isFinite(reference)) {
    const y = scale.y(reference);
    svg.append(svgElement("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y, class: "reference" }));
  }
  drawHorizontalAxis(svg, values.length, "layer", width, BAR_HEIGHT);
}

// The layer at which a pointer is in a chart of `count` layers.
function layerAt(svg, event, count) {
  const box = svg.getBoundingClientRect();
  const share = (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
  return clamp(Math.floor(share * count), 0, count - 1);
}

// Colour of a share of the largest value: small values are yellow, as in the plots.
function colourOf(share) {
  const place = clamp(1 - share, 0, 1) * (VIRIDIS.length - 1);
  const below = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const mixed = VIRIDIS[below].map((part, i) => Math.round(part + (place - below) * (VIRIDIS[below + 1][i] - part)));
  return `rgb(${mixed.join(" ")})`;
}

const matrixHeight = (width) => Math.min(width - MARGIN.left - MARGIN.right, LARGEST_MATRIX) * 0.8 + MARGIN.top + 62;

// The geometry of a heat map of `count` layers: column l, row n from below, as Figure 2 of arXiv 2502.05795.
function matrixPlaces(svg, count) {
  const width = Math.min(widthOf(svg), LARGEST_MATRIX + MARGIN.left + MARGIN.right);
  const height = matrixHeight(width);
  const cell = {
    width: (width - MARGIN.left - MARGIN.right) / count,
    height: (height - MARGIN.top - 62) / count,
  };
  const x = (layer) => MARGIN.left + layer * cell.width;
  const y = (next) => height - 62 - next * cell.height;
  return { width, height, cell, x, y };
}

// Distances between layers l and l + n; `farthest` is the end of the colours.
function drawMatrix(svg, matrix, farthest) {
  const count = matrix.length;
  const { width, height, cell, x, y } = matrixPlaces(svg, count);
  resized(svg, width, height);
  matrix.forEach((row, layer) => {
    row.forEach((value, index) => {
      if (Number.isNaN(value)) return;
      const box = { x: x(layer), y: y(index + 1), width: cell.width + 0.3, height: cell.height + 0.3 };
      svg.append(svgElement("rect", { ...box, fill: colourOf(value / farthest), class: "cell" }));
    });
  });
  const every = everyOf(count, 10);
  for (let n = every; n <= count; n += every) {
    const place = { x: MARGIN.left - 6, y: y(n) + cell.height / 2 + 4, "text-anchor": "end", class: "tick" };
    svg.append(svgElement("text", place, n));
  }
  const middle = y(count / 2);
  const turned = { x: 14, y: middle, transform: `rotate(-90 14 ${middle})`, "text-anchor": "middle", class: "axis" };
  svg.append(svgElement("text", turned, "subsequent layer n"));
  drawHorizontalAxis(svg, count, "layer l", width, height - 32);
  drawColours(svg, farthest, width, height);
  svg.append(svgElement("rect", { class: "outline", width: 0, height: 0, x: 0, y: 0 }));
}

function drawColours(svg, farthest, width, height) {
  const parts = 40;
  const wide = (width - MARGIN.left - MARGIN.right) * 0.5;
  for (let i = 0; i < parts; i += 1) {
    const box = { x: MARGIN.left + (i * wide) / parts, y: height - 26, width: wide / parts + 0.3, height: 10 };
    svg.append(svgElement("rect", { ...box, fill: colourOf(i / (parts - 1)), class: "cell" }));
  }
  svg.append(svgElement("text", { x: MARGIN.left, y: height - 4, class: "tick" }, "0"));
  const end = { x: MARGIN.left + wide, y: height - 4, "text-anchor": "end", class: "tick" };
  svg.append(svgElement("text", end, formatted(farthest)));
  svg.append(svgElement("text", { x: MARGIN.left + wide + 8, y: height - 17, class: "axis" }, "angle / π"));
}

// Outlines the cell of layers l and l + n.
function outlineCell(svg, count, layer, next) {
  const { cell, x, y } = matrixPlaces(svg, count);
  const outline = svg.querySelector(".outline");
  const box = { x: x(layer), y: y(next), width: cell.width, height: cell.height };
  for (const [name, value] of Object.entries(box)) outline.setAttribute(name, value);
}

// The cell [l, n] at which a pointer is, the nearest one outside of the triangle.
function cellAt(svg, event, count) {
  const box = svg.getBoundingClientRect();
  const { cell, y, width } = matrixPlaces(svg, count);
  const scale = box.width / width;
  const layer = clamp(Math.floor(((event.clientX - box.left) / scale - MARGIN.left) / cell.width), 0, count - 1);
  const next = Math.ceil((y(0) - (event.clientY - box.top) / scale) / cell.height);
  return [layer, clamp(next, 1, count - layer)];
}
