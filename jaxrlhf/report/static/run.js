// The report of a run, from the data that jaxrlhf/report/run.py collects.

function drawRun(data, root) {
  const records = unpackTokens(data.tokens);
  const parts = [
    ["curves", "Curves", curvesPart(data)],
    ["samples", "Before and after", samplesPart(data.samples)],
    ["tokens", "Tokens", tokensPart(records)],
    ["health", "Reward", healthPart(data)],
    ["evaluation", "Data and evaluation", dataPart(data)],
    ["reproduce", "Reproduce", reproducePart(data.reproduce)],
  ].filter(([, , part]) => part);
  root.append(
    header(data),
    element("nav", { "aria-label": "Parts of this page" }, parts.map(([id, title]) => element("a", { href: `#${id}` }, title))),
    ...parts.map(([id, title, part]) => section(id, title, part.note, part.nodes)),
    element("footer", { class: "soft" }, `Written by jaxrlhf on ${data.written.replace("T", " ").slice(0, 16)}.`));
}

// ---------------------------------------------------------------------------------------------------- head

function header(data) {
  // How it ended comes first, unless it ended as it should.
  const told = data.status.text === "Finished." ? data.verdict : [data.status.text, ...data.verdict];
  return element("header", {},
    element("div", { class: "over" }, `${data.method} run`, element("span", { class: `status ${data.status.kind}` }, data.status.kind)),
    element("h1", {}, visible(data.title)),
    element("p", { class: "verdict" }, told.map(visible).join(" ")),
    element("p", { class: "note" }, "Final values of training are means of the last few records; held-out values are those of the last evaluation."),
    data.warnings.length > 0 && element("ul", { class: "warnings", "aria-label": "Warnings" }, data.warnings.map((line) => element("li", {}, visible(line)))),
    element("dl", { class: "facts" }, data.facts.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, visible(value))))),
    data.time.length > 0 && timeTable(data.time),
    data.changes.length > 0 && element("details", { class: "changes" },
      element("summary", {}, changesSummary(data.changes)),
      table("Options that differ from their defaults", [
        { label: "option", value: (row) => row[0], show: (row) => element("code", {}, visible(row[0])) },
        { label: "value", value: (row) => row[1], show: (row) => modelText(row[1]) },
        { label: "default", value: (row) => row[2], show: (row) => element("span", { class: "soft" }, visible(row[2]) || "no such option now") },
        ...(data.changes.some((row) => row[3]) ? [{ label: "set by", value: (row) => row[3] ? "the command" : "the config file or preset" }] : []),
      ], data.changes)));
}

function timeTable(parts) {
  const total = parts.reduce((sum, row) => sum + row[1], 0);
  const share = (row) => `${Math.round(100 * row[1] / total)} %`;
  return element("details", { class: "changes" },
    element("summary", {}, `Where the time went: ${parts.slice(0, 3).map((row) => `${row[0]} ${share(row)}`).join(", ")}`),
    table("Wall-clock time", [
      { label: "part", value: (row) => row[0] },
      { label: "seconds", value: (row) => Number(row[1].toPrecision(4)) },
      { label: "share", value: (row) => row[1] / total, show: share },
    ], parts));
}

function changesSummary(changes) {
  const typed = changes.filter((row) => row[3]).length, others = changes.length - typed;
  const options = (count) => count === 1 ? "1 option differs from its default" : `${count} options differ from their defaults`;
  if (!typed || !others) return `${options(changes.length)}${typed ? ", set by the command" : ""}`;
  return `${options(changes.length)}: ${typed} set by the command, ${others} by its config file or preset`;
}

// ---------------------------------------------------------------------------------------------------- curves

