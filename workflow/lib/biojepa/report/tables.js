"use strict";
/* Tables: long groups of models fold to their heading, and those marked data-sortable sort by any heading. */
(function () {
  /* Folded when the page opens; without scripts every row is shown. */
  for (const body of document.querySelectorAll("tbody[data-fold]")) {
    const heading = body.querySelector("tr.group span");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "fold";
    const turn = (folded) => {
      body.classList.toggle("folded", folded);
      button.setAttribute("aria-expanded", String(!folded));
      button.textContent = (folded ? "Show " : "Hide ") + body.dataset.fold + " rows";
    };
    button.addEventListener("click", () => turn(!body.classList.contains("folded")));
    heading.append(" ", button);
    heading.dataset.fold = body.dataset.fold;
    turn(true);
  }

  const value = (row, at) => row.cells[at].dataset.sort ?? row.cells[at].textContent;
  function compare(u, v, numeric) {
    if (!numeric) return u.localeCompare(v, "en", { numeric: true });
    if (u === "" || v === "") return 0;
    return Number(u) - Number(v);
  }
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((th, at) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...th.childNodes);
      th.append(button);
      const numeric = th.dataset.numeric !== undefined;
      button.addEventListener("click", () => {
        const first = numeric ? "descending" : "ascending";
        const other = numeric ? "ascending" : "descending";
        const order = th.getAttribute("aria-sort") === first ? other : first;
        heads.forEach((head) => head.removeAttribute("aria-sort"));
        th.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...table.tBodies[0].rows];
        /* Rows without a value come last in either order. */
        rows.sort((a, b) => (value(a, at) === "") - (value(b, at) === "") || sign * compare(value(a, at), value(b, at), numeric));
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
