"use strict";

// Draws the charts of a report out of the numbers in it. Nothing is fetched, and text is only ever set as text.

const data = JSON.parse(document.getElementById("data").textContent);
const words = { nan: NaN, inf: Infinity, "-inf": -Infinity };
const numbers = (column) => column.map((value) => (typeof value === "string" ? words[value] : value));
const view = { smoothing: 0, log: false, clip: false, hidden: new Set(), range: null, step: null };
const MANY = 60; // More points than this are a line without dots, and are smoothed.
const CROWD = 16; // More members than this are their band alone.
const LATIN = 6.6; // Pixels of a digit in the labels of an axis.

for (const chart of data.charts) {
  for (const series of chart.series) {
    series.y = numbers(series.y);
    series.smooth ??= [series.x, series.y, series.y.map((y) => (Number.isFinite(y) ? 1 : 0))];
  }
  for (const band of chart.bands) for (const line of ["mean", "low", "first", "third", "high"]) band[line] = numbers(band[line]);
}
const steps = data.charts.flatMap((chart) => [...chart.series, ...chart.bands]).map((one) => one.x);
const whole = [Math.min(...steps.map((x) => x[0])), Math.max(...steps.map((x) => x[x.length - 1]))];

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "circle", "text", "rect", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A value in six digits, as Python's "%.6g" has it. */
function shown(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-4 || size >= 1e6)) {
    const [digits, power] = value.toExponential(5).split("e");
    return `${Number(digits)}e${power.replace(/^([+-])(\d)$/, "$10$2")}`;
  }
  return String(Number(value.toPrecision(6)));
}

const tick = (value) => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential().replace("e+", "e") : String(value));
const grouped = (step) => String(step).replace(/\B(?=(\d{3})+$)/g, ",");

/** Round numbers from one bound to the other, about as many as asked for. */
function ticks([low, high], count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
  const found = [];
  for (let index = Math.ceil(low / size - 1e-9); index * size <= high + size * 1e-9; index++) found.push(Number((index * size).toPrecision(12)));
  return found;
}

/** Powers of ten, or where these are few what lies between. */
function powers([low, high], count) {
  const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
  if (last - first < 1) return ticks([low, high], count).filter((value) => value > 0);
  const every = Math.ceil((last - first + 1) / count);
  const found = [];
  for (let power = first; power <= last; power += every) found.push(Number(`1e${power}`));
  return found;
}

/** The debiased exponential mean over a part of the whole run, whatever the spacing of the points. */
function smoothed([x, mean, count]) {
  const width = (view.smoothing * (whole[1] - whole[0])) / 4 || 1e-9;
  let [sum, weight, last] = [0, 0, x[0]];
  return x.map((step, index) => {
    const decay = Math.exp((last - step) / width);
    last = step;
    sum = sum * decay + (count[index] ? mean[index] * count[index] : 0);
    weight = weight * decay + count[index];
    return weight ? sum / weight : NaN;
  });
}

