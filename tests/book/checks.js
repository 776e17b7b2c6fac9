// What the tests ask a page in the browser. Playwright puts this into each page before its own scripts.

// Each page is a first visit: nothing stored by another one decides how it looks.
if (location.protocol === "file:") localStorage.clear();

const themes = new Set();
new MutationObserver(() => themes.add(document.documentElement.dataset.theme))
  .observe(document, { subtree: true, attributeFilter: ["data-theme"] });

window.checks = {
  // Whether the page has had another theme while it loaded.
  flashes(theme) {
    const other = theme === "dark" ? "light" : "dark";
    return themes.has(other) ? [`it was ${other} at first`] : [];
  },

  // The theme of the page, once it follows a change of the system and of the window. A page of the book marks what
  // scrolls, for the keyboard, 300 ms after the window or the text has changed.
  async settle() {
    await new Promise((next) => requestAnimationFrame(() => requestAnimationFrame(next)));
    await new Promise((next) => setTimeout(next, 400));
    return document.documentElement.dataset.theme;
  },

  // Formulas that the reader sees as TeX: not set, set as an error, or left in the text.
  untypeset() {
    const found = [...document.querySelectorAll(".math")].filter((m) => !m.querySelector("mjx-container"));
    found.push(...document.querySelectorAll("mjx-merror"));
    const raw = /\\\(|\\\[|\$[^$]+\$|\\(?:begin|frac|mathbb|theta)\b/;
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const parent = texts.currentNode.parentElement;
      if (!parent.closest("script, style, pre, code, mjx-container") && raw.test(texts.currentNode.data)) {
        found.push(parent);
      }
    }
    return [...(raw.test(document.title) ? [document.title] : []), ...found.map((e) => e.textContent.slice(0, 80))];
  },

  // What makes the page, as a whole, scroll sideways. Code and formulas scroll by themselves.
  tooWide() {
    const page = document.scrollingElement;
    if (page.scrollWidth <= page.clientWidth) return [];
    const beyond = (e) => e.getBoundingClientRect().right > page.clientWidth + 1;
    const guilty = [...document.querySelectorAll("body *")].filter(beyond);
    return [`${page.scrollWidth} > ${page.clientWidth}`, ...guilty.slice(0, 8).map((e) => e.outerHTML.slice(0, 80))];
  },

  // Tables and formulas that scroll in their box, so that a part is out of sight.
  cut() {
    const boxes = [...document.querySelectorAll("article :is(*:has(> table), div.math)")];
    return boxes.filter((box) => box.scrollWidth > box.clientWidth + 1).map((box) => box.innerText.slice(0, 80));
  },

  // Keep one token of each kind of code, formulas as empty boxes, and no shapes of pictures. axe looks at each
  // element, and nine in ten are tokens that look like another one, or glyphs and lines, which axe cannot see.
  thin() {
    const seen = new Set();
    for (const token of document.querySelectorAll("pre span, dt.sig span")) {
      const kind = [token, token.parentElement, token.closest("div, dt")].map((e) => e?.className).join("|");
      if (!token.id && seen.has(kind)) token.replaceWith(...token.childNodes);
      else seen.add(kind);
    }
    document.querySelectorAll("svg :is(use, path, defs)").forEach((shape) => shape.remove());
    const formulas = [...document.querySelectorAll("mjx-container > mjx-math")];
    const boxes = formulas.map((formula) => formula.getBoundingClientRect());
    formulas.forEach((formula, i) => {
      formula.replaceChildren();
      formula.parentElement.querySelector("math")?.replaceChildren();
      const size = { width: `${boxes[i].width}px`, height: `${boxes[i].height}px` };
      Object.assign(formula.style, { display: "inline-block", ...size });
    });
  },

  async violations() {
    const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"];
    const options = { runOnly: tags, resultTypes: ["violations"], preload: false };
    const { violations } = await axe.run(document, options);
    return violations.flatMap(({ id, nodes }) => nodes.slice(0, 3).map((node) =>
      `${id}: ${node.html.slice(0, 160)} (${node.failureSummary.split("\n").slice(1, 3).join(" ").trim()})`));
  },
};
