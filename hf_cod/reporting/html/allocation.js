// From scores to one value per layer under a budget, and what that is expected to cost. The formulas are those of
// hf_cod/functional/budget.py, hf_cod/scoring/allocation.py and hf_cod/functional/lost_energy.py, under the same names.
"use strict";

// (D - min) / (max - min), zero for equal scores. Scaled first, so that no difference overflows.
function unitRange(scores) {
  const largest = Math.max(...scores.map(Math.abs));
  const scaled = largest > 0 ? scores.map((score) => score / largest) : scores;
  const least = Math.min(...scaled);
  const width = Math.max(...scaled) - least;
  return scaled.map((score) => (width > 0 && Number.isFinite(width) ? (score - least) / width : 0));
}

function weightedMean(values, weights) {
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return values.reduce((sum, value, i) => sum + value * weights[i], 0) / total;
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// clamp(c - z, low, high) with the weighted mean `mean`. The mean is piecewise linear in c, so c is exact.
function clampedToMean(z, weights, mean, low, high) {
  const levels = [...z.map((value) => value + low), ...z.map((value) => value + high)].sort((a, b) => a - b);
  const at = (level) => z.map((value) => clamp(level - value, low, high));
  const means = levels.map((level) => weightedMean(at(level), weights));
  const first = means.findIndex((value) => value >= mean);
  const end = clamp(first < 0 ? levels.length : first, 1, levels.length - 1);
  const rise = means[end] - means[end - 1];
  const share = rise > 0 ? clamp((mean - means[end - 1]) / rise, 0, 1) : 0;
  return at(levels[end - 1] + share * (levels[end] - levels[end - 1]));
}

// Values that follow the scores linearly within [low, high]; their weighted mean is the budget.
function spreadValues(scores, weights, mean, low, high, falling) {
  const sign = falling ? 1 : -1;
  return clampedToMean(unitRange(scores).map((u) => sign * u * (high - low)), weights, mean, low, high);
}

// Rounds each value to a neighbouring choice; keeps the order of the values and, approximately, the weighted mean.
function roundTo(values, choices, weights, first) {
  const below = values.map((value) => Math.max(choices.filter((choice) => choice <= value + 1e-9).length - 1, 0));
  const above = below.map((place) => Math.min(place + 1, choices.length - 1));
  const step = values.map((_, i) => weights[i] * (choices[above[i]] - choices[below[i]]));
  const fell = values.map((value, i) => value - choices[below[i]]);
  let gap = fell.reduce((sum, value, i) => sum + weights[i] * value, 0);
  const place = [...below];
  const held = new Map();
  for (const i of values.map((_, i) => i).sort((i, j) => fell[j] - fell[i] || first[j] - first[i])) {
    if (!held.has(below[i]) && step[i] <= gap * (1 + 1e-9)) {
      place[i] = above[i];
      gap -= step[i];
    } else if (!held.has(below[i])) {
      held.set(below[i], i);
    }
  }
  const rest = (i) => Math.abs(gap - step[i]);
  const nearest = [...held.values()].reduce((best, i) => (best < 0 || rest(i) < rest(best) ? i : best), -1);
  if (nearest >= 0 && rest(nearest) < Math.abs(gap) * (1 - 1e-9)) place[nearest] = above[nearest];
  return place.map((index) => choices[index]);
}

// One value per layer: `kind` is "sparsity", with half the width of its interval `spread`, or "bits", with `choices`.
// A spread that would leave [0, 1] is reduced.
function allocate(scores, weights, { kind, budget, spread, choices }) {
  if (kind === "bits") {
    const values = spreadValues(scores, weights, budget, choices[0], choices[choices.length - 1], false);
    return roundTo(values, choices, weights, scores);
  }
  const lam = Math.min(spread, budget, 1 - budget);
  return spreadValues(scores, weights, budget, budget - lam, budget + lam, true);
}

// The n layers of least cost, in rising order; a layer whose cost is not known stays.
function leastCosts(costs, n) {
  const known = costs.map((_, i) => i).filter((i) => !Number.isNaN(costs[i]));
  known.sort((i, j) => (costs[i] === costs[j] ? i - j : costs[i] < costs[j] ? -1 : 1));
  return known.slice(0, n).sort((i, j) => i - j);
}

// erf by a series of positive terms, exact to rounding: 2/sqrt(pi) exp(-x^2) sum 2^n x^(2n+1) / (2n+1)!!
function erf(x) {
  if (x > 6) return 1;
  let term = x;
  let sum = x;
  for (let n = 1; term > 1e-17 * sum; n += 1) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

// Share of a normal distribution's energy in its smallest values, which are the share `sparsity` of all.
function lostBySparsity(sparsity) {
  if (sparsity <= 0 || sparsity >= 1) return sparsity <= 0 ? 0 : 1;
  let [low, high] = [0, 9];
  for (let i = 0; i < 60; i += 1) {
    const middle = (low + high) / 2;
    [low, high] = erf(middle / Math.SQRT2) < sparsity ? [middle, high] : [low, middle];
  }
  return sparsity - Math.sqrt(2 / Math.PI) * low * Math.exp((-low * low) / 2);
}

// Error of the best scalar quantizer of a normal distribution, as a share of its energy.
const lostByBits = (bits) => Math.min(1, ((Math.sqrt(3) * Math.PI) / 2) * 4 ** -bits);

// The metric that is expected if layer l loses the share lost[l] of its energy, by the sum of `expected_loss`; for
// perplexity the loss is its logarithm. NaN if the metric without a changed layer is unknown.
function expectedMetric({ metric, intact, without }, lost) {
  const logarithmic = metric === "perplexity";
  const loss = (value) => (logarithmic ? Math.log(value) : value);
  const sum = lost.reduce((total, share, i) => (share > 0 ? total + share * (loss(without[i]) - loss(intact)) : total), 0);
  return logarithmic ? Math.exp(loss(intact) + sum) : intact + sum;
}
