"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const element = (id) => document.getElementById(id);
  const pictures = read("pictures"), groups = read("groups");
  // What the legend shows: kind to colour.
  const kinds = Object.fromEntries([...document.querySelectorAll(".legend .dot")].map(
    (dot) => [dot.dataset.kind, getComputedStyle(dot).backgroundColor.match(/\d+/g).slice(0, 3).map(Number)]));

  // Theme
  element("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // Tables that sort: numbers as such, empty cells last.
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("thead button").forEach((button, column) => {
      button.addEventListener("click", () => {
        const head = button.closest("th");
        const down = head.classList.contains("n")
          ? head.ariaSort !== "descending" : head.ariaSort === "ascending";
        table.querySelectorAll("thead th").forEach((th) => th.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => row.cells[column].textContent.trim();
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if ((x === "–") !== (y === "–")) return x === "–" ? 1 : -1;
          const order = head.classList.contains("n") ? x - y : x.localeCompare(y);
          return down ? -order : order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // Images
  if (!groups.length) return;
  const canvases = [...document.querySelectorAll("canvas")];
  const state = { group: 0, place: 0, overlay: true, truth: false, flipped: false, maps: {} };
  const opacity = element("opacity"), colour = element("colour"), thumbs = element("thumbs");
  const number = () => groups[state.group].images[state.place];

  const loaded = (url) => new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.src = url;
  });

  async function indices(url, size) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = size;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(await loaded(url), 0, 0);
    const pixels = context.getImageData(0, 0, ...size).data;
    return Uint8Array.from({ length: size[0] * size[1] }, (_, k) => pixels[4 * k]);
  }

  // What a pane shows: the truth in place of a prediction, or of two predictions the other.
  const predictions = [...new Set(canvases.map((c) => c.dataset.map))].filter((m) => m && m !== "truth");
  const shown = (map) => {
    const place = predictions.indexOf(map);
    if (place < 0) return map;
    return state.truth ? "truth" : predictions[(place + state.flipped) % predictions.length];
  };
  const segments = (map) => pictures[number()].maps[map].segments;

  function draw(highlight) {
    const picture = pictures[number()], [width, height] = picture.size;
    for (const canvas of canvases) {
      [canvas.width, canvas.height] = [width, height];
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(state.image, 0, 0);
      const map = shown(canvas.dataset.map);
      if (!map || !state.overlay) continue;
      const layer = context.getImageData(0, 0, width, height), data = layer.data;
      const index = state.maps[map], list = segments(map), alpha = opacity.value / 100;
      for (let k = 0; k < index.length; k++) {
        const segment = list[index[k] - 1];
        if (!segment) continue;
        const paint = colour.value === "kind" ? kinds[segment[1]] || kinds.match : segment[2];
        const edge = ((k + 1) % width && index[k] !== index[k + 1]) ||
          (k + width < index.length && index[k] !== index[k + width]);
        let share = edge ? Math.min(1, alpha * 1.6) : alpha;
        if (highlight && highlight.map === map && highlight.index === index[k]) share = edge ? 1 : 0.15;
        for (let c = 0; c < 3; c++) data[4 * k + c] += share * (paint[c] * (edge ? 0.6 : 1) - data[4 * k + c]);
      }
      context.putImageData(layer, 0, 0);
    }
  }

  async function show() {
    const wanted = number(), picture = pictures[wanted];
    const [image, ...maps] = await Promise.all([
      loaded(picture.image), ...Object.values(picture.maps).map((map) => indices(map.png, picture.size)),
    ]);
    if (wanted !== number()) return;
    state.image = image;
    state.maps = Object.fromEntries(Object.keys(picture.maps).map((map, k) => [map, maps[k]]));
    [...thumbs.children].forEach((img, k) => img.setAttribute("aria-selected", k === state.place));
    // Not scrollIntoView, which would scroll the page, too, as soon as it is opened.
    const [thumb, strip] = [thumbs.children[state.place], thumbs].map((e) => e.getBoundingClientRect());
    thumbs.scrollLeft += thumb.left - strip.left - (strip.width - thumb.width) / 2;
    element("caption").textContent = `${picture.caption} · ${state.place + 1} of ${groups[state.group].images.length}`;
    draw();
    document.body.dataset.shown = wanted;
  }

  function fill() {
    thumbs.replaceChildren(...groups[state.group].images.map((k, place) => {
      const img = new Image();
      img.src = pictures[k].image;
      img.alt = pictures[k].name;
      img.setAttribute("role", "option");
      img.addEventListener("click", () => { state.place = place; show(); });
      return img;
    }));
    state.place = 0;
    show();
  }

  function point(event, canvas) {
    const map = shown(canvas.dataset.map || predictions[0]);
    const box = canvas.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) / box.width * canvas.width);
    const y = Math.floor((event.clientY - box.top) / box.height * canvas.height);
    const index = state.maps[map][y * canvas.width + x], segment = segments(map)[index - 1];
    element("info").textContent = `${map}: ${segment ? segment[0] : "void"}`;
    if (!segment) return draw();
    draw({ map, index });
  }

  const select = element("group");
  groups.forEach((group, k) => select.append(new Option(group.title, k)));
  select.addEventListener("change", () => { state.group = Number(select.value); fill(); });
  opacity.addEventListener("input", () => draw());
  colour.addEventListener("change", () => draw());
  for (const canvas of canvases) {
    canvas.addEventListener("pointermove", (event) => point(event, canvas));
    canvas.addEventListener("pointerleave", () => draw());
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(SELECT|INPUT)$/.test(event.target.tagName)) return;
    const last = groups[state.group].images.length - 1;
    if (event.key === "ArrowRight") { state.place = Math.min(last, state.place + 1); show(); }
    else if (event.key === "ArrowLeft") { state.place = Math.max(0, state.place - 1); show(); }
    else if (event.key === "o") { state.overlay = !state.overlay; draw(); }
    else if (event.key === "t") { state.truth = !state.truth; draw(); }
    else if (event.key === "f" && predictions.length > 1) { state.flipped = !state.flipped; draw(); }
    else if (event.key === "e") { colour.value = colour.value === "kind" ? "segment" : "kind"; draw(); }
    else return;
    event.preventDefault();
  });
  // Buttons that name an image show it.
  for (const button of document.querySelectorAll("[data-picture]")) {
    button.addEventListener("click", () => {
      const wanted = Number(button.dataset.picture);
      const group = groups.findIndex((g) => g.images.includes(wanted));
      if (group !== state.group) {
        select.value = state.group = group;
        fill();
      }
      state.place = groups[group].images.indexOf(wanted);
      show();
      element("viewer").scrollIntoView({ block: "nearest" });
    });
  }
  fill();
})();
