/**
 * Which way up is a photograph? All of it happens in the browser:
 *
 *   file -> readPicture -> pictureSquares -> the network -> orientationOf -> a card on the page
 *
 * rotation_ssl.orientation is the same in Python. Reducing and resizing repeat Pillow's arithmetic to the last bit, so
 * that the probabilities agree.
 * @typedef {{width: number, height: number, data: Uint8ClampedArray}} Pixels RGBA, row by row, opaque
 */

const RUNTIME = "./ort.wasm.bundle.min.mjs";
const WASM = "ort-wasm-simd-threaded.wasm";
const ELONGATED = 1.1; // ratio of longer to shorter side from which the whole picture is looked at too
const FIXED_BITS = 22; // the weights of resizing are integers, in units of 2^-22
const STRIP_PIXELS = 1 << 21; // a picture is read in strips of about so many pixels
const SHOWN_SIDES = [640, 240]; // the longer side of a picture on the page, at most: of the first 100, of the others
const GAP = 12; // pixels between two attention maps
const HEAT = ["#000004", "#320a5e", "#781c6d", "#bc3754", "#ed6925", "#fbb41a", "#fcffa4"]; // of activity 0 to 1
// the smallest WebAssembly module with an instruction on vectors
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11];
const sum = (values) => values.reduce((total, value) => total + value, 0);

// ---- reading a picture: rotation_ssl.orientation.turning.open_picture

/**
 * A picture as viewers show it, with its EXIF orientation: the bitmap, and its pixels reduced to little more than is
 * looked at in squares of `size` pixels. The caller closes the bitmap.
 * @param {Blob} file
 * @param {number} size
 * @returns {Promise<{bitmap: ImageBitmap, pixels: Pixels}>}
 */
export async function readPicture(file, size) {
  const start = new Uint8Array(await file.slice(0, 2).arrayBuffer());
  const isJpeg = start[0] === 0xff && start[1] === 0xd8;
  // the stored values: no colour profile changes them, as in Python
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(file, options);
  const factorOf = ({ width, height }) => Math.max(1, Math.floor(Math.min(width, height) / (2 * size)));
  // in Python the JPEG decoder reduces by a power of two, and Pillow by the rest, as it does with other formats
  const first = isJpeg ? [8, 4, 2, 1].find((factor) => factor <= factorOf(bitmap)) : factorOf(bitmap);
  const pixels = readReduced(bitmap, first);
  return { bitmap, pixels: reduce(pixels, factorOf(pixels)) };
}

/** The bitmap's pixels, on white where it is transparent, reduced by a factor; never all of them at once. */
function readReduced(bitmap, factor) {
  const [width, height] = [Math.ceil(bitmap.width / factor), Math.ceil(bitmap.height / factor)];
  const rows = factor * Math.max(1, Math.floor(STRIP_PIXELS / bitmap.width / factor));
  const canvas = newCanvas(bitmap.width, Math.min(rows, bitmap.height));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  const data = new Uint8ClampedArray(4 * width * height);
  for (let top = 0; top < bitmap.height; top += rows) {
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, -top);
    const strip = context.getImageData(0, 0, canvas.width, Math.min(rows, bitmap.height - top));
    data.set(reduce(strip, factor).data, 4 * width * (top / factor));
  }
  return { width, height, data };
}

/**
 * Pixels averaged in squares of factor x factor, smaller ones at the right and the bottom, as PIL.Image.reduce does.
 * @param {Pixels} pixels
 * @param {number} factor
 * @returns {Pixels}
 */
export function reduce({ width, height, data }, factor) {
  if (factor === 1) return { width, height, data };
  const [columns, rows] = [Math.ceil(width / factor), Math.ceil(height / factor)];
  const result = new Uint8ClampedArray(4 * columns * rows).fill(255);
  for (let i = 0; i < columns * rows; i++) {
    const [left, top] = [factor * (i % columns), factor * Math.floor(i / columns)];
    const [right, bottom] = [Math.min(width, left + factor), Math.min(height, top + factor)];
    const count = (right - left) * (bottom - top);
    const multiplier = Math.trunc(Math.fround(2 ** 24 / count)); // Pillow divides by multiplying with this
    for (let channel = 0; channel < 3; channel++) {
      let total = count >> 1;
      for (let y = top; y < bottom; y++) {
        for (let x = left; x < right; x++) total += data[4 * (y * width + x) + channel];
      }
      result[4 * i + channel] = Math.floor((total * multiplier) / 2 ** 24);
    }
  }
  return { width: columns, height: rows, data: result };
}

