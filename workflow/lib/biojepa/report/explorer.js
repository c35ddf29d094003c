"use strict";
/* The table of perturbations, and what is known about the one that is chosen. */
(function () {
  const X = DATA.explorer;
  const PAGE = 15;
  const element = (id) => document.getElementById(id);
  const escape = plots.escape;
  const modelOf = Object.fromEntries(X.models.map((model) => [model.name, model]));
  const label = (name) => (modelOf[name] ? modelOf[name].label : name);
  const state = { sort: "difference", ascending: false, page: 0, picked: null };
  if (!X.names.length || !X.metrics.length) { element("explorer").hidden = true; return; }

  function options(select, items, chosen) {
    for (const [value, text] of items) select.add(new Option(text, value, false, value === chosen));
  }
  function format(value, digits) {
    if (value === null || value === undefined) return "–";
    const text = value.toFixed(digits === undefined ? 3 : digits);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
  }
  const metric = () => X.metrics.find((item) => item.name === element("x-metric").value);
  const scores = (model) => (X.scores[metric().name] || {})[model] || X.names.map(() => null);
  /* How much better a is than b: positive is better whatever the direction of the metric. */
  function gain(a, b) {
    if (a === null || b === null) return null;
    const best = metric().best;
    if (best === "max") return a - b;
    return best === "min" ? b - a : Math.abs(b - best) - Math.abs(a - best);
  }

  function columns() {
    const a = element("x-a").value, b = element("x-b").value;
    const found = [
      { key: "name", title: "Perturbation", text: true, value: (i) => X.names[i] },
    ];
    if (X.scores[metric().name] && X.scores[metric().name].duplicate && a !== "duplicate" && b !== "duplicate") {
      found.push({ key: "duplicate", title: "Duplicate", value: (i) => scores("duplicate")[i] });
    }
    found.push({ key: "a", title: label(a), value: (i) => scores(a)[i] });
    if (a !== b) found.push({ key: "b", title: label(b), value: (i) => scores(b)[i] });
    found.push({ key: "difference", title: "Better by", value: (i) => gain(scores(a)[i], scores(b)[i]) });
    found.push(
      { key: "cells", title: "Cells", digits: 0, value: (i) => X.strata["cells"][i] },
      { key: "genes", title: "Sig. genes", digits: 0, value: (i) => X.strata["significant genes"][i] },
      { key: "category", title: "Category", text: true, value: (i) => X.categoryLabels[X.categories[i]] },
    );
    return found;
  }
  function differenceOf(all) { return all.find((item) => item.key === "difference"); }
  function rows(all) {
    const words = element("x-filter").value.trim().toLowerCase();
    const category = element("x-category").value;
    const column = all.find((item) => item.key === state.sort) || differenceOf(all);
    const chosen = X.names.map((_, i) => i).filter((i) =>
      (!words || X.names[i].toLowerCase().includes(words)) && (!category || X.categories[i] === category));
    const direction = state.ascending ? 1 : -1;
    return chosen.sort((i, j) => {
      const u = column.value(i), v = column.value(j);
      if (u === null || v === null) return (u === null) - (v === null) || i - j;
      return direction * (column.text ? (u < v ? -1 : u > v ? 1 : 0) : u - v) || i - j;
    });
  }

  function cell(row, text, numeric) {
    const td = row.insertCell();
    td.textContent = text;
    if (!numeric) td.style.textAlign = "left";
    return td;
  }
  function drawHead(all) {
    const row = document.createElement("tr");
    for (const column of all) {
      const th = document.createElement("th");
      th.scope = "col";
      if (column.text) th.style.textAlign = "left";
      if (column.key === state.sort) th.setAttribute("aria-sort", state.ascending ? "ascending" : "descending");
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.textContent = column.title;
      button.addEventListener("click", () => {
        state.ascending = state.sort === column.key ? !state.ascending : Boolean(column.text);
        state.sort = column.key;
        state.page = 0;
        update();
        element("x-table").querySelectorAll("th button")[all.indexOf(column)].focus();
      });
      th.append(button);
      row.append(th);
    }
    element("x-table").tHead.replaceChildren(row);
  }
  function differenceBar(value, widest) {
    const bar = document.createElement("span");
    bar.className = "diff";
    bar.setAttribute("aria-hidden", "true");
    for (const side of [-1, 1]) {
      const half = document.createElement("i");
      const share = value === null || value * side <= 0 ? 0 : Math.abs(value) / widest;
      half.style.width = (100 * share).toFixed(1) + "%";
      half.style.background = side > 0 ? "var(--main)" : "var(--negative)";
      bar.append(half);
    }
    return bar;
  }
  function drawTable(all, chosen) {
    const body = document.createElement("tbody");
    const difference = differenceOf(all);
    const widest = Math.max(1e-9, ...chosen.map((i) => Math.abs(difference.value(i) || 0)));
    for (const i of chosen.slice(state.page * PAGE, (state.page + 1) * PAGE)) {
      const row = body.insertRow();
      row.setAttribute("aria-selected", String(X.names[i] === state.picked));
      for (const column of all) {
        if (column.key === "name") {
          const button = document.createElement("button");
          button.type = "button";
          button.className = "pick";
          button.textContent = X.names[i];
          button.addEventListener("click", () => pick(X.names[i], true));
          row.insertCell().append(button);
          continue;
        }
        const value = column.value(i);
        const td = cell(row, column.text ? value : format(value, column.digits), !column.text);
        if (column.key === "category") td.className = "wrap";
        if (column.key === "difference") td.append(differenceBar(value, widest));
      }
    }
    element("x-table").tBodies[0].replaceWith(body);
    const pages = Math.max(1, Math.ceil(chosen.length / PAGE));
    element("x-prev").disabled = state.page === 0;
    element("x-next").disabled = state.page >= pages - 1;
    element("x-count").textContent = chosen.length + " of " + X.names.length + " perturbations, page " +
      (state.page + 1) + " of " + pages + (X.reduced ? "; main models and headline metrics only, all are in metrics.tsv" : "");
  }

  function drawBars(all, chosen) {
    const difference = differenceOf(all);
    const found = chosen.filter((i) => difference.value(i) !== null)
      .sort((i, j) => difference.value(j) - difference.value(i) || i - j);
    const values = found.map((i) => difference.value(i));
    const better = values.filter((value) => value > 0).length;
    element("x-bars-n").textContent = found.length + " perturbations, better on " + better + ", worse on " +
      values.filter((value) => value < 0).length + ".";
    const few = () => found.length <= (element("x-bars").clientWidth < 460 ? 14 : 40);
    plots.show(element("x-bars"), () => ({ // named below the bars where there is room
      data: [{
        type: "bar", x: found.map((_, k) => k), y: values,
        marker: { color: values.map((value) => (value > 0 ? "@main" : "@negative")) },
        customdata: found.map((i) => [escape(X.names[i]), escape(X.categoryLabels[X.categories[i]])]),
        hovertemplate: "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>better by %{y:.3f}<extra></extra>",
      }],
      layout: {
        bargap: 0.15, margin: { t: 8, r: 12, b: few() ? 80 : 36, l: 52 },
        xaxis: {
          showgrid: false, tickmode: "array", tickangle: -60, tickfont: { size: 10 },
          tickvals: few() ? found.map((_, k) => k) : [], ticktext: few() ? found.map((i) => escape(shorten(X.names[i]))) : [],
          title: { text: few() ? "" : "perturbation, best first" },
        },
        yaxis: { title: { text: "better by" }, zerolinecolor: "@ink" },
      },
    }));
  }
  function shorten(name) { return name.length > 16 ? name.slice(0, 15) + "…" : name; }

  function drawStrata(chosen) {
    const stratum = element("x-stratum").value;
    const traces = [];
    const add = (model, color, symbol) => {
      const found = chosen.filter((i) => X.strata[stratum][i] !== null && scores(model)[i] !== null);
      if (!found.length) return;
      traces.push({
        type: "scatter", mode: "markers", name: escape(label(model)),
        x: found.map((i) => X.strata[stratum][i]), y: found.map((i) => scores(model)[i]),
        marker: { color, symbol, size: 7, opacity: 0.8 },
        customdata: found.map((i) => escape(X.names[i])), hovertemplate: "<b>%{customdata}</b><br>%{x:.4~g}: %{y:.3f}",
      });
    };
    const a = element("x-a").value, b = element("x-b").value;
    if (a !== "duplicate" && b !== "duplicate") add("duplicate", "@positive", "square-open");
    if (b !== a) add(b, "@best", "circle-open");
    add(a, "@main", "diamond");
    element("x-strata-n").textContent = (traces.length ? traces[traces.length - 1].x.length : 0) + " perturbations.";
    plots.show(element("x-strata"), () => ({
      data: traces,
      layout: {
        legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, margin: { t: 8, r: 12, b: 44, l: 52 },
        xaxis: { title: { text: stratum } }, yaxis: { title: { text: escape(metric().label) } },
      },
    }));
  }

  function drawGenes(profile) {
    const model = element("x-model").value;
    const predicted = profile.p[model];
    const targets = new Set(state.picked.split(" @ ")[0].split("+"));
    const genes = profile.g.map((position) => X.genes[position]);
    const top = Math.max(0.05, ...profile.o.map(Math.abs), ...predicted.map((value) => Math.abs(value || 0))) * 1.08;
    const order = genes.map((_, k) => k).sort((i, j) => Math.abs(profile.o[j]) - Math.abs(profile.o[i]) || i - j);
    const named = spaced([...order.filter((k) => targets.has(genes[k])), ...order], profile.o, predicted, top);
    const hover = "<b>%{customdata}</b><br>observed %{x:.3f}, predicted %{y:.3f}<extra></extra>";
    element("x-genes-n").textContent = genes.length + " genes, fold " + profile.fold + ".";
    plots.show(element("x-genes"), () => ({
      data: [
        { type: "scatter", mode: "lines", x: [-top, top], y: [-top, top], hoverinfo: "skip", line: { color: "@ink", dash: "dot", width: 1.2 } },
        {
          type: "scatter", mode: "markers+text", x: profile.o, y: predicted, customdata: genes.map(escape), hovertemplate: hover,
          text: genes.map((gene, k) => (named.has(k) ? escape(shorten(gene)) : "")), textposition: profile.o.map((value) => (value > 0 ? "middle left" : "middle right")),
          textfont: { size: 10, color: "@soft" },
          marker: {
            size: genes.map((gene) => (targets.has(gene) ? 11 : 6)), color: "@main", opacity: 0.75,
            line: { width: genes.map((gene) => (targets.has(gene) ? 2.5 : 0)), color: "@ink" },
          },
        },
      ],
      layout: {
        showlegend: false, margin: { t: 8, r: 12, b: 44, l: 52 },
        xaxis: { title: { text: "observed Δ" }, range: [-top, top] }, yaxis: { title: { text: "predicted Δ" }, range: [-top, top] },
      },
    }));
    const table = document.createElement("table");
    const models = Object.keys(profile.p);
    const head = table.createTHead().insertRow();
    for (const title of ["Gene", "Observed Δ", ...models.map(label)]) {
      const th = document.createElement("th");
      th.scope = "col";
      th.textContent = title;
      head.append(th);
    }
    const body = table.createTBody();
    for (const k of order.slice(0, 12)) {
      const row = body.insertRow();
      cell(row, genes[k] + (targets.has(genes[k]) ? " (perturbed)" : ""), false);
      cell(row, format(profile.o[k], 2), true);
      for (const name of models) cell(row, format(profile.p[name][k], 2), true);
    }
    table.id = "x-gene-table";
    element("x-gene-table").replaceWith(table);
  }

  /* Name the genes that come first as long as their labels do not run into each other, ten at most. */
  function spaced(order, x, y, top) {
    const kept = new Set();
    for (const k of order) {
      if (kept.size >= 10) break;
      const free = [...kept].every((other) => Math.abs(x[k] - x[other]) > 0.36 * top || Math.abs(y[k] - y[other]) > 0.09 * top);
      if (free) kept.add(k);
    }
    return kept;
  }

  function drawSets() {
    const found = X.nes[state.picked];
    element("x-sets-figure").hidden = !found;
    element("x-no-sets").hidden = Boolean(found);
    if (!found) return;
    const sets = found.map((item) => escape(shortenSet(X.sets[item[0]])));
    const at = (k) => found.length - 1 - k;
    const traces = [{
      type: "scatter", mode: "markers", name: "observed", x: found.map((item) => item[1]), y: found.map((_, k) => at(k)),
      marker: { size: 11, symbol: found.map((item) => (item[2] !== null && item[2] < 0.05 ? "circle" : "circle-open")), color: "@ink", line: { width: 1.5, color: "@ink" } },
      customdata: found.map((item) => [escape(X.sets[item[0]]), format(item[2])]),
      hovertemplate: "<b>%{customdata[0]}</b><br>observed NES %{x:.2f}, FDR %{customdata[1]}",
    }];
    X.nesModels.forEach((model, m) => {
      const group = modelOf[model] ? modelOf[model].group : "other";
      const style = { main: ["@main", "diamond"], positive: ["@positive", "square"], baseline: ["@best", "triangle-up"] }[group] || ["@ablation", "triangle-down"];
      traces.push({
        type: "scatter", mode: "markers", name: escape(label(model)), x: found.map((item) => item[3][m]),
        y: found.map((_, k) => at(k)), marker: { size: 8, color: style[0], symbol: style[1], opacity: 0.85 },
        customdata: found.map((item) => escape(X.sets[item[0]])), hovertemplate: "<b>%{customdata}</b><br>predicted NES %{x:.2f}",
      });
    });
    element("x-sets-n").textContent = found.length + " gene sets.";
    plots.show(element("x-sets"), () => ({
      data: traces,
      layout: {
        legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, margin: { t: 8, r: 12, b: 40, l: 8 },
        xaxis: { title: { text: "normalized enrichment score" }, zerolinecolor: "@ink" },
        yaxis: { tickmode: "array", tickvals: found.map((_, k) => at(k)), ticktext: sets, zeroline: false, automargin: true },
      },
    }));
  }
  function shortenSet(name) {
    const limit = window.innerWidth < 640 ? 18 : 40;
    return name.length > limit ? name.slice(0, limit - 1) + "…" : name;
  }

  /* Ring the cells of the chosen perturbation in the map of the embedding. */
  function ringCells() {
    const map = document.querySelector('[data-figure="umap"]');
    if (!map) return;
    const base = plots.drawn.get(map);
    const plain = base.plain || base;
    const ringed = () => {
      const spec = plain();
      const name = escape(state.picked);
      const x = [], y = [];
      for (const trace of spec.data) trace.text.forEach((text, k) => { if (text === name) { x.push(trace.x[k]); y.push(trace.y[k]); } });
      const ring = {
        type: "scatter", mode: "markers", name, x, y, hoverinfo: "skip",
        marker: { size: 7, symbol: "circle-open", color: "@ink", line: { width: 1.2, color: "@ink" } },
      };
      return { data: x.length ? [...spec.data, ring] : spec.data, layout: spec.layout };
    };
    ringed.plain = plain;
    plots.show(map, ringed);
  }

  function pick(name, jump) {
    state.picked = name;
    const at = X.names.indexOf(name);
    element("x-name").textContent = name + ", " + X.categoryLabels[X.categories[at]];
    const profile = X.profiles[name];
    const select = element("x-model");
    const before = select.value;
    select.replaceChildren();
    if (profile) {
      const models = Object.keys(profile.p);
      options(select, models.map((model) => [model, label(model)]), models.includes(before) ? before : models[0]);
      drawGenes(profile);
    }
    for (const id of ["x-genes", "x-gene-table"]) element(id).closest(".split-2").hidden = !profile;
    select.parentElement.hidden = !profile;
    element("x-no-genes").hidden = Boolean(profile);
    drawSets();
    ringCells();
    for (const row of element("x-table").tBodies[0].rows) {
      row.setAttribute("aria-selected", String(row.cells[0].textContent === name));
    }
    if (jump) history.replaceState(null, "", "#p=" + encodeURIComponent(name));
    if (jump) element("x-detail").scrollIntoView({ behavior: "smooth", block: "nearest" });
  }

  function update() {
    const all = columns();
    const chosen = rows(all);
    state.page = Math.min(state.page, Math.max(0, Math.ceil(chosen.length / PAGE) - 1));
    drawHead(all);
    drawTable(all, chosen);
    drawBars(all, chosen);
    drawStrata(chosen);
  }

  options(element("x-metric"), X.metrics.map((item) => [item.name, item.label + (item.legacy ? " (legacy)" : "")]));
  const models = X.models.map((model) => [model.name, model.label]);
  options(element("x-a"), models, X.lead);
  options(element("x-b"), models, X.baseline[X.metrics[0].name] || X.models[X.models.length - 1].name);
  options(element("x-category"), [["", "all"], ...Object.entries(X.categoryLabels)]);
  options(element("x-stratum"), Object.keys(X.strata).map((name) => [name, name]));
  for (const id of ["x-metric", "x-a", "x-b", "x-category", "x-stratum"]) {
    element(id).addEventListener("change", () => { state.page = 0; update(); });
  }
  element("x-filter").addEventListener("input", () => { state.page = 0; update(); });
  element("x-model").addEventListener("change", () => drawGenes(X.profiles[state.picked]));
  element("x-prev").addEventListener("click", () => { state.page -= 1; update(); });
  element("x-next").addEventListener("click", () => { state.page += 1; update(); });
  update();
  /* An address that ends in #p=NAME opens at that perturbation. */
  function linked() {
    if (!location.hash.startsWith("#p=")) return null;
    let name = location.hash.slice(3);
    try { name = decodeURIComponent(name); } catch (error) { return null; }
    return X.names.includes(name) ? name : null;
  }
  function follow() {
    const name = linked();
    if (name === null) return;
    pick(name, false);
    element("x-detail").scrollIntoView({ block: "start" });
  }
  const first = rows(columns()).map((i) => X.names[i]).find((name) => X.profiles[name]);
  pick(first || X.names[0], false);
  follow();
  window.addEventListener("hashchange", follow);
})();
