// The comparison of models, from the data of jaxrlhf/evaluation/comparison.py. Model 0 is A, the baseline.

function drawCompare(data, root) {
  const styles = data.models.map((_, i) => `s${i % COLOURS}`);
  const parts = [
    ["models", "Models", modelsPart(data)],
    ["charts", "Charts", chartsPart(data, styles)],
    ["groups", "By group", groupsPart(data)],
    ["answers", "Answers", answersPart(data)],
    ["reproduce", "What was asked", askedPart(data)],
  ].filter(([, , part]) => part);
  const notes = data.notes.map(visible);
  root.append(
    element("header", {},
      element("div", { class: "over" }, "comparison of models"),
      element("h1", {}, `${data.models.length} models on ${data.prompts.length} prompt${data.prompts.length === 1 ? "" : "s"}`),
      data.models.slice(1).map((model) => element("p", { class: "verdict" }, verdict(model, data))),
      notes.length > 0 && element("ul", { class: "warnings", "aria-label": "Notes" }, notes.map((line) => element("li", {}, line)))),
    element("nav", { "aria-label": "Parts of this page" }, parts.map(([id, title]) => element("a", { href: `#${id}` }, title))),
    ...parts.map(([id, title, part]) => section(id, title, part.note, part.nodes)));
}

// ---------------------------------------------------------------------------------------------------- numbers

// Mean and standard error to the decimals that the first two digits of the error have, or if it is 0 the largest error
// of its `column`.
function withError(value, column = []) {
  if (!value || value.mean === undefined || value.mean === null) return "–";
  const errors = column.map((other) => (other && other.standard_error) || 0);
  return plusMinus(value.mean, value.standard_error, value.standard_error || Math.max(0, ...errors));
}

function plusMinus(mean, error, scale = error) {
  if (error === null || !scale) return `${number(mean, 3)} ± ${error === null ? "?" : 0}`;
  const decimals = Math.min(6, Math.max(0, 1 - Math.floor(Math.log10(scale))));
  const text = (x) => x.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  return `${text(mean)} ± ${text(error)}`.replace(/-/g, "−");
}

function withInterval(share, interval) {
  if (share === null || share === undefined) return "–";
  return `${share.toFixed(2)}${interval ? ` [${interval[0].toFixed(2)}, ${interval[1].toFixed(2)}]` : ""}`;
}

// What models are compared by, of statistics or of a prompt's answer.
function measure(stats, by) {
  return by === "score" ? (stats.mean === undefined ? null : stats) : (stats.references || {}).rouge_l || null;
}

function valueOf(answer, by) {
  const value = by === "score" ? answer.mean : answer.rouge_l;
  return value === undefined ? null : value;
}

function verdict(model, data) {
  const found = model.against, name = `${model.label} (${visible(model.model)})`;
  if (!found.prompts) return `${name} cannot be compared with A.`;
  const gain = found.difference.mean;
  const difference = gain === 0 ? "scores as A does" : `${data.by === "score" ? "scores" : "is"} `
    + (found.difference.standard_error === null ? number(Math.abs(gain), 3) : plusMinus(Math.abs(gain), found.difference.standard_error))
    + ` ${gain > 0 ? "higher" : "lower"} than A${data.by === "score" ? "" : ` in ${data.by}`}`;
  const controlled = found.length_controlled;
  return `${name} ${difference}; win rate ${withInterval(found.win_rate, found.win_rate_interval_95)}, at equal length `
    + `${withInterval(controlled.win_rate, controlled.interval_95)}.`;
}

// As `_duration` of run.py writes it.
function seconds(value) {
  const whole = Math.round(value), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  const two = (count) => String(count).padStart(2, "0");
  return hours ? `${hours} h ${two(minutes)} min` : minutes ? `${minutes} min ${two(whole % 60)} s` : `${whole} s`;
}

// ---------------------------------------------------------------------------------------------------- tables

