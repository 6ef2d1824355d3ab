"use strict";
// All text from the server is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const MOST_SHOWN = 50;
const byId = (id) => document.getElementById(id);
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;
const millions = (count) => `${(count / 1e6).toFixed(1)} million`;
let model = null;
let inForce = "";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function say(text) {
  byId("message").textContent = text;
}

async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer.json();
}

// The dial: a choice for requests of this page, and the curve of all points with the one in force.

function asked() {
  return document.querySelector("#dial input:checked").value;
}

function fillDial() {
  const choices = [["", "what the server has in force"], ...model.points.map((one) => [one.name, told(one)])];
  for (const [value, text] of choices) {
    const input = element("input", { type: "radio", name: "budget", value });
    input.checked = value === "";
    input.addEventListener("change", drawCurve);
    byId("dial").append(element("label", {}, input, ` ${text}`));
  }
}

function told(point) {
  const cost = point.macs === null ? "cost not measured" : `${percent(point.macs / model.dense_macs)} of the dense cost`;
  const right = point.accuracy === null ? "accuracy not measured" : `${percent(point.accuracy, 1)} correct`;
  return `${point.name}: ${cost}, ${right}`;
}

function drawCurve() {
  const points = model.points.filter((one) => one.macs !== null && one.accuracy !== null)
    .sort((a, b) => a.macs - b.macs);
  const curve = byId("curve");
  curve.replaceChildren();
  const lowest = Math.min(...points.map((one) => one.accuracy), 1);
  const least = Math.max(0, lowest - 0.05);
  const x = (one) => 40 + 340 * (one.macs / model.dense_macs);
  const y = (one) => 185 - 165 * ((one.accuracy - least) / (1 - least));
  curve.append(drawn("path", { class: "axis", d: "M40 10V185H390" }));
  curve.append(drawn("text", { x: 215, y: 212, "text-anchor": "middle" }, "cost, of the dense network's"));
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    curve.append(drawn("text", { x: 40 + 340 * share, y: 199, "text-anchor": "middle" }, percent(share)));
  }
  for (const share of [least, 1]) {
    curve.append(drawn("text", { x: 36, y: y({ accuracy: share }) + 4, "text-anchor": "end" }, percent(share)));
  }
  curve.append(drawn("polyline", { class: "path", points: points.map((one) => `${x(one)},${y(one)}`).join(" ") }));
  for (const one of points) {
    const kind = `point${one.name === inForce ? " force" : ""}${one.name === asked() ? " asked" : ""}`;
    curve.append(drawn("circle", { class: kind, cx: x(one), cy: y(one), r: 6 }));
  }
  const force = model.points.find((one) => one.name === inForce);
  byId("curve-caption").textContent =
    `Accuracy against cost, ${points.length} operating point${points.length === 1 ? "" : "s"}; ` +
    `the filled one is in force${force ? ` (${told(force)})` : ""}.`;
}

// Load, once a second.

async function watchLoad() {
  try {
    const status = await get("v1/status");
    byId("in-force").textContent = status.budget + (status.ready ? "" : " (not ready)");
    byId("rate").textContent = status.images_per_second.toFixed(1);
    byId("queued").textContent = status.queued;
    byId("wait").textContent = `${status.wait_ms.toFixed(1)} ms, of ${model.target_ms} ms`;
    byId("latency").textContent =
      status.p50_ms === null ? "-" : `${status.p50_ms.toFixed(1)} ms; ${status.p99_ms.toFixed(1)} ms`;
    if (inForce !== status.budget) {
      inForce = status.budget;
      drawCurve();
    }
  } catch {
    byId("in-force").textContent = "the server does not answer";
  }
  setTimeout(watchLoad, 1000);
}

// Pictures and answers.

async function classify(name, picture) {
  const address = `v1/classify?channels=true${asked() ? `&budget=${encodeURIComponent(asked())}` : ""}`;
  const answer = await fetch(address, {
    method: "POST", body: picture, headers: { "content-type": "application/octet-stream" },
  });
  const found = await answer.json();
  if (!answer.ok) throw new Error(`${name}: ${found.error}`);
  return found;
}

async function show(name, picture) {
  say(`Classifying ${name}.`);
  try {
    const found = await classify(name, picture);
    byId("results").prepend(card(name, picture, found.pictures[0], found.budget));
    while (byId("results").children.length > MOST_SHOWN) byId("results").lastElementChild.remove();
    const one = found.pictures[0];
    say(`${name}: ${one.class}, ${percent(one.probability, 1)}, ${percent(one.share_of_dense)} of the dense cost.`);
  } catch (error) {
    say(error.message);
  }
}

function card(name, picture, one, budget) {
  const image = element("img", { alt: name });
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  image.src = URL.createObjectURL(picture);
  const spent = element("span");
  spent.style.width = percent(Math.min(1, one.share_of_dense), 1);
  const bar = element("span", { class: "bar", "aria-hidden": "true" }, spent);
  const others = one.top.slice(1).map((each) => `${each.class} ${percent(each.probability, 1)}`).join(", ");
  const layers = element("details", {}, element("summary", {}, "Which channels ran in each layer"));
  layers.addEventListener("toggle", () => {
    if (layers.open && layers.children.length === 1) layers.append(...Object.entries(one.channels).map(layer));
  });
  return element("li", {}, image, element("div", {},
    element("p", { class: "answer" }, `${one.class}, ${percent(one.probability, 1)}`),
    element("p", {}, others ? `then ${others}` : ""),
    element("p", { class: "macs" },
      `${millions(one.macs)} multiply-adds, beside ${millions(model.dense_macs)} of the dense network: ` +
      `${percent(one.share_of_dense)}; operating point ${budget}`),
    bar, layers));
}

function layer([gate, digits]) {
  const ran = [...digits].filter((digit) => digit === "1").length;
  const text = `${gate}: ${ran} of ${digits.length}`;
  const row = drawn("svg", { role: "img", "aria-label": `${text} channels ran`, preserveAspectRatio: "none",
    viewBox: `0 0 ${10 * digits.length} 10` });
  [...digits].forEach((digit, index) => {
    row.append(drawn("rect", { class: digit === "1" ? "on" : "off", x: 10 * index + 1, y: 0, width: 8, height: 10 }));
  });
  return element("div", { class: "layer" }, element("span", { "aria-hidden": "true" }, text), row);
}

async function showFiles(files) {
  for (const file of files) await show(file.name, file);
}

function listen() {
  byId("files").addEventListener("change", async (event) => {
    await showFiles(event.target.files);
    event.target.value = "";
  });
  const drop = byId("drop");
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  for (const kind of ["dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.remove("over");
    });
  }
  document.addEventListener("drop", (event) => showFiles(event.dataTransfer.files));
}

function fillSamples() {
  for (let number = 0; number < model.samples; number++) {
    const name = `test image ${number + 1}`;
    const image = element("img", { src: `v1/samples/${number}`, alt: name });
    const button = element("button", { type: "button" }, image);
    button.addEventListener("click", async () => show(name, await (await fetch(image.src)).blob()));
    byId("samples").append(element("li", {}, button));
  }
}

async function begin() {
  try {
    model = await get("v1/model");
  } catch (error) {
    say(error.message);
    return;
  }
  byId("model").textContent = model.name;
  document.title = `manidp ${model.name}`;
  fillDial();
  fillSamples();
  drawCurve();
  listen();
  watchLoad();
}

begin();
