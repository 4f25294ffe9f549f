// The one view of the browsing widgets: a list with filters on the left, what Python rendered of one row on the right.
//
// `show` draws it from a source, which is the kernel (`render`, through anywidget) or data in the page (`mount`):
//   title, heading (HTML), facets (names), rows ({mark, word, label, note, find, values}), selected (number),
//   select(number), page(key), and onDetail, onPage, onSelected, which it calls with what comes back.
// HTML comes from Python, where every text of others is escaped; all that is written here goes through textContent.

const BUSY = 60; // ms between two requests while an arrow key is held

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function show(el, source) {
  const root = make("div", { className: "mmr5" });
  root.dataset.lmSuppressShortcuts = "true"; // or JupyterLab takes the arrow keys
  const name = `mmr5-${Math.random().toString(36).slice(2)}`;
  const total = source.rows.length;
  let current = -1;
  let shown = [];
  let waiting = 0;

  // the list
  const search = make("input", { type: "search", placeholder: "Search text", className: "search" });
  search.setAttribute("aria-label", "Search questions, documents and model text");
  const choices = source.facets.map((facet) => {
    const choice = make("select");
    choice.setAttribute("aria-label", facet);
    return choice;
  });
  const labels = source.facets.map((facet, f) => make("label", {}, make("span", { textContent: facet }), choices[f]));
  const count = make("p", { className: "count" });
  count.setAttribute("role", "status");
  const clear = make("button", { type: "button", textContent: "Clear filters", className: "clear" });
  const list = make("div", { className: "list", tabIndex: 0, id: name });
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", source.title);
  const options = source.rows.map((row, i) => {
    const mark = make("span", { className: `mark ${row.mark}`, textContent: row.word });
    const option = make(
      "div",
      { id: `${name}-${i}` },
      make("span", { className: "label", textContent: row.label }),
      make("span", { className: "note" }, mark, ` ${row.note}`),
    );
    option.setAttribute("role", "option");
    option.dataset.row = i;
    return option;
  });
  list.append(...options);
  const found = source.rows.map((row) => row.find.toLowerCase());

  // what is shown of a row
  const pane = make("div", { className: "pane", tabIndex: 0 });
  pane.setAttribute("role", "region");
  pane.setAttribute("aria-label", "Details");

  // a page, large
  const picture = make("img");
  const frame = make("div", { className: "frame" }, picture);
  const told = make("h3");
  const [back, on, size, marks, close] = ["◀ Previous", "Next ▶", "Actual size", "Hide evidence", "Close"].map((text) =>
    make("button", { type: "button", textContent: text }),
  );
  const bar = make("div", { className: "bar" }, told, back, on, size, marks, close);
  const large = make("dialog", { className: "large" }, bar, make("div", { className: "sheet", tabIndex: 0 }, frame));
  large.setAttribute("aria-label", "Page");
  picture.onload = () => frame.style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight);
  let opened = null;

  const side = make("div", { className: "side" }, search, make("div", { className: "facets" }, ...labels), count, list);
  const parts = [make("div", { className: "body" }, side, pane)];
  if (source.heading) {
    const summary = make("div", { className: "heading" });
    summary.innerHTML = source.heading;
    parts.unshift(make("details", { open: true }, make("summary", { textContent: source.title }), summary));
  } else parts.unshift(make("h2", { className: "title", textContent: source.title }));
  root.append(...parts, large);
  el.append(root);

  const passes = (i, except) =>
    choices.every((choice, f) => f === except || !choice.value || source.rows[i].values[f].includes(choice.value));

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = found.map((text) => words.every((word) => text.includes(word)));
    choices.forEach((choice, f) => {
      const counts = new Map();
      source.rows.forEach((row, i) => {
        const counted = fits[i] && passes(i, f) ? 1 : 0;
        for (const value of new Set(row.values[f])) counts.set(value, (counts.get(value) ?? 0) + counted);
      });
      const kept = choice.value;
      const sorted = [...counts].sort((a, b) => a[0].localeCompare(b[0], undefined, { numeric: true }));
      choice.replaceChildren(
        make("option", { value: "", textContent: "all" }),
        ...sorted.map(([value, n]) => make("option", { value, textContent: `${value} (${n})` })),
      );
      choice.value = kept;
    });
    shown = options.map((_, i) => i).filter((i) => fits[i] && passes(i, -1));
    const visible = new Set(shown);
    options.forEach((option, i) => (option.hidden = !visible.has(i)));
    const filtered = words.length > 0 || choices.some((choice) => choice.value);
    count.replaceChildren(shown.length === total ? `${total} rows` : `${shown.length} of ${total} rows`);
    if (filtered) count.append(clear);
    if (!visible.has(current)) shown.length ? select(shown[0]) : empty();
  }

  function empty() {
    mark(-1);
    pane.replaceChildren(make("p", { className: "nothing", textContent: total ? "No row fits these filters." : "No rows." }));
  }

  function mark(i) {
    options[current]?.setAttribute("aria-selected", "false");
    current = i;
    list.removeAttribute("aria-activedescendant");
    if (i < 0) return;
    options[i].setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", options[i].id);
    const { offsetTop, offsetHeight } = options[i];
    if (offsetTop < list.scrollTop) list.scrollTop = offsetTop;
    else if (offsetTop + offsetHeight > list.scrollTop + list.clientHeight)
      list.scrollTop = offsetTop + offsetHeight - list.clientHeight;
  }

  function select(i) {
    mark(i);
    pane.setAttribute("aria-busy", "true");
    clearTimeout(waiting);
    waiting = setTimeout(() => source.select(i), performance.now() - last < BUSY ? BUSY : 0);
    last = performance.now();
  }
  let last = 0;

  source.onDetail = ({ row, html, images }) => {
    if (row !== current) return; // an answer to an older request
    pane.innerHTML = html;
    for (const image of pane.querySelectorAll("img[data-page]")) {
      const src = images[image.dataset.page];
      if (src) image.src = src;
      else image.replaceWith(make("span", { className: "lost", textContent: "this page cannot be shown" }));
    }
    pane.scrollTop = 0;
    pane.setAttribute("aria-busy", "false");
  };
  source.onSelected = (i) => {
    if (i === current || !options[i]) return;
    if (options[i].hidden) {
      search.value = "";
      for (const choice of choices) choice.value = "";
      current = i;
      filter();
    }
    select(i);
  };

  // a page, large
  function enlarge(button) {
    opened = button;
    const image = button.querySelector("img");
    told.textContent = button.dataset.title;
    picture.alt = button.dataset.title;
    picture.src = image?.src ?? "";
    frame.replaceChildren(picture, ...[...button.querySelectorAll(".box")].map((box) => box.cloneNode()));
    marks.hidden = frame.children.length < 2;
    const all = [...pane.querySelectorAll("button.page")];
    back.disabled = all[0] === button;
    on.disabled = all.at(-1) === button;
    if (image) source.page(image.dataset.page);
    if (!large.open) large.showModal();
  }
  function step(by) {
    const all = [...pane.querySelectorAll("button.page")];
    const next = all[all.indexOf(opened) + by];
    if (next) enlarge(next);
  }
  source.onPage = ({ page, src, problem }) => {
    if (!large.open || opened?.querySelector("img")?.dataset.page !== page) return;
    if (src) picture.src = src;
    if (problem) told.textContent = problem;
  };
  back.onclick = () => step(-1);
  on.onclick = () => step(1);
  size.onclick = () => (size.textContent = large.classList.toggle("actual") ? "Fit to window" : "Actual size");
  marks.onclick = () =>
    (marks.textContent = large.classList.toggle("unmarked") ? "Show evidence" : "Hide evidence");
  close.onclick = () => large.close();
  large.onclick = (event) => event.target === large && large.close();
  large.onclose = () => opened?.focus();
  large.onkeydown = (event) => {
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
  };

  pane.onclick = (event) => {
    const button = event.target.closest("button.page");
    if (button) enlarge(button);
  };
  list.onclick = (event) => {
    const option = event.target.closest("[data-row]");
    if (option) select(Number(option.dataset.row));
  };
  list.onkeydown = (event) => {
    const at = shown.indexOf(current);
    const to = {
      ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 8, PageUp: at - 8, Home: 0, End: shown.length - 1,
    }[event.key];
    if (to === undefined || !shown.length) return;
    event.preventDefault();
    select(shown[Math.max(0, Math.min(shown.length - 1, to))]);
  };
  search.oninput = filter;
  for (const choice of choices) choice.onchange = filter;
  clear.onclick = () => {
    search.value = "";
    for (const choice of choices) choice.value = "";
    filter();
    search.focus();
  };

  if (total && source.selected < total) current = source.selected;
  filter();
  if (current >= 0) select(current);
  return root;
}

// The live widget: rows are sent once, then the number of a row goes to the kernel and its detail comes back.
function render({ model, el }) {
  const source = {
    ...Object.fromEntries(["title", "heading", "facets", "rows", "selected"].map((name) => [name, model.get(name)])),
    select(row) {
      if (model.get("detail").row === row) return source.onDetail(model.get("detail"));
      model.set("selected", row);
      model.save_changes();
    },
    page: (key) => model.send({ page: key }),
  };
  const heard = {
    "change:detail": () => source.onDetail(model.get("detail")),
    "change:selected": () => source.onSelected(model.get("selected")),
    "msg:custom": (message) => source.onPage(message),
  };
  show(el, source);
  for (const [event, listener] of Object.entries(heard)) model.on(event, listener);
  return () => {
    for (const [event, listener] of Object.entries(heard)) model.off(event, listener);
  };
}

// The static export: everything is in the page.
export function mount(el, data) {
  const source = {
    ...data,
    selected: 0,
    select: (row) => source.onDetail({ row, html: data.details[row], images: data.images }),
    page: () => {},
  };
  return show(el, source);
}

export default { render };