function modelsPart(data) {
  const models = data.models, against = (m, f) => m.against && m.against.prompts ? f(m.against) : null;
  const stats = (m) => m.statistics;
  const column = (label, value, show, about) => ({ label, value, show: (m) => value(m) === null || value(m) === undefined ? "–" : show(m), about });
  const measured = (label, value, about) => column(label, (m) => (value(m) || {}).mean, (m) => withError(value(m), models.map(value)), about);
  const name = { label: "model", value: (m) => m.label, show: (m) => element("span", {}, element("b", {}, m.label), ` ${visible(m.model)}`) };
  const passes = Object.keys((stats(models[0]).passes || {}).pass_at || {});
  const columns = [name,
    ...(data.by === "score" ? [measured("score", (m) => measure(stats(m), "score"), "mean ± standard error over prompts")] : []),
    measured("difference from A", (m) => against(m, (f) => f.difference)),
    column("wins – ties – losses", (m) => against(m, (f) => f.wins), (m) => `${m.against.wins} – ${m.against.ties} – ${m.against.losses}`),
    column("win rate", (m) => against(m, (f) => f.win_rate), (m) => withInterval(m.against.win_rate, m.against.win_rate_interval_95),
      "share of prompts with a higher mean than A, a tie counts half"),
    column("at equal length", (m) => against(m, (f) => f.length_controlled.win_rate),
      (m) => withInterval(m.against.length_controlled.win_rate, m.against.length_controlled.interval_95), "length-controlled win rate"),
    measured("KL to A", (m) => m.kl, "nats per completion"),
    ...passes.map((k) => measured(`pass@${k}`, (m) => stats(m).passes.pass_at[k])),
    ...(data.references_from ? ["sentence_bleu", "rouge_l"].map((key) => measured(key === "rouge_l" ? "ROUGE-L" : "BLEU",
      (m) => stats(m).references && stats(m).references[key])) : []),
    column("tokens", (m) => stats(m).tokens_mean, (m) => `${stats(m).tokens_mean.toFixed(1)}`, "mean length of a completion"),
    column("finished", (m) => stats(m).finished, (m) => withInterval(stats(m).finished, stats(m).finished_interval_95)),
  ];
  const parts = [...new Set(models.flatMap((m) => Object.keys(stats(m).components)))].filter((key) => !/_(truncated|unanswered|spread)$/.test(key));
  const draws = data.bootstrap;
  return {
    note: `± is a standard error over prompts, [ ] a 95 % interval: of win rates by bootstrap over prompts (${number(draws.resamples)} resamples, seed ${draws.seed}), of finished completions Wilson's. `
      + "At equal length: by a logistic regression on the length difference (Dubois et al. 2024).",
    nodes: [
      table("Measured on the prompts", columns, models),
      parts.length > 1 && table("Parts of the reward, before their weights", [name, ...parts.map((key) => measured(
        key in data.weights ? `${key} (× ${number(data.weights[key])})` : key, (m) => stats(m).components[key]))], models),
      models.some((m) => m.training) && trainingTable(models, name, column),
    ],
  };
}

function trainingTable(models, name, column) {
  const training = (m, f) => m.training ? f(m.training) : null, equal = models.map((m) => m.at_equal_tokens).filter(Boolean);
  const least = equal.length ? number(Math.min(...equal.map((e) => e.tokens)), 7) : "";
  const memory = (kind) => [(m) => training(m, (t) => t.peak_memory[kind]), (m) => `${(m.training.peak_memory[kind] / 2 ** 30).toFixed(2)} GiB`];
  const at = (key) => [(m) => m.at_equal_tokens && m.at_equal_tokens[key], (m) => number(m.at_equal_tokens[key], 3)];
  return table("Training of run directories", [name,
    column("method", (m) => training(m, (t) => t.method), (m) => m.training.method),
    column("time", (m) => training(m, (t) => t.seconds), (m) => (m.training.open_starts ? "at least " : "") + seconds(m.training.seconds), "sum over starts"),
    column("peak memory", ...memory("host")), column("device memory", ...memory("device")),
    column("tokens generated", (m) => training(m, (t) => t.generated_tokens), (m) => number(m.training.generated_tokens, 8)),
    column("steps", (m) => training(m, (t) => t.steps), (m) => number(m.training.steps, 8)),
    ...(equal.length ? [column(`score at ${least} tokens`, ...at("score")), column(`KL at ${least} tokens`, ...at("kl"))] : []),
  ], models);
}

