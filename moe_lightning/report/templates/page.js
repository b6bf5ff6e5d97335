"use strict";
const CAP = {{ cap }};
const tip = document.getElementById("tip");

function show(event, head, rows) {
  tip.replaceChildren(head);
  for (const [colour, name, value] of rows) {
    const row = document.createElement("div"), left = document.createElement("span"), swatch = document.createElement("i");
    swatch.className = "swatch " + colour;
    left.append(swatch, name);
    row.append(left, value);
    tip.append(row);
  }
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect(), gap = 14;
  const right = event.clientX + gap + width > document.documentElement.clientWidth;
  tip.style.left = Math.max(4, right ? event.clientX - gap - width : event.clientX + gap) + "px";
  tip.style.top = Math.max(4, event.clientY - gap - height) + "px";
}

const data = (chart) => JSON.parse(chart.querySelector('script[type="application/json"]').textContent);

for (const chart of document.querySelectorAll(".plot")) {
  const lines = data(chart), area = chart.querySelector(".area"), rule = chart.querySelector(".rule");
  const follow = (event) => {
    const box = area.getBoundingClientRect(), at = (100 * (event.clientX - box.left)) / box.width;
    const nearest = lines.map(({ name, colour, points }) => {
      const point = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      return { name, colour, point };
    });
    const first = nearest.reduce((a, b) => (Math.abs(b.point[0] - at) < Math.abs(a.point[0] - at) ? b : a)).point;
    rule.hidden = false;
    rule.style.left = first[0] + "%";
    const shown = nearest.filter(({ point }) => Math.abs(point[0] - first[0]) < 4).sort((a, b) => b.point[1] - a.point[1]);
    show(event, first[2], shown.map(({ name, colour, point }) => [colour, name, point[3]]));
  };
  area.addEventListener("pointermove", follow);
  area.addEventListener("pointerdown", follow);
  area.addEventListener("pointerleave", () => { rule.hidden = tip.hidden = true; });
}

for (const part of document.querySelectorAll("[data-tip]")) {
  for (const kind of ["pointermove", "pointerdown"]) part.addEventListener(kind, (event) => show(event, part.dataset.tip, []));
  part.addEventListener("pointerleave", () => { tip.hidden = true; });
}

for (const slider of document.querySelectorAll(".slider")) {
  const figure = slider.closest("figure"), input = slider.querySelector("input"), button = slider.querySelector("button");
  const maps = [...figure.querySelectorAll(".heat")].map((element) => ({
    ...data(element), element, cells: [...element.querySelectorAll(".cells i")], frame: 0,
  }));
  const steps = [...new Set(maps.flatMap((map) => map.steps))].sort((a, b) => a - b);
  let timer = 0;
  const draw = () => {
    const step = steps[input.value];
    for (const map of maps) {
      map.frame = Math.max(0, map.steps.findLastIndex((own) => own <= step));
      map.element.querySelector("output").textContent = map.steps[map.frame].toLocaleString("en");
      map.ratios[map.frame].forEach((percent, i) => {
        const ratio = percent / 100, off = ratio > CAP || ratio < 1 / CAP;
        map.cells[i].className = ratio > 1 ? (off ? "above" : "hot") : (off ? "below" : "cold");
        map.cells[i].style.opacity = off ? 1 : Math.abs(Math.log(ratio) / Math.log(CAP)).toFixed(2);
      });
    }
  };
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "play"; };
  const advance = () => { input.value = +input.value + 1; draw(); if (+input.value >= steps.length - 1) stop(); };
  input.max = steps.length - 1;
  input.value = steps.length - 1;
  input.addEventListener("input", () => { stop(); draw(); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (+input.value >= steps.length - 1) input.value = 0;
    draw();
    button.textContent = "pause";
    timer = setInterval(advance, 160);
  });
  slider.hidden = steps.length < 2;
  for (const map of maps) {
    map.cells.forEach((cell, i) => {
      cell.addEventListener("pointermove", (event) => {
        const place = `layer ${Math.floor(i / map.experts)}, expert ${i % map.experts}`;
        show(event, `${place}: ${(map.ratios[map.frame][i] / 100).toFixed(2)} × the mean`, []);
      });
      cell.addEventListener("pointerleave", () => { tip.hidden = true; });
    });
  }
}
