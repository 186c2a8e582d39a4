"""The page in a browser: its script zooms and sorts, and its policy lets no other script run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from offmap.audit.report.hosts import parse_report
from offmap.audit.report.html import render_html
from offmap.patience import scaled

from .samples import PAGE, Json, cell, every_vm, exposed, vm
from .test_html import EVIL, Page

DRIVER = """<script>addEventListener("load", () => {
  const figure = document.querySelector("figure.memory");
  const svg = figure.querySelector("svg.physical");
  const say = (name, value) => document.body.setAttribute("data-" + name, value);
  const press = (name) => figure.querySelector(`button[name=${name}]`).click();
  const key = (name) => svg.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
  const first = () => svg.querySelector("text").textContent;
  say("whole", first());
  press("graver");
  say("graver", figure.querySelector("output").textContent);
  for (let i = 0; i < 20; i++) key("+");
  say("near", first());
  say("scale", figure.querySelector(".scale").textContent);
  say("chosen", svg.querySelector(".chosen").getAttribute("class"));
  key("ArrowDown");
  say("down", first());
  key("ArrowRight");
  say("next", figure.querySelector("output").textContent);
  key("0");
  say("again", first());
  const table = [...document.querySelectorAll("table.sortable")].find((each) => each.textContent.includes("VMM"));
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[2].textContent).join();
  table.querySelectorAll("th button")[2].click();
  say("up", column());
  table.querySelectorAll("th button")[2].click();
  say("sorted", column());
});</script>"""


def in_browser(folder: Path, text: str) -> Page:
    """The page as it is once a browser has loaded it and run what it allows."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium: the page's script and its policy were not tried in a browser")
    (folder / "page.html").write_text(text)
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --dump-dom"
    command = [browser, *options.split(), f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=scaled(120), check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Page(done.stdout)


def many() -> Json:
    cells = [cell(1 << 38, 1 << 30), cell((1 << 38) + (1 << 30), PAGE, direct=1), cell(1 << 39, 1 << 30)]
    physical = {"ram": [["0x0", f"{1 << 40:#x}"]], "cell_bytes": None, "cells": cells}
    return every_vm(vm(10), exposed(9, physical=physical), vm(1000))


def test_script_zooms_and_sorts(tmp_path: Path) -> None:
    text = render_html([parse_report(many())])
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # lets the driver in
    page = in_browser(tmp_path, text.replace("</body>", DRIVER + "</body>"))
    (body,) = [attributes for tag, attributes in page.elements if tag == "body"]
    said = {name.removeprefix("data-"): value or "" for name, value in body.items()}
    assert said["whole"] == said["again"] == "0x0"
    assert said["graver"].startswith("0x4040000000 to 0x4040000fff, 4 KiB; direct map; ")
    assert said["scale"] == "Each row is 16 KiB now." and "chosen" in said["chosen"]
    assert (said["near"], said["down"]) == ("0x403ffe0000", "0x403ffe4000")
    assert said["next"].startswith("0x8000000000 to ")
    assert (said["up"], said["sorted"]) == ("9,10,1000", "1000,10,9")


def test_policy_lets_no_other_script_run(tmp_path: Path) -> None:
    text = render_html([parse_report(exposed(process=EVIL, notes=[EVIL]))])
    # Were an escape forgotten:
    hole = "<script>document.body.dataset.broken = 1</script><img src=x onerror='document.body.dataset.broken = 2'>"
    page = in_browser(tmp_path, text.replace("</body>", hole + "</body>"))
    (body,) = [attributes for tag, attributes in page.elements if tag == "body"]
    assert "data-broken" not in body
    # The positive control: our own script has run, and took the buttons out of hiding.
    assert all("hidden" not in attributes for attributes in page.classes("zoom"))
    assert page.classes("f-direct")
