"use strict";
// latent.html#12: one latent. latent.html#12,34: two of them side by side.
(() => {
  const { site } = atlas.data;
  const last = site.latents - 1;
  const place = atlas.byId("latents");
  const status = atlas.byId("status");

  const paintHeat = (canvas, columns, packed) => {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const rows = bytes.length / columns;
    Object.assign(canvas, { width: columns, height: rows });
    const pen = canvas.getContext("2d");
    const pixels = pen.createImageData(columns, rows);
    bytes.forEach((value, index) => pixels.data.set([255, 96, 0, 0.8 * value], 4 * index));
    pen.putImageData(pixels, 0, 0);
  };

  const exampleFigure = ([image, value, columns, packed]) => {
    const tile = atlas.thumbnail(image, 112);
    if (packed) {
      const canvas = atlas.element("canvas", { class: "heat", "aria-hidden": "true" });
      paintHeat(canvas, columns, packed);
      tile.append(canvas);
    }
    return atlas.element("figure", { class: "example" }, tile,
      atlas.element("figcaption", null, atlas.number(value), atlas.element("span", { class: "muted" }, ` image ${image}`)));
  };

  const gallery = (title, note, examples) => atlas.element("section", null,
    atlas.element("h2", null, title), atlas.element("p", { class: "lead" }, note),
    examples.length ? atlas.element("div", { class: "gallery" }, ...examples.map(exampleFigure))
      : atlas.element("p", { class: "none" }, "No examples: this latent fired on no image that was read."));

  const labels = (entry) => atlas.element("section", null, atlas.element("h2", null, "Labels"),
    entry.labels.length ? atlas.element("ol", { class: "labels" }, ...entry.labels.map(([word, score]) =>
      atlas.element("li", null, atlas.element("span", null, word), atlas.element("b", null, atlas.number(score)))))
      : atlas.element("p", { class: "none" }, "No label: nothing is known about what this latent means."),
    entry.margin === null ? null : atlas.element("p", { class: "note" }, `Margin of the best label to the next: ${atlas.number(entry.margin)}.`));

  const columnValue = (latent, [, , isLatent], value) => {
    if (!isLatent || value === null) return atlas.number(value);
    return atlas.element("span", null, atlas.latentLink(value, ""), " \u00b7 ",
      atlas.element("a", { href: `#${latent},${value}` }, "side by side"));
  };

  const numbers = (latent, entry) => atlas.element("section", null, atlas.element("h2", null, "Numbers"),
    atlas.element("dl", { class: "facts" }, ...site.columns.map((column, index) => atlas.element("div", { class: "fact" },
      atlas.element("dt", null, column[0]), atlas.element("dd", { class: "fact-value" }, columnValue(latent, column, entry.numbers[index])),
      atlas.element("dd", { class: "note" }, column[1])))));

  const relianceRow = ([number, attribution, share, positive, alignment, kind]) => atlas.element("tr", null,
    atlas.element("th", { scope: "row" }, atlas.classLink(number), " ", kind ? atlas.element("span", { class: "tag" }, kind) : null),
    ...[atlas.number(attribution), atlas.percent(share), atlas.percent(positive), atlas.number(alignment)]
      .map((text) => atlas.element("td", null, text)));

  const relianceTable = (title, rows) => {
    if (!rows.length) return [atlas.element("h3", null, title), atlas.element("p", { class: "none" }, "None.")];
    const heads = ["class", "mean attribution", "share of images", "share positive", "alignment"];
    const [body, more] = [atlas.element("tbody"), atlas.element("button", { type: "button", class: "more" })];
    new atlas.LongList(body, more, 25, relianceRow).fill(rows, 25);
    return [atlas.element("h3", null, title),
      atlas.element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title },
        atlas.element("table", null, atlas.element("thead", null,
          atlas.element("tr", null, ...heads.map((head) => atlas.element("th", { scope: "col" }, head)))), body)), more];
  };

  const reliance = (entry) => atlas.element("section", null,
    atlas.element("h2", null, "Classes that rely on it"),
    atlas.element("p", { class: "lead" }, `Mean attribution and share of images are over ${site.over}; the share positive is over those on which it fires.`),
    ...relianceTable("Classes that it raises most", entry.reliance.filter((row) => row[1] > 0)),
    ...relianceTable("Classes that it lowers most", entry.reliance.filter((row) => row[1] < 0)));

  const heatNote = (entry) => (entry.top.some((example) => example[2])
    ? " Coloured: the patches on which it fires, or, of a class token, those that made it fire; each image on its own scale." : "");

  const article = (latent, entry, isPair) => atlas.element("article", null,
    atlas.element(isPair ? "h2" : "h1", { class: "latent-title" }, ...titleOf(latent, entry, isPair)),
    entry.dead ? atlas.element("p", { class: "verdict" }, "This latent is dead: it never fired.") : null,
    gallery("Strongest examples", `The images on which the latent is largest, with its activation.${heatNote(entry)}`, entry.top),
    gallery("Across its range", "Images at quantiles of its activation, largest first: what it does when it is not at its strongest.", entry.spread),
    labels(entry), reliance(entry), numbers(latent, entry));

  const titleOf = (latent, entry, isPair) => {
    const [word] = entry.labels.length ? entry.labels[0] : [""];
    return isPair ? [atlas.latentLink(latent, word)] : [word, " ", atlas.element("span", { class: "number" }, `#${latent}`)];
  };

  const refused = (wanted) => (wanted === null
    ? "Add the number of a latent to the address: latent.html#12, or two for a pair: latent.html#12,34."
    : wanted.some((latent) => latent > last) ? `There is no latent ${Math.max(...wanted)}: they go from 0 to ${last}.` : "");

  const neighbour = (step) => {
    const wanted = atlas.hashNumbers();
    const next = wanted && wanted.length === 1 ? wanted[0] + step : -1;
    return next >= 0 && next <= last ? next : null;
  };

  const show = async () => {
    const wanted = atlas.hashNumbers();
    const asked = location.hash;
    atlas.stepLink(atlas.byId("previous"), neighbour(-1));
    atlas.stepLink(atlas.byId("next"), neighbour(1));
    atlas.byId("go").value = wanted ? wanted[0] : "";
    status.textContent = refused(wanted);
    if (status.textContent) { place.replaceChildren(); return; }
    try {
      const entries = await Promise.all(wanted.map(atlas.loadLatent));
      if (location.hash !== asked) return; // the reader went on while this was read
      const isPair = entries.length === 2;
      place.classList.toggle("side-by-side", isPair);
      place.replaceChildren(...entries.map((entry, index) => article(wanted[index], entry, isPair)));
      atlas.byId("heat-choice").hidden = !place.querySelector("canvas.heat");
      document.title = `${entries.map((entry, index) => atlas.latentName(wanted[index], entry.labels.length ? entry.labels[0][0] : "")).join(" and ")} \u00b7 ${site.title}`;
      document.documentElement.dataset.ready = asked;
    } catch (error) {
      place.replaceChildren();
      status.textContent = `This latent cannot be shown: ${error.message}.`;
    }
  };

  atlas.byId("go").addEventListener("change", (event) => { location.hash = `#${event.target.value}`; });
  atlas.byId("heat").addEventListener("input", (event) => place.classList.toggle("without-heat", !event.target.checked));
  atlas.arrowKeys(neighbour);
  addEventListener("hashchange", () => { scrollTo(0, 0); show(); });
  show();
})();
