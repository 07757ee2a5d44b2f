"""The page of `fastsd compare`, a single HTML file that needs no network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

from PIL import Image

from fastsd.compare.numbers import Table
from fastsd.compare.runs import RunData
from fastsd.run.folder import Grid

LONG = 44  # a table cell with more letters may be broken into several lines
Frames = Sequence[tuple[Grid, Image.Image]]


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on how to read the section, and its HTML."""

    title: str
    note: str
    body: str

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def page(title: str, sections: Sequence[Section]) -> str:
    links = " ".join(f'<a href="#{_safe(s.anchor)}">{_safe(s.title)}</a>' for s in sections)
    bodies = "\n".join(
        f'<section id="{_safe(s.anchor)}"><h2>{_safe(s.title)}</h2>\n<p>{_safe(s.note)}</p>\n{s.body}</section>'
        for s in sections
    )
    return _PAGE.substitute(title=_safe(title), links=links, body=bodies)


def table_section(table: Table) -> Section:
    head = "".join(f"<th>{_word(word)}</th>" for word in table.head)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
    body = f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>' if table.rows else ""
    return Section(table.title, table.note, body)


def picture(image: Image.Image, alt: str, caption: str | RunData = "", *, lossless: bool = False) -> str:
    """Return the HTML of a picture with the alternative text `alt`. Charts should be `lossless`; photographs need not be."""
    text = f"<figcaption>{_word(caption)}</figcaption>" if caption else ""
    width = f' style="max-width:{image.width}px"' if not lossless else ""
    return f'<figure>{text}<img src="{_uri(image, lossless=lossless)}" alt="{_safe(alt)}"{width}></figure>\n'


def film(films: Sequence[tuple[RunData, Frames]]) -> str:
    """Return the HTML of a slider for the sample grids of all runs. Each run shows its last grid up to the chosen step."""
    figures = "".join(
        f'<figure><figcaption>{_word(run)} <small></small></figcaption><img alt="samples of {_safe(run.label)}"></figure>\n'
        for run, _ in films
    )
    data = [
        [(grid.step, f"{grid.stage} {grid.step:,}", _uri(image, lossless=False)) for grid, image in frames]
        for _, frames in films
    ]
    return _FILM.substitute(figures=figures, films=json.dumps(data).replace("<", "\\u003c"))


def _cell(word: str | RunData) -> str:
    """Return the HTML of a table cell. Short text stays on one line; long text may break anywhere."""
    css_class = ' class="long"' if isinstance(word, str) and len(word) > LONG else ""
    return f"<td{css_class}>{_word(word)}</td>"


def _word(word: str | RunData) -> str:
    if isinstance(word, RunData):
        return f'<span class="run"><i style="background:{word.colour}"></i>{_safe(word.label)}</span>'
    return _safe(word)


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _uri(image: Image.Image, *, lossless: bool) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", lossless=lossless, quality=84, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


_FILM = Template("""<div class="bar"><button type="button">play</button><input type="range" min="0" aria-label="step">
<output></output></div>
<div class="film">$figures</div>
<script>
(() => {
  const films = $films;
  const steps = [...new Set(films.flat().map(frame => frame[0]))].sort((a, b) => a - b);
  const section = document.currentScript.parentElement;
  const [play, slider, output] = ["button", "input", "output"].map(kind => section.querySelector(kind));
  const figures = section.querySelectorAll("figure");
  let timer = 0;
  const show = () => {
    const step = steps[slider.value];
    output.value = "step " + step.toLocaleString("en");
    films.forEach((film, i) => {
      const frame = film.filter(frame => frame[0] <= step).pop() || film[0];
      figures[i].querySelector("img").src = frame[2];
      figures[i].querySelector("small").textContent = frame[1];
    });
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "play"; };
  slider.max = steps.length - 1;
  slider.value = steps.length - 1;
  slider.oninput = () => { stop(); show(); };
  play.onclick = () => {
    if (timer) return stop();
    play.textContent = "stop";
    timer = setInterval(() => { slider.value = (+slider.value + 1) % steps.length; show(); }, 500);
  };
  show();
})();
</script>
""")

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { max-width: 1200px; margin: 32px auto; padding: 0 24px; background: #fff; color: #1c1c1e;
         font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
  h1 { font-size: 26px; margin: 0 0 6px; }
  h2 { font-size: 19px; margin: 44px 0 2px; padding-top: 14px; border-top: 1px solid #e4e4e7; }
  p { margin: 2px 0 12px; color: #55555c; max-width: 96ch; }
  nav { margin-bottom: 8px; line-height: 1.9; }
  nav a { margin-right: 16px; color: #0a5ea8; text-decoration: none; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; vertical-align: top; padding: 5px 20px 5px 0; border-bottom: 1px solid #ececef; }
  th { vertical-align: bottom; font-weight: 600; line-height: 1.3; color: #44444a; }
  td, .run { white-space: nowrap; }
  td.long { white-space: normal; overflow-wrap: anywhere; min-width: 320px; }
  .run { font-weight: 600; }
  .run i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
  figure { margin: 0 0 20px; overflow-x: auto; }
  figcaption { margin: 8px 0 6px; }
  figcaption small { color: #66666d; margin-left: 6px; }
  img { width: 100%; height: auto; display: block; }
  .film { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 20px; }
  .film img { max-width: 640px; }
  .bar { display: flex; align-items: center; gap: 14px; margin: 6px 0 10px; position: sticky; top: 0; background: #fff;
         padding: 8px 0; }
  .bar input { flex: 1; }
  .bar output { min-width: 9em; font-variant-numeric: tabular-nums; }
  button { font: inherit; min-width: 5em; padding: 3px 12px; border: 1px solid #c8c8cd; border-radius: 6px;
           background: #f7f7f8; }
  @media print { .bar { display: none; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<h1>$title</h1>
<nav>$links</nav>
$body
</body>
</html>
""")
