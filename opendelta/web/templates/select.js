"use strict";
// The page holds one truth: `selected`, the full names of the selected modules. A row stands for one
// module or, folded, for many; so folding and unfolding change what is shown, never what is selected.

const byId = (id) => document.getElementById(id);
const tree = byId("tree"), search = byId("search");
const selected = new Set();
const ROWS_AT_START = 60;

class Row {
  constructor(node, members, parent) {
    this.node = node; // {label, names, type, parameters, children}
    this.members = members; // the own names that this row stands for: node.names, or one of them
    this.parent = parent;
    this.open = false;
    this.unfolded = null; // for a folded row: the rows, one per member, that are shown instead
    this.folded = null; // for such a row: the folded row that it came from
  }
  get label() { return this.members.length > 1 ? this.node.label : this.members[0]; }
  get path() { return this.parent.parent ? `${this.parent.path}.${this.label}` : this.label; }
  get hasChildren() { return this.node.children.length > 0; }
  get names() {
    return (this.fullNames ??= this.parent.parent
      ? this.parent.names.flatMap((name) => this.members.map((member) => `${name}.${member}`))
      : this.members);
  }
  get foldedChildren() {
    return (this.kept ??= this.node.children.map((child) => new Row(child, child.names, this)));
  }
  get children() { return this.foldedChildren.flatMap((row) => row.unfolded ?? [row]); }

  copy(members, parent) {
    const row = new Row(this.node, members, parent);
    row.open = this.open;
    row.kept = this.kept?.map((child) => child.copy(child.members, row));
    row.unfolded = this.unfolded?.map((single) => single.copy(single.members, parent)) ?? null;
    row.unfolded?.forEach((single) => { single.folded = row; });
    return row;
  }
  unfold() {
    this.unfolded = this.members.map((member) => this.copy([member], this.parent));
    this.unfolded.forEach((single) => { single.folded = this; });
  }
}

const root = new Row({ children: JSON.parse(byId("data").textContent) }, [], null);
root.open = true;
let shown = []; // the rows on the page, from top to bottom
let active = null; // the row that the keyboard acts on

// --- search --------------------------------------------------------------------------------------

let words = []; // of the query, in lower case
let found = new Map(); // row -> the full names among its own that fit the query
let openInSearch = new Map(); // row -> whether the user opened or closed it since the query changed

// A name fits if each word occurs in it or in the type, and one of them reaches the module's own name:
// "attention" finds the attention modules, not everything below them.
function fits(name, type) {
  const own = name.lastIndexOf(".") + 1;
  return words.every((word) => name.includes(word) || type.includes(word)) &&
    words.some((word) => type.includes(word) || name.lastIndexOf(word) + word.length > own && name.includes(word));
}

function findBelow(row) {
  let any = false;
  for (const child of row.children) {
    const type = child.node.type.toLowerCase();
    const hits = child.names.filter((name) => fits(name.toLowerCase(), type));
    if (hits.length) found.set(child, hits);
    const below = findBelow(child);
    if (below && !hits.length) found.set(child, []);
    any ||= below || hits.length > 0;
  }
  return any;
}

function find() {
  found = new Map();
  if (words.length) findBelow(root);
}

const isOpen = (row) => row === root || row.hasChildren && (words.length
  ? openInSearch.get(row) ?? row.children.some((child) => found.has(child))
  : row.open);

function setOpen(row, open) {
  if (words.length) openInSearch.set(row, open);
  else row.open = open;
}

// --- showing -------------------------------------------------------------------------------------

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text; // never as markup: names are the user's
  return made;
}

function listRows(row, depth, wholly) {
  for (const child of row.children) {
    if (words.length && !wholly && !found.has(child)) continue;
    child.depth = depth;
    shown.push(child);
    if (isOpen(child)) listRows(child, depth + 1, wholly || openInSearch.get(child) === true);
  }
}

