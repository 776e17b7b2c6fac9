// Set the formulas of a page some at a time, from the top, so that it answers its reader meanwhile.
window.MathJax.startup = {
  typeset: false,
  ready() {
    MathJax.startup.defaultReady();
    MathJax.startup.promise = MathJax.startup.promise.then(async () => {
      const waiting = [...document.querySelectorAll(".math")];
      while (waiting.length) {
        await MathJax.typesetPromise(waiting.splice(0, 4));
        await new Promise((next) => setTimeout(next));
      }
    });
  },
};
