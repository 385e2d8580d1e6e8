"""The report page and its plots: what is in them, and how a browser shows them at the width of a phone."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from stepcell.runtime.verify.report.page import page, warm_plot
from stepcell.runtime.verify.report.plot import Series, line_plot
from stepcell.runtime.verify.results import Growth, Report, Verdict, WarmError, judged, unchecked

PHONE = 390  # px
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

GROWTH = (
    Growth(
        name="y", kind="output", scale=1.0, steps=(1, 2, 4), max_abs=(1e-3, 2e-3, math.inf), rms=(1e-4, 2e-4, math.inf),
        peer_rms=(2e-4, 2e-4, 2e-4),
    ),
    Growth(name="<h>", kind="state", scale=0.5, steps=(1, 2, 4), max_abs=(0.0, 1e-3, 1e-3), rms=(0.0, 1e-4, 1e-4)),
)  # fmt: skip
WARM = (
    WarmError(
        name="h", measured=(1e-4, 2e-4), predicted=(1e-4, 1.9e-4), missed=(0.0, 1e-5), noise=(0.0, 1e-5),
        one_step=(1e-4, 1e-4), path=(0.1, 0.2),
    ),
)  # fmt: skip


def report(*verdicts: Verdict) -> Report:
    return Report(
        model="a-model-with-quite-a-long-name-that-does-not-fit-into-one-line-of-a-phone.onnx",
        reference="checkpoint.safetensors",
        subject_runs="TensorRT-RTX 1.7.1",
        reference_runs="torch, float64",
        device="GPU",
        input="random, seed 0, 32 frames",
        shapes={"x": (1, 3, 64, 64)},
        steps=4,
        warm_up=64,
        model_sha256="0" * 64,
        date="2026-11-29T00:00:00+00:00",
        versions={"stepcell": "0.1.0"},
        verdicts=verdicts,
        growth=GROWTH,
        warm=WARM,
        seconds=1.0,
    )


GOOD = judged("reset", 0.0, 0.0, "a reset is a fresh start")
BAD = judged("storage", 0.5, 0.01, "<h> stalls in float16", ["<h>"])


def test_failed_verdicts_come_first_and_names_are_escaped() -> None:
    text = page(report(GOOD, unchecked("pairing", "one state"), BAD))
    assert "failed: storage" in text
    assert text.index("<b>storage") < text.index("<b>reset") < text.index("<b>pairing")
    assert "<h>" not in text
    assert "&lt;h&gt; stalls in float16" in text
    assert "passed: 1 questions asked" in page(report(GOOD))


def test_the_page_is_one_file_of_well_formed_pictures() -> None:
    text = page(report(GOOD))
    assert not re.search(r"<script|<link|src=|@import|url\(", text)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        ET.fromstring(drawing)


def test_lines_leave_out_what_no_logarithm_has() -> None:
    drawing = ET.fromstring(line_plot("t", [Series("a", (1, 2, 3), (1e-3, 0.0, math.inf))], x_label="x", y_label="y"))
    assert len(drawing.findall("{*}circle")) == 1
    empty = line_plot("t", [Series("a", (1,), (0.0,))], x_label="x", y_label="y")
    assert "nothing differs" in empty
    ET.fromstring(empty)


def test_labels_do_not_cover_each_other() -> None:
    many = tuple(WARM[0].__class__(**{**{f: getattr(WARM[0], f) for f in WARM[0].__struct_fields__}, "name": f"h{n}"})
                 for n in range(5))  # fmt: skip
    places = [float(y) for y in re.findall(r'y="([\d.]+)" fill="var', warm_plot(many))]
    assert len(places) == 10
    gaps = [b - a for a, b in zip(sorted(places), sorted(places)[1:], strict=False)]
    assert min(gaps) > 12


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt install chromium)")
def test_a_phone_shows_the_page_without_scrolling_sideways(tmp_path: Path) -> None:
    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    script = "<script>document.title = 'wide ' + document.documentElement.scrollWidth</script>"
    # headless Chromium is never narrower than 500 px: a frame of a phone's width is put into it
    file.write_text(page(report(GOOD, BAD)).replace("</body>", script + "</body>"))
    holder = tmp_path / "holder.html"
    holder.write_text(
        f'<iframe src="page.html" style="width:{PHONE}px;height:2000px;border:0"></iframe>'
        "<script>onload = () => { document.title = document.querySelector('iframe').contentDocument.title }</script>"
    )
    base = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    where = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,2000", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [*base, *where, "--dump-dom", holder.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    found = re.search(r"<title>wide (\d+)</title>", done.stdout)
    assert found is not None, done.stdout + done.stderr[-500:]
    assert int(found[1]) <= PHONE
    subprocess.run(
        [*base, *where, f"--screenshot={picture}", file.as_uri()], capture_output=True, timeout=120, check=True
    )
    assert picture.stat().st_size > 20_000
