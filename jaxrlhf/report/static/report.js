"use strict";
// Parts that all pages share: elements, numbers, charts, tables, word diffs and the token view.
//
// A page holds its data as JSON in <script id="data">; the function of its kind (in run.js, compare.js) draws it.
// Texts come from models and are hostile until shown otherwise: they reach the page as text nodes only, through
// `visible`, which spells control characters out.

// ---------------------------------------------------------------------------------------------------- elements

// Create an HTML element. Attributes that are null or false are left out; functions (onclick) listen to events.
function element(name, attributes, ...children) {
  return furnish(document.createElement(name), attributes, children);
}

// The same for SVG.
function svg(name, attributes, ...children) {
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function furnish(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  // Numbers and strings become text nodes.
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// A part of the page with a heading; `note` explains it.
function section(id, title, note, ...children) {
  return element("section", { id, "aria-labelledby": `${id}-title` },
    element("h2", { id: `${id}-title` }, title), note && element("p", { class: "note" }, note), children);
}

// A menu with a label: options are [value, text]; `change` is called with the chosen value.
function menu(label, options, value, change) {
  const select = element("select", { "aria-label": label, onchange: () => change(select.value) },
    options.map(([key, text]) => element("option", { value: key, selected: String(key) === String(value) }, text)));
  return element("label", { class: "menu" }, element("span", {}, label), select);
}

let radioGroups = 0;

// A choice between a few [value, text]; `change` is called with the chosen value.
function radios(legend, options, value, change) {
  const name = `choice-${++radioGroups}`;
  return element("fieldset", { class: "radios" }, element("legend", {}, legend), options.map(([key, text]) =>
    element("label", {},
      element("input", { type: "radio", name, value: key, checked: key === value, onchange: () => change(key) }),
      element("span", {}, text))));
}

// A switch with two states.
function checkbox(label, change) {
  const box = element("input", { type: "checkbox", onchange: () => change(box.checked) });
  return element("label", { class: "checkbox" }, box, label);
}

// A foldable part.
function folded(summary, ...children) {
  return element("details", {}, element("summary", {}, summary), children);
}

// ---------------------------------------------------------------------------------------------------- numbers and text

// A number with `digits` significant digits; a dash if it is missing.
function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  let text;
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) text = value.toExponential(Math.max(0, digits - 2));
  else if (Number.isInteger(value) || size >= 10 ** (digits - 1)) text = Math.round(value).toLocaleString("en");
  else text = String(Number(value.toPrecision(digits)));
  return text.replace(/-/g, "−");
}

// A share as a percentage.
function percent(value) {
  return value === null || value === undefined ? "–" : `${number(100 * value, 3)} %`;
}

// A number with its sign.
function signed(value, digits = 3) {
  return value > 0 ? `+${number(value, digits)}` : number(value, digits);
}

