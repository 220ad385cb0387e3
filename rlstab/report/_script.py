"""The only script of the page: it shows the values of a chart at the step under the pointer or the arrow keys.

It is a constant, so that the page's policy can name it by its hash: nothing else runs, whatever a run holds.
"""

SCRIPT = """
"use strict";
for (const chart of document.querySelectorAll("svg.chart")) {
  const first = Number(chart.dataset.first), last = Number(chart.dataset.last);
  const cursor = chart.querySelector(".cursor");
  const names = chart.closest("figure").querySelectorAll(".legend li");
  const lines = [...chart.querySelectorAll(".line")].map((line) => ({
    x: line.dataset.x.split(" ").map(Number), y: line.dataset.y.split(" "),
  }));
  const rest = [...names].map((name) => name.querySelector("output").textContent);
  let step = last;
  const nearest = (all, wanted) => {
    let low = 0, high = all.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (all[middle] <= wanted) low = middle; else high = middle;
    }
    return wanted - all[low] < all[high] - wanted ? low : high;
  };
  const show = (wanted) => {
    step = Math.min(last, Math.max(first, wanted));
    const x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.setAttribute("visibility", "visible");
    lines.forEach((line, index) => {
      names[index].querySelector("output").textContent = line.y[nearest(line.x, step)];
    });
    names[lines.length].querySelector("output").textContent = String(Math.round(step));
    names[lines.length].classList.add("shown");
  };
  const hide = () => {
    cursor.setAttribute("visibility", "hidden");
    names.forEach((name, index) => { name.querySelector("output").textContent = rest[index]; });
    names[lines.length].classList.remove("shown");
  };
  const follow = (event) => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * WIDTH;
    show(first + (x - LEFT) / (WIDTH - LEFT - RIGHT) * (last - first));
  };
  chart.addEventListener("pointermove", follow);
  chart.addEventListener("pointerdown", follow);
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const pace = Math.max(1, Math.round((last - first) / 50));
    const way = { ArrowLeft: -pace, ArrowRight: pace, Home: -Infinity, End: Infinity }[event.key];
    if (way !== undefined) { event.preventDefault(); show(step + way); }
  });
}
"""
