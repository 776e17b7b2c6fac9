// Set the formulas of a page some at a time, from the top, so that it answers its reader meanwhile.
// In a hidden tab, where nobody waits and timers are slow, set all that are left.
async function typeset() {
  const waiting = [...document.querySelectorAll(".math")];
  while (waiting.length) {
    await MathJax.typesetPromise(waiting.splice(0, document.hidden ? Infinity : 4));
    await new Promise((next) => setTimeout(next));
  }
}

// Pages without formulas do not load MathJax.
if (window.MathJax) {
  window.MathJax.startup = {
    typeset: false,
    ready() {
      MathJax.startup.defaultReady();
      MathJax.startup.promise = MathJax.startup.promise.then(typeset);
    },
  };
}
