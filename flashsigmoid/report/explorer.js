// What explorer.py's page shows: reads its data, follows its controls, draws by Plotly. Nothing is loaded.
"use strict";
(() => {
  const { arms, colours } = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const union = (of) => [...new Set(arms.flatMap(of))].sort((a, b) => a - b);
  const steps = union((arm) => arm.steps);
  const state = { step: steps.at(-1), layer: arms[0].layers.at(-1), head: arms[0].heads[0], token: 0, scale: "own" };
  state.token = arms[0].grid[0] ? 0 : arms[0].tokens.length - 1;

  // float16, little endian, in base64
  function numbers(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return Float32Array.from({ length: bytes.length / 2 }, (_, i) => {
      const bits = bytes[2 * i] | (bytes[2 * i + 1] << 8);
      const exponent = (bits >> 10) & 31, fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
      if (exponent === 31) return fraction ? NaN : sign * Infinity;
      return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
    });
  }

  const decoded = new Map();
  function array(arm, kind, at) {
    const key = `${arms.indexOf(arm)} ${kind} ${at}`;
    if (!decoded.has(key)) decoded.set(key, numbers(arm[kind][at]));
    return decoded.get(key);
  }

  // weights (n rows) and norms (n) of the layer and head picked, null where the arm has none at this step
  function picked(arm, step = state.step) {
    const at = arm.steps.indexOf(step), layer = arm.layers.indexOf(state.layer), head = arm.heads.indexOf(state.head);
    const n = arm.tokens.length, map = layer * arm.heads.length + head;
    if (at < 0 || layer < 0 || head < 0 || state.token >= n) return null;
    const all = array(arm, "weights", at).subarray(map * n * n, (map + 1) * n * n);
    const rows = Array.from({ length: n }, (_, i) => Array.from(all.subarray(i * n, (i + 1) * n)));
    return { rows, norms: array(arm, "norms", at).subarray(map * n, (map + 1) * n) };
  }

  const sum = (row) => row.reduce((a, b) => a + b, 0);
  const largest = (row) => row.reduce((a, b) => Math.max(a, b), 0);
  const name = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
  const named = (arm) => (arm.grid[0] ? (text) => text : name);
  const short = (x) => (x === 0 ? "0" : Math.abs(x) < 1e-3 ? x.toExponential(1) : x.toPrecision(3));
  const css = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
  const colour = (arm) => css(arm.colour.slice(4, -1)); // of "var(--arm-0)"
  const options = { displayModeBar: false, responsive: true };

  function layout(more) {
    const ink = css("--soft"), line = { gridcolor: css("--line"), zeroline: false, linecolor: css("--line") };
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 },
      margin: { l: 48, r: 8, t: 8, b: 40 }, showlegend: false, dragmode: false,
    };
    const axes = {};
    for (const axis of ["xaxis", "yaxis", "xaxis2", "yaxis2"]) if (more[axis]) axes[axis] = { ...line, ...more[axis] };
    return { ...base, ...more, ...axes };
  }

  const fixed = { fixedrange: true, showgrid: false };
  const frame = (x0, x1, y0, y1, axes = {}) => ({
    type: "rect", x0, x1, y0, y1, line: { color: css("--warn"), width: 2 }, ...axes,
  });

  function pick(token) {
    state.token = token;
    element("token").value = token;
    draw();
  }

  function onClick(plot, token) {
    if (plot.picks) return;
    plot.picks = true;
    plot.on("plotly_click", ({ points }) => pick(token(points[0])));
  }

  async function drawMap(arm, i, rows, zmax) {
    const tell = named(arm), names = arm.tokens.map(tell);
    arm.hover ??= names.map((query) => names.map((key) => `${query} → ${key}`));
    const plot = element(`map-${i}`), n = names.length;
    const data = [{
      type: "heatmap", z: rows, zmin: 0, zmax, text: arm.hover,
      colorscale: [[0, css("--card")], [0.5, colour(arm)], [1, css("--ink")]],
      hovertemplate: "%{text}<br>query %{y}, key %{x}<br>weight %{z:.4g}<extra></extra>",
      colorbar: { thickness: 10, len: 1, outlinewidth: 0, tickfont: { size: 11 } },
    }];
    await Plotly.react(plot, data, layout({
      margin: { l: 48, r: 0, t: 8, b: 42 },
      xaxis: { ...fixed, title: { text: "key" }, constrain: "domain", range: [-0.5, n - 0.5] },
      yaxis: { ...fixed, title: { text: "query" }, range: [n - 0.5, -0.5], scaleanchor: "x", constrain: "domain" },
      shapes: [frame(-0.5, n - 0.5, state.token - 0.5, state.token + 0.5)],
    }), options);
    onClick(plot, (point) => point.y);
  }

  function drawStrip(arm, i, row) {
    const strip = element(`strip-${i}`), most = largest(row) || 1;
    if (!strip.children.length) {
      arm.tokens.forEach((token, j) => {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = name(token);
        button.onclick = () => pick(j);
        strip.append(button);
      });
    }
    [...strip.children].forEach((button, j) => {
      button.style.background = `color-mix(in srgb, ${arm.colour} ${Math.round(65 * row[j] / most)}%, transparent)`;
      button.title = `weight ${short(row[j])}`;
      button.setAttribute("aria-pressed", j === state.token);
    });
  }

  async function drawPatches(arm, i, row) {
    const [height, width] = arm.grid, first = arm.tokens.length - height * width;
    const grid = Array.from({ length: height }, (_, y) => row.slice(first + y * width, first + (y + 1) * width));
    const text = grid.map((line, y) => line.map((_, x) => arm.tokens[first + y * width + x]));
    const picture = (xref, yref, opacity) => ({
      source: arm.image, xref, yref, x: -0.5, y: -0.5, sizex: width, sizey: height, sizing: "stretch", opacity,
      layer: opacity < 1 ? "above" : "below",
    });
    const patch = state.token - first, x = patch % width, y = Math.floor(patch / width);
    const square = (anchor) => ({ ...fixed, visible: false, range: [height - 0.5, -0.5], scaleanchor: anchor, constrain: "domain" });
    const across = { ...fixed, visible: false, range: [-0.5, width - 0.5], constrain: "domain" };
    const heat = { type: "heatmap", text, hovertemplate: "%{text}<br>weight %{customdata:.4g}<extra></extra>", customdata: grid };
    const zeros = grid.map((line) => line.map(() => 0));
    const plot = element(`patches-${i}`);
    await Plotly.react(plot, [
      { ...heat, z: zeros, colorscale: [[0, "rgba(0,0,0,0)"], [1, "rgba(0,0,0,0)"]], showscale: false },
      { ...heat, z: grid, zmin: 0, zmax: largest(row) || 1, colorscale: colours, showscale: false, xaxis: "x2", yaxis: "y2" },
    ], layout({
      margin: { l: 0, r: 0, t: 4, b: 4 },
      xaxis: { ...across, domain: [0, 0.49] }, yaxis: square("x"),
      xaxis2: { ...across, domain: [0.51, 1], anchor: "y2" }, yaxis2: { ...square("x2"), anchor: "x2" },
      images: [picture("x", "y", 1), picture("x2", "y2", 0.3)],
      shapes: patch < 0 ? [] : [frame(x - 0.5, x + 0.5, y - 0.5, y + 0.5, { xref: "x", yref: "y" })],
    }), options);
    onClick(plot, (point) => first + point.y * width + point.x);
  }

  const statistics = {
    attn_norm: ({ norms }) => norms[state.token],
    row_mass: ({ rows }) => sum(rows[state.token]),
    sink: ({ rows }) => rows[state.token][0] / sum(rows[state.token]),
  };

  async function drawCurve(statistic) {
    const traces = [];
    for (const arm of arms) {
      const series = arm.recorded[statistic][arm.layers.indexOf(state.layer)] ?? [];
      const line = { color: colour(arm), width: 2 }, hovertemplate = "step %{x}: %{y:.4g}<extra>" + arm.label + "</extra>";
      if (series.length) traces.push({
        x: series.map((p) => p[0]), y: series.map((p) => p[1]), mode: "lines", line, name: arm.label, hovertemplate,
      });
      const seen = arm.steps.map((step) => [step, picked(arm, step)]).filter(([, found]) => found);
      traces.push({
        x: seen.map((p) => p[0]), y: seen.map((p) => statistics[statistic](p[1])), mode: "markers", cliponaxis: false,
        marker: { color: line.color, size: 8 }, name: `${arm.label}, head and token`, hovertemplate,
      });
    }
    const share = statistic === "sink" ? { tickformat: "~%" } : {};
    await Plotly.react(element(statistic), traces, layout({
      xaxis: { fixedrange: true, title: { text: "step" } }, yaxis: { fixedrange: true, rangemode: "tozero", ...share },
      shapes: [{ type: "line", x0: state.step, x1: state.step, yref: "paper", y0: 0, y1: 1,
        line: { color: css("--soft"), width: 1, dash: "dot" } }],
    }), options);
  }

  async function draw() {
    const asked = JSON.stringify(state);
    element("at").textContent = state.step.toLocaleString("en");
    const found = arms.map((arm) => picked(arm));
    const maxima = found.map((each) => (each ? largest(each.rows.map(largest)) : 0));
    const jobs = found.map((each, i) => {
      const arm = arms[i];
      element(`shown-${i}`).hidden = !each;
      element(`facts-${i}`).textContent = "not recorded for this step, layer, head and token";
      if (!each) return null;
      const row = each.rows[state.token], mass = sum(row), at = row.indexOf(largest(row));
      element(`facts-${i}`).textContent = `token ${state.token}, “${named(arm)(arm.tokens[state.token])}”: row mass ` +
        `${short(mass)}, on the first token ${mass ? (100 * row[0] / mass).toFixed(1) : 0} %, largest weight ${short(row[at])} ` +
        `on token ${at}, “${named(arm)(arm.tokens[at])}”`;
      const zmax = (state.scale === "own" ? maxima[i] : Math.max(...maxima)) || 1;
      if (!arm.image) drawStrip(arm, i, row);
      return Promise.all([drawMap(arm, i, each.rows, zmax), arm.image ? drawPatches(arm, i, row) : null]);
    });
    await Promise.all([...jobs, ...Object.keys(statistics).map(drawCurve)]);
    document.body.dataset.drawn = asked; // what the page shows now
  }

  function choices(id, values, text = String) {
    element(id).replaceChildren(...values.map((value) => new Option(text(value), value)));
    element(id).value = state[id];
    element(id).onchange = (event) => { state[id] = Number(event.target.value); draw(); };
  }

  arms.forEach((arm, i) => {
    const article = document.createElement("article");
    article.style.borderTopColor = arm.colour;
    article.innerHTML = `<h3></h3><p class="unit" id="facts-${i}"></p><div id="shown-${i}">` +
      (arm.image ? `<div class="patches" id="patches-${i}"></div>` : `<div class="strip" id="strip-${i}"></div>`) +
      `<div class="map" id="map-${i}"></div></div>`;
    article.firstChild.textContent = `${arm.label}, seed ${arm.seed}`;
    element("arms").append(article);
    const entry = document.createElement("span");
    entry.innerHTML = `<i class="dot" style="background:${arm.colour}"></i>`;
    entry.append(arm.label);
    element("legend").append(entry);
  });
  const most = arms.reduce((a, b) => (b.tokens.length > a.tokens.length ? b : a));
  choices("layer", union((arm) => arm.layers));
  choices("head", union((arm) => arm.heads));
  choices("token", most.tokens.map((_, i) => i), (i) => `${i}: ${named(most)(most.tokens[i])}`);
  element("scale").onchange = (event) => { state.scale = event.target.value; draw(); };
  element("step").max = steps.length - 1;
  element("step").value = steps.length - 1;
  element("step").oninput = (event) => { state.step = steps[event.target.value]; draw(); };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