// Spell out what cannot be seen or would reorder the text: control and format characters and unpaired surrogates.
function visible(text) {
  return String(text).replace(/[^\P{C}\n\t\u200c\u200d]/gu, (c) => {
    const code = c.codePointAt(0);
    return /\p{Cn}|\p{Co}/u.test(c) ? c : code < 256 ? `\\x${code.toString(16).padStart(2, "0")}`
      : code < 65536 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\U${code.toString(16).padStart(8, "0")}`;
  });
}

// A name that may break after its "_" and "/".
function breakable(name) {
  return String(name).split(/(?<=[_/])/).flatMap((part, i) => i ? [element("wbr"), part] : [part]);
}

// A text of a model, line breaks kept; `empty` stands for none at all.
function modelText(text, empty = "(empty)") {
  return text === "" ? element("span", { class: "empty" }, empty)
    : element("span", { class: "text", dir: "auto" }, visible(text));
}

// ---------------------------------------------------------------------------------------------------- scales

// About `count` round numbers from low to high.
function ticks(low, high, count, integers = false) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw || 1));
  let step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  if (integers) step = Math.max(1, Math.round(step));
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(i * step);
  return values.map((v) => Number(v.toPrecision(12)));
}

// The label of a tick, with the decimals that tell it from its neighbours.
function tickLabel(value, values) {
  const step = Math.abs(values[1] - values[0]) || Math.abs(value) || 1;
  const size = Math.max(...values.map(Math.abs));
  if (size >= 1e6 || size < 1e-3) return number(value, 3);
  const places = Math.min(6, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  const even = values.length < 3 || Math.abs(values[2] - values[1] - step) < step * 1e-6;
  return even ? value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places }).replace("-", "−") : number(value, 3);
}

// Powers of ten between low and high, or ordinary ticks if there are not two of them.
function logTicks(low, high, count) {
  const values = [];
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const stride = Math.max(1, Math.ceil((last - first + 1) / (count + 1)));
  for (let e = first; e <= last; e += stride) values.push(10 ** e);
  return values.length > 1 ? values : ticks(low, high, count).filter((v) => v > 0);
}

// A map from [low, high] to [from, to], linear or logarithmic, with its ticks.
function scale(low, high, from, to, { log = false, count = 4, integers = false } = {}) {
  const f = log ? Math.log10 : (v) => v;
  const span = f(high) - f(low) || 1;
  const map = (v) => from + ((f(v) - f(low)) / span) * (to - from);
  map.ticks = log ? logTicks(low, high, count) : ticks(low, high, count, integers);
  return map;
}

// The range of numbers, a little wider than they are; never empty.
function extent(values, log = false) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (v !== null && Number.isFinite(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) return [0, 1];
  if (low === 0 && high === 0) return [0, 1];
  if (low === high) return log ? [low / 2, high * 2] : [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  if (log) return [low, high];
  const margin = (high - low) * 0.05;
  return [low >= 0 && low - margin < 0 ? 0 : low - margin, high + margin];
}

// The index of the number in the increasing `xs` that is nearest to x.
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

// ---------------------------------------------------------------------------------------------------- charts

const COLOURS = 7; // the classes s0 ... s6 of report.css
const MARGIN = { left: 50, right: 12, top: 8, bottom: 34 };

// A frame that a chart draws in: title, legend, drawing, tooltip. `draw(width, height)` returns {nodes, stops}: what to
// draw, and the places that pointer and arrow keys stop at, as {x, y, lines: [[class, label, value], ...], title}.
function figure(spec, draw) {
  const tip = element("div", { class: "tip", role: "status" });
  const plot = svg("svg", { class: "plot", tabindex: "0", role: "img", "aria-label": spec.summary || spec.title });
  const box = element("div", { class: "canvas" }, plot, tip);
  const node = element("figure", { class: `chart ${spec.class || ""}` },
    element("figcaption", {}, element("span", { class: "title" }, spec.title),
      spec.unit && element("span", { class: "unit" }, spec.unit)),
    spec.legend && spec.legend.length > 0 && element("div", { class: "legend" }, spec.legend.map(([style, label, value]) =>
      element("span", {}, element("i", { class: `swatch ${style}` }), element("span", {}, breakable(label)),
        value !== undefined && element("b", {}, value)))),
    box,
    spec.about && spec.about.length > 0 && folded("What is this?", element("dl", { class: "about" },
      spec.about.map(([key, text]) => [element("dt", {}, key), element("dd", {}, text)]))));
  const height = spec.height || 160;
  let width = 0, stops = [], current = -1;

  function redraw() {
    const drawing = draw(width, height);
    stops = drawing.stops;
    current = -1;
    tip.classList.remove("on");
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    plot.setAttribute("height", height);
    plot.replaceChildren(...drawing.nodes, svg("g", { class: "cursor" }));
  }

  function show(index) {
    if (!stops.length) return;
    current = Math.max(0, Math.min(stops.length - 1, index));
    const stop = stops[current];
    plot.lastChild.replaceChildren(
      stop.rule === false ? "" : svg("line", { x1: stop.x, x2: stop.x, y1: MARGIN.top, y2: height - MARGIN.bottom }),
      ...stop.dots.map(([x, y, style]) => svg("circle", { cx: x, cy: y, r: 3.5, class: style })));
    tip.replaceChildren(element("div", { class: "tip-title" }, stop.title),
      ...stop.lines.map(([style, label, value]) => element("div", { class: "tip-line" },
        element("i", { class: `swatch ${style}` }), element("span", {}, label), element("b", {}, value))));
    tip.classList.add("on");
    // Beside the place, on its wider side, or below the drawing if its labels do not fit there.
    const right = stop.x > width / 2, room = (right ? stop.x : width - stop.x) - 12;
    tip.style.left = "0";
    const wide = tip.offsetWidth, fits = wide <= room;
    tip.style.left = `${Math.max(0, Math.min(width - wide, right ? stop.x - 12 - wide : stop.x + 12))}px`;
    tip.style.top = fits ? "4px" : `${height}px`;
  }

  function hide() {
    tip.classList.remove("on");
    plot.lastChild.replaceChildren();
    current = -1;
  }

  plot.addEventListener("pointermove", (event) => {
    const area = plot.getBoundingClientRect();
    const x = event.clientX - area.left, y = event.clientY - area.top;
    let best = -1, least = Infinity;
    stops.forEach((stop, i) => {
      const distance = (stop.x - x) ** 2 + (stop.rule === false ? (stop.y - y) ** 2 : 0);
      if (distance < least) { least = distance; best = i; }
    });
    if (best >= 0) show(best);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const target = { ArrowRight: current + 1, ArrowLeft: current < 0 ? stops.length - 1 : current - 1,
      PageDown: current + 10, PageUp: current - 10, Home: 0, End: stops.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    else if (target !== undefined) { event.preventDefault(); show(target); }
  });
  // A chart is drawn when its width is known, and again when it changes.
  new ResizeObserver(() => {
    const now = Math.round(box.clientWidth);
    if (now > 0 && now !== width) { width = now; redraw(); }
  }).observe(box);
  node.redraw = () => width && redraw();
  return node;
}

// Axes with light lines across at the ticks of y, and labels.
function axes(width, height, x, y, xLabel) {
  const bottom = height - MARGIN.bottom;
  return [
    ...y.ticks.map((v) => svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(v), y2: y(v) })),
    ...y.ticks.map((v) => svg("text", { class: "tick", x: MARGIN.left - 6, y: y(v) + 3.5, "text-anchor": "end" }, tickLabel(v, y.ticks))),
    svg("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom }),
    ...x.ticks.map((v) => svg("text", { class: "tick", x: x(v), y: bottom + 14, "text-anchor": "middle" }, tickLabel(v, x.ticks))),
    xLabel && svg("text", { class: "tick label", x: width - MARGIN.right, y: bottom + 28, "text-anchor": "end" }, xLabel),
  ].filter(Boolean);
}

// Curves over a common x, usually the step.
//   title, unit, xLabel, height     texts of the chart
//   series: [{label, x: [...], y: [...], points: true for single points instead of a line}]; x increases, y may be null
//   marks: [{x, label}]             vertical lines
//   about: [[name, definition]]     shown when unfolded
// `node.setLog(true)` makes y logarithmic where all values are positive.
function lineChart(spec) {
  const series = spec.series;
  const styles = series.map((s, i) => `s${i % COLOURS}`);
  const stepsOf = [...new Set(series.flatMap((s) => s.x))].sort((a, b) => a - b);
  const values = series.flatMap((s) => s.y.filter((v) => v !== null));
  const lastOf = (s) => s.y.findLast((v) => v !== null);
  const firstOf = (s) => s.y.find((v) => v !== null);
  let log = false;
  const node = figure({
    ...spec,
    legend: series.map((s, i) => [styles[i] + (s.points ? " round" : ""), s.label, number(lastOf(s))]),
    summary: `${spec.title}: ` + series.map((s) => `${s.label} from ${number(firstOf(s))} to ${number(lastOf(s))}`).join(", "),
  }, (width, height) => {
    const logarithmic = log && values.every((v) => v > 0);
    const x = scale(...range(stepsOf), MARGIN.left, width - MARGIN.right, { count: Math.max(2, (width - 60) / 60), integers: spec.integers !== false });
    const y = scale(...extent(values, logarithmic), height - MARGIN.bottom, MARGIN.top, { log: logarithmic, count: 4 });
    const nodes = axes(width, height, x, y, spec.xLabel === undefined ? "step" : spec.xLabel);
    for (const mark of spec.marks || []) {
      nodes.push(svg("line", { class: "mark", x1: x(mark.x), x2: x(mark.x), y1: MARGIN.top, y2: height - MARGIN.bottom },
        svg("title", {}, mark.label)));
    }
    series.forEach((s, i) => {
      const points = s.x.map((v, k) => [x(v), s.y[k] === null ? null : y(s.y[k])]);
      if (!s.points) nodes.push(svg("path", { class: `line ${styles[i]}`, d: path(points) }));
      else nodes.push(svg("path", { class: `line dashed ${styles[i]}`, d: path(points.filter((p) => p[1] !== null)) }));
      const alone = points.filter((p, k) => p[1] !== null && (s.points || ((points[k - 1] || [])[1] ?? null) === null && ((points[k + 1] || [])[1] ?? null) === null));
      nodes.push(...alone.map(([cx, cy]) => svg("circle", { class: `dot ${styles[i]}`, cx, cy, r: 2.5 })));
    });
    const stops = stepsOf.map((step) => {
      const lines = [], dots = [];
      series.forEach((s, i) => {
        if (!s.x.length) return;
        const k = nearest(s.x, step);
        const elsewhere = s.x[k] === step ? "" : ` (at ${number(s.x[k])})`;
        lines.push([styles[i] + (s.points ? " round" : ""), s.label + elsewhere, number(s.y[k], 5)]);
        if (s.y[k] !== null) dots.push([x(s.x[k]), y(s.y[k]), styles[i]]);
      });
      return { x: x(step), title: `${spec.xLabel || "step"} ${number(step, 7)}`, lines, dots };
    });
    return { nodes, stops };
  });
  node.setLog = (on) => { log = on; node.redraw(); };
  return node;
}

function range(xs) {
  if (!xs.length) return [0, 1];
  return xs[0] === xs[xs.length - 1] ? [xs[0] - 1, xs[0] + 1] : [xs[0], xs[xs.length - 1]];
}

// "M x y L x y ..." with gaps where y is null.
function path(points) {
  let d = "", pen = "M";
  for (const [x, y] of points) {
    if (y === null) pen = "M";
    else { d += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`; pen = "L"; }
  }
  return d;
}

