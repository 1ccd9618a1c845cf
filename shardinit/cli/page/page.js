// Search and filters over rows that are there already: without scripts all is shown.
(() => {
  const text = document.querySelector("#search");
  const selects = [...document.querySelectorAll(".find select")];
  const count = document.querySelector("#count");
  const groups = [...document.querySelectorAll("tr.group")].map((row) => ({
    row,
    button: row.querySelector("button.fold"),
    leaves: [...document.querySelectorAll(`tr.leaf[data-group="${row.dataset.group}"]`)],
    open: false,
  }));
  const show = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const narrowed = words.length > 0;
    let found = 0;
    for (const group of groups) {
      const right = selects.every((s) => !s.value || group.row.dataset[s.name] === s.value);
      const own = group.row.dataset.text;
      const alone = group.leaves.length === 0;
      let hits = 0;
      for (const leaf of group.leaves) {
        const hit = right && words.every((w) => (leaf.dataset.text + " " + own).includes(w));
        hits += hit;
        const exact = words.every((w) => own.includes(w));
        leaf.hidden = !(hit && (group.open || (narrowed && !exact)));
      }
      if (alone) hits = right && words.every((w) => own.includes(w)) ? 1 : 0;
      group.row.hidden = hits === 0;
      found += hits;
    }
    count.textContent = `${found.toLocaleString("en")} ${found === 1 ? "leaf" : "leaves"}`;
  };
  for (const group of groups) {
    if (!group.button) continue;
    group.button.addEventListener("click", () => {
      group.open = !group.open;
      group.button.textContent = group.open ? "▾" : "▸";
      group.button.setAttribute("aria-expanded", String(group.open));
      show();
    });
  }
  const read = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    text.value = asked.get("q") ?? "";
    for (const s of selects) s.value = asked.get(s.name) ?? "";
    show();
  };
  const write = () => {
    const asked = new URLSearchParams();
    if (text.value) asked.set("q", text.value);
    for (const s of selects) if (s.value) asked.set(s.name, s.value);
    history.replaceState(null, "", "#" + asked);
    show();
  };
  text.addEventListener("input", write);
  for (const s of selects) s.addEventListener("change", write);
  addEventListener("hashchange", read);
  document.querySelector(".find").hidden = false;
  read();
})();
