"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const items = new Map(page.items.map((item) => [item.id, item]));
  let rater = null; // alias, steps in this rater's order, answers by step, position
  let visible = 0; // when the step was last seen, 0 while the page is hidden
  let spent = 0; // milliseconds of this visit before that

  // Some browsers refuse storage to files: answers then live as long as the page.
  const store = {
    get(key) { try { return localStorage.getItem(key); } catch { return null; } },
    set(key, text) { try { localStorage.setItem(key, text); return true; } catch { return false; } },
    drop(key) { try { localStorage.removeItem(key); } catch { /* nothing is there */ } },
  };
  const place = (alias) => `popalign:${page.digest}:${alias}`;
  const last = `popalign:${page.digest}`;

  function fnv(text, bits) {
    const [start, prime] = bits === 64 ? [0xcbf29ce484222325n, 0x100000001b3n] : [0x811c9dc5n, 0x01000193n];
    let value = start;
    for (const byte of new TextEncoder().encode(text)) value = BigInt.asUintN(bits, (value ^ BigInt(byte)) * prime);
    return value;
  }

  function random(seed) { // mulberry32
    return () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  function shuffled(list, next) {
    const found = [...list];
    for (let i = found.length - 1; i > 0; i--) {
      const j = Math.floor(next() * (i + 1));
      [found[i], found[j]] = [found[j], found[i]];
    }
    return found;
  }

  // Every rater has an order of their own, the same after a reload, and every other rater sees the sides exchanged.
  function plan(alias) {
    const seed = Number(fnv(page.digest + alias, 32));
    const next = random(seed);
    const first = page.items.filter((item) => !item.last);
    const blocks = shuffled([...new Set(first.map((item) => item.block))].sort(), next);
    const order = blocks.flatMap((block) => shuffled(first.filter((item) => item.block === block), next));
    order.push(...shuffled(page.items.filter((item) => item.last), next));
    return { exchanged: next() < 0.5, steps: order.flatMap((item) => item.asks.map((ask) => [item.id, ask.id])) };
  }

  const stepKey = (step) => step.join(" ");
  const answered = () => rater.steps.filter((step) => rater.answers[stepKey(step)]);
  const firstOpen = () => rater.steps.findIndex((step) => !rater.answers[stepKey(step)]);

  function keep() {
    const kept = store.set(place(rater.alias), JSON.stringify(rater.answers));
    store.set(last, rater.alias);
    rater.kept = kept;
  }

  function show(name) {
    for (const id of ["start", "trial", "end"]) by(id).hidden = id !== name;
    document.body.dataset.screen = name;
    scrollTo(0, 0);
  }

  function begin(alias) {
    const { exchanged, steps } = plan(alias);
    rater = { alias, exchanged, steps, answers: JSON.parse(store.get(place(alias)) || "{}"), at: 0 };
    const open = firstOpen();
    if (open < 0) finish();
    else go(open);
  }

  function current() {
    const [itemId, askId] = rater.steps[rater.at];
    const item = items.get(itemId);
    const options = rater.exchanged ? [...item.options].reverse() : item.options;
    return { item, options, ask: item.asks.find((one) => one.id === askId) };
  }

  function choicesOf({ options, ask }) {
    if (options.length === 1) return ask.choices;
    const [a, b] = options.map((option) => option.id);
    return [
      { value: a, label: "A", key: "ArrowLeft", cap: "\u2190" },
      { value: "tie", label: "No difference", key: "ArrowDown", cap: "\u2193" },
      { value: b, label: "B", key: "ArrowRight", cap: "\u2192" },
    ];
  }

  function go(at) {
    rater.at = at;
    const step = current();
    const changed = document.body.dataset.item !== step.item.id;
    document.body.dataset.item = step.item.id;
    document.body.dataset.sides = step.options.length;
    by("caption").textContent = step.item.caption;
    by("caption").hidden = !step.item.caption;
    by("question").textContent = step.ask.text;
    by("hint").textContent = step.ask.hint;
    if (changed) by("options").replaceChildren(...step.options.map((option, side) => pictured(option, side, step)));
    const before = rater.answers[stepKey(rater.steps[at])];
    by("choices").replaceChildren(...choicesOf(step).map((choice) => button(choice, before)));
    const done = answered().length;
    by("progress").max = rater.steps.length;
    by("progress").value = done;
    by("count").textContent = `${at + 1} of ${rater.steps.length}`;
    by("back").disabled = at === 0;
    show("trial");
    by("question").focus({ preventScroll: true });
    spent = 0;
    visible = document.hidden ? 0 : performance.now();
  }

  function pictured(option, side, step) {
    const figure = document.createElement("figure");
    const name = step.options.length > 1 ? "AB"[side] : "";
    const grid = document.createElement("div");
    grid.className = "grid";
    grid.style.setProperty("--columns", Math.ceil(Math.sqrt(option.images.length)));
    grid.append(...option.images.map((id, number) => {
      const image = new Image();
      image.src = page.images[id];
      image.alt = `${name ? `Side ${name}, p` : "P"}icture ${number + 1} of ${option.images.length}`;
      image.draggable = false;
      return image;
    }));
    if (name) {
      const label = document.createElement("figcaption");
      label.textContent = name;
      figure.append(label);
    }
    figure.append(grid);
    return figure;
  }

  function button(choice, before) {
    const found = document.createElement("button");
    found.type = "button";
    found.dataset.value = choice.value;
    found.setAttribute("aria-keyshortcuts", choice.key);
    found.setAttribute("aria-pressed", String(Boolean(before) && before.choice === choice.value));
    const cap = document.createElement("kbd");
    cap.textContent = choice.cap || choice.key.toUpperCase();
    cap.setAttribute("aria-hidden", "true");
    found.append(choice.label, cap);
    found.addEventListener("click", () => answer(choice));
    return found;
  }

  function answer(choice) {
    const { item, options } = current();
    const left = options.length > 1 ? options[0].id : "";
    const took = Math.round(spent + (visible ? performance.now() - visible : 0));
    const asks = choice.whole ? item.asks.map((ask) => ask.id) : [rater.steps[rater.at][1]];
    for (const ask of asks) {
      const key = stepKey([item.id, ask]);
      const here = ask === rater.steps[rater.at][1];
      const earlier = rater.answers[key] ? rater.answers[key].milliseconds : 0;
      rater.answers[key] = { choice: choice.value, left, milliseconds: earlier + (here ? took : 0) };
    }
    keep();
    by("live").textContent = `Answered: ${choice.label}.`;
    const next = rater.steps.findIndex((step, at) => at > rater.at && !rater.answers[stepKey(step)]);
    if (next >= 0) go(next);
    else if (firstOpen() >= 0) go(firstOpen());
    else finish();
  }

  function fileText() {
    const answers = answered().map((step) => {
      const { choice, left, milliseconds } = rater.answers[stepKey(step)];
      return { item: step[0], ask: step[1], choice, left, milliseconds };
    });
    const complete = answers.length === rater.steps.length;
    const lines = [page.kind, page.id, page.digest, rater.alias, String(complete)];
    lines.push(...answers.map((a) => `${a.item} ${a.ask} ${a.choice} ${a.left} ${a.milliseconds}`));
    const checksum = fnv(lines.join("\n"), 64).toString(16).padStart(16, "0");
    const { format, version, kind, id, digest } = page;
    return JSON.stringify({ format, version, kind, id, digest, alias: rater.alias, complete, answers, checksum }, null, 1);
  }

  function finish() {
    visible = 0;
    const done = answered().length;
    const complete = done === rater.steps.length;
    by("end-count").textContent = `${done} of ${rater.steps.length} answered as ${rater.alias}`;
    by("end-title").textContent = complete ? "Done, thank you" : "Stopped for now";
    by("end-text").textContent = complete
      ? "Save your answers and send the file to whoever gave you this page."
      : "Your answers wait in this browser: open the page again with the same alias to go on.";
    by("end-note").textContent = rater.kept === false
      ? "This browser keeps nothing for files: save your answers before you close the page." : "";
    by("save").disabled = done === 0;
    by("resume").textContent = complete ? "Look again" : "Go on";
    by("resume").hidden = false;
    by("text").value = done ? fileText() : "";
    by("copy").open = false;
    show("end");
    by("end-title").focus({ preventScroll: true });
  }

  function save() {
    const link = document.createElement("a");
    link.download = `${page.kind}-${page.id}-${rater.alias.replace(/[^A-Za-z0-9_-]/g, "-")}.json`;
    link.href = URL.createObjectURL(new Blob([fileText()], { type: "application/json" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    by("end-note").textContent = `Saved as ${link.download}.`;
  }

  function forget() {
    if (!confirm("Delete your answers from this browser? What you saved as a file stays.")) return;
    store.drop(place(rater.alias));
    store.drop(last);
    rater = null;
    delete document.body.dataset.item;
    by("alias").value = "";
    show("start");
  }

  by("begin").addEventListener("submit", (event) => {
    event.preventDefault();
    const field = by("alias");
    field.value = field.value.trim();
    const fine = field.checkValidity();
    field.setAttribute("aria-invalid", String(!fine));
    by("alias-error").textContent = fine ? "" : "Letters, digits, spaces and . _ - only, beginning with a letter or digit.";
    if (fine) begin(field.value);
    else field.focus();
  });
  by("back").addEventListener("click", () => { if (rater.at > 0) go(rater.at - 1); });
  by("pause").addEventListener("click", finish);
  by("save").addEventListener("click", save);
  by("forget").addEventListener("click", forget);
  by("resume").addEventListener("click", () => go(Math.max(0, firstOpen())));
  document.addEventListener("visibilitychange", () => {
    if (by("trial").hidden) return;
    if (document.hidden && visible) { spent += performance.now() - visible; visible = 0; }
    else if (!document.hidden) visible = performance.now();
  });
  document.addEventListener("keydown", (event) => {
    if (by("trial").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const choice = choicesOf(current()).find((one) => one.key.toLowerCase() === event.key.toLowerCase());
    if (choice) { event.preventDefault(); answer(choice); }
    else if (event.key === "Backspace" && rater.at > 0) { event.preventDefault(); go(rater.at - 1); }
  });

  const known = store.get(last);
  if (known) {
    by("alias").value = known;
    by("begin-button").textContent = "I agree, go on";
  }
  show("start");
})();