function groupsPart(data) {
  const names = Object.keys(data.models[0].groups);
  if (!names.length) return null;
  return { nodes: names.map((group) => {
    const rows = Object.keys(data.models[0].groups[group]);
    const columns = [{ label: group, value: (row) => row }, { label: "prompts", value: (row) => data.models[0].groups[group][row].prompts }];
    for (const model of data.models) {
      const of = (row) => model.groups[group][row];
      columns.push({ label: `${model.label} ${data.by}`, value: (row) => (measure(of(row), data.by) || {}).mean, show: (row) => withError(measure(of(row), data.by), rows.map((other) => measure(of(other), data.by))) });
      if (model.against) columns.push({ label: `${model.label} win rate`, value: (row) => of(row).against.win_rate,
        show: (row) => withInterval(of(row).against.win_rate, of(row).against.win_rate_interval_95) });
      columns.push({ label: `${model.label} tokens`, value: (row) => of(row).tokens_mean, show: (row) => of(row).tokens_mean.toFixed(1) });
    }
    return table(`By ${group}`, columns, rows);
  }) };
}

// ---------------------------------------------------------------------------------------------------- charts

function chartsPart(data, styles) {
  const models = data.models, legend = models.map((m, i) => [`${styles[i]} round`, m.label]);
  const bounds = (value) => value && value.mean !== null ? [value.mean, value.mean - (value.standard_error || 0), value.mean + (value.standard_error || 0)] : null;
  const rate = (share, interval) => share === null || share === undefined ? null : [share, ...(interval || [share, share])];
  const others = models.map((m, i) => [m, styles[i]]).slice(1).filter(([m]) => m.against.prompts);
  const nodes = [
    rangeChart({ title: data.by, unit: "mean ± standard error", names: models.map((m) => m.label),
      marks: models.map((m, i) => ({ at: i, style: styles[i], label: m.label, values: bounds(measure(m.statistics, data.by)) })) }),
    others.length > 0 && rangeChart({ title: "Win rate against A", unit: "95 % interval; at equal length to the right", names: others.map(([m]) => m.label), include: [0, 0.5, 1],
      marks: others.flatMap(([m, style], i) => [
        { at: i - 0.1, style, label: `${m.label}, win rate`, values: rate(m.against.win_rate, m.against.win_rate_interval_95) },
        { at: i + 0.1, style, label: `${m.label}, at equal length`, values: rate(m.against.length_controlled.win_rate, m.against.length_controlled.interval_95) }]) }),
    models.some((m) => m.kl && m.kl.mean !== undefined) && scatterOfModels(data, styles, legend),
    ...Object.keys(models[0].groups).map((group) => {
      const names = Object.keys(models[0].groups[group]).slice(0, 12);
      return rangeChart({ title: `${data.by} by ${group}`, unit: "mean ± standard error", names, legend, height: 200,
        marks: names.flatMap((name, k) => models.map((m, i) => ({ at: k + (i - (models.length - 1) / 2) * (0.6 / models.length), style: styles[i],
          label: `${m.label}, ${visible(name)}`, values: bounds(measure(m.groups[group][name], data.by)) }))) });
    }),
    perPrompt(data, data.by, (answer) => valueOf(answer, data.by)),
    data.references_from && perPrompt(data, "BLEU", (answer) => answer.sentence_bleu ?? null),
  ];
  return { note: "Point at a chart, or focus it and use the arrow keys, to read it.", nodes: element("div", { class: "charts wide" }, nodes.filter(Boolean)) };
}