// Points of two quantities: title, xLabel, yLabel, x, y, names (a title for each point), and `order` in [0, 1], early to
// late, which fades the early ones. Numbers of colour classes may be given in `styles`.
function scatterChart(spec) {
  return figure({ ...spec, summary: `${spec.title}: ${spec.x.length} points` }, (width, height) => {
    const xs = scale(...extent(spec.x), MARGIN.left, width - MARGIN.right, { count: Math.max(2, (width - 60) / 60) });
    const ys = scale(...extent(spec.y), height - MARGIN.bottom, MARGIN.top, { count: 4 });
    const nodes = axes(width, height, xs, ys, spec.xLabel);
    const stops = [];
    spec.x.forEach((v, i) => {
      if (v === null || spec.y[i] === null) return;
      const style = `s${spec.styles ? spec.styles[i] % COLOURS : 0}`, x = xs(v), y = ys(spec.y[i]);
      nodes.push(svg("circle", { class: `dot ${style}`, cx: x, cy: y, r: 3, opacity: spec.order ? 0.25 + 0.75 * spec.order[i] : 0.8 }));
      stops.push({ x, y, rule: false, title: spec.names[i], dots: [[x, y, style]],
        lines: [["", spec.xLabel, number(v)], ["", spec.yLabel, number(spec.y[i])]] });
    });
    return { nodes, stops };
  });
}