function curvesPart(data) {
  if (!data.curves.length) return null;
  const marks = data.restarts.map((x) => ({ x, label: `restarted after step ${x}` }));
  const about = (keys) => keys.map((key) => [key, data.definitions[key] || "held-out rows, before training"]);
  const drawn = [];
  const chart = (spec) => {
    const node = lineChart({ ...spec, marks, about: about(spec.series.map((s) => s.label)) });
    drawn.push(node);
    return node;
  };
  const groups = data.curves.map((group) => {
    const nodes = element("div", { class: "charts" }, group.charts.map(chart));
    return group.title === "Other metrics" ? folded("Other metrics", nodes)
      : [element("h3", {}, group.title), nodes];
  });
  const tradeoffs = data.tradeoffs.length > 0 && [element("h3", {}, "Score against KL and length"),
    element("p", { class: "note" }, "A point per record, early ones faint. A score that rises only with the KL or the length may be the reward being exploited rather than met."),
    element("div", { class: "charts wide" }, data.tradeoffs.map((spec) => scatterChart({
      ...spec, height: 220, unit: "per response",
      legend: [["s0 round", "training"], ["s1 round", "held out"]].filter((_, i) => spec.styles.includes(i)),
    })))];
  return {
    note: "Point at a chart, or focus it and use the arrow keys, to read it. Dots are held-out rows" + (marks.length ? "; vertical lines are restarts." : "."),
    nodes: [
      element("div", { class: "controls" }, checkbox("logarithmic scale where values are positive", (on) => drawn.forEach((node) => node.setLog(on)))),
      groups.slice(0, 1), tradeoffs, groups.slice(1),
    ],
  };
}

// ---------------------------------------------------------------------------------------------------- before and after

function samplesPart(samples) {
  if (samples.fixed.length) return fixedSamples(samples);
  if (!samples.others.length) return null;
  const steps = [...new Set(samples.others.map((row) => row.step))];
  return {
    note: "No prompt was sampled at two steps, so these are samples of different prompts" + (steps.length > 1 ? ", of the first and the last step." : "."),
    nodes: steps.map((step) => [element("h3", {}, `Step ${number(step)}`), element("div", { class: "cards" },
      samples.others.filter((row) => row.step === step).map((row) => element("article", { class: "card" },
        element("div", { class: "prompt" }, modelText(row.prompt)),
        element("div", {}, scoreTag(row.score), modelText(row.completion)))))]),
  };
}

function fixedSamples(samples) {
  const steps = [...new Set(samples.fixed.flatMap((row) => Object.keys(row.answers).map(Number)))].sort((a, b) => a - b);
  const scoresOf = (row) => Object.values(row.answers).map(([, score]) => score);
  const unscored = samples.fixed.some((row) => !row.held_out && scoresOf(row).includes(null) && scoresOf(row).some((score) => score !== null));
  let step = steps[steps.length - 1], count = 10;
  const scored = samples.fixed.some((row) => pair(row).gain !== null);
  let order = scored ? "gain" : "log";
  const list = element("div", { class: "cards" });
  const more = element("button", { type: "button", class: "more", onclick: () => { count += 20; fill(); } }, "Show more");
  const slider = element("input", {
    type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "Step after",
    oninput: () => { step = steps[slider.value]; fill(); },
  });
  const shown = element("output", {});

  // The first answer, and the last one up to the chosen step.
  function pair(row) {
    const known = Object.keys(row.answers).map(Number).sort((a, b) => a - b);
    const later = known.filter((s) => s <= step).pop();
    const [first, last] = [known[0], later === undefined || later === known[0] ? known[0] : later];
    const [before, after] = [row.answers[first], row.answers[last]];
    const gain = first === last || before[1] === null || after[1] === null ? null : after[1] - before[1];
    return { row, first, last, before, after, gain };
  }

  function fill() {
    slider.setAttribute("aria-valuetext", `step ${step}`);
    shown.textContent = number(step, 9);
    const pairs = samples.fixed.map(pair);
    if (order !== "log") pairs.sort((a, b) => compareValues(a.gain, b.gain, order === "loss"));
    list.replaceChildren(...pairs.slice(0, count).map(card));
    more.hidden = pairs.length <= count;
  }

  function card({ row, first, last, before, after, gain }) {
    const [left, right] = diffTexts(before[0].replace(/^ /, ""), after[0].replace(/^ /, ""));
    return element("article", { class: "card" },
      element("div", { class: "prompt" }, row.held_out && element("span", { class: "tag" }, "held out"), modelText(row.prompt),
        gain !== null && element("b", { class: `gain ${gain > 0 ? "good" : gain < 0 ? "bad" : ""}` }, `gain ${signed(gain)}`)),
      element("div", { class: "pair" },
        element("div", {}, element("div", { class: "soft" }, `step ${number(first, 9)} `, scoreTag(before[1])), left),
        element("div", {}, element("div", { class: "soft" }, `step ${number(last, 9)} `, scoreTag(after[1])), right)));
  }

  fill();
  return {
    note: "The same prompts at the first step they were sampled and at the chosen one; what changed is marked. Step 0 is before training."
      + (unscored ? " Those without a score repeat the first prompts, for which only reward models are called: other rewards may count their calls, cost or ask." : "")
      + (samples.left_out ? ` ${number(samples.left_out)} more prompts are in samples.jsonl.` : ""),
    nodes: [
      element("div", { class: "controls" },
        element("label", { class: "menu" }, element("span", {}, "Step"), slider, shown),
        scored && menu("Order", [["gain", "largest gain first"], ["loss", "largest loss first"], ["log", "as logged"]], order, (value) => { order = value; fill(); })),
      list, more,
    ],
  };
}

