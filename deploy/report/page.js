"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const options = { displayModeBar: false, responsive: true, doubleClick: "reset", showTips: false };
  // A finger that moves over a plot scrolls the page.
  const touch = matchMedia("(pointer: coarse)").matches;

  async function draw() {
    for (const { id, data, layout } of figures) {
      if (touch) layout.dragmode = false;
      await Plotly.newPlot(id, data, layout, options);
      await new Promise((done) => setTimeout(done));
    }
    document.documentElement.dataset.drawn = figures.length;
  }

  // An entry of a legend hides its lines in the figures that the legend is for.
  document.addEventListener("click", ({ target }) => {
    const key = target.closest(".legend button");
    if (!key) return;
    const visible = key.getAttribute("aria-pressed") !== "true";
    key.setAttribute("aria-pressed", visible);
    for (const plot of key.closest("[data-legend]").querySelectorAll(".plot")) {
      const lines = (plot.data || []).flatMap((line, i) => (line.meta === key.dataset.name ? [i] : []));
      if (lines.length) Plotly.restyle(plot, { visible }, lines);
    }
  });

  // On paper plots are as wide as their place there.
  const drawings = () => document.querySelectorAll(".plot .main-svg");
  addEventListener("beforeprint", () => {
    for (const svg of drawings()) {
      svg.setAttribute("viewBox", `0 0 ${svg.width.baseVal.value} ${svg.height.baseVal.value}`);
    }
  });
  addEventListener("afterprint", () => drawings().forEach((svg) => svg.removeAttribute("viewBox")));

  draw();
})();