// Counts per bin, several series drawn over each other: title, xLabel, edges [n + 1], series [{label, counts: [n]}].
function histogram(spec) {
  const styles = spec.series.map((s, i) => `s${i % COLOURS}`);
  return figure({
    ...spec, legend: spec.series.map((s, i) => [styles[i], s.label]),
    summary: `${spec.title}: ${spec.series.map((s) => s.label).join(", ")}`,
  }, (width, height) => {
    const x = scale(spec.edges[0], spec.edges[spec.edges.length - 1], MARGIN.left, width - MARGIN.right, { count: Math.max(2, (width - 60) / 60) });
    const most = Math.max(...spec.series.flatMap((s) => s.counts), 1e-9);
    const y = scale(0, most * 1.05, height - MARGIN.bottom, MARGIN.top, { count: 3, integers: spec.integers !== false });
    const nodes = axes(width, height, x, y, spec.xLabel);
    spec.series.forEach((s, i) => {
      let d = `M${x(spec.edges[0])} ${y(0)}`;
      s.counts.forEach((count, k) => { d += `V${y(count).toFixed(1)}H${x(spec.edges[k + 1]).toFixed(1)}`; });
      nodes.push(svg("path", { class: `area ${styles[i]}`, d: `${d}V${y(0)}Z` }));
    });
    const stops = spec.edges.slice(0, -1).map((edge, k) => ({
      x: (x(edge) + x(spec.edges[k + 1])) / 2, dots: [],
      title: `${number(edge, 3)} to ${number(spec.edges[k + 1], 3)}`,
      lines: spec.series.map((s, i) => [styles[i], s.label, number(s.counts[k])]),
    }));
    return { nodes, stops };
  });
}

