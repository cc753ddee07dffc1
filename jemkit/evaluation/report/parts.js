"use strict";
(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const charts = JSON.parse(document.getElementById("data").textContent).charts;

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

  // A card opens on hover, focus or tap; a click pins it, Escape or a click elsewhere closes it.
  let open = null, pinned = false;
  const close = () => {
    if (!open) return;
    document.getElementById(open.getAttribute("aria-controls")).hidePopover();
    open.setAttribute("aria-expanded", "false");
    open = null;
    pinned = false;
  };
  const place = (button, card) => {
    const at = button.getBoundingClientRect(), size = card.getBoundingClientRect();
    const below = at.bottom + 6 + size.height <= innerHeight;
    const top = below ? at.bottom + 6 : Math.max(8, at.top - 6 - size.height);
    card.style.left = Math.max(8, Math.min(at.left, innerWidth - size.width - 8)) + "px";
    card.style.top = top + "px";
  };
  // Focus may scroll the page: the card moves with its figure, and closes when that leaves the view.
  const follow = () => {
    if (!open) return;
    const at = open.getBoundingClientRect();
    if (at.bottom < 0 || at.top > innerHeight || at.right < 0 || at.left > innerWidth) return close();
    place(open, document.getElementById(open.getAttribute("aria-controls")));
  };
  const show = (button) => {
    if (open === button) return;
    close();
    const card = document.getElementById(button.getAttribute("aria-controls"));
    card.showPopover();
    place(button, card);
    button.setAttribute("aria-expanded", "true");
    open = button;
  };
  for (const button of all(".number")) {
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && !pinned && show(button));
    button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && !pinned && close());
    button.addEventListener("focus", () => button.matches(":focus-visible") && show(button));
    button.addEventListener("blur", close);
    button.addEventListener("click", () => {
      if (open === button && pinned) return close();
      show(button);
      pinned = true;
    });
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && close());
  document.addEventListener("click", (event) => event.target.closest(".number, .card") || close());
  addEventListener("scroll", follow, { capture: true, passive: true });

  // Why a figure is missing, by a tap.
  const readout = document.getElementById("readout");
  const tell = (text, x, y) => {
    readout.textContent = text;
    readout.hidden = false;
    const size = readout.getBoundingClientRect();
    readout.style.left = Math.max(8, Math.min(x + 14, innerWidth - size.width - 8)) + "px";
    readout.style.top = Math.max(8, Math.min(y + 14, innerHeight - size.height - 8)) + "px";
  };
  for (const dash of all(".dash")) {
    dash.addEventListener("click", (event) => {
      const at = dash.getBoundingClientRect();
      tell(dash.title, at.left, at.bottom);
      event.stopPropagation();
    });
    dash.addEventListener("blur", () => { readout.hidden = true; });
  }

  // The values under the pointer, from the data that the curves were drawn of.
  const nearest = (xs, x) => {
    let best = -1;
    xs.forEach((value, i) => {
      if (value !== null && (best < 0 || Math.abs(value - x) < Math.abs(xs[best] - x))) best = i;
    });
    return best;
  };
  for (const [id, chart] of Object.entries(charts)) {
    const svg = document.querySelector(`#${id} svg.chart`);
    if (!svg) continue;
    const [left, right, low, high] = chart.x;
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      if (at < left || at > right) { readout.hidden = true; return; }
      const x = low + (at - left) / (right - left) * (high - low);
      const lines = chart.series.map((one) => {
        const i = nearest(one.x, x);
        return i < 0 ? one.label : `${one.label}  ${one.x[i]}: ${one.y[i] === null ? "not finite" : one.y[i]}`;
      });
      tell(lines.join("\n"), event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", () => { readout.hidden = true; });
  }

  addEventListener("beforeprint", () => all("details").forEach((part) => { part.open = true; }));
})();
