// The prompt explorer's browser half. No dependency, no network: images arrive as PNG data URLs.

const CSS = `
.p2m { display: flex; flex-wrap: wrap; gap: 18px; font: 14px/1.45 system-ui, sans-serif; max-width: 860px; }
.p2m canvas { width: 340px; max-width: 100%; height: auto; align-self: flex-start; border-radius: 6px; background: #000; image-rendering: pixelated; }
.p2m .side { flex: 1 1 320px; display: flex; flex-direction: column; gap: 10px; }
.p2m label { font-weight: 600; }
.p2m .field { display: grid; grid-template-columns: 1fr auto; gap: 3px 8px; }
.p2m .field label { grid-column: 1 / 3; text-transform: capitalize; }
.p2m input[type=text], .p2m select { font: inherit; padding: 5px 7px; border: 1px solid #98a2ae; border-radius: 5px; min-width: 0; width: 100%; box-sizing: border-box; background: #fff; color: #111; }
.p2m .absent input[type=text] { background: repeating-linear-gradient(135deg, #eceff3 0 7px, #dde2e8 7px 14px); color: #6b7480; border-style: dashed; }
.p2m button { font: inherit; padding: 4px 10px; border: 1px solid #98a2ae; border-radius: 5px; background: #f4f6f8; color: #111; cursor: pointer; }
.p2m button[aria-pressed=true] { background: #33475b; color: #fff; }
.p2m .row { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; }
.p2m .row input[type=range] { flex: 1 1 6em; width: auto; min-width: 0; margin: 0; }
.p2m .row label { font-weight: 400; }
.p2m .read { font-variant-numeric: tabular-nums; }
.p2m .read b { font-size: 17px; }
.p2m .error { color: #b3261e; min-height: 1.4em; }
.p2m .busy { opacity: .55; }
`;

const WAIT_FOR_KERNEL = 8000; // ms; a first answer may have to load the text encoder

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