// ---------------------------------------------------------------------------------------------------- tables

// A table that sorts by a click on the head of a column.
//   columns: [{label, value: (row) => number or text, show: (row) => text or node, about}]; a column of numbers is
//            aligned to the right
//   rows: any values
function table(caption, columns, rows) {
  const body = element("tbody");
  const numeric = columns.map((c) => rows.some((row) => typeof c.value(row) === "number"));
  let sorted = -1, ascending = true;

  function fill(order) {
    body.replaceChildren(...order.map((row) => element("tr", {}, columns.map((c, i) => {
      const content = c.show ? c.show(row) : typeof c.value(row) === "string" ? visible(c.value(row)) : number(c.value(row));
      return element(i === 0 ? "th" : "td", { class: numeric[i] && "number", scope: i === 0 && "row" }, content);
    }))));
  }

  const heads = columns.map((c, i) => element("th", { scope: "col", class: numeric[i] && "number", title: c.about },
    element("button", { type: "button", onclick: () => {
      ascending = sorted === i ? !ascending : !numeric[i];
      sorted = i;
      heads.forEach((h, k) => k === i ? h.setAttribute("aria-sort", ascending ? "ascending" : "descending")
        : h.removeAttribute("aria-sort"));
      fill([...rows].sort((a, b) => compareValues(c.value(a), c.value(b), ascending)));
    } }, c.label)));
  fill(rows);
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("caption", {}, caption), element("thead", {}, element("tr", {}, heads)), body));
}

// Missing values come last in either direction.
function compareValues(a, b, ascending) {
  const missing = (v) => v === null || v === undefined || v === "";
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  return ascending ? order : -order;
}

// ---------------------------------------------------------------------------------------------------- word diff

const LONGEST = 1200; // words of a text that are compared one by one

// Compare two texts word by word: [[text, changed], ...] of each.
function wordDiff(before, after) {
  const a = before.match(/\s+|[^\s]+/g) || [], b = after.match(/\s+|[^\s]+/g) || [];
  let start = 0, end = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const x = a.slice(start, a.length - end), y = b.slice(start, b.length - end);
  const same = x.length <= LONGEST && y.length <= LONGEST ? commonWords(x, y) : [[], []];
  const flags = (words, kept) => words.map((_, i) => i >= start && i < words.length - end && !kept[i - start]);
  return [joined(a, flags(a, same[0])), joined(b, flags(b, same[1]))];
}

// Longest common subsequence: for the words of each list, whether they belong to it.
function commonWords(x, y) {
  const width = y.length + 1, length = new Uint16Array((x.length + 1) * width);
  for (let i = x.length - 1; i >= 0; i--) for (let j = y.length - 1; j >= 0; j--) {
    length[i * width + j] = x[i] === y[j] ? length[(i + 1) * width + j + 1] + 1
      : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
  }
  const inX = [], inY = [];
  for (let i = 0, j = 0; i < x.length && j < y.length;) {
    if (x[i] === y[j]) { inX[i++] = true; inY[j++] = true; }
    else if (length[(i + 1) * width + j] >= length[i * width + j + 1]) i++;
    else j++;
  }
  return [inX, inY];
}

