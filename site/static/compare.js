// The comparison page: a table and rows of it are picked, the address keeps the choice (report/comparing.py says how),
// and the rows are compared here by the rules of mimbench.compare. What records say is only ever shown as text.
"use strict";
{
  const MOST = 12;  // rows at once: 66 pairs
  const page = (id) => document.getElementById(id);
  const sections = new Map([...document.querySelectorAll(".candidates")].map((part) => [part.id, part]));
  const held = new Map();  // what data/bits/ says of a table, once it is loaded
  let [anchor, picked] = ["", []];  // what is chosen

  // Words --------------------------------------------------------------------------------------------

  const count = (value) => value.toLocaleString("en");
  const fixed = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
  const signed = (value, digits = 2) => (value < 0 ? "" : "+") + fixed(value, digits);
  const ratio = (value) => (value === null ? "–"
    : value < 0.1 ? value.toPrecision(1) : value < 100 ? value.toFixed(2) : count(Math.round(value)));
  const chance = (p) => (p < 1e-4 ? "<\u00a00.0001" : String(Number(p.toPrecision(2))));
  const interval = (low, high, form = fixed) => (low === null ? "no interval" : `${form(low)} to ${form(high)}`);

  function verdict({ pairs }) {
    const tested = pairs.filter((pair) => pair.paired);
    if (!tested.length) return "The difference cannot be tested; below is why, and what can be said all the same.";
    const apart = tested.filter((pair) => pair.p_corrected < 0.05);
    if (pairs.length > 1)
      return `Of ${tested.length} pairs that can be tested, ${apart.length} ${apart.length === 1 ? "is" : "are"} told apart`
        + ` at 5 % after Holm’s correction.`;
    const [{ a, b, paired: found, p_corrected: p }] = tested;
    const points = `${interval(found.low, found.high, signed)} points, p\u00a0${p < 1e-4 ? "" : "=\u00a0"}${chance(p)}`;
    if (!apart.length) return `Chance alone may make this difference between ${a} and ${b} (95 % interval ${points}).`;
    const [better, other] = found.difference > 0 ? [a, b] : [b, a];
    return `${better} is better than ${other}, by ${fixed(Math.abs(found.difference))} points`
      + ` (${a} − ${b}, 95 % interval: ${points}).`;
  }

  function remarks(rows, pairs) {
    const seeds = [...new Set(pairs.flatMap((pair) => (pair.paired ? [pair.paired.seeds] : [])))].sort((x, y) => x - y);
    const several = seeds.filter((number) => number > 1);
    const found = rows.flatMap((row) => row.notes.map((note) => `${row.label} ${note}.`));
    if (seeds.includes(1))
      found.push("A pair of single runs is compared over test images alone (McNemar’s exact test): that says nothing"
        + " about another seed.");
    if (several.length) found.push(`${several.join(" or ")} seeds in common: intervals cover seeds and test images.`);
    return found;
  }

  // The same in the terminal, or "" where it has no names for these rows.
  function command(rows, options) {
    const presets = new Set(rows.map((row) => row.preset).filter((preset) => preset !== null));
    if (rows.some((row) => row.name === null) || presets.size > 1) return "";
    return ["mimbench compare", ...rows.map((row) => row.name), options, ...[...presets].map((p) => `--preset ${p}`)]
      .join(" ");
  }

  // What is shown ------------------------------------------------------------------------------------

  const SVG = new Set(["svg", "line", "circle"]);
  function make(tag, attributes = {}, ...children) {
    const made = document.createElementNS(`http://www.w3.org/${SVG.has(tag) ? "2000/svg" : "1999/xhtml"}`, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }
  const text = (value) => make("bdi", {}, value);
  const number = (value) => make("td", { class: "number" }, value);

  function tabular(title, note, heads, rows, isTitled = true) {
    const caption = make("caption", {}, make("span", {}, isTitled ? make("strong", {}, title) : "", note));
    const head = make("tr", {}, ...heads.map(([name, kind]) => make("th", { scope: "col", class: kind ?? "" }, name)));
    const table = make("table", {}, caption, make("thead", {}, head), make("tbody", {}, ...rows));
    return make("div", { class: "scroll", role: "region", "aria-label": title, tabindex: "0" }, table);
  }

  // An interval around a mark, with a line at zero.
  function drawn(value, low, high, at) {
    const line = (kind, x1, x2, y1 = 11, y2 = 11) => make("line", { class: kind, x1, x2, y1, y2 });
    return make("svg", { class: "strip", viewBox: "0 0 176 22", "aria-hidden": "true" },
      line("ground", 0, 176), line("floor", at(0), at(0), 1, 21), line("range", at(low), at(high)),
      make("circle", { class: "mean", cx: at(value), cy: 11, r: 3 }));
  }

  const tableOfRows = (rows, groups, { metric, unit }) => tabular("What is compared", "", [
    ["Row"], ["Seeds", "number"], [`${metric}${unit && ", "}${unit}`, "number"], ["95 % interval"],
    ["Device time", "number"], ["Images seen", "number"], ["Rank group", "number"],
  ], rows.map((row, i) => make("tr", {}, make("th", { scope: "row" }, text(row.label)), number(row.seeds.join(" ")),
    number(fixed(row.value)), make("td", {}, interval(row.low, row.high)), number(row.trained ? row.time : "–"),
    number(row.trained ? row.seen : "–"), number(groups[i] ?? "–"))));

  function tableOfPairs(pairs) {
    const tested = pairs.filter((pair) => pair.paired);
    const ends = tested.flatMap(({ paired: found }) => [found.low, found.high]);
    const [left, right] = [Math.min(0, ...ends), Math.max(0, ...ends)];
    const at = (value) => (5 + 166 * (value - left) / (right - left || 1)).toFixed(1);
    return tabular("Differences", "in points of percent; and how many times the cost of pretraining", [
      ["Pair"], ["Difference", "number"], ["95 % interval"], ["around zero"],
      [tested.length > 1 ? `p (Holm, of ${tested.length})` : "p", "number"], ["Only one right", "number"],
      ["Device time ×", "number"], ["Images ×", "number"], [""],
    ], pairs.map((pair) => {
      const found = pair.paired;
      const cells = found ? [number(signed(found.difference)), make("td", {}, interval(found.low, found.high, signed)),
        make("td", {}, drawn(found.difference, found.low, found.high, at)), number(chance(pair.p_corrected)),
        number(`${count(found.only_a)} / ${count(found.only_b)}`)]
        : [make("td", { colspan: "5" }, "not comparable: ", text(pair.obstacles.join("; ")))];
      return make("tr", {}, make("th", { scope: "row" }, text(pair.a), " − ", text(pair.b)), ...cells,
        number(ratio(pair.seconds)), number(ratio(pair.images)), make("td", { class: "small" }, text(pair.cost_note)));
    }));
  }

  const tablesOfClasses = (pairs) => pairs.flatMap((pair) => Object.entries(pair.classes).map(([name, classes]) => {
    const sorted = [...classes].sort(([, x], [, y]) => Math.abs(y[2]) - Math.abs(x[2]));
    const widest = Math.abs(sorted[0][1][2]) || 1;
    const bar = (value) => make("span", { class: `bar${value < 0 ? " other" : ""}`,
      style: `width:${(100 * Math.abs(value) / widest).toFixed(1)}%` });
    const summary = make("summary", {}, `${name} by class: `, text(pair.a), " − ", text(pair.b));
    const table = tabular(`${name} by class`, "the largest differences first; without intervals",
      [["Class"], [text(pair.a), "number"], [text(pair.b), "number"], ["Difference", "number"], [""]],
      sorted.map(([label, [x, y, difference]]) => make("tr", {}, make("th", { scope: "row" }, text(label)),
        number(fixed(x, 1)), number(fixed(y, 1)), number(signed(difference, 1)),
        make("td", { class: "drawn" }, bar(difference)))), false);
    table.classList.add("tall");
    return make("details", pairs.length === 1 ? { open: "" } : {}, summary, table);
  }));

  function tableOfSettings(rows) {
    const names = [...new Set(rows.flatMap((row) => Object.keys(row.settings)))];
    const values = (name) => rows.map((row) => row.settings[name] ?? "–");
    const differ = names.filter((name) => new Set(values(name)).size > 1);
    const shared = (name) => rows.every((row) => name in row.settings);
    const order = [...differ.filter(shared), ...differ.filter((name) => !shared(name))];
    if (!order.length) return make("p", {}, "Their settings are the same.");
    const table = tabular("What differs in setting", `${order.length} of ${names.length}; all else is the same`,
      [["Setting"], ...rows.map((row) => [text(row.label)])],
      order.map((name) => make("tr", {}, make("th", { scope: "row" }, text(name)),
        ...values(name).map((value) => make("td", { class: "value" }, text(value))))));
    table.classList.add("tall");
    return table;
  }

  function show() {
    const table = held.get(anchor);
    const rows = picked.map((key) => table.rows[key]);
    const result = page("result");
    result.hidden = rows.length < 2;
    page("said").textContent = ["Pick two rows or more.", "Pick a second row."][rows.length] ?? "";
    if (result.hidden) return;
    const found = mimbench.compare(rows, table.labels);
    page("said").textContent = verdict(found);
    const typed = command(rows, table.options);
    result.replaceChildren(
      tableOfRows(rows, found.groups, table), tableOfPairs(found.pairs),
      make("ul", { class: "small" }, ...remarks(rows, found.pairs).map((note) => make("li", {}, text(note)))),
      ...tablesOfClasses(found.pairs), tableOfSettings(rows),
      ...(typed ? [make("p", { class: "small" }, "The same in the terminal:"),
        make("pre", { tabindex: "0" }, make("code", {}, typed))] : []));
  }

  // What is chosen -----------------------------------------------------------------------------------

  const complain = (trouble) => {
    page("trouble").textContent = trouble;
    page("trouble").hidden = !trouble;
  };

  mimbench.bits = (name, content) => held.set(name, content);
  mimbench.tables = held;

  function load(name) {
    if (held.has(name)) return Promise.resolve();
    return new Promise((resolve, reject) => {
      const script = make("script", { src: `data/bits/${name}.js` });
      script.onload = () => (held.has(name) ? resolve() : reject());
      script.onerror = reject;
      document.head.append(script);
    });
  }

  // Shows a table and checks the rows of these names, which the address or the user gave.
  async function choose(name, wanted) {
    const isOther = name !== anchor;
    [anchor, picked] = [name, []];
    page("candidates").value = name;
    for (const [other, section] of sections) section.hidden = other !== name;
    try {
      await load(name);
    } catch {
      page("result").hidden = true;
      return complain(`data/bits/${name}.js cannot be read: is the site’s folder complete?`);
    }
    if (anchor !== name) return undefined;  // another was picked meanwhile
    const rows = Object.entries(held.get(name).rows);
    const faults = [];
    for (const word of wanted) {
      const keys = rows.filter(([key, row]) => [key, row.hash, row.method].includes(word)).map(([key]) => key);
      if (keys.length === 1 && !picked.includes(keys[0])) picked.push(keys[0]);
      else if (keys.length > 1) faults.push(`“${word}” has ${keys.length} rows in this table: pick one of them.`);
      else if (!keys.length) faults.push(`The link names a row that this table does not have: “${word}”.`);
    }
    if (picked.length > MOST) faults.push(`No more than ${MOST} rows are compared at once.`);
    picked = picked.slice(0, MOST);
    complain(faults.join(" "));
    if (isOther) find();
    boxes();
    return show();
  }

  const rowsOf = (section) => [...section.querySelectorAll("tbody tr")];

  function boxes() {
    for (const row of rowsOf(sections.get(anchor))) row.querySelector("input").checked = picked.includes(row.dataset.key);
  }

  function find() {
    const words = page("find").value.toLowerCase().split(/\s+/);
    for (const row of rowsOf(sections.get(anchor)))
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  }

  function remember() {
    const rows = picked.map(encodeURIComponent).join(",");
    history.replaceState(null, "", `#${anchor}${rows && `&rows=${rows}`}`);
  }

  function restore() {
    const [first] = sections.keys();
    let name = "", rows = [];
    try {
      const [table, ...rest] = location.hash.slice(1).split("&");
      name = decodeURIComponent(table);
      rows = (rest.find((part) => part.startsWith("rows=")) ?? "rows=").slice(5).split(",").filter(Boolean)
        .map(decodeURIComponent);
    } catch {
      return choose(first, []).then(() => complain("The link is damaged. Pick a table and its rows here."));
    }
    if (!name || sections.has(name)) return choose(name || first, rows);
    return choose(first, []).then(() => complain(
      `The link names a table that is not here: “${name}”. It may be of other records, or scored in another way.`));
  }

  if (sections.size) {
    document.body.classList.add("scripted");
    for (const section of sections.values()) {
      for (const row of rowsOf(section)) {
        const box = make("input", { type: "checkbox", autocomplete: "off" });
        const head = row.cells[0];
        head.replaceChildren(make("label", {}, box, " ", ...head.childNodes));
        box.addEventListener("change", () => {
          const { key } = row.dataset;
          picked = box.checked ? [...picked, key] : picked.filter((other) => other !== key);
          choose(anchor, picked).then(remember);
        });
      }
    }
    page("compare").hidden = false;
    page("find").addEventListener("input", find);
    page("candidates").addEventListener("change", (event) => choose(event.target.value, []).then(remember));
    window.addEventListener("hashchange", restore);
    restore();
  }
}
