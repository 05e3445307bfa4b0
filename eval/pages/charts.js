"use strict";
// Vega-Lite charts in the page's colours.
function ink(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
function draw(id, spec) {
  const place = document.getElementById(id);
  if (!place || !spec) return;
  const quiet = ink("--quiet"), line = ink("--line");
  const config = {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: line },
    axis: { labelColor: quiet, titleColor: quiet, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 12, titleFontSize: 12 },
    legend: { labelColor: ink("--ink"), titleColor: quiet, labelFontSize: 12, labelLimit: 400 },
    header: { labelColor: ink("--ink"), titleColor: quiet }, title: { color: ink("--ink") },
  };
  vegaEmbed(place, { ...spec, config }, { actions: false, renderer: "svg", ast: false }).catch((error) => {
    place.textContent = "This chart cannot be drawn: " + error.message;
  });
}
function drawAll(charts) {
  for (const [id, spec] of Object.entries(charts)) draw(id, spec);
}
