"use strict";
/* The table of perturbations: filtered, sorted and shown a page at a time. */
(function () {
  const { columns, flags, total } = DATA.rows;
  const PAGE = 25;
  const element = (id) => document.getElementById(id);
  const state = { at: columns.findIndex((column) => column.key === "effect_size"), ascending: false, page: 0 };
  const names = columns[0].values, flagged = columns[columns.length - 1].values;

  function told(column, i) {
    if (column.shown) return column.shown[i];
    const value = column.values[i];
    if (column.kind === "text") return value;
    if (value === null) return "–";
    if (column.kind === "count") return value.toLocaleString("en").replace(/,/g, "\u202f");
    if (column.kind === "percent") return (100 * value).toFixed(0) + "\u202f%";
    const text = column.kind === "p" && value < 0.001 ? value.toExponential(0) : value.toFixed(3);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
  }
  function chosen() {
    const words = element("q-filter").value.trim().toLowerCase(), flag = element("q-flag").value;
    const column = columns[state.at], direction = state.ascending ? 1 : -1;
    return names.map((_, i) => i)
      .filter((i) => names[i].toLowerCase().includes(words) && (!flag || flagged[i].split(", ").includes(flag)))
      .sort((i, j) => {
        const u = column.values[i], v = column.values[j];
        /* Rows without a value come last in either order. */
        if (u === null || v === null) return (u === null) - (v === null) || i - j;
        if (column.kind === "text") return direction * u.localeCompare(v, "en", { numeric: true }) || i - j;
        return direction * (u - v) || i - j;
      });
  }
  function drawHead() {
    const row = document.createElement("tr");
    columns.forEach((column, at) => {
      const th = document.createElement("th"), button = document.createElement("button");
      th.scope = "col";
      if (column.kind === "text") th.className = "words";
      if (at === state.at) th.setAttribute("aria-sort", state.ascending ? "ascending" : "descending");
      button.type = "button";
      button.className = "sort";
      button.textContent = column.title;
      button.addEventListener("click", () => {
        const rising = column.kind === "text" || column.kind === "p";
        state.ascending = state.at === at ? !state.ascending : rising;
        state.at = at;
        state.page = 0;
        update();
        element("q-table").querySelectorAll("th button")[at].focus();
      });
      th.append(button);
      row.append(th);
    });
    element("q-table").tHead.replaceChildren(row);
  }
  function update() {
    const found = chosen(), pages = Math.max(1, Math.ceil(found.length / PAGE));
    drawHead();
    const body = document.createElement("tbody");
    for (const i of found.slice(state.page * PAGE, (state.page + 1) * PAGE)) {
      const row = body.insertRow();
      for (const column of columns) {
        const td = row.insertCell();
        td.textContent = told(column, i);
        if (column.kind === "text") td.className = "words";
      }
    }
    element("q-table").tBodies[0].replaceWith(body);
    element("q-prev").disabled = state.page === 0;
    element("q-next").disabled = state.page >= pages - 1;
    element("q-count").textContent = found.length + " of " + total + " perturbations, page " + (state.page + 1) + " of " + pages;
  }
  for (const flag of flags) element("q-flag").add(new Option(flag, flag));
  for (const [id, event] of [["q-filter", "input"], ["q-flag", "change"]]) {
    element(id).addEventListener(event, () => { state.page = 0; update(); });
  }
  element("q-prev").addEventListener("click", () => { state.page -= 1; update(); });
  element("q-next").addEventListener("click", () => { state.page += 1; update(); });
  update();
})();
