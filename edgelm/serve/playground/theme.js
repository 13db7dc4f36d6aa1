// The theme: the system's, or the one chosen on this page. It runs before the page is drawn, so that nothing flashes.
"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("edgelm.theme");
  } catch {
    // storage is switched off: the choice lasts until the page is closed
  }
  const current = () => chosen ?? (dark.matches ? "dark" : "light");

  function show() {
    root.dataset.theme = current();
    const other = current() === "dark" ? "light" : "dark";
    document.getElementById("theme")?.setAttribute("aria-label", `Switch to the ${other} theme`);
  }

  show();
  dark.addEventListener("change", show);
  document.addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", () => {
      chosen = current() === "dark" ? "light" : "dark";
      try {
        localStorage.setItem("edgelm.theme", chosen);
      } catch {
        // as above
      }
      show();
    });
  });
})();
