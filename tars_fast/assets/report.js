"use strict";
const items = [...document.querySelectorAll("#items > details")];
const choices = [...document.querySelectorAll("#filters select")];
const words = document.getElementById("words");
const count = document.getElementById("count");
function filter() {
  const sought = words.value.trim().toLowerCase();
  let shown = 0;
  for (const item of items) {
    const fits = choices.every((choice) => !choice.value || item.dataset[choice.id] === choice.value);
    item.hidden = !fits || (sought !== "" && !item.textContent.toLowerCase().includes(sought));
    if (item.hidden) item.querySelector("audio")?.pause();
    else shown += 1;
  }
  count.textContent = `${shown} of ${items.length} items shown`;
}
if (items.length) {
  document.getElementById("filters").hidden = false;
  for (const choice of choices) choice.addEventListener("change", filter);
  words.addEventListener("input", filter);
  // Browsers keep what was chosen when a page is loaded again.
  filter();
}
document.addEventListener("play", (event) => {
  for (const player of document.querySelectorAll("audio")) if (player !== event.target) player.pause();
}, true);
