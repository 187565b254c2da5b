"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const options = { displayModeBar: false, responsive: true, doubleClick: "reset", showTips: false };
  // A finger that moves over a plot scrolls the page.
  const touch = matchMedia("(pointer: coarse)").matches;

  const choice = (name) => document.getElementById(name).value;

  // A line's moving mean over a stretch of its axis; on a log axis of the logarithms, as the eye would. Bands move along.
  function smooth(x, y, share, log) {
    const half = ((x.at(-1) - x[0]) * share) / 2;
    const value = log ? Math.log10 : (v) => v, back = log ? (v) => 10 ** v : (v) => v;
    const found = [];
    let from = 0, to = 0, sum = 0;
    for (let i = 0; i < x.length; i++) {
      // At the ends both sides shrink: a mean of one side would shift a slope.
      const reach = Math.min(half, x[i] - x[0], x.at(-1) - x[i]);
      while (to < x.length && (to <= i || x[to] <= x[i] + reach)) sum += value(y[to++]);
      while (to > i + 1 && x[to - 1] > x[i] + reach) sum -= value(y[--to]);
      while (from > 0 && x[from - 1] >= x[i] - reach) sum += value(y[--from]);
      while (from < i && x[from] < x[i] - reach) sum -= value(y[from++]);
      found.push(back(sum / (to - from)));
    }
    return found;
  }

  const smoothable = (line) => line.mode === "lines" && line.line.shape !== "hv" && !line.stackgroup;

  // The figure's lines and axis, as the reader has chosen.
  function chosen({ data, layout, axes }, raw) {
    const axis = axes[choice("axis")], share = Number(choice("smoothing"));
    const x = raw.map((line, i) => (axis?.x ? axis.x[i] : line.x));
    const log = layout.yaxis.type === "log";
    const y = raw.map((line, i) => (share && smoothable(data[i]) ? smooth(x[i], line.y, share, log) : line.y));
    return { x, y, axis };
  }

  const drawn = [];
  async function redraw() {
    for (const { plot, figure, raw, own, fitted } of drawn) {
      const { x, y, axis = own } = chosen(figure, raw);
      const moved = { "xaxis.autorange": true, ...fitted };
      for (const [name, value] of Object.entries(axis.layout)) moved[`xaxis.${name}`] = value;
      for (const [i, at] of axis.marks.entries()) {
        Object.assign(moved, { [`shapes[${i}].x0`]: at, [`shapes[${i}].x1`]: at });
        if (i < figure.layout.annotations.length) moved[`annotations[${i}].x`] = at;
      }
      await Plotly.update(plot, { x, y }, moved);
      await new Promise((done) => setTimeout(done));
    }
    document.documentElement.dataset.chosen = `${choice("axis")} ${choice("smoothing")}`;
  }
  for (const id of ["axis", "smoothing"]) document.getElementById(id)?.addEventListener("change", redraw);

  async function draw() {
    for (const figure of figures) {
      const { id, data, layout, axes } = figure;
      if (touch) layout.dragmode = false;
      const raw = data.map(({ x, y }) => ({ x, y }));
      const [own] = Object.values(axes);
      // plotly.js writes the range that it finds into the layout.
      const fitted = layout.yaxis.range ? {} : { "yaxis.autorange": true };
      if (own) drawn.push({ plot: document.getElementById(id), figure, raw, own, fitted });
      await Plotly.newPlot(id, data, layout, options);
      await new Promise((done) => setTimeout(done));
    }
    // What was chosen meanwhile has reached the plots that were drawn by then.
    if (drawn.length && (choice("axis") || Number(choice("smoothing")))) await redraw();
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
