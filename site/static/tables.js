// Sorts tables marked data-sortable, and filters the front page's methods; the address keeps what was chosen.
// Without JavaScript the pages stay as rendered, with all of their tables.
"use strict";
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const initial = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  table.sortBy = (column, next) => {
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    table.classList.toggle("resorted", Boolean(next));
    if (!next) return body.append(...initial);
    heads[column].setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    const order = (a, b) => {
      const [x, y] = [key(a, column), key(b, column)];
      if (x === "" || y === "") return (x === "") - (y === "");  // rows without a value stay last
      const [m, n] = [Number(x), Number(y)];
      return sign * (Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n);
    };
    body.append(...initial.slice().sort(order));
  };
  heads.forEach((head, column) => {
    if (head.dataset.sort === "none") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { undefined: "descending", descending: "ascending" }[head.getAttribute("aria-sort") ?? undefined];
      table.sortBy(column, next);
      table.dispatchEvent(new CustomEvent("sorted", { bubbles: true, detail: next && `${column}-${next}` }));
    });
  });
}

for (const choice of document.querySelectorAll(".views")) {
  choice.hidden = false;
  const show = () => {
    const chosen = choice.querySelector(":checked").value;
    for (const part of document.querySelectorAll("[data-view]"))
      part.hidden = chosen !== "" && part.dataset.view !== chosen;
  };
  choice.addEventListener("change", show);
  show();  // a browser that goes back keeps what was chosen
}

const controls = document.querySelector(".controls");
if (controls) {
  const boards = [...document.querySelectorAll(".board")];
  const shown = controls.querySelector(".shown");
  const link = controls.querySelector(".compare");
  let sorted = "";

  const show = () => {
    const wanted = Object.fromEntries(new FormData(controls));
    const words = wanted.q.toLowerCase().split(/\s+/).filter(Boolean);
    for (const board of boards) {
      board.hidden = Boolean(wanted.view) && board.id !== wanted.view;
      if (board.hidden) continue;
      const table = board.querySelector("table");
      const heads = [...table.tHead.rows[0].cells];
      const scores = heads.flatMap((head, at) => (head.dataset.protocol === undefined ? [] : [at]));
      const kept = scores.filter((at) => ["protocol", "dataset"].every(
        (name) => !wanted[name] || heads[at].dataset[name] === wanted[name]));
      for (const at of scores)
        for (const row of [table.tHead.rows[0], ...table.tBodies[0].rows]) row.cells[at].hidden = !kept.includes(at);
      let left = 0;
      for (const row of table.tBodies[0].rows) {
        const text = `${row.cells[0].textContent} ${row.querySelector("a")?.title ?? ""}`.toLowerCase();
        row.hidden = !(kept.some((at) => row.cells[at].dataset.sort !== undefined)
          && ["family", "backbone", "preset"].every((name) => !wanted[name] || row.dataset[name] === wanted[name])
          && words.every((word) => text.includes(word)));
        left += !row.hidden;
      }
      shown.textContent = `${left} of ${table.tBodies[0].rows.length} lines`;
    }
    pick();
  };

  const pick = () => {
    if (!link) return;
    const board = boards.find((each) => !each.hidden);
    const rows = [...board.querySelectorAll("tbody tr")].filter((row) => row.querySelector(".pick:checked"));
    const heads = [...board.querySelector("thead tr").cells];
    const common = heads.findIndex((head, at) => head.dataset.anchor && !head.hidden
      && rows.every((row) => row.cells[at].dataset.sort !== undefined));
    link.hidden = rows.length < 2 || common < 0;
    if (!link.hidden)
      link.href = `compare.html#${heads[common].dataset.anchor}&rows=${rows.map((row) => row.dataset.key).join(",")}`;
  };

  const remember = () => {
    const state = new URLSearchParams([...new FormData(controls)].filter(([, value]) => value !== ""));
    if (state.get("view") === boards[0].id) state.delete("view");
    if (sorted) state.set("sort", sorted);
    history.replaceState(null, "", `#${state}`);
  };

  const restore = () => {
    const state = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    for (const field of controls.querySelectorAll("input, select")) field.value = field.options?.[0].value ?? "";
    for (const board of boards) board.querySelector("table").sortBy(0, undefined);
    for (const [name, value] of state) {
      const field = controls.elements[name];
      if (field && (field.type === "search" || [...field.options].some((option) => option.value === value)))
        field.value = value;
    }
    sorted = /^\d+-(ascending|descending)$/.test(state.get("sort") ?? "") ? state.get("sort") : "";
    show();
    const table = boards.find((each) => !each.hidden).querySelector("table");
    const [column, order] = sorted.split("-");
    if (sorted && Number(column) < table.tHead.rows[0].cells.length) table.sortBy(Number(column), order);
  };

  controls.hidden = false;
  for (const box of document.querySelectorAll(".pick")) box.hidden = false;
  document.addEventListener("change", (event) => event.target.matches(".pick") && pick());
  document.addEventListener("sorted", (event) => { sorted = event.detail ?? ""; remember(); });
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("input", () => { show(); remember(); });
  controls.addEventListener("reset", () => setTimeout(() => {
    for (const box of document.querySelectorAll(".pick")) box.checked = false;
    for (const board of boards) board.querySelector("table").sortBy(0, undefined);
    sorted = "";
    show();
    remember();
  }));
  window.addEventListener("hashchange", restore);
  restore();
}
