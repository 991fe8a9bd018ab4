"use strict";
// index.html: the scatter of pairs, the ranked list, the tables of classes and latents, the map.
(() => {
  const { site, overview, table } = atlas.data;
  const unexpected = overview.unexpected.map(([number, ...values]) => atlas.pair(number, values));

  // What the reader chose; it lives in the history entry, so that the back button brings it back.
  const state = { class: "", kind: "", text: "", shown: 20, search: "", sorted: 0, descending: false, colour: 0, ...history.state };
  const keep = () => history.replaceState({ ...state }, "");
  addEventListener("hashchange", () => { if (!history.state) keep(); });

  const drawPairs = () => {
    const points = overview.points;
    const rank = new Map(unexpected.map((each, index) => [`${each.number},${each.latent}`, index]));
    const rankOf = (index) => rank.get(`${points[index][0]},${points[index][1]}`) ?? Infinity;
    const all = points.map((_, index) => index);
    const [outliers, others] = [all.filter((index) => points[index][4]), all.filter((index) => !points[index][4])];
    const wordOf = (index) => table.words[points[index][1]] || `#${points[index][1]}`;
    new atlas.Scatter(atlas.byId("pairs-plot")).fill({
      x: points.map((point) => point[2]),
      y: points.map((point) => point[3]),
      roles: ["muted", "outlier"],
      role: (index) => (points[index][4] ? "outlier" : "muted"),
      radius: (index) => (points[index][4] ? 4 : 2.5),
      order: others.concat(outliers),
      names: outliers.sort((a, b) => rankOf(a) - rankOf(b)).slice(0, 60),
      name: (index) => `${atlas.className(points[index][0])}: ${wordOf(index)}`,
      describe: (index) => [atlas.latentName(points[index][1], table.words[points[index][1]]),
        `class: ${atlas.className(points[index][0])}`,
        `alignment ${atlas.number(points[index][2])}, attribution ${atlas.number(points[index][3])}`,
        points[index][4] ? "unexpected" : "not unexpected"],
      open: (index) => { location.href = `latent.html#${points[index][1]}`; },
      axes: ["alignment of the latent's meaning with the class", `mean attribution (${site.scoreName})`],
    });
  };

  const choices = (select, values) => select.append(...values.map(([value, text]) => atlas.element("option", { value }, text)));

  const listUnexpected = () => {
    const [classes, kinds] = [atlas.byId("filter-class"), atlas.byId("filter-kind")];
    const text = atlas.byId("filter-text");
    const numbers = [...new Set(unexpected.map((each) => each.number))];
    choices(classes, numbers.map((number) => [number, atlas.className(number)])
      .sort((a, b) => a[1].localeCompare(b[1], "en")));
    choices(kinds, [...new Set(unexpected.map((each) => each.kind))].filter((kind) => kind).sort().map((kind) => [kind, kind]));
    const ranked = new atlas.LongList(atlas.byId("ranked"), atlas.byId("more-ranked"), 20,
      (each) => atlas.pairRow(each, { showClass: true }));
    ranked.button.addEventListener("click", () => { state.shown = ranked.shown; keep(); });
    const searched = (each) => [each.word, atlas.className(each.number), each.kind, `#${each.latent}`, ...each.reasons]
      .join("\n").toLowerCase();
    const fill = (shown) => {
      Object.assign(state, { class: classes.value, kind: kinds.value, text: text.value, shown });
      const wanted = state.text.trim().toLowerCase();
      const found = unexpected.filter((each) => (state.class === "" || each.number === Number(state.class))
        && (state.kind === "" || each.kind === state.kind) && searched(each).includes(wanted));
      ranked.fill(found, shown);
      atlas.byId("no-ranked").hidden = found.length > 0;
      atlas.byId("ranked-count").textContent = `${found.length.toLocaleString("en")} of ${unexpected.length.toLocaleString("en")} pairs`;
    };
    const refill = () => { fill(ranked.step); keep(); };
    [classes.value, kinds.value, text.value] = [state.class, state.kind, state.text];
    [classes, kinds, text].forEach((control) => control.addEventListener("input", refill));
    fill(state.shown);
  };

  const tabulateClasses = () => {
    const number = (title, explanation, index) => ({ title, explanation,
      value: (row) => overview.classes[row][index], cell: (row) => atlas.number(overview.classes[row][index]) });
    const classes = new atlas.Table(atlas.byId("class-table"), {
      caption: "Classes", size: overview.classes.length, onChange: () => {},
      columns: [
        { title: "class", explanation: "name of the class", isText: true, value: atlas.className, cell: atlas.classLink },
        number("latents shown", "on the page of the class", 0),
        number("unexpected", "all latents that are unexpected for the class; the ranked list has each for its strongest class alone", 1),
        number("evidence", "strongest evidence of its unexpected latents", 2),
      ],
    });
    const search = atlas.byId("search-class");
    const matches = (row) => atlas.className(row).toLowerCase().includes(search.value.trim().toLowerCase());
    search.addEventListener("input", () => classes.filter(matches));
    Object.assign(classes, { sorted: 2, descending: true });
    classes.filter(matches);
  };

  const tabulateLatents = () => {
    const numbers = site.columns.map(([title, explanation, isLatent], index) => ({ title, explanation,
      value: (row) => table.numbers[index][row],
      cell: (row) => (isLatent && table.numbers[index][row] !== null
        ? atlas.latentLink(table.numbers[index][row], "") : atlas.number(table.numbers[index][row])) }));
    const latents = new atlas.Table(atlas.byId("latent-table"), {
      caption: "Latents", size: table.words.length,
      columns: [
        { title: "latent", explanation: "number of the latent and its best label", value: (row) => row,
          cell: (row) => atlas.latentLink(row, table.words[row]) },
        { title: "label score", explanation: "how well the best label fits: cosine, empty prompt subtracted",
          value: (row) => table.scores[row], cell: (row) => atlas.number(table.scores[row]) },
        ...numbers,
      ],
      onChange: () => Object.assign(state, { sorted: latents.sorted, descending: latents.descending }),
    });
    const search = atlas.byId("search-latent");
    const lower = table.words.map((word) => word.toLowerCase());
    const filter = () => {
      // "12" is looked for in labels and numbers, "#12" in numbers alone.
      const wanted = search.value.trim().toLowerCase();
      const [, sign, digits] = /^(#?)(\d+)$/.exec(wanted) || [null, "", null];
      latents.filter((row) => (!sign && lower[row].includes(wanted)) || (digits !== null && String(row).startsWith(digits)));
      state.search = search.value;
      atlas.byId("latent-count").textContent = `${latents.rows.length.toLocaleString("en")} of ${lower.length.toLocaleString("en")} latents`;
    };
    search.value = state.search;
    Object.assign(latents, { sorted: Math.min(state.sorted, latents.columns.length - 1), descending: state.descending });
    filter();
    search.addEventListener("input", () => { filter(); keep(); });
    latents.onChange = () => { Object.assign(state, { sorted: latents.sorted, descending: latents.descending }); keep(); };
  };

  const drawMap = () => {
    const columns = [["label score", table.scores],
      ...site.columns.map(([title, , isLatent], index) => [title, table.numbers[index], isLatent]).filter((column) => !column[2])];
    const select = atlas.byId("map-colour");
    choices(select, columns.map(([title], index) => [index, title]));
    state.colour = Math.min(state.colour, columns.length - 1);
    select.value = state.colour;
    const steps = 6;
    const roles = Array.from({ length: steps }, (_, step) => `ramp-${step}`);
    let bounds = [];
    const values = () => columns[state.colour][1];
    const step = (value) => bounds.filter((bound) => value >= bound).length;
    const recolour = () => {
      // Equal shares of the latents have each colour, so that a long tail does not hide the rest.
      const sorted = values().filter((value) => value !== null).sort((a, b) => a - b);
      bounds = roles.slice(1).map((_, each) => sorted[Math.floor(sorted.length * (each + 1) / steps)]);
      const starts = sorted.length ? [sorted[0], ...bounds] : [];
      atlas.byId("map-legend").replaceChildren(...starts.map((start, each) => atlas.element("li", null,
        atlas.element("span", { class: `dot-swatch ramp-${each}` }), `from ${atlas.number(start)}`)));
    };
    recolour();
    const map = new atlas.Scatter(atlas.byId("map-plot"));
    map.fill({
      x: table.x, y: table.y, roles: [...roles, "line"],
      role: (index) => (values()[index] === null ? "line" : roles[step(values()[index])]),
      radius: () => (table.words.length > 5000 ? 1.5 : 3),
      order: table.words.map((_, index) => index), names: [], name: null, axes: null,
      describe: (index) => [atlas.latentName(index, table.words[index]),
        `${columns[state.colour][0]}: ${atlas.number(values()[index])}`],
      open: (index) => { location.href = `latent.html#${index}`; },
    });
    select.addEventListener("input", () => { state.colour = Number(select.value); keep(); recolour(); map.draw(); });
  };

  drawPairs();
  listUnexpected();
  tabulateClasses();
  tabulateLatents();
  drawMap();
  document.documentElement.dataset.ready = "index";
})();
