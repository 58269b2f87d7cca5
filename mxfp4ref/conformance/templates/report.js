const form = document.querySelector(".filter");
const [text, failed] = form.querySelectorAll("input");
const rows = [...document.querySelectorAll("[data-case]")];

function filter() {
  const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0, all = 0;
  for (const row of rows) {
    const content = (row.dataset.case + " " + row.textContent).toLowerCase();
    row.hidden = (failed.checked && row.dataset.ok) || !words.every((word) => content.includes(word));
    if (row.tagName === "TR") { all += 1; shown += !row.hidden; }
  }
  for (const suite of document.querySelectorAll("details.suite")) {
    suite.hidden = ![...suite.querySelectorAll("[data-case]")].some((row) => !row.hidden);
    if (words.length && !suite.hidden) suite.open = true;
  }
  form.querySelector("output").value = shown === all ? "" : `${shown} of ${all} cases`;
}

form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
