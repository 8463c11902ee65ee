// What the widget manager expects of the page, served from the page's own folder.
(() => {
  const widgets = new URL("widgets/", document.currentScript.src).href;
  window.__jupyter_widgets_assets_path__ = widgets;
  window.requirejs.config({
    paths: {
      // Without this the manager asks a CDN for the front end of anywidget, which the prompt explorer needs.
      anywidget: `${widgets}anywidget`,
      // The manager's parts lie in one bundle, and look for its icon fonts beside the file they think they are.
      "@jupyter-widgets": widgets.slice(0, -1),
      "@jupyter-widgets/html-manager/dist": widgets.slice(0, -1),
    },
  });

  // The manager typesets labels through MathJax 2's queue; MathJax 3 has none, and replaces window.MathJax on loading.
  const hub = {
    async Queue([, , element]) {
      while (!window.MathJax.typesetPromise) await new Promise((resolve) => setTimeout(resolve, 50));
      return window.MathJax.typesetPromise([element]);
    },
  };
  let mathjax = Object.assign(window.MathJax ?? {}, { Hub: hub });
  Object.defineProperty(window, "MathJax", {
    configurable: true,
    get: () => mathjax,
    set: (value) => (mathjax = Object.assign(value, { Hub: hub })),
  });
})();
