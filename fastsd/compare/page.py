"""The pages of `fastsd compare`, `fastsd watch` and audits: HTML without a network, wide and narrow, light and dark."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Template

from matplotlib.figure import Figure
from PIL import Image

from fastsd.compare import charts
from fastsd.compare.numbers import Table
from fastsd.compare.runs import RunData
from fastsd.run.folder import Grid

LONG = 44  # a table cell with more letters may be broken into several lines
Frames = Sequence[tuple[Grid, str]]


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on how to read the section, and its HTML."""

    title: str
    note: str
    body: str

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())

    @property
    def html(self) -> str:
        anchor, title = _safe(self.anchor), _safe(self.title)
        return f'<section id="{anchor}"><h2>{title}</h2>\n<p>{_safe(self.note)}</p>\n{self.body}</section>'


def page(title: str, sections: Sequence[Section], seconds: float = 0) -> str:
    """Return a whole page. One with `seconds` gets its sections again after so many, from the address "sections"."""
    links = " ".join(f'<a href="#{_safe(s.anchor)}">{_safe(s.title)}</a>' for s in sections)
    script = _FILM_SCRIPT + (_LIVE_SCRIPT.substitute(milliseconds=round(1000 * seconds)) if seconds else "")
    head = f"<nav>{links}</nav>" if not seconds else '<p id="state"></p>'
    return _PAGE.substitute(title=_safe(title), head=head, body="\n".join(s.html for s in sections), script=script)


def table_section(table: Table) -> Section:
    if not table.rows:
        return Section(table.title, table.note, "")
    head = "".join(f'<th scope="col">{_word(word)}</th>' if word else "<td></td>" for word in table.head)
    rows = "".join(f"<tr>{_cell(first, 'th')}{''.join(map(_cell, others))}</tr>\n" for first, *others in table.rows)
    # A region that scrolls must be reachable with the keyboard.
    region = f'<div class="wide" role="region" aria-label="{_safe(table.title)}" tabindex="0">'
    body = f"{region}<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    return Section(table.title, table.note, body)


def picture(image: Image.Image, alt: str, caption: str | RunData = "") -> str:
    """Return the HTML of a picture with the alternative text `alt`. A wide one scrolls, to keep its texts readable."""
    text = f"<figcaption>{_word(caption)}</figcaption>" if caption else ""
    return f'<figure tabindex="0">{text}<img class="sheet" src="{data_uri(image)}" alt="{_safe(alt)}"></figure>\n'


def chart(draw: Callable[[float], Figure | None], description: str) -> str:
    """Return the HTML of a chart in two widths, of which the page shows the one that fits, or "" if there is none to draw."""
    figures = [(name, draw(width)) for name, width in (("wide-only", charts.WIDE), ("narrow-only", charts.NARROW))]
    return "".join(f'<figure class="{name}">{charts.svg(figure, description)}</figure>\n' for name, figure in figures if figure)


def film(films: Sequence[tuple[RunData, Frames]]) -> str:
    """Return the HTML of a slider for the sample grids of all runs. Each run shows its last grid up to the chosen step.

    `films` has, for each run, its grids with the address of each one's picture: a path, or a `data_uri`.
    """
    figures = "".join(
        f'<figure><figcaption>{_word(run)} <small></small></figcaption><img alt="samples of {_safe(run.label)}"></figure>\n'
        for run, _ in films
    )
    data = [[(grid.step, f"{grid.stage} {grid.step:,}", uri) for grid, uri in frames] for _, frames in films]
    return _FILM.substitute(figures=figures, films=_safe(json.dumps(data)))


def _cell(word: str | RunData, kind: str = "td") -> str:
    """Return the HTML of a table cell. Short text stays on one line; long text may break anywhere."""
    css_class = ' class="long"' if isinstance(word, str) and len(word) > LONG else ""
    scope = ' scope="row"' if kind == "th" else ""
    return f"<{kind}{css_class}{scope}>{_word(word)}</{kind}>"


