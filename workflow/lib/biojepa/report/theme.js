"use strict";
/* Light or dark: the system's choice until the reader makes another. */
const theme = (function () {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const listeners = [];
  let chosen = new URLSearchParams(location.search).get("theme");
  function apply(name) {
    root.dataset.theme = name;
    const button = document.getElementById("theme");
    if (button) button.textContent = name === "dark" ? "Light" : "Dark";
    listeners.forEach((listener) => listener(name));
  }
  function current() { return chosen || (system.matches ? "dark" : "light"); }
  system.addEventListener("change", () => apply(current()));
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      chosen = root.dataset.theme === "dark" ? "light" : "dark";
      apply(chosen);
    });
    apply(current());
  });
  root.dataset.theme = current();
  return {
    onChange: (listener) => listeners.push(listener),
    color: (name) => getComputedStyle(root).getPropertyValue("--" + name).trim(),
    show: apply,
    restore: () => apply(current()),
  };
})();
