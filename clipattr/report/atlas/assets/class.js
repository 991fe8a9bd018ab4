"use strict";
// class.html#12: the latents of one class.
(() => {
  const { site } = atlas.data;
  const last = site.classNames.length - 1;
  const status = atlas.byId("status");
  const place = atlas.byId("class");
  const lists = Object.fromEntries(["unexpected", "others"].map((name) => [name,
    new atlas.LongList(atlas.byId(name), atlas.byId(`more-${name}`), 20, (pair) => atlas.pairRow(pair, { showClass: false }))]));

  const scatter = new atlas.Scatter(atlas.byId("class-plot"));

  const plot = (pairs) => {
    const all = pairs.map((_, index) => index);
    scatter.fill({
      x: pairs.map((pair) => pair.alignment), y: pairs.map((pair) => pair.attribution),
      roles: ["muted", "outlier"], role: (index) => (pairs[index].unexpected ? "outlier" : "muted"),
      radius: () => 4.5, names: all,
      order: [...all.filter((index) => !pairs[index].unexpected), ...all.filter((index) => pairs[index].unexpected)],
      name: (index) => pairs[index].word || `#${pairs[index].latent}`,
      describe: (index) => [atlas.latentName(pairs[index].latent, pairs[index].word),
        `alignment ${atlas.number(pairs[index].alignment)}, attribution ${atlas.number(pairs[index].attribution)}`],
      open: (index) => { location.href = `latent.html#${pairs[index].latent}`; },
      axes: ["alignment of the latent's meaning with the class", `mean attribution (${site.scoreName})`],
    });
  };

  const fill = (number, { pairs, more }) => {
    atlas.byId("class-name").textContent = atlas.className(number);
    document.title = `${atlas.className(number)} \u00b7 ${site.title}`;
    for (const name of ["unexpected", "others"]) {
      const found = pairs.filter((pair) => pair.unexpected === (name === "unexpected"));
      lists[name].fill(found, lists[name].step);
      atlas.byId(`no-${name}`).hidden = found.length > 0;
      const hidden = name === "unexpected" && more ? ` of ${(found.length + more).toLocaleString("en")}` : "";
      atlas.byId(`${name}-count`).textContent = `(${found.length.toLocaleString("en")}${hidden})`;
    }
    atlas.byId("left-out").hidden = more === 0;
    atlas.byId("left-out").textContent = `These have the strongest evidence; ${more.toLocaleString("en")} more are in the tables of the run alone.`;
    plot(pairs);
  };

  const neighbour = (step) => {
    const wanted = atlas.hashNumbers();
    const next = wanted && wanted.length === 1 ? wanted[0] + step : -1;
    return next >= 0 && next <= last ? next : null;
  };

  const refused = (wanted) => (wanted === null || wanted.length > 1
    ? "Choose a class, or add its number to the address: class.html#12."
    : wanted[0] > last ? `There is no class ${wanted[0]}: they go from 0 to ${last}.` : "");

  const show = async () => {
    const wanted = atlas.hashNumbers();
    const asked = location.hash;
    atlas.stepLink(atlas.byId("previous"), neighbour(-1));
    atlas.stepLink(atlas.byId("next"), neighbour(1));
    status.textContent = refused(wanted);
    place.hidden = status.textContent !== "";
    if (place.hidden) return;
    atlas.byId("go").value = wanted[0];
    try {
      const found = await atlas.loadClass(wanted[0]);
      if (location.hash !== asked) return; // the reader went on while this was read
      fill(wanted[0], found);
      document.documentElement.dataset.ready = asked;
    } catch (error) {
      place.hidden = true;
      status.textContent = `This class cannot be shown: ${error.message}.`;
    }
  };

  atlas.byId("go").append(...site.classNames.map((name, number) => atlas.element("option", { value: number }, name)));
  atlas.byId("go").addEventListener("input", (event) => { location.hash = `#${event.target.value}`; });
  atlas.arrowKeys(neighbour);
  addEventListener("hashchange", () => { scrollTo(0, 0); show(); });
  show();
})();
