"use strict";
/* Draw the figures of the page with plotly, in the colours of the current theme, when they come near. */
const DATA = JSON.parse(document.getElementById("report-data").textContent);
const plots = (function () {
  const CONFIG = {
    responsive: true, displaylogo: false,
    // Only what works offline: plotly's own bar holds a button that sends the figure to its maker.
    modeBarButtons: [["toImage", "resetScale2d"]], plotlyServerURL: "", showSendToCloud: false,
    displayModeBar: window.matchMedia("(hover: hover)").matches ? "hover" : false,
    toImageButtonOptions: { format: "svg" },
  };
  const drawn = new Map(); // element → function that returns its specification

  /* plotly draws a subset of HTML, so names that come from data are escaped first. */
  function escape(text) {
    return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }
  /* "@main" under a key that is a colour becomes that colour of the theme; other strings stay. */
  function paint(value, key) {
    if (typeof value === "string") {
      return /color/i.test(key) && value[0] === "@" ? theme.color(value.slice(1)) : value;
    }
    if (Array.isArray(value)) return /color/i.test(key) ? value.map((item) => paint(item, key)) : value.map((item) =>
      item && typeof item === "object" ? paint(item, "") : item);
    if (value && typeof value === "object") {
      const painted = {};
      for (const name of Object.keys(value)) painted[name] = paint(value[name], name);
      return painted;
    }
    return value;
  }
  function axis(own) {
    return Object.assign({ gridcolor: "@grid", zerolinecolor: "@grid", linecolor: "@rule", ticks: "", automargin: true },
      own, { title: Object.assign({ standoff: 8, font: { size: 12 } }, own && own.title) });
  }
  function draw(element) {
    const spec = drawn.get(element)();
    const narrow = element.clientWidth < 460;
    const layout = Object.assign({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      margin: { t: 10, r: 12, b: 44, l: 52 }, autosize: true, colorway: ["@c1", "@c2", "@c3"],
    }, spec.layout);
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 12, color: "@soft" };
    layout.hoverlabel = { bgcolor: "@raised", bordercolor: "@rule", font: { color: "@ink", size: 12 }, align: "left", namelength: -1 };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: "@rule", activecolor: "@ink" };
    layout.xaxis = axis(layout.xaxis);
    layout.yaxis = axis(layout.yaxis);
    if (layout.legend) layout.legend = Object.assign({ font: { size: 11 } }, layout.legend);
    return Plotly.react(element, paint(spec.data, ""), paint(layout, ""), CONFIG);
  }
  const waiting = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      waiting.delete(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "900px" });

  /* Draw an element's figure when it comes near, or again at once when it was drawn before. */
  function show(element, specification) {
    const before = drawn.has(element) && !waiting.has(element);
    drawn.set(element, specification);
    if (before) return draw(element);
    waiting.add(element);
    observer.observe(element);
    return null;
  }
  function drawAll() {
    for (const element of drawn.keys()) {
      observer.unobserve(element);
      waiting.delete(element);
      draw(element);
    }
  }
  theme.onChange(() => { for (const element of drawn.keys()) if (!waiting.has(element)) draw(element); });
  /* Paper is white: print every figure, in light colours and at the width of a page. */
  window.addEventListener("beforeprint", () => {
    theme.show("light");
    drawAll();
    for (const element of drawn.keys()) Plotly.relayout(element, { width: 660 });
  });
  window.addEventListener("afterprint", () => {
    for (const element of drawn.keys()) Plotly.relayout(element, { width: null, autosize: true });
    theme.restore();
  });

  for (const element of document.querySelectorAll("[data-figure]")) {
    const figure = DATA.figures[element.dataset.figure];
    const select = document.querySelector('[data-select="' + CSS.escape(element.dataset.figure) + '"]');
    const chosen = () => figure.options[select ? select.selectedIndex : 0][1];
    if (select) select.addEventListener("change", () => show(element, chosen));
    show(element, chosen);
  }
  for (const select of document.querySelectorAll("[data-tables]")) {
    const choose = () => {
      for (const table of document.querySelectorAll('[data-table="' + select.dataset.tables + '"]')) {
        table.hidden = table.dataset.value !== select.value;
      }
    };
    select.addEventListener("change", choose);
    choose();
  }
  /* Mark the section in view in the bar at the top. */
  const links = new Map([...document.querySelectorAll(".bar-top nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
  const spy = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting || !links.has(entry.target.id)) continue;
      for (const [id, link] of links) link.classList.toggle("here", id === entry.target.id);
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("main section").forEach((section) => spy.observe(section));
  return { show, escape, drawn };
})();
