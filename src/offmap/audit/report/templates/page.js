"use strict";
// Optional: sorts tables, and redraws the picture when somebody looks closer. The page is complete without it.
(() => {
  const WIDTH = 1000, LEFT = 130, NARROWEST = 2.5, MARKED = 6, MARKS = 48, ROWS = 16, PITCH = 24, HEIGHT = 18, SMALLEST_ROW = 16384;
  const SVG = "http://www.w3.org/2000/svg";

  const element = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const hex = (number) => "0x" + number.toString(16);
  const size = (bytes) => {
    const power = Math.floor(Math.log2(bytes) / 10);
    return `${bytes / 2 ** (10 * power)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][power]}`;
  };

  const picture = (figure) => {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const svg = figure.querySelector("svg.physical");
    const whole = [...svg.childNodes];
    const wholeBox = svg.getAttribute("viewBox");
    const output = figure.querySelector("output");
    const scale = figure.querySelector(".scale");
    const span = data.end - data.start;
    let row = 0; // bytes a row; 0: the whole picture as it came
    let start = data.start;
    let chosen = -1;

    const tell = (at) => {
      output.textContent = at < 0 ? output.dataset.empty : data.cells[at][4];
    };
    const mark = () => {
      for (const each of svg.querySelectorAll(".c")) each.classList.toggle("chosen", Number(each.dataset.i) === chosen);
    };
    const draw = () => {
      scale.textContent = row ? `Each row is ${size(row)} now.` : "";
      if (!row) {
        svg.replaceChildren(...whole);
        svg.setAttribute("viewBox", wholeBox);
        mark();
        return;
      }
      const drawn = [], marks = [];
      for (let number = 0; number < ROWS; number++) {
        const low = start + number * row, high = low + row, y = number * PITCH;
        drawn.push(element("text", { x: LEFT - 8, y: y + 14, "text-anchor": "end" }, hex(low)));
        const place = (from, to) => {
          const left = Math.max(from, low), right = Math.min(to, high);
          return [((left - low) / row) * WIDTH, ((right - left) / row) * WIDTH];
        };
        for (const [from, to] of data.ram) {
          if (from >= high || to <= low) continue;
          const [x, width] = place(from, to);
          drawn.push(element("rect", { class: "ram", x: LEFT + x, y: y, width: width, height: HEIGHT }));
        }
        const here = [];
        data.cells.forEach(([from, bytes, look, rank, text], at) => {
          if (from < high && from + bytes > low) here.push([rank, at, look, text, ...place(from, from + bytes)]);
        });
        here.sort((a, b) => a[0] - b[0]);
        for (const [rank, at, look, text, x, exact] of here) {
          const width = Math.max(exact, NARROWEST);
          const cell = element("rect", {
            class: "c f-" + look, "data-i": at, x: LEFT + Math.min(x, WIDTH - width), y: y, width: width, height: HEIGHT,
          });
          cell.append(element("title", {}, text));
          drawn.push(cell);
          if (rank && exact < MARKED) marks.push(element("path", { class: "mark", d: `M${LEFT + x + width / 2} ${y}l-4 -6h8z` }));
        }
      }
      svg.replaceChildren(...drawn, ...(marks.length > MARKS ? [] : marks));
      svg.setAttribute("viewBox", `0 -6 ${LEFT + WIDTH + 2} ${ROWS * PITCH + 6}`);
      mark();
    };
    const show = (bytes, middle) => {
      if (bytes * ROWS >= span) row = 0;
      else {
        row = Math.max(bytes, SMALLEST_ROW);
        start = Math.max(0, Math.floor((middle - (ROWS / 2) * row) / row) * row);
      }
      draw();
    };
    const middle = () => {
      if (chosen >= 0) return data.cells[chosen][0];
      return row ? start + (ROWS / 2) * row : data.start + span / 2;
    };
    const widest = () => 2 ** Math.ceil(Math.log2(span / ROWS));
    const nearer = (at) => show((row || widest()) / 4, at === undefined ? middle() : at);
    const farther = () => show(row * 4 || Infinity, middle());
    const step = (by) => {
      if (!data.cells.length) return;
      chosen = chosen < 0 ? (by > 0 ? 0 : data.cells.length - 1) : Math.min(Math.max(chosen + by, 0), data.cells.length - 1);
      const from = data.cells[chosen][0];
      if (row && (from < start || from >= start + ROWS * row)) show(row, from);
      tell(chosen);
      mark();
    };
    const graver = () => {
      const most = Math.max(...data.cells.map((cell) => cell[3]));
      for (let add = 1; add <= data.cells.length; add++) {
        const at = (Math.max(chosen, -1) + add) % data.cells.length;
        if (data.cells[at][3] === most) {
          chosen = at - 1;
          step(1);
          return;
        }
      }
    };

    svg.addEventListener("pointerover", (event) => tell(event.target.dataset.i === undefined ? chosen : Number(event.target.dataset.i)));
    svg.addEventListener("pointerleave", () => tell(chosen));
    svg.addEventListener("click", (event) => {
      chosen = event.target.dataset.i === undefined ? -1 : Number(event.target.dataset.i);
      tell(chosen);
      mark();
    });
    svg.addEventListener("dblclick", (event) => {
      if (chosen >= 0) nearer(data.cells[chosen][0]);
      event.preventDefault();
    });
    svg.addEventListener("keydown", (event) => {
      const keys = {
        "+": () => nearer(), "=": () => nearer(), "-": farther, 0: () => show(Infinity, 0), ArrowRight: () => step(1),
        ArrowLeft: () => step(-1), g: graver,
        ArrowDown: () => row && show(row, start + (ROWS / 2 + 1) * row), ArrowUp: () => row && show(row, start + (ROWS / 2 - 1) * row),
      };
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      keys[event.key]();
      event.preventDefault();
    });
    const buttons = { nearer: () => nearer(), farther, whole: () => show(Infinity, 0), previous: () => step(-1), next: () => step(1), graver };
    for (const button of figure.querySelectorAll("button")) button.addEventListener("click", buttons[button.name]);
    figure.querySelector(".zoom").hidden = output.hidden = false;
    tell(-1);
  };

  const sortable = (table) => {
    table.querySelectorAll("th").forEach((head, column) => {
      const button = document.createElement("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (line) => line.cells[column].dataset.k ?? line.cells[column].textContent;
        const lines = [...table.tBodies[0].rows];
        lines.sort((a, b) => key(a).localeCompare(key(b), "en", { numeric: true }) * (down ? -1 : 1));
        table.tBodies[0].append(...lines);
      });
    });
  };

  document.querySelectorAll("figure.memory").forEach(picture);
  document.querySelectorAll("table.sortable").forEach(sortable);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
})();
