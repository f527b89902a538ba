// What of a page a reader cannot see or read: boxes that are cut, and letters with too little contrast.
(() => {
  const found = {overflow: [], contrast: [], scrollY: scrollY, wide: document.documentElement.scrollWidth - innerWidth};
  const name = (node) => {
    const label = node.tagName.toLowerCase() + (node.className && typeof node.className === "string" ? "." + node.className : "");
    return label + ": " + (node.textContent || node.alt || "").trim().slice(0, 40);
  };
  const shown = (node) => {
    const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    return box.width > 0 && box.height > 0 && style.visibility !== "hidden" && style.display !== "none";
  };
  // Anything that reaches beyond the window, or beyond a box that cuts or scrolls it sideways, is hidden from a reader.
  for (const node of document.querySelectorAll("body *")) {
    if (!shown(node) || node.closest("[hidden], svg, script, style")) continue;
    const box = node.getBoundingClientRect();
    if (box.right > innerWidth + 1 || box.left < -1) found.overflow.push("window, " + name(node));
    const style = getComputedStyle(node);
    if (node.scrollWidth > node.clientWidth + 1 && style.overflowX !== "visible" && node.tagName !== "INPUT")
      found.overflow.push("inside, " + name(node));
  }
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const background = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.unshift(parse(getComputedStyle(at).backgroundColor));
    return layers.reduce((below, top) => over(top, below), parse(getComputedStyle(document.documentElement).backgroundColor)[3] ? [255, 255, 255, 1] : matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18, 1] : [255, 255, 255, 1]);
  };
  const light = (color) => {
    const [r, g, b] = color.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let lowest = 99, count = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || node.closest("script, style, option, noscript") || !shown(node)) continue;
    if (node.disabled) continue;
    const below = background(node), ink = over(parse(getComputedStyle(node).color), below), value = ratio(ink, below);
    count += 1;
    lowest = Math.min(lowest, value);
    if (value < 4.5) found.contrast.push(value.toFixed(2) + " " + name(node));
  }
  return {...found, lowest, count, tables: document.querySelectorAll("table").length,
          images: [...document.images].map((image) => image.naturalWidth > 0 && image.complete)};
})()