function scatterOfModels(data, styles, legend) {
  const shown = data.models.map((m, i) => [m, i]).filter(([m, i]) => i === 0 || (m.kl && m.kl.mean !== undefined));
  return scatterChart({ title: `${data.by} against KL`, xLabel: "KL to A, nats", yLabel: data.by, height: 200, legend,
    x: shown.map(([m, i]) => i === 0 ? 0 : m.kl.mean), y: shown.map(([m]) => (measure(m.statistics, data.by) || { mean: null }).mean),
    names: shown.map(([m]) => m.label), styles: shown.map(([, i]) => i) });
}

// The value of each prompt, in the order of A's.
function perPrompt(data, title, value) {
  const rows = data.prompts.map((prompt) => prompt.answers.map(value)).filter((row) => row.some((v) => v !== null));
  if (rows.length < 2) return null;
  rows.sort((a, b) => compareValues(a[0], b[0], true));
  return lineChart({ title: `${title} of each prompt`, xLabel: "prompts in the order of A", height: 200,
    series: data.models.map((m, i) => ({ label: m.label, x: rows.map((_, k) => k + 1), y: rows.map((row) => row[i]), points: rows.length > 40 })) });
}

// Values with ranges at named places: names, marks [{at, style, label, values: [value, low, high] or null}], and
// numbers to `include` on the axis.
function rangeChart(spec) {
  const known = spec.marks.filter((mark) => mark.values);
  return figure({ ...spec, summary: `${spec.title}: ${known.map((m) => `${m.label} ${number(m.values[0], 3)}`).join(", ")}` }, (width, height) => {
    const y = scale(...extent([...known.flatMap((m) => m.values), ...(spec.include || [])]), height - MARGIN.bottom, MARGIN.top, { count: 4 });
    const x = scale(-0.5, spec.names.length - 0.5, MARGIN.left, width - MARGIN.right);
    const plain = Object.assign((v) => x(v), { ticks: [] });
    const room = (width - MARGIN.left - MARGIN.right) / spec.names.length, letters = Math.max(1, Math.floor(room / 6.5));
    const nodes = axes(width, height, plain, y, "");
    spec.names.forEach((name, i) => {
      const text = visible(name), short = text.length > letters ? `${text.slice(0, Math.max(1, letters - 1))}…` : text;
      nodes.push(svg("text", { class: "tick", x: x(i), y: height - 8, "text-anchor": "middle" }, short));
    });
    const stops = known.map((mark) => {
      const [value, low, high] = mark.values, place = x(mark.at);
      nodes.push(svg("line", { class: mark.style, "stroke-width": 1.5, x1: place, x2: place, y1: y(low), y2: y(high) }),
        svg("circle", { class: `dot ${mark.style}`, cx: place, cy: y(value), r: 4 }));
      return { x: place, y: y(value), rule: false, title: mark.label, dots: [[place, y(value), mark.style]],
        lines: [["", "value", number(value, 4)], ["", "from", number(low, 4)], ["", "to", number(high, 4)]] };
    });
    return { nodes, stops };
  });
}

// ---------------------------------------------------------------------------------------------------- answers

