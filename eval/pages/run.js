"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 24, RIGHT = 0.5;
const get = (id) => document.getElementById(id);
let page = 0;

// Everything that comes from data is set as text, never as markup.
function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}
function fill(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => {
    const option = element("option", text);
    option.value = value;
    return option;
  }));
  select.value = chosen;
}
const task = () => data.tasks[Number(get("task").value)];
const holder = (stage, name) => data.rows[stage].holders[name];
const stagesOf = (one) => data.rows.map((row, number) => number).filter((number) => one.name in data.rows[number].holders);
const score = (one, stage, place) => {
  const scores = one.scores[holder(stage, one.name)][get("mode").value][place];
  return scores === null ? 0 : scores;
};
const right = (one, stage, place) => score(one, stage, place) >= RIGHT;

function chooseTask(number, to) {
  get("task").value = number;
  const one = task(), stages = stagesOf(one), options = stages.map((stage) => [stage, data.rows[stage].stage]);
  const own = stages.find((stage) => data.rows[stage].tasks.includes(one.name));
  fill(get("from"), options, own === undefined ? stages[0] : own);
  fill(get("to"), options, to === undefined ? stages[stages.length - 1] : to);
}
function matches(one, place, needle) {
  const from = Number(get("from").value), to = Number(get("to").value);
  const before = right(one, from, place), after = right(one, to, place), show = get("show").value;
  if (show === "lost" && !(before && !after)) return false;
  if (show === "gained" && !(!before && after)) return false;
  if (show === "kept" && !(before && after)) return false;
  if (show === "never" && (before || after)) return false;
  if (!needle) return true;
  const answers = Object.values(one.answers).map((all) => all[place]);
  return [one.ids[place], one.texts[place], one.right[place], ...answers].some((text) => text.toLowerCase().includes(needle));
}
function wrongFor(one, place) {
  const from = Number(get("from").value);
  return stagesOf(one).filter((stage) => stage >= from && !right(one, stage, place)).length;
}
function card(one, place) {
  const item = element("li"), told = element("div", null, "told");
  const shown = one.pictures[place], source = shown === null ? null : data.pictures[shown];
  if (source) {
    const image = element("img");
    image.src = source;
    image.alt = "The picture of question " + one.ids[place];
    image.loading = "lazy";
    item.append(image);
  }
  told.append(element("p", one.texts[place], "question"));
  const line = element("p", "Right: ");
  line.append(element("strong", one.right[place]), element("span", "  (question " + one.ids[place] + ")", "quiet"));
  told.append(line);
  if (!source && one.names[place]) told.append(element("p", "Picture: " + one.names[place], "quiet"));
  const table = element("table"), body = element("tbody");
  let last = null;
  for (const stage of stagesOf(one)) {
    const by = holder(stage, one.name), good = right(one, stage, place), value = score(one, stage, place);
    if (by === last) continue;  // the same parameters answer
    last = by;
    const row = element("tr"), name = element("th", data.rows[stage].stage);
    name.scope = "row";
    const verdict = (good ? "right" : "wrong") + (value > 0 && value < 1 ? " " + value.toFixed(2) : "");
    const text = one.answers[by][place] || "(nothing)";
    row.append(name, element("td", text, /\S{20}/.test(text) ? "long" : null), element("td", verdict, good ? "is-right" : "is-wrong"));
    body.append(row);
  }
  table.append(body);
  told.append(table);
  item.append(told);
  return item;
}
function show() {
  const one = task(), needle = get("search").value.trim().toLowerCase();
  let places = one.ids.map((_, place) => place).filter((place) => matches(one, place, needle));
  if (get("sort").value === "early") {
    const wrong = new Map(places.map((place) => [place, wrongFor(one, place)]));
    places = [...places].sort((a, b) => wrong.get(b) - wrong.get(a));
  }
  const pages = Math.max(1, Math.ceil(places.length / PAGE));
  page = Math.min(page, pages - 1);
  get("found").replaceChildren(...places.slice(page * PAGE, (page + 1) * PAGE).map((place) => card(one, place)));
  const of = one.total > one.ids.length ? ` (${one.total} in the test set; the page holds those that changed and a sample)` : "";
  get("count").textContent = `${places.length} of ${one.ids.length} questions of ${one.name}${of}`;
  get("page").textContent = `Page ${page + 1} of ${pages}`;
  get("back").disabled = page === 0;
  get("next").disabled = page >= pages - 1;
  for (const button of document.querySelectorAll(".matrix button")) {
    const here = button.dataset.task === one.name && button.dataset.stage === data.rows[Number(get("to").value)].stage;
    button.setAttribute("aria-pressed", String(here));
  }
}
function restart() {
  page = 0;
  show();
}

fill(get("task"), data.tasks.map((one, number) => [number, one.name]), data.first);
chooseTask(data.first);
get("task").addEventListener("change", () => { chooseTask(Number(get("task").value)); restart(); });
for (const id of ["from", "to", "show", "mode", "sort"]) get(id).addEventListener("change", restart);
get("search").addEventListener("input", restart);
get("filter").addEventListener("submit", (event) => event.preventDefault());
get("back").addEventListener("click", () => { page -= 1; show(); });
get("next").addEventListener("click", () => { page += 1; show(); });
for (const button of document.querySelectorAll(".matrix button")) {
  button.addEventListener("click", () => {
    const number = data.tasks.findIndex((one) => one.name === button.dataset.task);
    const stage = data.rows.findIndex((row) => row.stage === button.dataset.stage);
    chooseTask(number, stage);
    get("show").value = "all";
    restart();
    get("questions").scrollIntoView();
    get("task").focus({ preventScroll: true });
  });
}
show();
drawAll(data.charts);
