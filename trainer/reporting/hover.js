// Under the pointer: the values of every curve at the nearest point that was logged.
for (const chart of document.querySelectorAll(".chart")) {
  const plot = chart.querySelector(".plot");
  const curves = JSON.parse(chart.dataset.points);
  const legends = [...chart.querySelectorAll(".legend li")].map((item) => item.firstChild.textContent.trim());
  const pointer = document.createElement("div");
  const tip = document.createElement("div");
  pointer.className = "pointer";
  tip.className = "tip";
  const nearest = (points, left) =>
    points.reduce((best, point) => (Math.abs(point[2] - left) < Math.abs(best[2] - left) ? point : best));
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const left = ((event.clientX - box.left) / box.width) * 100;
    const found = curves.map((points) => nearest(points, left));
    const at = found.reduce((best, point) => (Math.abs(point[2] - left) < Math.abs(best[2] - left) ? point : best));
    const lines = found.map((point, number) => `${legends[number]}: ${point[1]}`);
    tip.replaceChildren(`${at[0].toLocaleString("en")} images`);
    for (const line of lines) tip.append(document.createElement("br"), line);
    pointer.style.left = `${at[2]}%`;
    tip.style.left = at[2] > 50 ? "auto" : `calc(${at[2]}% + 8px)`;
    tip.style.right = at[2] > 50 ? `calc(${100 - at[2]}% + 8px)` : "auto";
    plot.append(pointer, tip);
  });
  plot.addEventListener("pointerleave", () => { pointer.remove(); tip.remove(); });
}
