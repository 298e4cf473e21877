"use strict";
// Without this script, the page has the same contents. It sorts tables by a click on a heading, and shows the values of
// a figure's lines under the pointer. See pretrain/report/svg.py for the layout of data-hover.

const numeric = (text) => {
  const plain = text.trim().replace(/\u2212/g, "-").replace(/,/g, "");
  return /^[+-]?\.?\d/.test(plain) ? parseFloat(plain) : NaN;
};

const sortBy = (heading, table) => {
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of heading.parentNode.cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = table.tBodies[0];
  // A cell may say in data-key what it is sorted by; an empty one comes last.
  const key = (cell) => cell.dataset.key ?? cell.textContent.trim();
  const rows = [...body.rows].map((row) => ({ row, text: key(row.cells[heading.cellIndex]) }));
  const missing = (entry) => entry.text === "" || entry.text === "\u2013";
  const areNumbers = rows.every((entry) => missing(entry) || !Number.isNaN(numeric(entry.text)));
  const order = (a, b) =>
    areNumbers ? numeric(a.text) - numeric(b.text) : a.text.localeCompare(b.text, "en", { numeric: true });
  rows.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : ascending ? order(a, b) : order(b, a)));
  body.append(...rows.map((entry) => entry.row));
};

for (const table of document.querySelectorAll("table")) {
  if (!table.tHead || table.tBodies[0].rows.length < 2) continue;
  for (const heading of table.tHead.rows[0].cells) {
    if (!heading.textContent.trim()) continue;
    heading.tabIndex = 0;
    heading.setAttribute("aria-sort", "none");
    heading.addEventListener("click", () => sortBy(heading, table));
    heading.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sortBy(heading, table);
    });
  }
}

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
const guide = document.createElement("div");
guide.className = "guide";
guide.hidden = true;
document.body.append(tip, guide);

const shown = (value, share) =>
  share ? `${(100 * value).toFixed(1)} %` : String(Number(value.toPrecision(5))).replace("-", "\u2212");

const nearest = (points, x) =>
  points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));

const line = (text, colour) => {
  const entry = document.createElement("div");
  if (colour) {
    const mark = document.createElement("span");
    mark.className = "key";
    mark.style.background = colour;
    entry.append(mark);
  }
  entry.append(text);
  return entry;
};

const hover = (svg, data, event) => {
  const area = svg.getBoundingClientRect();
  const [left, top, right, bottom] = data.box.map((part, i) => part * (i % 2 ? area.height : area.width));
  const part = (event.clientX - area.left - left) / (right - left);
  const lines = data.lines.filter((found) => found.points.length);
  tip.hidden = guide.hidden = part < 0 || part > 1 || !lines.length;
  if (tip.hidden) return;
  const [from, to] = data.logarithmic ? data.x.map(Math.log) : data.x;
  const along = from + part * (to - from);
  const x = nearest(lines.flatMap((found) => found.points), data.logarithmic ? Math.exp(along) : along)[0];
  const entries = lines.map((found) => {
    const [, y, low, high] = nearest(found.points, x);
    const range = low === undefined ? "" : ` (${shown(low, data.share)} to ${shown(high, data.share)})`;
    return line(`${found.name}: ${shown(y, data.share)}${range}`, found.colour);
  });
  tip.replaceChildren(line(`${data.label} ${x.toLocaleString("en")}`), ...entries);
  const place = ((data.logarithmic ? Math.log(x) : x) - from) / (to - from);
  const at = area.left + left + place * (right - left);
  Object.assign(guide.style, { left: `${at}px`, top: `${area.top + top}px`, height: `${bottom - top}px` });
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(at + 12, document.documentElement.clientWidth - width - 4))}px`;
  tip.style.top = `${Math.max(4, area.top + top - height - 4)}px`;
};

for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const data = JSON.parse(svg.dataset.hover);
  svg.addEventListener("pointermove", (event) => hover(svg, data, event));
  svg.addEventListener("pointerdown", (event) => hover(svg, data, event));
  svg.addEventListener("pointerleave", () => (tip.hidden = guide.hidden = true));
}
addEventListener("scroll", () => (tip.hidden = guide.hidden = true), { passive: true });