def _word(word: str | RunData) -> str:
    if isinstance(word, RunData):
        return f'<span class="run"><i style="background:{word.colour}"></i>{_safe(word.label)}</span>'
    return _safe(word)


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def data_uri(image: Image.Image) -> str:
    """Return an image as an address that contains it."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=84, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


_FILM = Template("""<div class="films" data-films="$films"><div class="bar"><button type="button">play</button>
<input type="range" min="0" aria-label="step"><output></output></div>
<div class="film">$figures</div></div>
""")

_FILM_SCRIPT = """<script>
const positions = new Map();  // of the sliders, by section: a section may be replaced by one with more steps
const startFilms = () => document.querySelectorAll(".films:not(.started)").forEach(element => {
  element.classList.add("started");
  const films = JSON.parse(element.dataset.films), key = element.closest("section").id;
  const steps = [...new Set(films.flat().map(frame => frame[0]))].sort((a, b) => a - b);
  const [play, slider, output] = ["button", "input", "output"].map(kind => element.querySelector(kind));
  const figures = element.querySelectorAll("figure");
  let timer = 0;
  const show = () => {
    const step = steps[slider.value];
    positions.set(key, +slider.value === steps.length - 1 ? Infinity : step);
    output.value = "step " + step.toLocaleString("en");
    films.forEach((film, i) => {
      const frame = film.filter(frame => frame[0] <= step).pop() || film[0];
      figures[i].querySelector("img").src = frame[2];
      figures[i].querySelector("small").textContent = frame[1];
    });
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "play"; };
  const before = positions.get(key) ?? Infinity;
  slider.max = steps.length - 1;
  slider.value = before === Infinity ? steps.length - 1 : Math.max(steps.findLastIndex(step => step <= before), 0);
  slider.oninput = () => { stop(); show(); };
  play.onclick = () => {
    if (timer) return stop();
    play.textContent = "stop";
    timer = setInterval(() => {
      if (!element.isConnected) return clearInterval(timer);
      slider.value = (+slider.value + 1) % steps.length;
      show();
    }, 500);
  };
  show();
});
startFilms();
</script>
"""

_LIVE_SCRIPT = Template("""<script>
const state = document.getElementById("state"), main = document.querySelector("main"), last = new Map();
const update = async () => {
  try {
    const sections = await (await fetch("sections", {cache: "no-store"})).json();
    if (sections.map(([id]) => id).join() !== [...main.children].map(section => section.id).join()) {
      main.innerHTML = sections.map(([, html]) => html).join("");
    } else {
      sections.forEach(([id, html]) => { if (last.get(id) !== html) document.getElementById(id).outerHTML = html; });
    }
    sections.forEach(([id, html]) => last.set(id, html));
    startFilms();
    state.removeAttribute("role");
    state.textContent = "live, " + new Date().toLocaleTimeString();
  } catch {  // a screen reader says this, and not each refresh
    state.setAttribute("role", "alert");
    state.textContent = "no connection to fastsd watch";
  }
};
update();
setInterval(() => document.hidden || update(), $milliseconds);
</script>
""")

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  :root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --soft: #55555c; --line: #e4e4e7; --link: #0a5ea8;
          --button: #f7f7f8; --grid: #e8e8e8; --mark: #6f6f76; }
  @media (prefers-color-scheme: dark) {
    :root { --paper: #161618; --ink: #ececee; --soft: #a8a8b0; --line: #38383d; --link: #6cb6ff; --button: #2a2a2e;
            --grid: #333338; --mark: #9a9aa2; }
  }
  body { max-width: 1200px; margin: 32px auto; padding: 0 24px; background: var(--paper); color: var(--ink);
         font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
  h1 { font-size: 26px; margin: 0 0 6px; }
  h2 { font-size: 19px; margin: 44px 0 2px; padding-top: 14px; border-top: 1px solid var(--line); }
  p { margin: 2px 0 12px; color: var(--soft); max-width: 96ch; }
  nav { margin-bottom: 8px; line-height: 1.9; }
  nav a { display: inline-block; margin-right: 16px; color: var(--link); text-decoration: none; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; vertical-align: top; padding: 5px 20px 5px 0; border-bottom: 1px solid var(--line); }
  th { font-weight: 600; color: var(--soft); }
  thead th { vertical-align: bottom; line-height: 1.3; }
  td, tbody th, .run { white-space: nowrap; }
  tbody .long { white-space: normal; overflow-wrap: anywhere; min-width: 320px; }
  .run { font-weight: 600; color: var(--ink); }
  .run i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
  figure { margin: 0 0 20px; overflow-x: auto; }
  figcaption { margin: 8px 0 6px; }
  figcaption small { color: var(--soft); margin-left: 6px; }
  img, figure svg { width: 100%; height: auto; display: block; }
  img.sheet { width: auto; }
  svg text { fill: var(--ink); font-family: system-ui, -apple-system, "Segoe UI", sans-serif !important; }
  .narrow-only { display: none; }
  @media (max-width: 1000px) {  /* below, the texts of a wide chart would be smaller than 11 px */
    .wide-only { display: none; }
    .narrow-only { display: block; max-width: 600px; }
  }
  @media (max-width: 760px) {
    body { margin: 16px auto; padding: 0 12px; }
    tbody .long { min-width: 200px; }
  }
  .film { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 20px; }
  .film img { max-width: 640px; }
  .bar { display: flex; align-items: center; gap: 14px; margin: 6px 0 10px; position: sticky; top: 0; background: var(--paper);
         padding: 8px 0; }
  .bar input { flex: 1; }
  .bar output { min-width: 9em; font-variant-numeric: tabular-nums; }
  button { font: inherit; min-width: 5em; padding: 3px 12px; border: 1px solid var(--line); border-radius: 6px;
           background: var(--button); color: var(--ink); }
  .trip { margin: 26px 0 34px; }
  .trip h3 { font-size: 15px; margin: 0; overflow-wrap: anywhere; }
  .trip h3 span { color: var(--soft); margin-right: 6px; font-variant-numeric: tabular-nums; }
  .trip p { font-variant-numeric: tabular-nums; margin-bottom: 4px; }
  .strip { display: grid; grid-template-columns: repeat(var(--columns), minmax(108px, 1fr)); gap: 0 12px; align-items: end;
           overflow-x: auto; }
  .strip figure { margin: 0; }
  .strip figcaption { overflow-wrap: anywhere; font-size: 13px; color: var(--soft); }
  .strip img + img { margin-top: 6px; image-rendering: pixelated; }
  @media print { .bar { display: none; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<h1>$title</h1>
$head
<main>
$body
</main>
$script</body>
</html>
""")
