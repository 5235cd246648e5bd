"use strict";

const PARTS = ["vae1_encoder", "vae1_decoder", "vae2_encoder", "vae2_decoder", "module"];
const element = (id) => document.getElementById(id);
const sessions = {};
let ort, photo, waiting = Promise.resolve();

function say(text, state) {
  element("status").textContent = text;
  document.body.dataset.state = state;
}

/** The bytes of a data element: base64 of gzip. */
async function embedded(id) {
  const text = atob(element(id).textContent.trim());
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** RGBA levels -> NCHW in [-1, 1]. */
function toPixels(levels, size) {
  const area = size * size, pixels = new Float32Array(3 * area);
  for (let place = 0; place < area; place++)
    for (let channel = 0; channel < 3; channel++) pixels[channel * area + place] = levels[4 * place + channel] / 127.5 - 1;
  return pixels;
}

/** NCHW in about [-1, 1] -> RGBA levels. */
function toLevels(pixels, size) {
  const area = size * size, levels = new Uint8ClampedArray(4 * area).fill(255);
  for (let place = 0; place < area; place++)
    for (let channel = 0; channel < 3; channel++) levels[4 * place + channel] = Math.round((pixels[channel * area + place] + 1) * 127.5);
  return levels;
}

function psnr(one, other) {
  let sum = 0;
  for (let place = 0; place < one.length; place++) if (place % 4 !== 3) sum += (one[place] - other[place]) ** 2;
  return 10 * Math.log10((255 * 255) / (sum / (0.75 * one.length)));
}

function draw(id, levels, size, caption) {
  const canvas = element(id);
  canvas.width = canvas.height = size;
  canvas.getContext("2d").putImageData(new ImageData(levels, size, size), 0, 0);
  canvas.parentElement.querySelector("span").textContent = caption;
}

/** The photo's square centre, as RGBA levels. */
function cropped(bitmap, size) {
  const canvas = new OffscreenCanvas(size, size), context = canvas.getContext("2d");
  const side = Math.min(bitmap.width, bitmap.height);
  const left = Math.floor((bitmap.width - side) / 2), top = Math.floor((bitmap.height - side) / 2);
  context.fillStyle = "white";
  context.fillRect(0, 0, size, size);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, left, top, side, side, 0, 0, size, size);
  return context.getImageData(0, 0, size, size).data;
}

/** Run a part; [its only output, milliseconds]. */
async function run(part, inputs) {
  const session = sessions[part];
  const wanted = Object.fromEntries(session.inputNames.map((name) => [name, inputs[name]]));
  const start = performance.now();
  const outputs = await session.run(wanted);
  return [outputs[session.outputNames[0]], performance.now() - start];
}

async function translate() {
  if (!photo) return;
  const size = Number(element("size").value);
  say("Working …", "busy");
  await new Promise((resolve) => setTimeout(resolve)); // the words appear before the work begins
  const original = cropped(photo, size);
  const image = new ort.Tensor("float32", toPixels(original, size), [1, 3, size, size]);
  draw("original", new Uint8ClampedArray(original), size, `${size} x ${size} px`);
  const show = (id, pixels, time) => {
    const levels = toLevels(pixels.data, size);
    draw(id, levels, size, `${time.toFixed(0)} ms, ${psnr(levels, original).toFixed(2)} dB`);
  };
  const [latents, encoding1] = await run("vae1_encoder", { image });
  const [decoded, decoding1] = await run("vae1_decoder", { latents });
  show("vae1", decoded, encoding1);
  const [own, encoding2] = await run("vae2_encoder", { image });
  show("vae2", (await run("vae2_decoder", { latents: own }))[0], encoding2);
  const clamped = new ort.Tensor("float32", decoded.data.map((value) => Math.min(1, Math.max(-1, value))), decoded.dims);
  const [again, encodingAgain] = await run("vae2_encoder", { image: clamped });
  show("reencode", (await run("vae2_decoder", { latents: again }))[0], decoding1 + encodingAgain);
  const [aligned, aligning] = await run("module", { latents, image });
  show("aligned", (await run("vae2_decoder", { latents: aligned }))[0], aligning);
  say("Done.", "done");
}

/** One thing at a time, in the order in which it was asked for; a failure is said and the page goes on. */
function then(action) {
  waiting = waiting.then(action).catch((error) => say(`That did not work: ${error.message}`, "failed"));
}

function open(file) {
  if (!file) return;
  say("Reading …", "busy");
  then(async () => {
    photo = await createImageBitmap(file, { colorSpaceConversion: "none" });
    await translate();
  });
}

async function replace(files) {
  for (const file of files) {
    const part = PARTS.find((name) => file.name.startsWith(name)) ?? "module";
    sessions[part] = await ort.InferenceSession.create(new Uint8Array(await file.arrayBuffer()));
  }
  say(`Loaded ${files.length} file(s).`, "ready");
  await translate();
}

async function start() {
  const code = new Blob([await embedded("runtime")], { type: "text/javascript" });
  ort = await import(URL.createObjectURL(code));
  ort.env.wasm.wasmBinary = (await embedded("wasm")).buffer;
  ort.env.wasm.numThreads = 1;
  for (const part of PARTS) sessions[part] = await ort.InferenceSession.create(await embedded(part));
  say("Ready.", "ready");
}

element("photo").addEventListener("change", (event) => open(event.target.files[0]));
element("sample").addEventListener("click", () => then(async () => open(new Blob([await embedded("picture")]))));
element("size").addEventListener("change", () => then(translate));
element("models").addEventListener("change", (event) => {
  const files = [...event.target.files];
  then(() => replace(files));
});
for (const name of ["dragover", "dragleave", "drop"])
  document.addEventListener(name, (event) => {
    event.preventDefault();
    element("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") open(event.dataTransfer.files[0]);
  });
then(start);
