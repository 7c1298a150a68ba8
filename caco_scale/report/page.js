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
  const { frame: [left, bottom, width, height, low, high], lines, digits, unit } = JSON.parse(chart.dataset.chart);
  const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor");
  const when = chart.querySelector(".when"), shown = [...chart.querySelectorAll(".value > span")];
  const last = shown.map((span) => span.textContent);
  const read = (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, ((event.clientX - box.left) / box.width - left) / width));
    const epoch = low + share * (high - low);
    const places = lines.map((line) => (line.e.length ? nearest(line.e, epoch) : -1));
    const longest = places.reduce((a, _, i) => (lines[i].e.length > lines[a].e.length ? i : a), 0);
    const at = lines[longest].e[places[longest]];
    when.textContent = `epoch ${at.toLocaleString("en", { maximumFractionDigits: 2 })}, step ${lines[longest].s[places[longest]].toLocaleString("en")}`;
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
