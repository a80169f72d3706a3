// Sorts tables marked data-sortable by a click on a column's head, and shows the tables of one view alone.
// Without JavaScript the pages stay as rendered, with all of their tables.
"use strict";
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const initial = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  heads.forEach((head, column) => {
    if (head.dataset.sort === "none") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { undefined: "descending", descending: "ascending" }[head.getAttribute("aria-sort") ?? undefined];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      table.classList.toggle("resorted", Boolean(next));
      if (!next) return body.append(...initial);
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const order = (a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if (x === "" || y === "") return (x === "") - (y === "");  // rows without a value stay last
        const [m, n] = [Number(x), Number(y)];
        return sign * (Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n);
      };
      body.append(...initial.slice().sort(order));
    });
  });
}

for (const choice of document.querySelectorAll(".views")) {
  choice.hidden = false;
  const show = () => {
    const chosen = choice.querySelector(":checked").value;
    for (const part of document.querySelectorAll("[data-view]"))
      part.hidden = chosen !== "" && part.dataset.view !== chosen;
    for (const section of document.querySelectorAll("section:not([data-view])"))
      if (section.querySelector("[data-view]")) section.hidden = !section.querySelector("[data-view]:not([hidden])");
  };
  choice.addEventListener("change", show);
  show();  // a browser that goes back keeps what was chosen
}