function makeElement(row, index) {
  const line = element("div", "row");
  row.element = line;
  line.id = `row-${index}`;
  line.dataset.index = index;
  line.title = row.path;
  line.style.setProperty("--depth", row.depth);
  line.setAttribute("role", "treeitem");
  line.setAttribute("aria-level", row.depth + 1);
  if (row.hasChildren) line.setAttribute("aria-expanded", isOpen(row));
  line.append(element("span", "toggle", row.hasChildren ? (isOpen(row) ? "[-]" : "[+]") : ""));

  const text = element("span", "text");
  text.append(element("span", "name", row.label), element("span", "type", row.node.type));
  line.append(text);
  if (row.members.length > 1) {
    const star = element("span", "star", "[*]");
    star.title = "Double-click to unfold";
    line.classList.add("repeated");
    line.append(star, element("span", "note", `×${row.members.length}`));
  } else if (row.folded) {
    const star = element("span", "star again", "[*]");
    star.title = `Double-click to fold ${row.folded.label} again`;
    line.append(star);
  }
  row.inside = element("span", "note inside");
  line.append(row.inside);
  const { parameters } = row.node;
  if (parameters.length) line.append(element("span", "shapes", parameters.join("  ")));
  line.classList.toggle("bare", !parameters.length && !row.hasChildren);
  line.classList.toggle("found", Boolean(found.get(row)?.length));
  line.classList.toggle("passed", words.length > 0 && found.get(row)?.length === 0);
  return line;
}

function render() {
  shown = [];
  listRows(root, 0, false);
  tree.replaceChildren(...shown.map(makeElement));
  byId("nothing-found").hidden = shown.length > 0;
  if (!shown.includes(active)) active = shown[0] ?? null;
  mark();
  activate(active, false);
}

// Bring every row's look in line with `selected`.
function mark() {
  const below = new Map(); // full name -> how many selected modules it contains
  for (const name of selected) {
    for (let dot = name.lastIndexOf("."); dot > 0; dot = name.lastIndexOf(".", dot - 1)) {
      const parent = name.slice(0, dot);
      below.set(parent, (below.get(parent) ?? 0) + 1);
    }
  }
  for (const row of shown) {
    const own = row.names.filter((name) => selected.has(name)).length;
    const all = own === row.names.length;
    row.element.classList.toggle("selected", all);
    row.element.classList.toggle("partly", own > 0 && !all);
    row.element.setAttribute("aria-checked", all ? "true" : own ? "mixed" : "false");
    const inside = isOpen(row) ? 0 : row.names.reduce((sum, name) => sum + (below.get(name) ?? 0), 0);
    const notes = [];
    if (own && !all) notes.push(`${own} of ${row.names.length} selected`);
    if (inside) notes.push(`${inside} selected inside`);
    row.inside.textContent = notes.join(", ");
    row.inside.hidden = !notes.length;
  }
  const hits = [...found.values()].flat();
  const button = byId("select-found");
  button.hidden = !hits.length;
  button.textContent = hits.every((name) => selected.has(name)) ? `Deselect all ${hits.length}` : `Select all ${hits.length}`;
}

function activate(row, scroll = true) {
  active?.element?.classList.remove("active");
  active = row;
  if (!row) return tree.removeAttribute("aria-activedescendant");
  row.element.classList.add("active");
  tree.setAttribute("aria-activedescendant", row.element.id);
  if (scroll) row.element.scrollIntoView({ block: "nearest" });
}

// --- selecting -----------------------------------------------------------------------------------

function toggleNames(names) {
  const remove = names.every((name) => selected.has(name));
  for (const name of names) remove ? selected.delete(name) : selected.add(name);
  mark();
  say("");
  countSoon();
}

function toggleOpen(row) {
  setOpen(row, !isOpen(row));
  render();
}

function toggleFold(row) {
  if (row.members.length > 1) {
    row.unfold();
    active = row.unfolded[0];
  } else if (row.folded) {
    active = row.folded;
    row.folded.unfolded = null;
  } else return;
  find();
  render();
}

// --- talking to the terminal's side ----------------------------------------------------------------