// ---- what is looked at: rotation_ssl.orientation.predict.picture_squares

/** Where the network looks: at the square in the centre; of an elongated picture also at the whole. */
function viewPlaces({ width, height }) {
  const side = Math.min(width, height);
  const center = { left: (width - side) / 2, top: (height - side) / 2, width: side, height: side };
  return Math.max(width, height) < ELONGATED * side ? [center] : [center, { left: 0, top: 0, width, height }];
}

/**
 * The V views as squares, (V, 3, size, size), resized with Pillow's bicubic antialiased filter.
 * @param {Pixels} pixels
 * @param {number} size
 * @returns {Uint8Array}
 */
export function pictureSquares(pixels, size) {
  // Pillow 13 resizes the height first where most is to be gained
  const heightFirst = pixels.height - size > Math.max(0, 2 * (pixels.width - size));
  const squares = viewPlaces(pixels).map(({ left, top, width, height }) => {
    const across = (image) => resize(image, "x", resizeWeights(left, width, size, pixels.width));
    const down = (image) => resize(image, "y", resizeWeights(top, height, size, pixels.height));
    return (heightFirst ? across(down(pixels)) : down(across(pixels))).data;
  });
  const plane = size * size;
  const valueAt = (_, i) => squares[Math.floor(i / (3 * plane))][4 * (i % plane) + (Math.floor(i / plane) % 3)];
  return Uint8Array.from({ length: squares.length * 3 * plane }, valueAt);
}

/** For each of `size` pixels: the first of the `limit` pixels that it is made from, and their weights. */
function resizeWeights(start, side, size, limit) {
  const scale = side / size;
  const stretch = Math.max(1, scale);
  return Array.from({ length: size }, (_, i) => {
    const center = start + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - 2 * stretch + 0.5));
    const count = Math.min(limit, Math.trunc(center + 2 * stretch + 0.5)) - first;
    const weights = Array.from({ length: count }, (_, x) => bicubic((x + first - center + 0.5) * (1 / stretch)));
    const [total, unit] = [sum(weights), 2 ** FIXED_BITS];
    return { first, weights: weights.map((weight) => Math.trunc((weight / total) * unit + Math.sign(weight) / 2)) };
  });
}

/** Keys' cubic convolution with a = -0.5. */
function bicubic(distance) {
  const [a, x] = [-0.5, Math.abs(distance)];
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** Pixels resized along one axis. */
function resize({ width, height, data }, axis, places) {
  const [columns, rows] = axis === "x" ? [places.length, height] : [width, places.length];
  const step = axis === "x" ? 4 : 4 * width; // from a value to the next one along the axis
  const result = new Uint8ClampedArray(4 * columns * rows);
  for (let i = 0; i < 4 * columns * rows; i++) {
    const [column, row] = [(i >> 2) % columns, Math.floor((i >> 2) / columns)];
    const { first, weights } = places[axis === "x" ? column : row];
    const start = (axis === "x" ? 4 * row * width : 4 * column) + first * step + (i & 3);
    let total = 2 ** (FIXED_BITS - 1);
    for (let n = 0; n < weights.length; n++) total += data[start + n * step] * weights[n];
    result[i] = total >> FIXED_BITS; // the array clamps it to 0..255
  }
  return { width: columns, height: rows, data: result };
}

// ---- the network: rotation_ssl.orientation.predict.predict_orientation

/** Load the network and what runs it; `progress` is told which fraction of the bytes is there. */
export async function loadNetwork(progress) {
  if (!globalThis.WebAssembly?.validate(new Uint8Array(SIMD))) {
    throw new Error("this browser has no WebAssembly SIMD. Please use a newer one.");
  }
  const facts = await (await get("model.json")).json();
  const loaded = {};
  const load = (name) =>
    download(name, (bytes) => {
      loaded[name] = bytes;
      progress(sum(Object.values(loaded)) / sum(Object.values(facts.bytes)));
    });
  const [ort, model, wasm] = await Promise.all([import(RUNTIME), load("model.onnx"), load(WASM)]);
  ort.env.wasm.numThreads = 1; // several would need a server that isolates the page
  ort.env.wasm.wasmBinary = wasm;
  return { ...facts, ort, session: await ort.InferenceSession.create(model) };
}

async function get(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`the server does not have ${name} (status ${response.status}).`);
  return response;
}