function scoreTag(score) {
  return score !== null && score !== undefined && element("span", { class: "tag" }, `score ${number(score, 3)}`);
}

// ---------------------------------------------------------------------------------------------------- tokens

function tokensPart(records) {
  return records.length > 0 && {
    note: "Every token of a recorded response, coloured by one of its numbers; the darkest colours are the 1st and 99th percentile over all records on this page.",
    nodes: [tokenView(records)],
  };
}

// ---------------------------------------------------------------------------------------------------- reward

function healthPart(data) {
  const nodes = [], tables = [], evaluation = data.evaluation;
  if (data.scores) {
    nodes.push(histogram({ title: "Scores early and late", unit: data.scores.of, xLabel: "score", height: 180, ...data.scores }));
  }
  if (evaluation.histogram) {
    const { edges, ...rest } = evaluation.histogram;
    nodes.push(histogram({ title: "Scores of held-out responses", xLabel: "score", height: 180, edges,
      series: Object.entries(rest).map(([label, counts]) => ({ label, counts })) }));
  }
  if ((evaluation.calibration || []).length > 1) {
    const bins = evaluation.calibration;
    nodes.push(lineChart({
      title: "Calibration", unit: `expected calibration error ${number(evaluation.ece, 3)}`, xLabel: "confidence", height: 180, integers: false,
      series: [
        { label: "accuracy", x: bins.map((b) => Number(b.confidence.toPrecision(4))), y: bins.map((b) => b.accuracy), points: true },
        { label: "perfect", x: [bins[0].confidence, bins[bins.length - 1].confidence].map((v) => Number(v.toPrecision(4))),
          y: [bins[0].confidence, bins[bins.length - 1].confidence] },
      ],
    }));
  }
  if (data.components.length) {
    tables.push(table("Components of the score, before their weights", [
      { label: "component", value: (row) => row.name },
      { label: "mean at first", value: (row) => row.first },
      { label: "mean at last", value: (row) => row.last },
      { label: "change", value: (row) => row.first === null ? null : row.last - row.first, show: (row) => row.first === null ? "–" : signed(row.last - row.first) },
      { label: "std", value: (row) => row.std, about: "standard deviation over the last completions" },
      { label: "corr. with length", value: (row) => row.length },
      { label: "no score", value: (row) => row.unanswered, show: (row) => percent(row.unanswered) },
      { label: "cut", value: (row) => row.truncated, show: (row) => percent(row.truncated), about: "completions too long for the reward model to read in full" },
      { label: "errors", value: (row) => row.errors, about: "completions without a usable answer, in the whole run" },
    ], data.components));
  }
  if (data.correlations.length) {
    nodes.push(table("What the score goes with", [
      { label: "score and", value: (row) => row.name },
      { label: "correlation", value: (row) => row.value, show: (row) => number(row.value, 2) },
      { label: "over", value: (row) => row.count, show: (row) => `${number(row.count)} ${row.of}` },
    ], data.correlations));
  }
  return nodes.length + tables.length > 0 && { nodes: [element("div", { class: "charts wide" }, nodes), tables] };
}