// Join neighbouring words with the same flag; a blank between two changed words counts as changed.
function joined(words, flags) {
  const parts = [];
  words.forEach((word, i) => {
    const blank = /^\s+$/.test(word);
    const changed = blank && i > 0 && i + 1 < words.length ? flags[i - 1] && flags[i + 1] : flags[i];
    if (parts.length && parts[parts.length - 1][1] === changed) parts[parts.length - 1][0] += word;
    else parts.push([word, changed]);
  });
  return parts;
}

// The two texts with what changed marked: [node of before, node of after].
function diffTexts(before, after) {
  const [a, b] = wordDiff(before, after);
  const nodes = (parts, mark) => parts.length === 0 ? modelText("") : element("span", { class: "text", dir: "auto" },
    parts.map(([text, changed]) => changed ? element(mark, {}, visible(text)) : visible(text)));
  return [nodes(a, "del"), nodes(b, "ins")];
}

// ---------------------------------------------------------------------------------------------------- token view

// Series that colour tokens, in the order of their buttons: label, and the value that has no colour (null: the scale
// runs from the lowest to the highest value, in one colour).
const TOKEN_SERIES = {
  kl: ["KL", 0, "log p of the policy less log p of the reference, nats"],
  advantage: ["advantage", 0, "how much better the token turned out than the critic or the group expected"],
  value: ["value", 0, "the critic's estimate of the reward still to come, before this token"],
  reward: ["reward", 0, "reward of this token: KL penalty, and at the last one the score"],
  logprob: ["log p", null, "log-probability of the token by the policy that sampled it, nats"],
  entropy: ["entropy", null, "entropy of the next-token distribution at this place, nats"],
  ratio: ["ratio", 1, "probability after the update over that before it"],
  ref_logprob: ["reference log p", null, "log-probability by the reference model, nats"],
  td_error: ["TD error", 0, "reward + gamma * next value - value"],
  return: ["return", 0, "what the value is trained to predict"],
};
const COLOURED = ["kl", "advantage", "value", "reward", "logprob", "entropy", "ratio"];

// Unpack what jaxrlhf/report/tokens.py packed: words by number, lists as base64 of 3 bytes a number.
function unpackTokens(packed) {
  const wordsOf = (text) => whole24(text).map((i) => packed.words[i]);
  return packed.records.map((record) => {
    const words = wordsOf(record.top[0]), logprobs = floats24(record.top[1]), pieces = wordsOf(record.pieces);
    const series = Object.fromEntries(Object.entries(record.series).map(([name, text]) => [name, floats24(text)]));
    const top = pieces.map((_, i) => Array.from({ length: record.ranks }, (_, k) => i * record.ranks + k)
      .filter((k) => k < words.length).map((k) => [words[k], logprobs[k]]));
    return { ...record, ids: whole24(record.ids), pieces, series, top };
  });
}

function whole24(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return Array.from({ length: bytes.length / 3 }, (_, i) => bytes[3 * i] | (bytes[3 * i + 1] << 8) | (bytes[3 * i + 2] << 16));
}

// The upper 3 bytes of float32; nan is null.
function floats24(text) {
  const floats = new Float32Array(Uint32Array.from(whole24(text), (n) => n << 8).buffer);
  return Array.from(floats, (v) => Number.isNaN(v) ? null : Number(v.toPrecision(5)));
}

// The map from a value of a series to a colour and its legend, from the 1st and 99th percentile over all records.
function tokenScale(records, name) {
  const values = records.flatMap((r) => r.series[name] || []).filter((v) => v !== null && Number.isFinite(v)).sort((a, b) => a - b);
  const at = (q) => values.length ? values[Math.round(q * (values.length - 1))] : 0;
  const middle = TOKEN_SERIES[name][1];
  let low = at(0.01), high = at(0.99);
  if (middle !== null) {
    const reach = Math.max(Math.abs(low - middle), Math.abs(high - middle)) || Math.max(...values.map((v) => Math.abs(v - middle)), 1e-9);
    low = middle - reach;
    high = middle + reach;
  }
  const colour = (value) => {
    if (value === null || value === undefined) return "transparent";
    const part = middle === null ? (value - low) / (high - low || 1) : (value - middle) / (high - middle);
    const strength = Math.min(1, Math.abs(middle === null ? Math.max(0, part) : part));
    return `rgba(var(--${middle !== null && part < 0 ? "negative" : "positive"}), ${(0.62 * strength).toFixed(3)})`;
  };
  return { low, high, middle, colour };
}

