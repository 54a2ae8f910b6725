// The interactive page of fastattn.viz.page: menus choose a layer, a head and a query; a heat map and links follow.
// Plotly is in the page already; "layers" holds what _page_data.py wrote.
"use strict";

const MOST_CELLS = 512; // a side of the heat map; beyond, a cell is the largest of several
const MOST_ROWS = 60; // tokens in a column of links
const LEVELS = 8; // of width and opacity: a trace each
const FAINTEST = 0.01; // lines weaker than this share of the strongest are left out
const LISTED = 8;
const BLUE = "#0072B2", VERMILION = "#D55E00", INK = "#222222";
const MOST_LINES = 600;
const LABEL = 14; // pixels from label to label
const CONFIG = { responsive: true, displaylogo: false };
const FONT = { family: "system-ui, sans-serif", size: 12, color: INK };

const byId = (id) => document.getElementById(id);
const layers = JSON.parse(byId("layers").textContent).map((layer) => ({
  ...layer,
  keys: new Uint32Array(bytes(layer.keys)),
  weights: new Uint16Array(bytes(layer.weights)),
}));

function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer;
}

// What Plotly draws may hold a few tags; tokens have none.
function escaped(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function range(count, first = 0) {
  return Array.from({ length: count }, (_, place) => first + place);
}

// Weights of one query over all keys, of one head or (head "mean") the average.
function rowOf(layer, head, query) {
  const queries = layer.queryTokens.length, keys = layer.keyTokens.length;
  const row = new Float32Array(keys);
  const heads = head === "mean" ? range(layer.heads) : [Number(head)];
  const scale = 1 / 65535 / heads.length;
  for (const each of heads) {
    if (layer.topK) {
      const start = (each * queries + query) * layer.topK;
      for (let place = start; place < start + layer.topK; place++) {
        if (layer.keys[place] < keys) row[layer.keys[place]] += layer.weights[place] * scale;
      }
    } else {
      const start = (each * queries + query) * keys;
      for (let key = 0; key < keys; key++) row[key] += layer.weights[start + key] * scale;
    }
  }
  return row;
}

function shown(weight) {
  return weight.toFixed(3);
}

function named(tokens, position) {
  return `${tokens[position]} (${position})`;
}

function span(tokens, first, step) {
  const last = Math.min(first + step, tokens.length) - 1;
  return last === first ? named(tokens, first) : `${first} to ${last}`;
}

// As many labels along an axis as its pixels hold, with their positions where some are left out.
function ticks(tokens, pixels) {
  const least = Math.max(1, (tokens.length * LABEL) / pixels), magnitude = 10 ** Math.floor(Math.log10(least));
  const step = least === 1 ? 1 : [1, 2, 5, 10].map((nice) => Math.ceil(nice * magnitude)).find((nice) => nice >= least);
  const places = range(Math.ceil(tokens.length / step)).map((place) => place * step);
  const text = places.map((place) => escaped(step > 1 ? `${place}: ${tokens[place]}` : tokens[place]));
  return { tickmode: "array", tickvals: places, ticktext: text, automargin: true, zeroline: false, showgrid: false };
}

function drawMap(layer, head) {
  const queries = layer.queryTokens.length, keys = layer.keyTokens.length;
  const stepQ = Math.ceil(queries / MOST_CELLS), stepK = Math.ceil(keys / MOST_CELLS);
  const z = [], text = [], rows = Math.ceil(queries / stepQ), columns = Math.ceil(keys / stepK);
  let top = 0;
  for (let row = 0; row < rows; row++) {
    const cells = new Float32Array(columns);
    for (let query = row * stepQ; query < Math.min((row + 1) * stepQ, queries); query++) {
      rowOf(layer, head, query).forEach((weight, key) => {
        const column = Math.floor(key / stepK);
        cells[column] = Math.max(cells[column], weight);
      });
    }
    const from = escaped(span(layer.queryTokens, row * stepQ, stepQ));
    text.push(Array.from(cells, (weight, column) =>
      `query ${from}<br>key ${escaped(span(layer.keyTokens, column * stepK, stepK))}<br>` +
      `${stepQ * stepK > 1 ? "largest weight" : "weight"} ${shown(weight)}`));
    top = cells.reduce((most, weight) => Math.max(most, weight), top);
    z.push(Array.from(cells, Math.sqrt)); // small weights stay visible; the legend has the weights
  }
  const marks = [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1].filter((mark) => mark <= top);
  const trace = {
    type: "heatmap", z, text, x0: (stepK - 1) / 2, dx: stepK, y0: (stepQ - 1) / 2, dy: stepQ,
    colorscale: "YlGnBu", reversescale: true, zmin: 0, zmax: Math.sqrt(top) || 1,
    xgap: columns > MOST_ROWS ? 0 : 1, ygap: rows > MOST_ROWS ? 0 : 1,
    hovertemplate: "%{text}<extra></extra>",
    colorbar: { title: { text: "weight", side: "right" }, tickvals: marks.map(Math.sqrt), ticktext: marks.map(String),
      thickness: 12, len: 0.7, outlinewidth: 0 },
  };
  const width = byId("map").clientWidth - 200, height = Math.min(Math.max(250, 15 * queries), 15 * MOST_ROWS);
  const layout = {
    height: height + 130, font: FONT, margin: { l: 20, r: 10, t: 30, b: 30 },
    annotations: [{ xref: "paper", yref: "paper", x: 0.5, y: 0, yshift: -20, text: "key", showarrow: false }],
    xaxis: { ...ticks(layer.keyTokens, width), side: "top", tickangle: -90 },
    yaxis: { ...ticks(layer.queryTokens, height), autorange: "reversed", title: { text: "query", standoff: 8 } },
  };
  Plotly.react("map", [trace], layout, { ...CONFIG, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
}

// Which queries the links show: the one chosen, or as many as fit from the first on.
function windowOf(layer, query, first) {
  const queries = layer.queryTokens.length;
  if (queries <= MOST_ROWS) return range(queries);
  const start = query === "all" ? first : Math.max(0, Number(query) - MOST_ROWS / 2);
  return range(MOST_ROWS, Math.min(start, queries - MOST_ROWS));
}

// Pairs of the queries to draw, and the keys of the right column: all, or those that are looked at most.
function linked(layer, head, query, queries) {
  const sums = new Float32Array(layer.keyTokens.length), pairs = [];
  for (const each of query === "all" ? queries : [Number(query)]) {
    rowOf(layer, head, each).forEach((weight, key) => {
      sums[key] += weight;
      if (weight > 0) pairs.push({ query: each, key, weight });
    });
  }
  let keys = range(sums.length);
  if (keys.length > MOST_ROWS) {
    keys = keys.filter((key) => sums[key] > 0).sort((one, other) => sums[other] - sums[one]).slice(0, MOST_ROWS).sort((one, other) => one - other);
  }
  const kept = new Set(keys);
  pairs.sort((one, other) => other.weight - one.weight);
  return { keys, pairs: pairs.filter((pair) => kept.has(pair.key)) };
}

function column(tokens, places, x, chosen) {
  const all = places.length === tokens.length;
  return {
    type: "scatter", mode: "markers+text", x: places.map(() => x), y: places.map((_, row) => (row + 0.5) / places.length),
    text: places.map((place) => escaped(all ? tokens[place] : `${place}: ${tokens[place]}`)),
    textposition: x ? "middle right" : "middle left", customdata: places, cliponaxis: false,
    marker: { size: 5, color: places.map((place) => (place === chosen ? VERMILION : BLUE)) },
    textfont: { color: places.map((place) => (place === chosen ? VERMILION : INK)) },
    hovertemplate: `${x ? "key" : "query"} %{text}<extra></extra>`, showlegend: false,
  };
}

function lines(layer, pairs, rowOfQuery, rowOfKey, gamma) {
  const top = pairs.length ? pairs[0].weight : 1;
  return range(LEVELS).map((level) => {
    const share = (level + 0.5) / LEVELS, x = [], y = [], text = [];
    for (const { query, key, weight } of pairs.slice(0, MOST_LINES)) {
      const place = Math.min(LEVELS - 1, Math.floor((weight / top) * LEVELS));
      if (place !== level || weight < FAINTEST * top) continue;
      const from = rowOfQuery(query), to = rowOfKey(key);
      const said = `${escaped(named(layer.queryTokens, query))} → ${escaped(named(layer.keyTokens, key))}<br>` +
        `weight ${shown(weight)}`;
      // Plotly hovers over points: several on each line.
      for (const along of [0.1, 0.3, 0.5, 0.7, 0.9]) {
        const end = along === 0.1 ? 0 : along === 0.9 ? 1 : along;
        x.push(end);
        y.push(from + (to - from) * end);
        text.push(said);
      }
      x.push(null);
      y.push(null);
      text.push("");
    }
    return {
      type: "scatter", mode: "lines", x, y, text, line: { color: BLUE, width: 0.6 + 5 * share * top },
      opacity: share ** gamma,
      hovertemplate: "%{text}<extra></extra>", showlegend: false,
    };
  });
}

function drawLinks(layer, head, query, first) {
  const queries = windowOf(layer, query, first);
  const { keys, pairs } = linked(layer, head, query, queries);
  const rowOfQuery = new Map(queries.map((each, row) => [each, (row + 0.5) / queries.length]));
  const rowOfKey = new Map(keys.map((each, row) => [each, (row + 0.5) / keys.length]));
  const traces = lines(layer, pairs, (each) => rowOfQuery.get(each), (each) => rowOfKey.get(each),
    query === "all" ? 1 : 0.5);
  traces.push(column(layer.queryTokens, queries, 0, query === "all" ? -1 : Number(query)));
  traces.push(column(layer.keyTokens, keys, 1, -1));
  const axis = { visible: false, fixedrange: true };
  // Room for the longest label of either side, in pixels.
  const room = (tokens) => 40 + 7.5 * tokens.reduce((most, token) => Math.max(most, token.length), 8);
  const heading = (x, text) => ({ x, y: 0, text, showarrow: false, yshift: 14, font: FONT });
  const layout = {
    height: Math.max(380, 60 + 17 * Math.max(queries.length, keys.length)), font: FONT, hovermode: "closest",
    hoverdistance: 12, margin: { l: room(layer.queryTokens), r: room(layer.keyTokens), t: 30, b: 20 },
    annotations: [heading(0, "query"), heading(1, "key")],
    xaxis: { ...axis, range: [-0.01, 1.01] }, yaxis: { ...axis, range: [1, 0] },
  };
  Plotly.react("links", traces, layout, { ...CONFIG, modeBarButtons: [["toImage"]] });
  return pairs;
}

function say(layer, head, query, pairs) {
  const what = `layer ${layer.name}, ${head === "mean" ? "average of the heads" : `head ${head}`}`;
  byId("map").setAttribute("aria-label", `Heat map of attention weights, queries by keys: ${what}`);
  byId("links").setAttribute("aria-label", `Lines from queries to the keys they attend to: ${what}`);
  const listed = pairs.slice(0, LISTED).map(({ query: from, key, weight }) =>
    (query === "all" ? `${named(layer.queryTokens, from)} → ` : "") + `${named(layer.keyTokens, key)} ${shown(weight)}`);
  const who = query === "all" ? "Strongest links" : `${named(layer.queryTokens, Number(query))} attends to`;
  byId("strongest").textContent = `${who}: ${listed.join(", ") || "nothing"}.`;
  byId("note").textContent = layer.topK
    ? `Kept are the ${layer.topK} strongest keys of each query and head; other weights show as 0.` : "";
}

function fill(menu, options, chosen) {
  menu.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

function menus() {
  const layer = layers[byId("layer").value || 0];
  const keep = (menu, options) => {
    fill(menu, options, options.some(([value]) => value === menu.value) ? menu.value : options[0][0]);
  };
  const heads = range(layer.heads).map((head) => [String(head), `head ${head}`]);
  keep(byId("head"), layer.heads > 1 ? [["mean", "average"], ...heads] : heads);
  keep(byId("query"), [["all", "all"], ...layer.queryTokens.map((token, place) => [String(place), `${place}: ${token}`])]);
  const first = byId("first"), most = Math.max(0, layer.queryTokens.length - MOST_ROWS);
  first.max = most;
  first.value = Math.min(Number(first.value), most);
  first.parentElement.hidden = most === 0;
}

function draw() {
  const layer = layers[byId("layer").value], head = byId("head").value, query = byId("query").value;
  const first = Math.max(0, Math.floor(Number(byId("first").value)) || 0);
  drawMap(layer, head);
  say(layer, head, query, drawLinks(layer, head, query, first));
}

function choose(query) {
  byId("query").value = byId("query").value === String(query) ? "all" : String(query);
  draw();
}

fill(byId("layer"), layers.map((layer, place) => [String(place), layer.name]), "0");
menus();
draw();
byId("layer").addEventListener("change", () => { menus(); draw(); });
for (const id of ["head", "query", "first"]) byId(id).addEventListener("change", draw);
byId("links").on("plotly_click", ({ points: [point] }) => {
  if (point.data.mode === "markers+text" && point.x === 0) choose(point.customdata);
});
byId("map").on("plotly_click", ({ points: [point] }) => choose(Math.round(point.y)));
