"use strict";
// Sorts and filters the table of every number, and shows samples. All text goes in as text, never as markup.
(() => {
  const find = (id) => document.getElementById(id);

  function make(tag, text, name) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  }

  function labelled(text, control) {
    const label = make("label", `${text} `);
    label.append(control);
    return label;
  }

  function search(text) {
    const box = make("input");
    box.type = "search";
    return [labelled(text, box), box];
  }

  // Numbers as numbers; an empty cell comes last either way.
  function compare(a, b, down) {
    if (a === "" || b === "") return (a === "") - (b === "");
    const [x, y] = [Number(a), Number(b)];
    const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
    return down ? -order : order;
  }

  function sortable(table) {
    const [body] = table.tBodies;
    const rows = [...body.rows];
    const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    [...table.tHead.rows[0].cells].forEach((head, column, heads) => {
      const button = make("button", head.textContent);
      button.type = "button";
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        rows.sort((a, b) => compare(value(a, column), value(b, column), down));
        body.append(...rows);
      });
      head.replaceChildren(button);
    });
    const [label, box] = search("Only rows with");
    const told = make("span", `${rows.length} rows`, "meta");
    told.setAttribute("role", "status");
    const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !words.every((word) => texts.get(row).includes(word));
        shown += !row.hidden;
      }
      told.textContent = `${shown} of ${rows.length} rows`;
    });
    const controls = make("div", undefined, "controls");
    controls.append(label, told);
    table.parentElement.before(controls);
  }

  function explorer(place, { policies, splits }) {
    const state = { split: 0, at: 0, matching: [] };
    const choose = (text, names, chosen) => {
      const select = make("select");
      names.forEach((name, i) => select.append(new Option(name, i, false, i === chosen)));
      return [labelled(text, select), select];
    };
    const names = policies.map((policy) => policy.label);
    const [splitLabel, split] = choose("split", splits.map((s) => s.name), 0);
    const [leftLabel, left] = choose("policy", names, 0);
    const [rightLabel, right] = choose("beside", names, names.length - 1);
    const [boxLabel, box] = search("prompts with");
    const [before, after] = ["previous", "next"].map((text) => make("button", text));
    const told = make("span", "", "meta");
    told.setAttribute("role", "status");
    const card = make("div", undefined, "sample");

    function answers(prompt, policy) {
      const column = make("div");
      const head = make("p", undefined, "label");
      const dot = make("span", undefined, "dot");
      dot.style.background = policies[policy].colour;
      head.append(dot, policies[policy].label);
      column.append(head);
      const given = prompt.answers[policy] ?? [];
      if (!given.length) column.append(make("p", "no answers at hand", "meta"));
      for (const [pieces, numbers] of given) {
        const text = make("div", undefined, "text");
        text.dir = "auto";
        pieces.forEach((piece, i) => text.append(make(i % 2 ? "mark" : "span", piece)));
        if (!text.textContent) text.append("(empty)");
        column.append(text, make("div", numbers, "meta"));
      }
      return column;
    }

    function show() {
      const { prompts, total } = splits[state.split];
      const prompt = prompts[state.matching[state.at]];
      before.disabled = state.at === 0;
      after.disabled = state.at >= state.matching.length - 1;
      const filtered = box.value ? ` of ${state.matching.length} that match` : "";
      told.textContent = prompt
        ? `prompt ${state.at + 1}${filtered}, of the first ${prompts.length} of ${total}`
        : `no prompt matches, of the first ${prompts.length} of ${total}`;
      card.replaceChildren();
      if (!prompt) return;
      for (const [name, content] of [["prompt", prompt.prompt], ["reference", prompt.reference]]) {
        if (!content) continue;
        const text = make("div", content, "text");
        text.dir = "auto";
        card.append(make("p", name, "label"), text);
      }
      const columns = make("div", undefined, "answers");
      columns.append(...[...new Set([left.value, right.value])].map((p) => answers(prompt, Number(p))));
      card.append(columns);
    }

    function filter() {
      const wanted = box.value.toLowerCase();
      state.split = Number(split.value);
      state.matching = [...splits[state.split].prompts.keys()].filter((i) =>
        splits[state.split].prompts[i].prompt.toLowerCase().includes(wanted));
      state.at = 0;
      show();
    }

    for (const control of [left, right]) control.addEventListener("input", show);
    for (const control of [split, box]) control.addEventListener("input", filter);
    for (const [button, step] of [[before, -1], [after, 1]]) {
      button.type = "button";
      button.addEventListener("click", () => {
        state.at += step;
        show();
      });
    }
    const controls = make("div", undefined, "controls");
    controls.append(splitLabel, leftLabel, rightLabel, boxLabel, before, after, told);
    place.append(controls, card);
    filter();
  }

  sortable(find("every"));
  const data = JSON.parse(find("data").textContent);
  if (data.splits.length) {
    explorer(find("explorer"), data);
    find("plain").hidden = true;
  }
  for (const area of document.querySelectorAll("textarea")) area.addEventListener("focus", () => area.select());
})();
