"use strict";
// What a page does beyond what HTML does by itself: charts are read out under a pointer or by keys, icicles widen
// what is clicked, trees unfold at once, tables are put in order. Without this script a page shows the same figures for each chart's marked instant.

// A number to so many decimals; of two that are equally near, the even one, as Python does.
function rounded(value, decimals) {
  const scaled = value * 10 ** decimals, low = Math.floor(scaled), rest = scaled - low;
  const up = rest > 0.5 || (rest === 0.5 && low % 2 === 1);
  return ((low + up) / 10 ** decimals).toFixed(decimals);
}

// Bytes as bptool's own `format_bytes` writes them.
function formatBytes(bytes) {
  for (const [power, unit] of [[40, "TiB"], [30, "GiB"], [20, "MiB"], [10, "KiB"]]) {
    if (Math.abs(bytes) >= 2 ** power) return `${rounded(bytes / 2 ** power, 2)} ${unit}`;
  }
  return `${bytes} B`;
}

// The last place in a sorted list whose value is at most `value`.
function lastAtMost(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sorted[middle] <= value) low = middle; else high = middle - 1;
  }
  return low;
}

function make(tag, kind, ...children) {
  const made = document.createElement(tag);
  made.className = kind;
  made.append(...children);
  return made;
}

function fillDetails(rows, details, texts) {
  rows.forEach((row, i) => {
    const [bytes, label] = row.cells;
    bytes.className = "number";
    bytes.textContent = "";
    label.replaceChildren();
    if (i >= details.length) return;
    const [what, where, kind, count, held] = details[i];
    bytes.textContent = formatBytes(held);
    const swatch = make("span", `swatch ${texts[kind]}`);
    swatch.setAttribute("aria-hidden", "true");
    const place = make("div", "one-line muted", make("code", "", texts[where]));
    place.title = texts[where];
    label.append(make("div", "one-line", swatch, count > 1 ? `${count} × ` : "", make("code", "", texts[what])), place);
  });
}

function liven(chart) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const find = (selector) => chart.querySelector(selector);
  const plot = find(".plot"), crosshair = find(".crosshair"), release = find(".release");
  const rows = [...chart.querySelectorAll(".details tr")];
  const last = data.where.length - 1;
  const totals = data.where.map((_, i) => data.layers.reduce((sum, layer) => sum + layer[i], 0));
  let current = data.shown, pinned = false;

  function show(i) {
    current = i;
    const layer = (key) => find(`[data-layer="${key}"]`).cells;
    const write = (key, bytes) => {
      const [, amount, share] = layer(key);
      amount.textContent = formatBytes(bytes);
      share.textContent = `${rounded((100 * bytes) / Math.max(totals[i], 1), 1)}%`;
    };
    data.layers.forEach((values, key) => write(key, values[i]));
    write("total", totals[i]);
    fillDetails(rows, data.details[i], data.texts);
    const where = data.texts[data.where[i]];
    find(".moment").textContent = i === data.shown ? "At the peak" : pinned ? "Pinned" : "Here";
    find(".place").textContent = where;
    crosshair.style.left = `${50 * (data.edges[i] + data.edges[i + 1])}%`;
    crosshair.hidden = i === data.shown;
    release.hidden = !pinned;
    plot.setAttribute("aria-valuenow", i);
    plot.setAttribute("aria-valuetext", `${formatBytes(totals[i])}, ${where}`);
  }

  function pin(i) { pinned = i !== data.shown; show(i); }

  function at(event) {
    const box = plot.getBoundingClientRect();
    return Math.min(lastAtMost(data.edges, (event.clientX - box.left) / box.width), last);
  }

  const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };
  function press(event) {
    if (event.key === "Escape") pin(data.shown);
    else if (event.key in steps) pin(Math.max(0, Math.min(last, current + steps[event.key])));
    else return;
    event.preventDefault();
  }

  const slider = { role: "slider", tabindex: 0, "aria-label": "instant of the step", "aria-valuemin": 0, "aria-valuemax": last };
  for (const [name, value] of Object.entries(slider)) plot.setAttribute(name, value);
  plot.addEventListener("pointermove", (event) => { if (!pinned) show(at(event)); });
  plot.addEventListener("pointerleave", () => { if (!pinned) show(data.shown); });
  plot.addEventListener("click", (event) => { pin(pinned ? data.shown : at(event)); });
  plot.addEventListener("keydown", press);
  release.addEventListener("click", () => { pin(data.shown); plot.focus(); });
  for (const button of document.querySelectorAll(`[data-shows="${chart.id}"]`)) {
    button.disabled = false;
    button.addEventListener("click", () => { pin(Number(button.dataset.instant)); chart.scrollIntoView({ block: "nearest" }); });
  }
  show(data.shown);
}

function foldable(tree) {
  const button = tree.querySelector(".unfold"), all = [...tree.querySelectorAll("details")];
  button.hidden = all.every((details) => details.open);
  let open = true;
  button.addEventListener("click", () => {
    all.forEach((details, i) => { details.open = open || i === 0; });
    button.textContent = open ? "Fold all" : "Unfold all";
    open = !open;
  });
}

