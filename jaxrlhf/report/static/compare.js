// The comparison of models.

function drawCompare(data, root) {
  root.append(element("h1", {}, data.title));
}

drawCompare(JSON.parse(document.getElementById("data").textContent), document.getElementById("page"));