async function post(action, body, signal) {
  let response;
  try {
    response = await fetch(action + location.search, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The selection is over: it was submitted or cancelled elsewhere, or the program ended.");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function say(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

let timer = 0, counting = new AbortController();

function stopCounting() {
  clearTimeout(timer);
  counting.abort();
}

function countSoon() {
  stopCounting(); // the answer would be about an earlier selection
  counting = new AbortController();
  timer = setTimeout(showCount, 60, counting.signal);
}

async function showCount(signal) {
  const names = [...selected], output = byId("count");
  let answer = { text: "Nothing selected", problem: false, patterns: [] };
  try {
    if (names.length) answer = await post("count", { names }, signal);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
    return;
  }
  output.textContent = answer.text;
  output.className = answer.problem ? "problem" : names.length ? "some" : "";
  showChosen(answer.patterns);
}

function showChosen(patterns) {
  byId("hint").hidden = patterns.length > 0;
  byId("chosen").replaceChildren(...patterns.map(([pattern, names]) => {
    const item = element("li", "");
    const remove = element("button", "", "×");
    remove.type = "button";
    remove.title = `Deselect ${pattern}`;
    remove.setAttribute("aria-label", remove.title);
    remove.addEventListener("click", () => toggleNames(names.filter((name) => selected.has(name))));
    const label = element("span", "");
    label.append(...pattern.split(/(?<=\.)/).map((part) => element("i", "", part))); // breaks at dots
    item.append(label);
    if (names.length > 1) item.append(element("small", "", `×${names.length}`));
    item.append(remove);
    return item;
  }));
}

async function decide(action, body, title) {
  byId("submit").disabled = byId("cancel").disabled = true;
  stopCounting();
  try {
    await post(action, body);
    byId("over-title").textContent = title;
    byId("over-text").textContent = "Go back to your terminal or notebook. This page can be closed.";
    byId("over").hidden = false;
    byId("over-title").focus();
  } catch (error) {
    say(error.message);
    byId("submit").disabled = byId("cancel").disabled = false;
    countSoon();
  }
}

const submit = () => decide("submit", { names: [...selected] },
  `${selected.size} module${selected.size === 1 ? "" : "s"} submitted`);

// --- mouse and keyboard ----------------------------------------------------------------------------

const rowOf = (event) => shown[event.target.closest(".row")?.dataset.index];

tree.addEventListener("click", (event) => {
  const row = rowOf(event);
  if (!row) return;
  activate(row, false);
  if (event.target.closest(".toggle")) row.hasChildren && toggleOpen(row);
  else if (event.target.closest(".text")) toggleNames(row.names);
});

tree.addEventListener("dblclick", (event) => {
  const row = rowOf(event);
  if (row && event.target.closest(".star")) toggleFold(row);
});

const keys = {
  ArrowDown: (row) => activate(shown[shown.indexOf(row) + 1] ?? row),
  ArrowUp: (row) => activate(shown[shown.indexOf(row) - 1] ?? row),
  Home: () => activate(shown[0]),
  End: () => activate(shown.at(-1)),
  ArrowRight: (row) => isOpen(row) ? keys.ArrowDown(row) : row.hasChildren && toggleOpen(row),
  ArrowLeft: (row) => isOpen(row) ? toggleOpen(row) : row.parent !== root && activate(row.parent),
  "+": (row) => row.hasChildren && !isOpen(row) && toggleOpen(row),
  "-": (row) => isOpen(row) && toggleOpen(row),
  " ": (row) => toggleNames(row.names),
  Enter: (row) => toggleNames(row.names),
  "*": (row) => { toggleFold(row); activate(active); },
};

tree.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !active || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key](active);
});

search.addEventListener("input", () => {
  words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  openInSearch = new Map();
  find();
  render();
});

search.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    if (found.size) activate(shown.find((row) => found.get(row)?.length) ?? active);
    tree.focus();
  }
});

document.addEventListener("keydown", (event) => {
  if (!byId("over").hidden) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
  else if (event.key === "/" && event.target !== search) search.focus();
  else if (event.key === "Escape" && search.value) {
    search.value = "";
    search.dispatchEvent(new Event("input"));
    tree.focus();
  } else return;
  event.preventDefault();
});

byId("select-found").addEventListener("click", () => toggleNames([...found.values()].flat()));
byId("submit").addEventListener("click", submit);
byId("cancel").addEventListener("click", () => decide("cancel", {}, "Cancelled: nothing is modified"));

// Open level after level while the page stays in one look.
for (let level = [root], rows = 0; level.length; ) {
  const next = level.flatMap((row) => row.children);
  rows += next.length;
  if (rows > ROWS_AT_START) break;
  for (const row of level) row.open = true;
  level = next.filter((row) => row.hasChildren);
}
render();
tree.focus({ preventScroll: true });