async function pixels(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = element("canvas", { width: image.width, height: image.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, image.width, image.height);
  const grey = new Float32Array(image.width * image.height);
  for (let i = 0; i < grey.length; i++) grey[i] = data[4 * i] / 255;
  return { grey, width: image.width, height: image.height };
}

function dice(probability, truth, threshold) {
  let both = 0, sum = 0;
  for (let i = 0; i < truth.length; i++) {
    const p = probability[i] > threshold, t = truth[i] > 0.5;
    both += p && t;
    sum += p + t;
  }
  return sum ? (2 * both) / sum : 1;
}

const entropy = (p) => (p <= 0 || p >= 1 ? 0 : -(p * Math.log2(p) + (1 - p) * Math.log2(1 - p)));

function border(inside, i, width, height) {
  if (!inside(i)) return false;
  const x = i % width, y = (i - x) / width;
  return x === 0 || y === 0 || x === width - 1 || y === height - 1 ||
    !inside(i - 1) || !inside(i + 1) || !inside(i - width) || !inside(i + width);
}

function render({ model, el }) {
  const roles = model.get("roles"), cases = model.get("cases"), table = model.get("table");
  const state = { case: 0, prompts: {}, show: { mask: true, doubt: false, truth: true }, request: 0 };
  let image, truth, probability, typing, patience;

  const canvas = element("canvas", { role: "img", "aria-label": "image with mask" });
  const error = element("div", { class: "error", role: "alert" });
  const score = element("span", { class: "read", "data-read": "dsc", "aria-live": "polite" });
  const clock = element("span", { class: "read", "data-read": "ms" });
  const fields = Object.fromEntries(roles.map((role) => [role, promptField(role)]));
  const choose = element("select", { "aria-label": "case", onchange: () => open(Number(choose.value)) },
    ...cases.map((c, i) => element("option", { value: i, text: c.name })));
  const slider = element("input", { type: "range", min: 0.05, max: 0.95, step: 0.05, value: model.get("threshold"),
    "aria-label": "threshold", oninput: () => { level.textContent = Number(slider.value).toFixed(2); draw(); } });
  const level = element("span", { class: "read", text: Number(slider.value).toFixed(2) });

  const side = element("div", { class: "side" }, choose, ...roles.map((role) => fields[role].node),
    element("div", { class: "row" }, "threshold", slider, level),
    element("div", { class: "row" }, toggle("mask", "mask"), toggle("doubt", "uncertainty"), toggle("truth", "truth")),
    element("div", { class: "row" }, score, clock), error);
  const root = element("div", { class: "p2m" }, element("style", { text: CSS }), canvas, side);
  el.append(root);

  function toggle(name, text) {
    const box = element("input", { type: "checkbox", "data-show": name, onchange: () => { state.show[name] = box.checked; draw(); } });
    box.checked = state.show[name];
    return element("label", {}, box, " " + text);
  }

  function promptField(role) {
    const list = element("datalist", { id: `p2m-${role}-${Math.random().toString(36).slice(2)}` },
      ...(model.get("suggestions")[role] || []).map((text) => element("option", { value: text })));
    const input = element("input", { type: "text", list: list.id, "aria-label": `${role} prompt`, "data-role": role,
      oninput: () => {
        state.prompts[role] = input.value;
        refresh();
        clearTimeout(typing);
        typing = setTimeout(ask, 250);
      } });
    const absent = element("button", { type: "button", text: "absent", "data-absent": role,
      title: "no prompt: the model falls back to what it learned for absence",
      onclick: () => {
        state.prompts[role] = state.prompts[role] === null ? input.value : null;
        refresh();
        ask();
      } });
    const node = element("div", { class: "field" }, element("label", { text: `${role} prompt` }), input, absent, list);
    function refresh() {
      const none = state.prompts[role] === null;
      node.classList.toggle("absent", none);
      absent.setAttribute("aria-pressed", none);
      input.placeholder = none ? "absent: no words are given" : "type a prompt";
    }
    return { node, set(text) { state.prompts[role] = text; input.value = text ?? ""; refresh(); } };
  }

  async function open(index) {
    state.case = index;
    const chosen = cases[index];
    for (const role of roles) fields[role].set(chosen.prompts[role] ?? null);
    [image, truth] = await Promise.all([pixels(chosen.image), pixels(chosen.truth)]);
    probability = null;
    canvas.width = image.width;
    canvas.height = image.height;
    draw();
    ask();
  }

  function ask() {
    const known = table[JSON.stringify([state.case, ...roles.map((role) => state.prompts[role])])];
    state.request += 1;
    clearTimeout(patience);
    if (known) return answer(known);
    root.classList.add("busy");
    patience = setTimeout(() => {
      root.classList.remove("busy");
      error.textContent = "No kernel answers here: choose a suggested prompt, or run the notebook to try your own.";
    }, WAIT_FOR_KERNEL);
    model.set("request", { id: state.request, case: state.case, prompts: { ...state.prompts } });
    model.save_changes();
  }

  async function answer(reply) {
    clearTimeout(patience);
    root.classList.remove("busy");
    error.textContent = reply.error || "";
    if (reply.error) return;
    const asked = state.request;
    const map = await pixels(reply.probability);
    if (asked !== state.request) return; // a newer prompt is under way
    probability = map.grey;
    clock.textContent = `${reply.milliseconds} ms for this prompt`;
    root.dataset.answered = String(asked);
    draw();
  }

  function draw() {
    if (!image) return;
    const threshold = Number(slider.value), { width, height } = image;
    const context = canvas.getContext("2d");
    const frame = context.createImageData(width, height);
    const predicted = (i) => probability !== null && probability[i] > threshold;
    const lesion = (i) => truth.grey[i] > 0.5;
    for (let i = 0; i < width * height; i++) {
      let colour = [image.grey[i] * 255, image.grey[i] * 255, image.grey[i] * 255];
      const paint = (rgb, alpha) => { colour = colour.map((c, k) => c * (1 - alpha) + rgb[k] * alpha); };
      if (state.show.doubt && probability) paint([255, 64, 200], 0.75 * entropy(probability[i]));
      if (state.show.mask && predicted(i)) paint([213, 94, 0], border(predicted, i, width, height) ? 1 : 0.28);
      if (state.show.truth && border(lesion, i, width, height)) paint([240, 228, 66], 0.95);
      frame.data.set([...colour, 255], 4 * i);
    }
    context.putImageData(frame, 0, 0);
    const value = probability ? dice(probability, truth.grey, threshold).toFixed(3) : "…";
    score.replaceChildren("Dice ", element("b", { text: value }));
  }

  const heard = () => { const reply = model.get("answer"); if (reply.id === state.request) answer(reply); };
  model.on("change:answer", heard);
  open(0);
  return () => { model.off("change:answer", heard); clearTimeout(typing); clearTimeout(patience); };
}

export default { render };