// A piece of text with its blanks shown: · for a leading or trailing blank, ↵ for a line break, ⇥ for a tab.
function pieceText(piece) {
  if (piece === "") return "▯"; // a part of a character, or a token that is no text
  return visible(piece.replace(/^ +| +$/g, (s) => "·".repeat(s.length)).replace(/\n/g, "↵").replace(/\t/g, "⇥"));
}

// The token view of unpacked records: a step and a sample to choose, its tokens coloured by a series, the numbers of
// the token under pointer or focus, and value and return along the sequence.
function tokenView(records) {
  const available = Object.keys(TOKEN_SERIES).filter((name) => records.some((r) => r.series[name]));
  const coloured = COLOURED.filter((name) => available.includes(name));
  const scales = Object.fromEntries(available.map((name) => [name, tokenScale(records, name)]));
  const steps = [...new Set(records.map((r) => r.step))];
  let name = coloured.includes("advantage") ? "advantage" : coloured[0];
  let step = steps[steps.length - 1], record, spans = [], current = -1, pinned = -1;

  const prompt = element("p", { class: "prompt" });
  const text = element("div", { class: "tokens", role: "listbox", "aria-label": "Tokens of the response", "aria-orientation": "horizontal" });
  const detail = element("aside", { class: "detail", "aria-live": "polite" });
  const legend = element("div", { class: "scale" });
  const curve = element("div");
  const sampleMenu = element("span");
  const node = element("div", { class: "token-view" },
    element("div", { class: "controls" },
      menu("Step", steps.map((s) => [s, number(s, 9)]), step, (value) => { step = Number(value); chooseStep(); }),
      sampleMenu),
    coloured.length > 0 && element("div", { class: "controls" },
      radios("Colour by", coloured.map((key) => [key, TOKEN_SERIES[key][0]]), name, (value) => { name = value; paint(); }), legend),
    element("div", { class: "split" }, element("div", { class: "reading" }, prompt, text, curve), detail));

  function chooseStep() {
    const here = records.filter((r) => r.step === step);
    sampleMenu.replaceChildren(menu("Sample", here.map((r, i) => [i, sampleName(r)]), 0, (i) => choose(here[i])));
    choose(here[0]);
  }

  function sampleName(r) {
    const opening = r.prompt.replace(/\s+/g, " ").trim();
    return `${r.score === null || r.score === undefined ? "no score" : `score ${number(r.score, 3)}`} · ${visible(opening.length > 40 ? `${opening.slice(0, 40)}…` : opening)}`;
  }

  // Text of token i; the stop token of a finished response is no part of its text.
  function tokenText(i) {
    const stop = record.pieces[i] === "" && record.finished && i === record.length - 1;
    return stop ? "⟨end⟩" : pieceText(record.pieces[i]);
  }

  // Whether token i is the environment's, not one that the policy sampled.
  function isGiven(i) {
    return record.environment.includes(i);
  }

  // Whether a probable token is the one that was sampled.
  function isSampled(i, [piece, logprob]) {
    const sampled = record.series.logprob ? record.series.logprob[i] : null;
    return piece === record.pieces[i] || (record.pieces[i] === "" && sampled !== null && Math.abs(sampled - logprob) < 1e-4);
  }

  function choose(chosen) {
    record = chosen;
    current = pinned = -1;
    prompt.replaceChildren(element("b", {}, "Prompt "), modelText(record.prompt));
    spans = record.pieces.map((_, i) => element("span", {
      class: ["token", isGiven(i) && "given"].filter(Boolean).join(" "), role: "option", tabindex: i === 0 ? "0" : "-1", "aria-selected": "false", dir: "auto", "data-index": i,
    }, tokenText(i)));
    // A line of the response ends where its token has a line break.
    text.replaceChildren(...spans.flatMap((span, i) => record.pieces[i].includes("\n") ? [span, element("br")] : [span]));
    if (record.length > record.pieces.length) text.append(element("span", { class: "soft" }, ` … ${number(record.length - record.pieces.length)} more tokens`));
    if (!record.pieces.length) text.append(modelText(""));
    const lines = ["value", "return"].filter((key) => record.series[key]);
    curve.replaceChildren(...lines.length ? [lineChart({
      title: "Value and return along the response", xLabel: "token", height: 130,
      series: lines.map((key) => ({ label: key, x: record.series[key].map((_, i) => i + 1), y: record.series[key] })),
    })] : []);
    paint();
    show(-1);
  }

  function paint() {
    if (!name) return;
    const values = record.series[name] || [];
    spans.forEach((span, i) => { span.style.backgroundColor = scales[name].colour(values[i]); });
    const { low, high, middle } = scales[name];
    const stops = [0, 0.25, 0.5, 0.75, 1].map((q) => scales[name].colour(low + q * (high - low)));
    legend.replaceChildren(element("span", {}, number(low, 3)),
      element("i", { style: `background: linear-gradient(to right, ${stops.join(", ")})` }),
      element("span", {}, number(high, 3)), middle === null ? "" : element("span", { class: "soft" }, `(no colour: ${middle})`));
    legend.title = TOKEN_SERIES[name][2];
    show(current);
  }

  // Show the numbers of token i; -1: how to use the view.
  function show(i) {
    if (spans[current]) spans[current].setAttribute("aria-selected", "false");
    current = i;
    detail.classList.toggle("filled", i >= 0);
    if (i < 0) {
      detail.replaceChildren(element("p", { class: "note" },
        spans.length ? "Point at a token, or move with the arrow keys, to see its numbers and what else the policy might have said." : "No tokens."));
      return;
    }
    spans[i].setAttribute("aria-selected", "true");
    const rows = available.filter((key) => record.series[key]);
    const top = record.top[i] || [];
    const most = top.length ? Math.max(...top.map(([, p]) => Math.exp(p))) : 1;
    detail.replaceChildren(
      element("div", { class: "piece" }, tokenText(i)),
      element("div", { class: "soft" }, `token ${i + 1} of ${record.length}`, record.ids.length > i && `, id ${record.ids[i]}`,
        isGiven(i) && ", of the environment"),
      element("dl", { class: "numbers" }, rows.map((key) => [
        element("dt", { title: TOKEN_SERIES[key][2], class: key === name && "chosen" }, TOKEN_SERIES[key][0]),
        element("dd", { class: key === name && "chosen" }, number(record.series[key][i], 4))])),
      top.length ? element("div", { class: "soft" }, "most probable here") : "",
      top.length ? element("ol", { class: "top" }, top.map(([piece, p]) => element("li", { class: isSampled(i, [piece, p]) && "chosen" },
        element("span", { class: "token" }, pieceText(piece)),
        element("span", { class: "bar" }, element("i", { style: `width: ${(100 * Math.exp(p) / most).toFixed(1)}%` })),
        element("b", {}, percent(Math.exp(p)))))) : "");
  }

  const indexOf = (event) => event.target.dataset && event.target.dataset.index !== undefined ? Number(event.target.dataset.index) : -1;
  text.addEventListener("pointerover", (event) => { const i = indexOf(event); if (i >= 0) show(i); });
  text.addEventListener("pointerleave", () => { if (pinned !== current) show(pinned); });
  text.addEventListener("focusin", (event) => { const i = indexOf(event); if (i >= 0) { pinned = i; show(i); } });
  text.addEventListener("click", (event) => { const i = indexOf(event); if (i >= 0) move(i); });
  text.addEventListener("keydown", (event) => {
    const from = indexOf(event);
    const target = { ArrowRight: from + 1, ArrowDown: from + 10, ArrowLeft: from - 1, ArrowUp: from - 10, Home: 0, End: spans.length - 1 }[event.key];
    if (from < 0 || target === undefined) return;
    event.preventDefault();
    move(Math.max(0, Math.min(spans.length - 1, target)));
  });

  // Give the focus to token i: a single one of them can be reached by the tab key.
  function move(i) {
    spans.forEach((span) => span.setAttribute("tabindex", "-1"));
    spans[i].setAttribute("tabindex", "0");
    spans[i].focus();
  }

  chooseStep();
  return node;
}
