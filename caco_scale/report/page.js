"use strict";
// Reading a chart: the figures nearest to the pointer, in place of the last ones.
const write = (value, digits, unit) => {
  if (value === null || value === undefined) return "—";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e7)
    ? value.toExponential(digits - 1)
    : value.toLocaleString("en", { maximumSignificantDigits: digits });
  return unit ? text + (unit === "%" ? "" : " ") + unit : text;
};
const nearest = (values, wanted) => {
  let best = 0;
  values.forEach((value, i) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i; });
  return best;
};
for (const chart of document.querySelectorAll(".chart")) {
  const { frame: [left, bottom, width, height, low, high], lines, digits, unit, axis } = JSON.parse(chart.dataset.chart);
  const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor");
  const when = chart.querySelector(".when"), shown = [...chart.querySelectorAll(".value > span")];
  const last = shown.map((span) => span.textContent);
  const read = (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, ((event.clientX - box.left) / box.width - left) / width));
    const wanted = low + share * (high - low);
    const places = lines.map((line) => (line.e.length ? nearest(line.e, wanted) : -1));
    const longest = places.reduce((a, _, i) => (lines[i].e.length > lines[a].e.length ? i : a), 0);
    const at = lines[longest].e[places[longest]];
    const epoch = axis === "epoch" ? `epoch ${at.toLocaleString("en", { maximumFractionDigits: 2 })}, ` : "";
    when.textContent = `${epoch}step ${lines[longest].s[places[longest]].toLocaleString("en")}`;
    places.forEach((place, i) => { shown[i].textContent = place < 0 ? "—" : write(lines[i].v[place], digits, unit); });
    cursor.hidden = false;
    cursor.style.left = `${(left + width * (at - low) / (high - low)) * 100}%`;
    cursor.style.top = `${(1 - bottom - height) * 100}%`;
    cursor.style.height = `${height * 100}%`;
  };
  plot.addEventListener("pointermove", read);
  plot.addEventListener("pointerdown", read);
  plot.addEventListener("pointerleave", () => {
    cursor.hidden = true;
    when.textContent = "last";
    shown.forEach((span, i) => { span.textContent = last[i]; });
  });
}

// Copying the data of a figure: lines of cells with tabs between them, as spreadsheets and pandas take them.
const toText = (rows) => rows.map((cells) => cells.map((cell) => {
  const text = String(cell ?? "");
  return /[\t\r\n"]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}).join("\t")).join("\n") + "\n";
const rowsOfChart = ({ figure, unit, axis, lines }) => {
  const value = unit ? `${figure} (${unit})` : figure, isMean = lines.some((line) => line.least);
  const head = ["run", ...(axis === "epoch" ? ["epoch"] : []), "step", value];
  const rows = [isMean ? [...head, "least", "greatest"] : head];
  for (const { run, e, s, v, least = v, greatest = v } of lines) s.forEach((step, i) => {
    const row = [run, ...(axis === "epoch" ? [e[i]] : []), step, v[i]];
    rows.push(isMean ? [...row, least[i], greatest[i]] : row);
  });
  return rows;
};
const say = (button, words) => {
  document.querySelector(".said")?.remove();
  const said = document.createElement("span");
  said.className = "said";
  said.setAttribute("role", "status");
  button.after(said);
  said.textContent = words;
};
const copy = async (button, text) => {
  try {
    await navigator.clipboard.writeText(text); // absent in pages of http, refused in some of file
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.className = "copying";
    area.readOnly = true;
    area.value = text;
    area.setAttribute("aria-label", "data of the figure");
    button.parentElement.append(area);
    area.select();
    if (document.execCommand("copy")) {
      area.remove();
      button.focus();
      return true;
    }
    area.classList.add("by-hand"); // it stays selected, until the reader goes on
    area.addEventListener("blur", () => { area.remove(); document.querySelector(".said")?.remove(); });
    return false;
  }
};
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const { chart, table } = button.closest("figure").dataset;
    const rows = chart ? rowsOfChart(JSON.parse(chart)) : JSON.parse(table);
    const isDone = await copy(button, toText(rows));
    say(button, isDone ? `${(rows.length - 1).toLocaleString("en")} lines copied` : "press Ctrl+C to copy");
  });
}

// Paper cannot be clicked: what is folded is printed open.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const one of folded) one.open = true;
});
addEventListener("afterprint", () => { for (const one of folded) one.open = false; });
