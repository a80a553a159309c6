// What is wrong with the page as it stands, one line each; browse.py asks at every width and in every colour scheme.
() => {
  const found = [];
  const style = (element) => getComputedStyle(element);
  const name = (element) => {
    const classes = [...element.classList].slice(0, 2).map((part) => "." + part).join("");
    const text = element.textContent.trim().replace(/\s+/g, " ").slice(0, 50);
    return `<${element.localName}${classes}> ${JSON.stringify(text)}`;
  };

  // room
  const excess = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (excess > 0) found.push(`the page is ${excess} px wider than the window`);
  const main = document.querySelector("main, [role=main]") ?? document.body;
  const scrolled = (element) => {
    for (let box = element; box !== main.parentElement; box = box.parentElement)
      if (["auto", "scroll"].includes(style(box).overflowX)) return true;
    return false;
  };
  const beyond = (element) => element.clientWidth && element.scrollWidth - element.clientWidth;
  const wide = [...main.querySelectorAll("*")].filter(
    // what only screen readers see is clipped to a pixel; Furo's headings, tables and signatures reach into the margin by 8 px
    (element) => !element.closest("mjx-assistive-mml, svg, .visually-hidden") && beyond(element) > 8 && !scrolled(element)
  );
  for (const element of wide.filter((box) => !wide.some((other) => other !== box && box.contains(other))))
    found.push(`${name(element)} holds something ${beyond(element)} px wider than itself and does not scroll`);

  // colours, as [red, green, blue, opacity]
  const parts = (colour) => {
    const numbers = colour.match(/[\d.]+/g).map(Number);
    return [...numbers.slice(0, 3), numbers[3] ?? 1];
  };
  const over = (front, back) => [0, 1, 2].map((i) => front[3] * front[i] + (1 - front[3]) * back[i]);
  const behind = (element) => {
    if (element === null) return [255, 255, 255];
    const colour = parts(style(element).backgroundColor);
    return colour[3] === 1 ? colour.slice(0, 3) : over(colour, behind(element.parentElement));
  };
  // relative luminance and contrast of WCAG 2.2
  const luminance = (colour) => {
    const [red, green, blue] = colour.map((part) => (part <= 10.31475 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrast = (one, other) => {
    const [less, more] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (more + 0.05) / (less + 0.05);
  };

  const faint = new Map();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    if (element.closest("script, style, noscript, svg, mjx-assistive-mml, .visually-hidden")) continue;
    const { color, fontSize, fontWeight } = style(element);
    const large = parseFloat(fontSize) >= (fontWeight >= 700 ? 18.66 : 24);
    const back = behind(element);
    const ratio = contrast(over(parts(color), back), back);
    if (ratio >= (large ? 3 : 4.5)) continue;
    const key = `${color} on rgb(${back.map(Math.round).join(", ")})`;
    faint.set(key, faint.get(key) ?? `${name(element)} has a contrast of ${ratio.toFixed(2)}: ${key}`);
  }
  found.push(...faint.values());

  // pictures and equations
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  for (const image of document.images) {
    const file = image.getAttribute("src").slice(0, 80);
    if (!image.alt) found.push(`the picture ${file} has no alternative text`);
    if (!image.complete || !image.naturalWidth) {
      found.push(`the picture ${file} did not load`);
      continue;
    }
    if (luminance(behind(image)) > 0.2) continue;
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    // its axes are black
    if (pixels.some((part, at) => at % 4 === 3 && part < 128)) found.push(`the picture ${file} is transparent before a dark page`);
  }
  for (const element of document.querySelectorAll("mjx-merror")) found.push(`${name(element)} is no TeX`);
  return found;
}
