"use strict";
// Shows the charts that Python made, and swaps those of one cell for another's. Nothing is drawn or computed here.
const CONFIG = { responsive: true, displayModeBar: false };
const TOUCH = matchMedia("(hover: none)").matches; // where a finger that drags wants to scroll the page
const place = (name) => document.querySelector(`[data-chart="${name}"]`);
const json = (element) => JSON.parse(element.textContent);
const draw = (name, { data, layout }) => Plotly.react(place(name), data, TOUCH ? { ...layout, dragmode: false } : layout, CONFIG);

async function unpacked(element) {
  const bytes = Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

class Study {
  constructor(element) {
    this.id = element.dataset.study;
    this.section = document.getElementById(this.id);
    this.form = this.section.querySelector("form.choice");
    this.found = json(element); // cells, maps, sizes, best and the empty charts of the curves
    this.curves = unpacked(document.querySelector(`[data-curves="${this.id}"]`)).then(JSON.parse);
    this.map = 0;
    for (const [name, chart] of Object.entries({ ...this.found.scaling, ...this.found.costs })) draw(`${this.id}-${name}`, chart);
    this.form.addEventListener("change", (event) => this.asked(event.target.name));
    for (const button of this.section.querySelectorAll("button.show"))
      button.addEventListener("click", () => {
        this.choose(+button.dataset.cell);
        this.section.querySelector(".area-curves").scrollIntoView({ block: "nearest" });
      });
    this.choose(this.remembered() ?? this.found.best);
    place(`${this.id}-map`).on("plotly_click", (event) => this.choose(event.points[0].customdata));
  }

  remembered() {
    const match = new URLSearchParams(location.hash.slice(1)).get(this.id);
    return match !== null && this.found.cells[match] ? +match : null;
  }

  // The cell whose fields were asked for in the form; where there is none, the nearest that has the field just changed.
  asked(changed) {
    const value = (name) => this.form.elements[name]?.value;
    if (changed === "map") {
      this.map = +value("map");
      const inMap = this.found.maps[this.map].cells;
      return this.choose(inMap.includes(this.cell) ? this.cell : inMap[0]);
    }
    const agree = (cell) => Object.keys(cell).filter((name) => cell[name] === value(name)).length;
    const fitting = this.found.cells.map((cell, i) => [agree(cell), i]).filter(([, i]) => this.found.cells[i][changed] === value(changed));
    this.choose(fitting.reduce((best, next) => (next[0] > best[0] ? next : best))[1]);
  }

  choose(cell) {
    this.cell = cell;
    if (!this.found.maps[this.map].cells.includes(cell)) this.map = this.found.maps.findIndex((map) => map.cells.includes(cell));
    const map = this.found.maps[this.map];
    const [x, y] = map.places[map.cells.indexOf(cell)];
    const outline = { type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: "#d55e00", width: 3 } };
    draw(`${this.id}-map`, { data: map.chart.data, layout: { ...map.chart.layout, shapes: [outline] } });
    if (this.drawn !== this.map) draw(`${this.id}-sizes`, map.sizes);
    this.drawn = this.map;
    for (const [name, value] of Object.entries(this.found.cells[cell])) if (this.form.elements[name]) this.form.elements[name].value = value;
    if (this.form.elements.map) this.form.elements.map.value = this.map;
    for (const row of this.section.querySelectorAll("tr[data-cell]")) row.classList.toggle("is-chosen", +row.dataset.cell === cell);
    const hash = new URLSearchParams(location.hash.slice(1));
    hash.set(this.id, cell);
    if (cell !== this.found.best || this.remembered() !== null) history.replaceState(null, "", `#${hash}`);
    this.showCurves(cell);
  }

  async showCurves(cell) {
    const { title, accuracy, loss } = (await this.curves)[cell];
    if (cell !== this.cell) return; // another was chosen meanwhile
    this.section.querySelector(".chosen").textContent = title;
    draw(`${this.id}-accuracy`, { data: accuracy, layout: this.found.accuracy.layout });
    draw(`${this.id}-loss`, { data: loss, layout: this.found.loss.layout });
  }
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const number = (row) => parseFloat(row.cells[column].dataset.value);
      const compare = (a, b) => {
        const [left, right] = [number(a), number(b)];
        if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right); // those without come last
        return down ? right - left : left - right;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    });
  });
}

async function start() {
  const library = document.createElement("script");
  library.textContent = await unpacked(document.getElementById("plotly"));
  document.head.append(library); // runs at once
  const comparison = document.querySelector("[data-comparison]");
  if (comparison) draw("comparison", json(comparison));
  for (const element of document.querySelectorAll('script[type="application/json"][data-study]')) new Study(element);
}

document.querySelectorAll("table.sortable").forEach(sortable);
start();

const refresh = +document.body.dataset.refresh;
if (refresh) setTimeout(() => location.reload(), 1000 * refresh);
