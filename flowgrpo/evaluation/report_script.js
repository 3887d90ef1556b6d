// The report's film strip, and its updates while a run is followed. The page is complete without this.
"use strict";

const main = document.querySelector("main");
const live = document.body.dataset.version !== undefined;
const interval = Number(document.body.dataset.interval); // milliseconds between two questions to the server
const FRAME = 700; // milliseconds for which playing shows a frame
let film = null;

// Connects the slider of the film strip with its images. `position` is the frame that was shown before
// an update, or null for the newest.
function startFilm(position) {
  if (film) clearInterval(film.timer);
  film = null;
  const data = main.querySelector(".film-data");
  if (!data) return;
  const frames = JSON.parse(data.textContent);
  const images = [...main.querySelectorAll(".film-tiles img")];
  const notes = [...main.querySelectorAll(".film-tiles figcaption")];
  const [bar, slider, button, output, scores] =
    [".film-bar", ".film-bar input", ".film-bar .play", ".film-bar output", ".film-scores"].map((s) => main.querySelector(s));
  frames[frames.length - 1].images = images.map((image) => image.src);

  function show(index) {
    const frame = frames[index];
    images.forEach((image, i) => { image.src = frame.images[i]; });
    notes.forEach((note, i) => {
      note.textContent = frame.notes[i];
      note.className = { "✓": "good", "✗": "bad" }[frame.notes[i][0]] || "";
    });
    output.textContent = frame.name;
    scores.textContent = frame.scores;
    slider.setAttribute("aria-valuetext", frame.name);
  }

  function stop() {
    clearInterval(film.timer);
    film.timer = null;
    button.classList.remove("playing");
    button.setAttribute("aria-label", "Play");
  }

  function play() {
    if (film.timer) return stop();
    button.classList.add("playing");
    button.setAttribute("aria-label", "Pause");
    if (Number(slider.value) === frames.length - 1) slider.value = 0;
    show(Number(slider.value));
    film.timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show(Number(slider.value));
      if (Number(slider.value) === frames.length - 1) stop();
    }, FRAME);
  }

  film = { timer: null, frames, slider };
  slider.addEventListener("input", () => { if (film.timer) stop(); show(Number(slider.value)); });
  button.addEventListener("click", play);
  for (const image of images) {
    image.addEventListener("pointerdown", () => { if (!film.timer) show(0); });
    image.addEventListener("dragstart", (event) => event.preventDefault());
  }
  bar.hidden = false;
  if (position !== null && position < frames.length) {
    slider.value = position;
    show(position);
  }
}

// Shows the chosen frame again when an image is no longer pressed, wherever the pointer is then.
for (const name of ["pointerup", "pointercancel"]) {
  document.addEventListener(name, () => {
    if (film && !film.timer) film.slider.dispatchEvent(new Event("input"));
  });
}

// Replaces the page's content and keeps what the reader has chosen: open details and the film's frame.
function replace(content) {
  const position = film && Number(film.slider.value) < film.frames.length - 1 ? Number(film.slider.value) : null;
  const open = new Set([...main.querySelectorAll("details[open] > summary")].map((s) => s.textContent));
  const { scrollX, scrollY } = window;
  main.innerHTML = content;
  for (const summary of main.querySelectorAll("details > summary")) {
    if (open.has(summary.textContent)) summary.parentElement.open = true;
  }
  startFilm(position);
  window.scrollTo(scrollX, scrollY);
}

async function follow() {
  const status = document.querySelector(".live");
  try {
    if (!document.hidden) {
      const answer = await fetch(`state?version=${encodeURIComponent(document.body.dataset.version)}`);
      const state = await answer.json();
      if (state.content !== undefined) {
        replace(state.content);
        document.body.dataset.version = state.version;
      }
      status.textContent = state.words;
      status.dataset.state = state.state;
    }
  } catch {
    status.textContent = "no connection: is flowgrpo report --serve still running?";
    status.dataset.state = "lost";
  }
  setTimeout(follow, interval);
}

startFilm(null);
if (live) follow();
