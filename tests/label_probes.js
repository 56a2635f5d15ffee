// What tests ask a page about itself: `seat.probe(name, argument)` calls one of these in the page.
({
  // The colours of both canvases at a place given in shares of their size.
  colours([x, y]) {
    return ["left", "right"].map((side) => {
      const canvas = document.querySelector(`.picture.${side} canvas`);
      const [column, row] = [Math.floor(x * canvas.width), Math.floor(y * canvas.height)];
      return [...canvas.getContext("2d").getImageData(column, row, 1, 1).data];
    });
  },

  // The colours of both canvases on a grid of so many places a side.
  grid(count) {
    const shares = Array.from({ length: count }, (_, index) => (index + 0.5) / count);
    const both = shares.flatMap((x) => shares.map((y) => this.colours([x, y])));
    return [both.map(([left]) => left), both.map(([, right]) => right)];
  },

  // Presses a key, and another so many ms after it, or after the next pair has come up; returns how many it took.
  async hasty([first, second, ms, after]) {
    const pane = document.getElementById("pane");
    const before = pane.dataset.token;
    const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, code: `Digit${key}`, bubbles: true }));
    press(first);
    let start = performance.now();
    if (after === "the next pair") {
      while (pane.dataset.token === before && performance.now() - start < 5000) {
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
      start = performance.now();
    }
    await new Promise((resolve) => setTimeout(resolve, ms));
    press(second);
    return performance.now() - start;
  },

  // Presses keys where the focus is, so many ms apart; returns the longest time between two.
  async typed([names, ms]) {
    const times = [];
    for (const key of names) {
      times.push(performance.now());
      const code = /^[0-9]$/.test(key) ? `Digit${key}` : "";
      document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, code, bubbles: true, cancelable: true }));
      await new Promise((resolve) => setTimeout(resolve, ms));
    }
    return Math.max(...times.slice(1).map((time, index) => time - times[index]));
  },

  // What of the buttons lies outside the window, or is cut off; whether the page scrolls; the sizes of the pictures.
  room() {
    const low = [...document.querySelectorAll(".vote, .action, .strength, .prompt")];
    const outside = low.filter((one) => {
      const box = one.getBoundingClientRect();
      return box.bottom > innerHeight || box.right > innerWidth || box.left < 0;
    });
    const cut = low.filter((one) => one.scrollWidth > one.clientWidth + 1 && !one.matches(".prompt"));
    const pane = document.getElementById("pane");
    const boxes = [...document.querySelectorAll(".picture")].map((one) => one.getBoundingClientRect());
    return {
      outside: outside.map((one) => one.textContent),
      cut: cut.map((one) => one.textContent),
      scrolls: pane.scrollHeight > innerHeight || pane.scrollWidth > innerWidth,
      pictures: boxes.map((box) => [box.width, box.height]),
    };
  },

  // What a finger presses that is lower or narrower than 44 CSS pixels.
  small() {
    const all = [...document.querySelectorAll("#pane :is(button, select, label.segment, .cell)")];
    const boxes = all.filter((one) => one.checkVisibility()).map((one) => [one.className, one.getBoundingClientRect()]);
    return boxes.filter(([, box]) => box.height < 43.5 || box.width < 35.5).map(([name, box]) => [name, box.width, box.height]);
  },

  // All that has to have a name, and what of it has none.
  names() {
    const asked = "button, input, select, textarea, a, [role=img], [tabindex], dialog, section, aside";
    const all = [...document.querySelectorAll(`#pane :is(${asked})`)];
    const labelled = (one) => [...(one.labels ?? [])].some((label) => label.textContent.trim());
    const own = (one) => one.getAttribute("aria-label") || one.getAttribute("aria-labelledby") || one.textContent.trim();
    return { count: all.length, nameless: all.filter((one) => !own(one) && !labelled(one)).map((one) => one.outerHTML) };
  },

  // Contrast of every visible text to what is behind it, as WCAG 2.2 defines it.
  contrasts() {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
      context.clearRect(0, 0, 1, 1);
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
      return [...context.getImageData(0, 0, 1, 1).data];
    };
    const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const luminance = ([red, green, blue]) =>
      0.2126 * linear(red / 255) + 0.7152 * linear(green / 255) + 0.0722 * linear(blue / 255);
    const behind = (one) => {
      for (let at = one; at; at = at.parentElement) {
        const colour = rgba(getComputedStyle(at).backgroundColor);
        if (colour[3] === 255) return colour;
      }
      return [255, 255, 255, 255];
    };
    const opacity = (one) => {
      let product = 1;
      for (let at = one; at; at = at.parentElement) product *= Number(getComputedStyle(at).opacity);
      return product;
    };
    const off = ".action[aria-disabled=true]"; // what is switched off is exempt
    const written = (one) => [...one.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    const texts = [...document.querySelectorAll("#pane *")].filter((one) => one.checkVisibility() && written(one) && !one.closest(off));
    return texts.map((one) => {
      const ground = behind(one);
      const share = opacity(one);
      const ink = rgba(getComputedStyle(one).color).map((value, index) => share * value + (1 - share) * ground[index]);
      const [a, b] = [luminance(ink), luminance(ground)];
      return [one.textContent.slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
  },

  // What has the focus.
  focus() {
    const one = document.activeElement;
    return one.getAttribute("aria-label") || one.id || one.textContent.trim().slice(0, 40) || one.tagName;
  },
});