/** The index of the last point at or before a step, or -1. */
function before(x, step) {
  let [low, high] = [0, x.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

class Chart {
  constructor(figure) {
    this.chart = data.charts[figure.dataset.chart];
    this.plot = figure.querySelector(".plot");
    this.tip = make("div", { class: "tip", hidden: "" });
    this.svg = make("svg", { tabindex: "0", role: "img", "aria-label": `${this.chart.name} over train steps` });
    this.plot.append(this.svg, this.tip);
    this.legend(figure.querySelector(".legend"));
    new ResizeObserver(() => this.draw()).observe(this.plot);
    this.listen();
  }

  legend(place) {
    const lines = [...this.chart.bands, ...this.chart.series.filter((series) => series.member === null)];
    const kinds = new Map(lines.reverse().map((line) => [line.legend, line])); // A band tells of its mean as well.
    if (kinds.size < 2 && !this.chart.bands.length) return;
    for (const [text, line] of [...kinds].reverse()) {
      const hue = data.runs.length > 1 && line.hue === `h${line.run % 8}` ? "neutral" : line.hue;
      const mark = make("svg", { width: 22, height: 10, "aria-hidden": "true" });
      if (line.low) mark.append(make("rect", { class: `area ${hue}`, width: 22, height: 10 }));
      mark.append(make("line", { class: `line ${hue} ${line.dash}`, x1: 0, x2: 22, y1: 5, y2: 5 }));
      place.append(make("span", {}, mark, text));
    }
    const members = Math.max(0, ...this.chart.bands.map((band) => band.members));
    if (members) place.append(make("span", {}, `mean, quartiles and extremes of ${members} members`));
  }

  listen() {
    let pressed = null;
    const at = (event) => event.clientX - this.svg.getBoundingClientRect().left;
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0) pressed = at(event);
    });
    this.svg.addEventListener("pointermove", (event) => {
      point(this.step(at(event)), this);
      if (pressed === null) return;
      const [left, right] = [Math.min(pressed, at(event)), Math.max(pressed, at(event))];
      this.chosen.setAttribute("x", left);
      this.chosen.setAttribute("width", right - left);
    });
    window.addEventListener("pointerup", (event) => {
      if (pressed !== null && Math.abs(at(event) - pressed) > 8) zoom([this.step(pressed), this.step(at(event))].sort((a, b) => a - b));
      pressed = null;
    });
    this.svg.addEventListener("pointerleave", () => point(null, this));
    this.svg.addEventListener("blur", () => point(null, this));
    this.svg.addEventListener("dblclick", () => zoom(null));
    this.svg.addEventListener("keydown", (event) => {
      if (event.key === "Escape") zoom(null);
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      event.preventDefault();
      const known = [...new Set(this.seen().flatMap((line) => line.x))].sort((a, b) => a - b);
      const index = before(known, view.step ?? known[0]) + (event.key === "ArrowRight" ? 1 : -1);
      point(known[Math.max(0, Math.min(known.length - 1, index))], this);
    });
  }

  /** What is not hidden: bands, then lines. */
  seen() {
    return [...this.chart.bands, ...this.chart.series].filter((line) => !view.hidden.has(line.run));
  }

  step(pixel) {
    const [low, high] = this.x;
    return Math.round(Math.max(low, Math.min(high, low + ((pixel - this.left) / this.width) * (high - low))));
  }

  draw() {
    const [outer, height] = [this.plot.clientWidth, this.plot.clientHeight];
    const seen = this.seen();
    this.x = view.range ?? (whole[0] < whole[1] ? whole : [whole[0] - 1, whole[1] + 1]);
    const log = view.log;
    const found = [];
    const take = (value) => Number.isFinite(value) && (!log || value > 0) && found.push(value);
    for (const line of seen) {
      const [from, to] = [Math.max(0, before(line.x, this.x[0] - 1)), Math.min(line.x.length, before(line.x, this.x[1]) + 2)];
      for (const column of line.low ? [line.low, line.high] : [line.y]) for (let index = from; index < to; index++) take(column[index]);
    }
    found.sort((a, b) => a - b);
    const cut = view.clip ? Math.floor(found.length / 100) : 0;
    const [low, high] = found.length ? [found[cut], found[found.length - 1 - cut]] : log ? [0.1, 1] : [0, 1];
    const room = log ? (high / low) ** 0.05 : (high - low) * 0.05;
    const flat = low === high;
    const y = log ? [low / (flat ? 2 : room), high * (flat ? 2 : room)] : [low - (flat ? Math.abs(low) / 10 || 1 : room), high + (flat ? Math.abs(low) / 10 || 1 : room)];
    const down = (log ? powers : ticks)(y, 4);
    this.left = 10 + LATIN * Math.max(2, ...down.map((value) => tick(value).length));
    this.width = Math.max(20, outer - this.left - 12);
    const [top, bottom] = [10, height - 22];
    const across = (step) => this.left + ((step - this.x[0]) / (this.x[1] - this.x[0])) * this.width;
    const up = (value) => bottom - (log ? Math.log(value / y[0]) / Math.log(y[1] / y[0]) : (value - y[0]) / (y[1] - y[0])) * (bottom - top);
    const drawable = (value) => Number.isFinite(value) && (!log || value > 0);
    this.across = across;
    this.up = (value) => (drawable(value) ? up(value) : null);

    const clip = { x: this.left, y: 0, width: this.width, height: bottom };
    const inner = make("svg", { ...clip, viewBox: `${clip.x} ${clip.y} ${clip.width} ${clip.height}` });
    const axes = make("g", { class: "axes" });
    for (const value of down) {
      axes.append(make("line", { x1: this.left, x2: this.left + this.width, y1: up(value), y2: up(value) }));
      axes.append(make("text", { x: this.left - 6, y: up(value) + 4, "text-anchor": "end" }, tick(value)));
    }
    for (const value of ticks(this.x, Math.max(2, this.width / 90)).filter(Number.isInteger)) {
      const anchor = across(value) > outer - 30 ? "end" : "middle";
      axes.append(make("text", { x: Math.min(across(value), outer - 2), y: height - 5, "text-anchor": anchor }, grouped(value)));
    }
    for (const mark of data.marks.filter((mark) => !view.hidden.has(mark.run))) {
      const line = make("line", { class: `mark ${mark.kind}`, x1: across(mark.step), x2: across(mark.step), y1: 0, y2: bottom });
      line.append(make("title", {}, mark.text));
      inner.append(line);
    }
    const layers = seen.map((line) => this.line(line, across, up, drawable, top, bottom));
    for (const layer of ["back", "front"]) for (const drawn of layers) inner.append(...drawn[layer]);
    this.cross = make("line", { class: "cross", y1: 0, y2: bottom, visibility: "hidden" });
    this.chosen = make("rect", { class: "chosen", y: 0, height: bottom, width: 0 });
    inner.append(this.cross, this.chosen);
    this.svg.setAttribute("viewBox", `0 0 ${outer} ${height}`);
    this.svg.replaceChildren(axes, inner);
  }

  /** What is seen of a line, behind all lines and before them. */
  line(line, across, up, drawable, top, bottom) {
    const path = (x, y) => {
      let [text, pen] = ["", "M"];
      for (let index = 0; index < x.length; index++) {
        if (!drawable(y[index])) pen = "M";
        else {
          text += `${pen}${across(x[index]).toFixed(1)} ${up(y[index]).toFixed(1)}`;
          pen = "L";
        }
      }
      return text;
    };
    if (line.low) {
      const area = (low, high) => {
        const there = line.x.map((_, index) => index).filter((index) => drawable(low[index]) && drawable(high[index]));
        const edge = (column, order) => path(order.map((index) => line.x[index]), order.map((index) => column[index]));
        return there.length ? `${edge(high, there)}${edge(low, there.reverse()).replace("M", "L")}Z` : "";
      };
      const areas = [area(line.low, line.high), area(line.first, line.third)];
      return {
        back: areas.map((d) => make("path", { class: `area ${line.hue}`, d })),
        front: [make("path", { class: `line ${line.hue} ${line.dash}`, d: path(line.x, line.mean) })],
      };
    }
    const smooth = view.smoothing > 0 && this.chart.noisy && line.x.length > MANY && line.member === null;
    const faint = smooth ? "raw" : line.member === null ? "" : "member";
    const raw = make("path", { class: `line ${line.hue} ${line.dash} ${faint}`, d: path(line.x, line.y) });
    const drawn = smooth ? [make("path", { class: `line ${line.hue} ${line.dash}`, d: path(line.smooth[0], smoothed(line.smooth)) })] : [];
    if (!faint) drawn.push(raw);
    line.x.forEach((step, index) => {
      const value = line.y[index];
      const alone = !drawable(line.y[index - 1]) && !drawable(line.y[index + 1]);
      if (drawable(value) && (alone || (line.dots && line.member === null && line.x.length <= MANY))) {
        drawn.push(make("circle", { class: `dot ${line.hue}`, cx: across(step), cy: up(value), r: 2.5 }));
      }
      if (Number.isFinite(value)) return;
      const [x, y] = [across(step), value === -Infinity ? bottom - 6 : top];
      const shape = Number.isNaN(value) ? `M${x - 4} ${y - 4}l8 8m0 -8l-8 8` : `M${x - 4} ${y + 3}h8l-4 -7z`;
      const turned = value === -Infinity ? { transform: `rotate(180 ${x} ${y})` } : {};
      const mark = make("path", { class: `odd ${line.hue}`, d: shape, ...turned });
      mark.append(make("title", {}, `${line.label}: ${shown(value)} at step ${step}`));
      drawn.push(mark);
    });
    const crowd = line.member !== null && this.chart.bands.some((band) => band.members > CROWD);
    return { back: faint && !crowd ? [raw] : [], front: drawn };
  }

  /** The line at a step, in every chart; its values in the chart that is pointed at. */
  point(step, here) {
    this.cross.setAttribute("visibility", step === null ? "hidden" : "visible");
    this.tip.hidden = step === null || here !== this;
    if (step === null) return;
    const x = this.across(step);
    this.cross.setAttribute("x1", x);
    this.cross.setAttribute("x2", x);
    if (here !== this) return;
    const rows = [];
    for (const line of this.seen()) {
      const index = before(line.x, step);
      if (index < 0 || (line.member !== null && this.chart.bands.length && line.member !== undefined)) continue;
      const value = line.low ? `${shown(line.mean[index])}  [${shown(line.low[index])}, ${shown(line.high[index])}]` : shown(line.y[index]);
      const then = line.x[index] === step ? "" : ` at ${grouped(line.x[index])}`;
      rows.push(make("tr", {}, make("td", {}, make("i", { class: `swatch ${line.hue}` })), make("td", {}, line.label), make("td", {}, value), make("td", {}, then)));
    }
    this.tip.replaceChildren(make("b", {}, `step ${grouped(step)}`), make("table", {}, ...rows));
    const [width, room] = [this.tip.offsetWidth, this.plot.clientWidth];
    this.tip.style.left = `${Math.max(0, Math.min(room - width, x > room / 2 ? x - width - 12 : x + 12))}px`;
  }
}

const charts = [...document.querySelectorAll("figure[data-chart]")].map((figure) => new Chart(figure));
const reset = document.getElementById("reset");

function draw() {
  for (const chart of charts) chart.draw();
}

function point(step, here) {
  view.step = step;
  for (const chart of charts) chart.point(step, here);
}

function zoom(range) {
  view.range = range && range[0] < range[1] ? range : null;
  reset.hidden = view.range === null;
  draw();
}

function control(id, event, act) {
  const element = document.getElementById(id);
  element.addEventListener(event, () => (act(element), draw()));
  act(element);
}

control("smoothing", "input", (slider) => (view.smoothing = (slider.value / 100) ** 2));
control("log", "change", (box) => (view.log = box.checked));
control("clip", "change", (box) => (view.clip = box.checked));
reset.addEventListener("click", () => zoom(null));
for (const chip of document.querySelectorAll("button[data-run]")) {
  chip.addEventListener("click", () => {
    const run = Number(chip.dataset.run);
    view.hidden[view.hidden.has(run) ? "delete" : "add"](run);
    chip.setAttribute("aria-pressed", String(!view.hidden.has(run)));
    draw();
  });
}
draw(); // Those in a closed fold too, which nothing resizes.
document.documentElement.dataset.drawn = charts.length;
