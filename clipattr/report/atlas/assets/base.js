"use strict";
// What every page of the atlas needs: data files, elements, numbers, links. Plain scripts, because
// browsers refuse modules and fetch on file://. Words of the data only ever become text nodes.

const atlas = { data: {} };

// Data files call this.
atlas.put = (name, value) => { atlas.data[name] = value; };

// With trusted types (Chromium) the browser itself refuses markup made of strings, and scripts from elsewhere.
atlas.policy = window.trustedTypes
  ? window.trustedTypes.createPolicy("atlas", { createScriptURL: (url) => atlas.checkedUrl(url) })
  : { createScriptURL: (url) => atlas.checkedUrl(url) };

atlas.checkedUrl = (url) => {
  if (!/^data\/[a-z]+-\d+\.js$/.test(url)) throw new TypeError(`not a data file of the atlas: ${url}`);
  return url;
};

// The value of data/<name>.js, which is read once.
atlas.load = (name) => {
  if (name in atlas.data) return Promise.resolve(atlas.data[name]);
  return new Promise((resolve, reject) => {
    const tag = document.createElement("script");
    tag.src = atlas.policy.createScriptURL(`data/${name}.js`);
    tag.onload = () => { tag.remove(); resolve(atlas.data[name]); };
    tag.onerror = () => { tag.remove(); reject(new Error(`data/${name}.js is missing or broken`)); };
    document.head.append(tag);
  });
};

atlas.loadLatent = async (latent) => {
  const size = atlas.data.site.latentsPerFile;
  return (await atlas.load(`latents-${Math.floor(latent / size)}`))[latent % size];
};

atlas.loadClass = async (number) => {
  const size = atlas.data.site.classesPerFile;
  const { pairs, more } = (await atlas.load(`classes-${Math.floor(number / size)}`))[number % size];
  return { pairs: pairs.map((values) => atlas.pair(number, values)), more };
};

// An element with attributes (never a handler or a style) and children: elements or text.
atlas.element = (tag, attributes, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
};

atlas.byId = (id) => document.getElementById(id);

// A (class, latent) pair from the array in which it was written (scripts.pair_value and
// LatentTable.described, in Python).
atlas.pair = (number, values) => {
  const [latent, attribution, share, positive, alignment, unexpected, evidence, kind, reasons,
    counterpart, word, pictures, counterpartWord] = values;
  return { number, latent, attribution, share, positive, alignment, unexpected: unexpected === 1, evidence, kind,
    reasons, counterpart, word, pictures, counterpartWord };
};

const MINUS = "\u2212";
atlas.missing = "\u2013";

// Three significant digits with a true minus sign; whole numbers in full.
atlas.number = (value) => {
  if (value === null) return atlas.missing;
  const size = Math.abs(value);
  const text = Number.isInteger(size) ? size.toLocaleString("en")
    : size < 1e-4 || size >= 1e6 ? size.toExponential(2).replace("-", MINUS)
    : size >= 1000 ? size.toFixed(0) : size.toPrecision(3);
  return value < 0 ? MINUS + text : text;
};

atlas.percent = (value) => {
  if (value === null) return atlas.missing;
  const percent = 100 * value;
  return `${percent >= 10 || percent === 0 ? percent.toFixed(0) : percent.toPrecision(2)}\u00a0%`;
};

atlas.className = (number) => atlas.data.site.classNames[number] || `class ${number}`;

atlas.latentName = (latent, word) => (word ? `${word} ` : "") + `#${latent}`;

atlas.latentLink = (latent, word) => atlas.element("a", { href: `latent.html#${latent}` },
  word ? atlas.element("b", null, word) : "latent", " ", atlas.element("span", { class: "number" }, `#${latent}`));

atlas.classLink = (number) => atlas.element("a", { href: `class.html#${number}` }, atlas.className(number));

// A thumbnail; where the file is missing, a quiet tile with the number of the image.
atlas.thumbnail = (image, size) => {
  const picture = atlas.element("img", { src: `thumbs/${Math.floor(image / 1000)}/${image}.jpg`,
    alt: `image ${image}`, width: size, height: size, loading: "lazy", decoding: "async" });
  const tile = atlas.element("span", { class: "tile" }, picture);
  picture.addEventListener("error", () => {
    tile.replaceChildren(atlas.element("span", { class: "no-picture" }, `image ${image}`));
  }, { once: true });
  return tile;
};

atlas.thumbnails = (images) => atlas.element("span", { class: "strip" },
  ...images.map((image) => atlas.thumbnail(image, 44)));

atlas.term = (name, value) => atlas.element("div", null,
  atlas.element("dt", null, name), atlas.element("dd", null, value));

// The numbers in the hash of this page, "#12,34" as [12, 34]; null where it is something else.
atlas.hashNumbers = () => (/^#\d+(,\d+)?$/.test(location.hash)
  ? location.hash.slice(1).split(",").map(Number) : null);

// Left and right go to the neighbours, unless somebody types.
atlas.arrowKeys = (neighbour) => document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const isTyping = event.target.closest("input, select, textarea, [tabindex]");
  if (!step || isTyping || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const target = neighbour(step);
  if (target !== null) location.hash = `#${target}`;
});

// Set a link to a neighbour, or take its target away at the ends.
atlas.stepLink = (link, target) => {
  if (target === null) link.removeAttribute("href");
  else link.setAttribute("href", `#${target}`);
};
