"use strict";
(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];

  // Tables sort by a click on their head; a cell without a value goes last.
  for (const table of all("table.sortable")) {
    const heads = all("thead th", table);
    heads.forEach((head, at) => {
      const button = head.querySelector(".sort");
      if (!button) return;
      button.addEventListener("click", () => {
        const body = table.tBodies[0];
        const numeric = [...body.rows].some((row) => row.cells[at].dataset.value !== undefined);
        const now = head.getAttribute("aria-sort");
        const up = now === "descending" || now === null && !numeric;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => {
          const cell = row.cells[at];
          if (!numeric) return cell.textContent.trim().toLowerCase();
          return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
        };
        const order = (a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x === null || y === null) return (x === null) - (y === null);
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        };
        body.append(...[...body.rows].sort(order));
      });
    });
  }

  addEventListener("beforeprint", () => all("details").forEach((part) => { part.open = true; }));
})();