function answersPart(data) {
  const models = data.models, categories = [...new Set(data.prompts.map((p) => p.category))];
  const samples = Math.max(...data.prompts.flatMap((p) => p.answers.map((a) => a.completions.length)));
  let order = "file", chosen = "", sample = 0, other = 1, differences = true, count = 10;
  const list = element("div", { class: "cards" });
  const more = element("button", { type: "button", class: "more", onclick: () => { count += 20; fill(); } }, "Show more");

  function fill() {
    const shown = data.prompts.filter((p) => chosen === "" || p.category === categories[chosen]);
    if (order !== "file") shown.sort((a, b) => compareValues(a.answers[other].improvement, b.answers[other].improvement, order === "worst"));
    list.replaceChildren(...shown.slice(0, count).map(card));
    more.hidden = shown.length <= count;
  }

  function card(prompt) {
    const texts = prompt.answers.map((answer) => answer.completions.find((c) => c.sample === sample) || null);
    const base = texts[0], rival = texts[other];
    const marked = differences && base && rival ? diffTexts(base.text, rival.text) : null;
    return element("article", { class: "card" },
      element("div", { class: "prompt" },
        prompt.category !== "(none)" && element("span", { class: "tag" }, visible(prompt.category)), modelText(prompt.prompt)),
      prompt.reference !== null && element("p", { class: "soft" }, "reference: ", modelText(prompt.reference)),
      element("div", { class: "columns" }, prompt.answers.map((answer, i) => element("div", {}, answerHead(answer, texts[i]),
        texts[i] === null ? element("span", { class: "empty" }, "no such sample")
          : marked && i === 0 ? marked[0] : marked && i === other ? marked[1] : modelText(texts[i].text)))));
  }

  function answerHead(answer, completion) {
    const facts = [];
    if (completion && completion.score !== undefined) facts.push(`score ${number(completion.score, 3)}`);
    if (completion && completion.sentence_bleu !== undefined) facts.push(`BLEU ${number(completion.sentence_bleu, 2)}, ROUGE-L ${number(completion.rouge_l, 2)}`);
    const gain = answer.improvement;
    if (samples > 1 && valueOf(answer, data.by) !== null) facts.push(`mean ${number(valueOf(answer, data.by), 3)}`);
    return element("div", { class: "soft" }, element("b", {}, answer.label), ` ${facts.join(", ")} `,
      gain !== null && element("span", { class: gain > 0 ? "good" : gain < 0 ? "bad" : "" }, `(${signed(gain)} to A)`));
  }

  fill();
  return {
    note: samples > 1 ? `"score" is that of the sample shown, "mean" that of all ${samples} samples of the prompt. Samples are independent draws, numbered as they were generated.`
      : "Each model answered each prompt once.",
    nodes: [element("div", { class: "controls" },
      menu("order", [["file", "as in the file"], ["best", "largest gain first"], ["worst", "largest loss first"]], order, (v) => { order = v; fill(); }),
      models.length > 2 && menu("A against", models.slice(1).map((m, i) => [i + 1, m.label]), other, (v) => { other = Number(v); fill(); }),
      categories.length > 1 && menu("category", [["", "all"], ...categories.map((name, i) => [i, visible(name)])], chosen, (v) => { chosen = v; fill(); }),
      samples > 1 && menu("sample", Array.from({ length: samples }, (_, i) => [i, i + 1]), sample, (v) => { sample = Number(v); fill(); }),
      switchOn("mark words that differ", (on) => { differences = on; fill(); })), list, more],
  };
}

// A checkbox that is on at first.
function switchOn(label, change) {
  const node = checkbox(label, change);
  node.querySelector("input").checked = true;
  return node;
}

function askedPart(data) {
  const facts = [
    ["prompts", data.prompts_from.join(", ")], ["references", data.references_from || "none"], ["categories", data.category_from || "none"],
    ["seed", String(data.seed)], ["completions per prompt", String(data.prompts[0].answers[0].completions.length)],
    ["threshold", data.threshold === null ? "none" : String(data.threshold)],
  ];
  return { nodes: [
    element("dl", { class: "facts" }, facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, visible(value))))),
    folded("Sampling and reward", element("pre", {}, visible(JSON.stringify({ sampling: data.sampling, reward: data.reward }, null, 1)))),
  ] };
}

drawCompare(JSON.parse(document.getElementById("data").textContent), document.getElementById("page"));