// ---------------------------------------------------------------------------------------------------- data and evaluation

const LABELS = {
  "eval/scores": "score", "eval/scores_greedy": "score, greedy", "eval/kl": "KL", "eval/win_rate": "win rate", "eval/gain": "gain",
  "eval/mean_length": "length", "eval/finished": "finished", "eval/heldout_scores": "other reward model", "eval/heldout_gain": "its gain",
};

const SHARES = /(win_rate|finished|accuracy|accuracies)$/;

function dataPart(data) {
  const nodes = [];
  if (data.about) nodes.push(element("pre", { class: "plain" }, visible(data.about)));
  if (data.validations.length) {
    const keys = [...new Set(data.validations.flatMap((row) => Object.keys(row)))].filter((key) => key !== "step");
    nodes.push(table("Held-out rows by step", [{ label: "step", value: (row) => row.step, show: (row) => number(row.step, 9) }, ...keys.map((key) => ({
      label: LABELS[key] || key.replace("eval/", ""), about: data.definitions[key], value: (row) => row[key],
      show: (row) => SHARES.test(key) ? percent(row[key]) : number(row[key]),
    }))], data.validations));
  }
  const evaluation = data.evaluation, flat = Object.entries(evaluation).filter(([, value]) => typeof value !== "object");
  if (flat.length) nodes.push(table("evaluation.json: the exported model on held-out rows", [
    { label: "measure", value: (row) => row[0].replaceAll("_", " ") }, { label: "value", value: (row) => row[1] }], flat));
  if (evaluation.by_length) nodes.push(table("Accuracy by length", [
    { label: "held-out rows", value: (row) => row[0] },
    { label: "count", value: (row) => row[1].count },
    { label: "accuracy", value: (row) => row[1].accuracy, show: (row) => percent(row[1].accuracy) },
  ], Object.entries(evaluation.by_length)));
  return nodes.length > 0 && { nodes: [nodes.filter((node) => node.matches("pre")), element("div", { class: "tables" }, nodes.filter((node) => !node.matches("pre")))] };
}

// ---------------------------------------------------------------------------------------------------- reproduce

function reproducePart(run) {
  const line = (name, value) => value && element("div", {}, element("dt", {}, name), element("dd", {}, element("code", {}, visible(value))));
  return {
    nodes: [
      run.command && element("pre", { class: "command" }, visible(run.command)),
      element("dl", { class: "facts" }, line("working directory", run.directory), line("exported model", run.export), line("checkpoints of steps", run.checkpoints.join(", ")),
        line("SHA-256 of the config", run.hash), line("platform", run.platform), line("devices", run.mesh)),
      run.starts.length > 1 && table("Starts", [
        { label: "start", value: (row) => row.time.replace("T", " ").slice(0, 19) },
        { label: "from step", value: (row) => row.step },
        { label: "end", value: (row) => row.end.replace("T", " ").slice(0, 19) },
        { label: "outcome", value: (row) => row.outcome || "not recorded" },
        { label: "host", value: (row) => row.host },
      ], run.starts),
      run.versions.length > 0 && folded("Versions", table("Versions", [
        { label: "package", value: (row) => row[0] }, { label: "version", value: (row) => String(row[1]) }], run.versions)),
      run.config && folded("config.yaml: every option", element("pre", {}, visible(run.config))),
    ],
  };
}

drawRun(JSON.parse(document.getElementById("data").textContent), document.getElementById("page"));
