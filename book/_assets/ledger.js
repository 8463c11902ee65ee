// Filters of the claims ledger: what is chosen in the form stays, and a count is read aloud.
(() => {
  const form = document.querySelector("form.filters");
  const rows = [...document.querySelectorAll(".ledger tbody tr")];
  const said = form.querySelector("output");
  const texts = rows.map((row) => row.textContent.toLowerCase());

  function show() {
    const chosen = Object.fromEntries(new FormData(form));
    const words = chosen.words.toLowerCase().split(/\s+/).filter(Boolean);
    delete chosen.words;
    let shown = 0;
    rows.forEach((row, index) => {
      const fits = Object.entries(chosen).every(([name, value]) => !value || row.dataset[name] === value);
      row.hidden = !(fits && words.every((word) => texts[index].includes(word)));
      shown += !row.hidden;
    });
    said.textContent = `${shown} of ${rows.length} rows shown`;
  }

  // A link such as ledger.html?paper=nullbus&verdict=supported opens with that choice.
  for (const [name, value] of new URLSearchParams(location.search)) {
    const field = form.elements[name];
    if (field) field.value = value;
  }
  form.addEventListener("input", show);
  form.addEventListener("reset", () => setTimeout(show)); // after the fields are empty
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