// Slabs as wide as their shares of the one that is zoomed into; the ones around it are as wide as the picture.
function zoomable(icicle) {
  const data = JSON.parse(icicle.querySelector("script").textContent);
  const find = (selector) => icicle.querySelector(selector);
  const slabs = [...icicle.querySelectorAll(".slab")], rows = [...icicle.querySelectorAll("tbody tr")];
  const drawing = find(".slabs"), release = find(".release");
  const within = (i, j) => data.left[i] >= data.left[j] - 1e-6 && data.left[i] + data.width[i] <= data.left[j] + data.width[j] + 1e-6;
  let zoomed = 0, selected = 0;

  function read(i) {
    find(".moment").textContent = data.words[i][1];
    find(".place").textContent = data.note[i];
    rows.forEach((row, k) => data.figures[i][k].forEach((figure, j) => { row.cells[j + 1].textContent = figure; }));
  }

  function fit() {
    const whole = drawing.getBoundingClientRect().width;
    slabs.forEach((slab, i) => {
      const text = slab.querySelector("text"), room = (parseFloat(slab.getAttribute("width")) / 100) * whole - 10;
      for (const words of [...data.words[i], ""]) {
        text.textContent = words;
        if (text.getComputedTextLength() <= room) break;
      }
    });
  }

  function zoom(i) {
    zoomed = i;
    slabs.forEach((slab, j) => {
      const begin = Math.max(0, (data.left[j] - data.left[i]) / data.width[i]);
      const end = Math.min(1, (data.left[j] + data.width[j] - data.left[i]) / data.width[i]);
      slab.classList.toggle("gone", end - begin < 1e-5);
      slab.setAttribute("x", `${100 * begin}%`);
      slab.setAttribute("width", `${100 * Math.max(end - begin, 0)}%`);
    });
    release.hidden = i === 0;
    fit();
    select(i);
  }

  function select(i) {
    selected = i;
    slabs.forEach((slab, j) => { slab.classList.toggle("selected", j === i && document.activeElement === drawing); });
    drawing.setAttribute("aria-label", `${data.words[i][1]}, ${data.figures[i].at(-1).join(", ")}`);
    read(i);
  }

  // The nearest slab above, below or beside the selected one.
  function beside(key) {
    const level = data.level[selected] + ({ ArrowUp: -1, ArrowDown: 1 }[key] ?? 0);
    const row = slabs.map((_, j) => j).filter((j) => data.level[j] === level);
    if (key === "ArrowUp") return row.find((j) => within(selected, j));
    if (key === "ArrowDown") return row.find((j) => within(j, selected));
    return row[row.indexOf(selected) + (key === "ArrowRight" ? 1 : -1)];
  }

  function press(event) {
    if (event.key === "Escape") zoom(0);
    else if (event.key === "Enter") zoom(selected);
    else if (event.key.startsWith("Arrow")) select(beside(event.key) ?? selected);
    else return;
    event.preventDefault();
  }

  slabs.forEach((slab, i) => {
    slab.addEventListener("pointerenter", () => { read(i); });
    slab.addEventListener("click", () => { zoom(i); });
  });
  drawing.setAttribute("tabindex", 0);
  drawing.addEventListener("pointerleave", () => { read(selected); });
  for (const change of ["focus", "blur"]) drawing.addEventListener(change, () => { select(selected); });
  drawing.addEventListener("keydown", press);
  release.addEventListener("click", () => { zoom(0); drawing.focus(); });
  window.addEventListener("resize", fit);
  fit();
}

function readable(plot) {
  const words = plot.querySelector(".pointed-at");
  for (const dot of plot.querySelectorAll(".dot, .stack")) {
    for (const name of ["pointerenter", "focus"]) dot.addEventListener(name, () => { words.textContent = dot.ariaLabel; });
    for (const name of ["pointerleave", "blur"]) dot.addEventListener(name, () => { words.textContent = words.dataset.hint; });
  }
}

// A click on a column's head puts the rows in its order, a second one in the other; cells without a key come last.
function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];

  function sort(column) {
    const up = heads[column].ariaSort !== "ascending", keys = new Map(rows.map((row) => [row, row.cells[column].dataset.key]));
    const known = rows.filter((row) => keys.get(row) !== undefined);
    const numbers = known.every((row) => !Number.isNaN(Number(keys.get(row))));
    const compare = (a, b) => numbers ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
    known.sort((a, b) => (up ? 1 : -1) * compare(keys.get(a), keys.get(b)));
    body.append(...known, ...rows.filter((row) => keys.get(row) === undefined));
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[column].ariaSort = up ? "ascending" : "descending";
  }

  heads.forEach((head, i) => {
    const button = head.querySelector("button");
    button.disabled = false;
    button.addEventListener("click", () => { sort(i); });
  });
}

document.querySelectorAll("figure.chart").forEach(liven);
document.querySelectorAll("figure.icicle").forEach(zoomable);
document.querySelectorAll("figure.roofline, figure.scatter, figure.stacks").forEach(readable);
document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll(".tree").forEach(foldable);
