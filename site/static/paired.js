// Whether one method is better than another on the same test items: the statistics of mimbench.stats, which explains
// them and which tests hold against these. Percentages run from 0 to 100; intervals are at 95 %.
"use strict";
window.mimbench ??= {};
{
  const Z = 1.959963984540054;  // the normal distribution's 97.5 % point
  const BEYOND = 37;  // so far out that the normal distribution's share is 0 but for 1e-299

  // What record.pack() wrote, "N:BASE64", as N zeros and ones.
  function unpack(text) {
    const [count, packed] = text.split(":");
    const bytes = atob(packed);
    return Uint8Array.from({ length: Number(count) }, (_, i) => (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1);
  }

  // a and b: what S runs each have right of N items, as S arrays of N zeros and ones, in the same order of seeds.
  function paired(a, b) {
    const [seeds, n] = [a.length, a[0].length];
    const [bySeed, byItem] = [new Float64Array(seeds), new Float64Array(n)];
    let [onlyA, onlyB] = [0, 0];
    for (let s = 0; s < seeds; s++) {
      for (let i = 0; i < n; i++) {
        const difference = a[s][i] - b[s][i];
        onlyA += difference > 0;
        onlyB += difference < 0;
        bySeed[s] += difference;
        byItem[i] += difference;
      }
    }
    bySeed.forEach((sum, s) => bySeed[s] = sum / n);
    byItem.forEach((sum, i) => byItem[i] = sum / seeds);
    const mean = (onlyA - onlyB) / (n * seeds);
    const table = (s, i) => a[s][i] - b[s][i];
    const [centre, half, p] = seeds === 1 ? mcnemar(onlyA, onlyB, n) : [mean, ...overBoth(table, bySeed, byItem, mean)];
    const [low, high] = [centre - half, centre + half].map((end) => 100 * Math.min(Math.max(end, -1), 1));
    return { difference: 100 * mean, low, high, p, only_a: onlyA, only_b: onlyB, n, seeds };
  }

  // One run each: centre and half width of Bonett and Price's interval, and the p value of McNemar's exact test.
  function mcnemar(onlyA, onlyB, n) {
    const [more, less] = [(onlyA + 1) / (n + 2), (onlyB + 1) / (n + 2)];
    const half = Z * Math.sqrt((more + less - (more - less) ** 2) / (n + 2));
    return [more - less, half, Math.min(1, 2 * fairCoin(Math.min(onlyA, onlyB), onlyA + onlyB))];
  }

  // The chance of k heads or fewer in m throws.
  function fairCoin(k, m) {
    let [term, halvings] = [1, m];  // the chance of exactly k is term / 2 ** halvings
    for (let i = 1; i <= k; i++) {
      term *= (m - k + i) / i;
      for (; term > 1 && halvings > 0; halvings--) term /= 2;
    }
    term *= 2 ** -halvings;
    let sum = 0;
    for (let i = k; i >= 0 && term > sum * 1e-18; i--) {
      sum += term;
      term *= i / (m - i + 1);
    }
    return sum;
  }

  // Several seeds: half width and p value, where both seeds and items are samples.
  function overBoth(table, bySeed, byItem, mean) {
    const [seeds, n] = [bySeed.length, byItem.length];
    const squares = (values) => values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
    let rest = 0;
    for (let s = 0; s < seeds; s++)
      for (let i = 0; i < n; i++) rest += (table(s, i) - bySeed[s] - byItem[i] + mean) ** 2;
    const noise = rest / ((seeds - 1) * (n - 1) * n * seeds);
    const ofSeeds = Math.sqrt(squares(bySeed) / (seeds - 1) / seeds);
    const ofItems = Math.sqrt(Math.max(squares(byItem) / (n - 1) / n - noise, 2 / (n + 2) ** 2));
    // With z for the normal distribution, Student's t is where the same share lies beyond it.
    const half = (z) => Math.hypot(student(logBeyond(z), seeds - 1) * ofSeeds, z * ofItems);
    if (half(BEYOND) <= Math.abs(mean)) return [half(Z), 0];
    return [half(Z), Math.exp(logBeyond(root((z) => half(z) - Math.abs(mean), 0, BEYOND)))];
  }

  // Where an increasing function is 0, to the last bit.
  function root(f, low, high) {
    for (;;) {
      const middle = (low + high) / 2;
      if (middle <= low || middle >= high) return middle;
      if (f(middle) < 0) low = middle;
      else high = middle;
    }
  }

  // b0 + a1 / (b1 + a2 / (b2 + ...)), where part(i) is [ai, bi] (Lentz, Applied Optics 15, 1976).
  function fraction(b0, part) {
    let [value, c, d] = [b0, b0, 0];
    for (let i = 1; i < 10000; i++) {
      const [a, b] = part(i);
      d = 1 / (b + a * d);
      c = b + a / c;
      value *= c * d;
      if (Math.abs(c * d - 1) < 1e-16) break;
    }
    return value;
  }

  // The logarithm of the share of the normal distribution beyond -z and z: the incomplete gamma function of 1/2.
  function logBeyond(z) {
    const x = z * z / 2;
    if (x === 0) return 0;
    const front = 0.5 * Math.log(x / Math.PI) - x;
    if (x > 1.5) return front - Math.log(fraction(x + 0.5, (i) => [-i * (i - 0.5), x + 2 * i + 0.5]));
    let [term, sum] = [2, 2];
    for (let k = 1.5; term > 1e-17 * sum; k++) sum += term *= x / k;
    return Math.log1p(-Math.exp(front) * sum);
  }

  // The t beyond which, and below -t, a share of Student's distribution lies that is given by its logarithm.
  function student(logShare, freedom) {
    return Math.exp(root((logT) => logShare - logBeyondStudent(logT, freedom), -80, 709));
  }

  // The same for Student's t, which comes as its logarithm: the incomplete beta function of freedom / 2 and 1/2.
  function logBeyondStudent(logT, freedom) {
    const a = freedom / 2;
    const w = 2 * logT - Math.log(freedom);  // log of t² / freedom
    const logX = w > 0 ? -w - Math.log1p(Math.exp(-w)) : -Math.log1p(Math.exp(w));
    let beta = freedom % 2 ? Math.PI : 2;  // B(1/2, 1/2) or B(1, 1/2), and from there on up
    for (let k = freedom % 2 ? 0.5 : 1; k < a; k++) beta *= k / (k + 0.5);
    const front = a * logX + 0.5 * (logX + w) - Math.log(beta);
    if (Math.exp(logX) < (a + 1) / (a + 2.5)) return front - Math.log(a * incomplete(Math.exp(logX), a, 0.5));
    return Math.log1p(-Math.exp(front) / (0.5 * incomplete(Math.exp(logX + w), 0.5, a)));
  }

  // The continued fraction of the incomplete beta function (DLMF 8.17.22), which divides.
  function incomplete(x, a, b) {
    return fraction(1, (i) => {
      const m = i >> 1;
      const over = (a + i - 1) * (a + i);
      return [i % 2 ? -(a + m) * (a + b + m) * x / over : m * (b - m) * x / over, 1];
    });
  }

  // The p values corrected for their number (Holm).
  function holm(values) {
    const corrected = [];
    let largest = 0;
    values.map((_, i) => i).sort((i, j) => values[i] - values[j]).forEach((i, done) => {
      corrected[i] = largest = Math.max(largest, Math.min(1, (values.length - done) * values[i]));
    });
    return corrected;
  }

  // The place of each method's group, better scores first; apart(i, j) says which pairs a test tells apart.
  function rankGroups(scores, apart) {
    const order = scores.map((_, i) => i).sort((i, j) => scores[j] - scores[i]);
    const places = [];
    let place = 1;
    order.forEach((i, position) => {
      const above = order.slice(0, position);
      if (above.every((high) => order.slice(position).every((low) => apart(high, low)))) place = position + 1;
      places[i] = place;
    });
    return places;
  }

  // The rules of mimbench.compare, for rows as report/comparing.py writes them ----------------------------

  // All pairs of rows, as mimbench.compare.compare() finds them.
  function compare(rows, labels) {
    const pairs = rows.flatMap((a, i) => rows.slice(i + 1).map((b) => pairOf(a, b, labels)));
    const tested = pairs.filter((pair) => pair.paired);
    holm(tested.map((pair) => pair.paired.p)).forEach((p, i) => tested[i].p_corrected = p);
    const apart = (a, b) => pairs.some((pair) => pair.p_corrected < 0.05
      && [pair.a, pair.b].includes(a.label) && [pair.a, pair.b].includes(b.label));
    const groups = tested.length < pairs.length ? []
      : rankGroups(rows.map((row) => row.value), (i, j) => apart(rows[i], rows[j]));
    return { pairs, groups };
  }

  function pairOf(a, b, labels) {
    const pair = { a: a.label, b: b.label, obstacles: [], paired: null, p_corrected: null, classes: {}, ...cost(a, b) };
    const common = a.seeds.length === 1 && b.seeds.length === 1 ? [[0, 0]]
      : a.seeds.flatMap((seed, i) => (b.seeds.includes(seed) ? [[i, b.seeds.indexOf(seed)]] : []));
    if (!common.length) return { ...pair, obstacles: ["they have no seed in common"] };
    const sides = [[a, common.map(([i]) => i)], [b, common.map(([, j]) => j)]];
    pair.classes = byClass(sides, labels);
    for (const [row, runs] of sides)
      for (const fault of new Set(runs.map((i) => row.faults[i])))
        if (fault) pair.obstacles.push(`${row.label} ${fault}`);
    if (pair.obstacles.length) return pair;
    const bits = sides.map(([row, runs]) => runs.map((i) => unpack(row.correct[i])));
    const sizes = [...new Set(bits.flat().map((run) => run.length))].sort((x, y) => x - y);
    if (sizes.length > 1) pair.obstacles.push(`other test items: ${sizes.map((size) => size.toLocaleString("en")).join(" and ")}`);
    else if (sizes[0] < 2) pair.obstacles.push("a paired comparison needs two test items or more");
    else pair.paired = paired(...bits);
    return pair;
  }

  // [a, b, a - b] by class, where all runs have a number for it.
  function byClass(sides, labels) {
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    const found = {};
    for (const [name, classes] of Object.entries(labels)) {
      const tables = sides.map(([row, runs]) => runs.map((i) => row.classes[name][i]));
      if (tables.flat().includes(null)) continue;
      const cells = classes.flatMap((label, at) => {
        const values = tables.map((runs) => runs.map((table) => table[at]));
        if (values.flat().includes(null)) return [];
        const [x, y] = values.map(mean);
        return [[label, [x, y, x - y]]];
      });
      if (cells.length) found[name] = new Map(cells);
    }
    return found;
  }

  // How many times the pretraining of b that of a took.
  function cost(a, b) {
    const idle = [a, b].filter((row) => !row.trained).map((row) => row.label);
    if (idle.length)
      return { seconds: null, images: null, cost_note: `nothing was pretrained here for ${idle.join(" and ")}` };
    const machines = [...new Set([...a.machines, ...b.machines])].sort();
    const same = machines.length === 1;
    return {
      seconds: same && b.device_seconds > 0 ? a.device_seconds / b.device_seconds : null,
      images: a.images / b.images,
      cost_note: same ? "" : `device times are of different machines: ${machines.join(" and ")}`,
    };
  }

  Object.assign(window.mimbench, { unpack, paired, holm, rankGroups, compare });
}
