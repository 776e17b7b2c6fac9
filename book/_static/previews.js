// What a link leads to, shown beside it: a formula, a result, a term, a publication, a function. It comes to a pointer
// that rests and to the focus of the keyboard; it goes with them, or by Escape. A finger, which cannot rest, gets none.
const SITE = new URL(document.documentElement.dataset.content_root, location).href; // of this language
const REST = 250; // milliseconds
const box = Object.assign(document.createElement("div"), { id: "preview", role: "tooltip", popover: "manual" });

const files = {};
function load(name) {
  const script = Object.assign(document.createElement("script"), { src: new URL(name, `${SITE}_static/`) });
  document.head.append(script);
  return new Promise((next) => script.addEventListener("load", next));
}

async function typeset() {
  if (!box.querySelector(".math")) return;
  const { config, path } = previews.mathjax;
  if (!window.MathJax) { // a page without formulas
    window.MathJax = { ...config, startup: { typeset: false } };
    files.mathjax = load(path);
  }
  await files.mathjax;
  await MathJax.startup.promise;
  await MathJax.typesetPromise([box]);
  box.querySelectorAll("[tabindex]").forEach((formula) => formula.removeAttribute("tabindex"));
}

function place(link) {
  const at = link.getClientRects()[0], { width, height } = box.getBoundingClientRect();
  const above = at.bottom + height > innerHeight && at.top > innerHeight - at.bottom;
  const right = document.documentElement.clientWidth - width;
  box.style.top = `${scrollY + (above ? at.top - height : at.bottom)}px`;
  box.style.left = `${Math.max(0, Math.min(at.left, right))}px`;
}

async function show(link) {
  hide();
  await (files.texts ??= load("texts-of-previews.js"));
  const text = previews.texts[decodeURI(link.href.slice(SITE.length))];
  if (!text || link !== wanted) return;
  box.innerHTML = text;
  box.style.visibility = "hidden";
  document.querySelector("article").append(box);
  box.showPopover();
  await typeset();
  if (link !== wanted) return;
  place(link);
  box.style.visibility = "visible";
  link.removeAttribute("title"); // it says less
  link.setAttribute("aria-describedby", box.id);
}

function hide() {
  document.querySelector('[aria-describedby="preview"]')?.removeAttribute("aria-describedby");
  box.remove();
}

let timer, wanted = null;
function want(link, delay = 0) {
  clearTimeout(timer);
  if (link !== wanted) timer = setTimeout(() => ((wanted = link) ? show(link) : hide()), delay);
}

const linkOf = (event) => event.target.closest('article a.internal[href*="#"]');
if (matchMedia("(hover: hover) and (pointer: fine)").matches) {
  document.addEventListener("pointerover", (event) => {
    if (box.contains(event.target)) clearTimeout(timer);
    else want(linkOf(event), REST);
  });
  document.addEventListener("focusin", (event) => event.target.matches(":focus-visible") && want(linkOf(event)));
  document.addEventListener("focusout", () => want(null));
  document.addEventListener("keydown", ({ key }) => key === "Escape" && want(null));
}