async function download(name, progress) {
  const parts = [];
  const reader = (await get(name)).body.getReader();
  for (let part = await reader.read(), length = 0; !part.done; part = await reader.read()) {
    parts.push(part.value);
    progress((length += part.value.length));
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/**
 * How a picture is turned, and where the network is active in each of its views as they are given.
 * @param {Awaited<ReturnType<typeof loadNetwork>>} network
 * @param {Pixels} pixels
 * @returns {Promise<{rotation: number, confidence: number, probabilities: number[], attention: Float32Array[]}>}
 *   the picture's content is rotated by `rotation` x 90 degrees counter-clockwise; maps of size x size values, 0 to 1
 */
export async function predictOrientation({ ort, session, size, temperature }, pixels) {
  const squares = pictureSquares(pixels, size);
  const views = squares.length / (3 * size * size);
  const input = new ort.Tensor("uint8", squares, [views, 3, size, size]);
  const { logits, attention } = await session.run({ squares: input });
  const mapOf = (view) => attention.data.subarray(view * size * size, (view + 1) * size * size);
  return { ...orientationOf(logits.data, temperature), attention: Array.from({ length: views }, (_, v) => mapOf(v)) };
}

/** The average over all views and their four turns; logits are (4, V, 4): turn, view, rotation. */
function orientationOf(logits, temperature) {
  const probabilities = [0, 0, 0, 0];
  for (let at = 0; at < logits.length; at += 4) {
    const turn = Math.floor((4 * at) / logits.length);
    const exps = [0, 1, 2, 3].map((k) => Math.exp(logits[at + k] / temperature));
    // a picture that is turned by k looks turned by k + turn in its copy that is turned once more
    for (let k = 0; k < 4; k++) probabilities[k] += exps[(k + turn) % 4] / sum(exps) / (logits.length / 4);
  }
  const confidence = Math.max(...probabilities);
  return { rotation: probabilities.indexOf(confidence), confidence, probabilities };
}

// ---- the page

const find = (name) => document.querySelector(name);
const say = (text) => void (find("#status").textContent = text);
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const newCanvas = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

/** Look at pictures one after another; each gets a card, also one that cannot be read. */
async function lookAtAll(files, network) {
  const counts = {};
  for (const [number, file] of files.entries()) {
    say(`Looking at ${file.name} (${number + 1} of ${files.length})`);
    const card = await lookAt(file, network);
    find("#results").append(card);
    if (number === 0) card.scrollIntoView({ block: "nearest" });
    counts[card.dataset.outcome] = (counts[card.dataset.outcome] ?? 0) + 1;
  }
  const outcomes = Object.entries(counts).map(([outcome, count]) => `${count} ${outcome}`);
  say(`${files.length} ${files.length === 1 ? "photograph" : "photographs"}: ${outcomes.join(", ")}.`);
}

async function lookAt(file, network) {
  let picture;
  try {
    picture = await readPicture(file, network.size);
    return await createCard(file.name, picture, await predictOrientation(network, picture.pixels), network);
  } catch (error) {
    console.warn(file.name, error);
    return fill("#failure", { name: file.name }, "not read");
  } finally {
    picture?.bitmap.close();
  }
}

/** A copy of a template, with texts in its elements of these classes. */
function fill(template, texts, outcome) {
  const card = find(template).content.firstElementChild.cloneNode(true);
  for (const [name, text] of Object.entries(texts)) card.querySelector(`.${name}`).textContent = text;
  card.querySelector(".badge").textContent = card.dataset.outcome = outcome;
  return card;
}

async function createCard(name, { bitmap, pixels }, { rotation, confidence, probabilities, attention }, network) {
  const outcome = confidence < network.threshold ? "undecided" : rotation ? "turned" : "upright";
  const card = fill("#card", {
    name, confidence: percent(confidence), least: percent(network.threshold), layer: network.layer,
    rotation: `${90 * rotation}° counter-clockwise (k = ${rotation})`,
    fix: rotation ? `${90 * rotation}° clockwise, or ${360 - 90 * rotation}° counter-clockwise` : "none",
  }, outcome); // prettier-ignore
  card.style.setProperty("--threshold", network.threshold);
  card.querySelectorAll(".bars li").forEach((bar, k) => {
    bar.style.setProperty("--probability", probabilities[k]);
    bar.querySelector("b").textContent = percent(probabilities[k]);
  });
  const longest = SHOWN_SIDES[Number(find("#results").childElementCount >= 100)]; // the large ones take 5 MB each
  const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const shown = await createImageBitmap(bitmap, { resizeWidth: width, resizeHeight: height, resizeQuality: "high" });
  const quarters = outcome === "turned" ? rotation : 0;
  drawTurned(card.querySelector(".given"), shown, 0);
  drawTurned(card.querySelector(".fixed"), shown, quarters);
  drawTurned(card.querySelector(".attention"), drawAttention(shown, pixels, attention, network.size), quarters);
  shown.close();
  return card;
}

/** Draw a picture on a canvas, turned clockwise by so many quarters. */
function drawTurned(canvas, picture, quarters) {
  [canvas.width, canvas.height] = quarters % 2 ? [picture.height, picture.width] : [picture.width, picture.height];
  const context = canvas.getContext("2d");
  context.translate(canvas.width / 2, canvas.height / 2);
  context.rotate((quarters * Math.PI) / 2);
  context.drawImage(picture, -picture.width / 2, -picture.height / 2);
}

/** The attention map of each view, from dark to bright, over the view itself; of two the whole is above or left. */
function drawAttention(shown, pixels, attention, size) {
  const places = viewPlaces(pixels);
  const scale = Math.max(shown.width, shown.height) / Math.max(pixels.width, pixels.height);
  const isWide = pixels.width > pixels.height;
  const more = places.length > 1 ? Math.min(shown.width, shown.height) + GAP : 0;
  const canvas = newCanvas(isWide ? shown.width : shown.width + more, isWide ? shown.height + more : shown.height);
  const context = canvas.getContext("2d");
  places.forEach(({ left, top, width, height }, view) => {
    const source = [left, top, width, height].map((length) => length * scale);
    // the square in the centre stands beside its place in the whole
    const place = [...source];
    if (view === 0) place[isWide ? 1 : 0] += more;
    Object.assign(context, { globalAlpha: 1, globalCompositeOperation: "source-over" });
    context.drawImage(drawHeat(attention[view], size), ...place);
    Object.assign(context, { globalAlpha: 0.35, globalCompositeOperation: "lighter" });
    context.drawImage(shown, ...source, ...place);
  });
  return canvas;
}

function drawHeat(values, size) {
  const canvas = newCanvas(size, size);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const gradient = context.createLinearGradient(0, 0, size, 0);
  HEAT.forEach((color, i) => gradient.addColorStop(i / (HEAT.length - 1), color));
  context.fillStyle = gradient;
  context.fillRect(0, 0, size, 1);
  const colors = new Uint32Array(context.getImageData(0, 0, size, 1).data.buffer);
  const image = context.createImageData(size, size);
  new Uint32Array(image.data.buffer).set(Array.from(values, (value) => colors[Math.round(value * (size - 1))]));
  context.putImageData(image, 0, 0);
  return canvas;
}

function start() {
  say("Loading the network (24 MB, once).");
  const loading = loadNetwork((fraction) => (find("progress").value = fraction)).then(
    (network) => (say("Ready."), network),
    (error) => say(`The network could not be loaded: ${error.message}`),
  );
  let queue = loading.finally(() => (find("progress").hidden = true));
  const add = (...files) => {
    queue = queue.then((network) => network && files.length && lookAtAll(files, network)).then(() => loading);
  };
  const addSample = async (address) => add(new File([await (await get(address)).blob()], address.split("/").pop()));
  const mark = (event, isOver) => (event.preventDefault(), document.body.classList.toggle("over", isOver));
  document.addEventListener("dragover", (event) => mark(event, true));
  document.addEventListener("dragleave", (event) => mark(event, false));
  document.addEventListener("drop", (event) => (mark(event, false), add(...event.dataTransfer.files)));
  find("#files").addEventListener("change", ({ target }) => (add(...target.files), (target.value = "")));
  for (const button of document.querySelectorAll("#samples button")) {
    const fail = (error) => say(`The sample could not be loaded: ${error.message}`);
    button.addEventListener("click", () => addSample(button.firstElementChild.src).catch(fail));
  }
}

start();
