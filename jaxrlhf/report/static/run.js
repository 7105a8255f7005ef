// The report of a run.

function drawRun(data, root) {
  root.append(element("h1", {}, visible(data.title)));
}

drawRun(JSON.parse(document.getElementById("data").textContent), document.getElementById("page"));
