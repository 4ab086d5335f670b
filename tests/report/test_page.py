"""The page: it stands alone, nothing comes from outside, hostile text is escaped."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from report.reading import Page, arms_of

from flashsigmoid.record import RecordWriter, read_records
from flashsigmoid.report import write_report
from flashsigmoid.report.figures import DARK, LIGHT
from flashsigmoid.report.summary import statement

MakeRun = Callable[..., Path]


def test_the_page_stands_alone(seeds: Path, tmp_path: Path) -> None:
    out = write_report([seeds], tmp_path / "out" / "three.html")
    assert out == tmp_path / "out" / "three.html"
    names = sorted(file.relative_to(out.parent).as_posix() for file in out.parent.rglob("*"))
    figures = [f"three-figures/{name}.png" for name in ("attn-norm", "loss-step", "loss-time", "row-mass", "sink")]
    assert names == ["three-figures", *figures, "three.html"]
    assert all((out.parent / name).read_bytes().startswith(b"\x89PNG") for name in figures)

    source = out.read_text(encoding="utf-8")
    page = Page(source)
    assert not re.search(r"https?:|file:|data:|@import|//[a-z]", source)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "action", "background")
        assert not name.startswith("on")
        if name in ("href", "xlink:href"):
            assert value.startswith("#"), (tag, name, value)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|xlink:href=")#([^)"]+)', source)
    assert used
    assert set(used) <= set(ids)
    assert str(tmp_path) not in source

    # two figures of loss and three statistics of three arms, in the colours of the page alone
    assert page.tags.count("svg") == 2 + 3 * 3
    svgs = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    assert not {colour for colour in (*LIGHT, *DARK, "#000000", "#010203") if colour in svgs}
    assert {f"var(--arm-{i})" for i in range(3)} <= set(re.findall(r"var\(--arm-\d\)", svgs))
    assert "bigram 2.480" in svgs
    assert "any bigram 2.350" in svgs

    assert all(sentence in page.text for sentence in statement(arms_of(seeds)))
    assert page.tags.count("pre") == 3
    assert "<GLOUCESTER> & Lady:" in page.text
    marked = re.findall(r'<tr class="differs">(.*?)</tr>', source)
    assert [re.findall(r"<th.*?>(.*?)</th>", row) for row in marked] == [["attention"], ["sigmoid_bias"]]
    folded = source[source.index("<details>") : source.index("</details>")]
    assert '<th scope="row">nlayers</th>' in folded
    assert ">attention<" not in folded
    assert "flashsigmoid demo --seeds 3" in page.text

    # the same records give the same page, and leave nothing half-written
    write_report([seeds], out)
    assert out.read_text(encoding="utf-8") == source
    assert not list(out.parent.rglob("*.tmp"))


def test_damage_absence_and_hostile_text_are_shown_and_escaped(run: MakeRun, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script><img src="http://evil.example/a.png">$\\frac{1}{2}$'
    run("a", broken_at=300, sample=f"{evil}\x00\x1b[31m", without=("row_mass",), note=evil, nlayers=2)
    run("b", attention=evil, stop=250, without=("row_mass", "sample"), nlayers=2)
    out = tmp_path / "report"
    stale = out / "report-figures"
    stale.mkdir(parents=True)
    for name in ("row-mass.png", "mine.txt"):
        (stale / name).write_text("older")
    page = Page(write_report([tmp_path / "runs"], out).read_text(encoding="utf-8"))
    assert not {"script", "img"} & set(page.tags)
    assert evil in page.text
    assert "\x00" not in page.text
    assert "\x1b" not in page.text
    assert page.text.count("not recorded") >= 2
    assert "sigmoid: train/loss became nan at step 300." in page.text
    assert "is unfinished: 250 of 600 steps are recorded." in page.text
    # a figure that has nothing to show is gone; what is not ours stays
    assert not (stale / "row-mass.png").exists()
    assert (stale / "mine.txt").exists()


def test_a_single_run_without_numbers_is_a_page(tmp_path: Path) -> None:
    RecordWriter(tmp_path / "run" / "records.jsonl", {"attention": "sigmoid"}).close()
    out = write_report([tmp_path / "run"], tmp_path / "page.html")
    page = Page(out.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 0
    assert page.text.count("not recorded") >= 6
    assert list((tmp_path / "page-figures").iterdir()) == []


def test_a_resumed_and_dirty_run_says_so(run: MakeRun, tmp_path: Path) -> None:
    folder = run("a", nlayers=1)
    path = folder / "records.jsonl"
    RecordWriter(path, resume_step=400).close()
    first, rest = path.read_text().split("\n", 1)
    header = json.loads(first)
    header["header"].update(commit="0123abc", dirty=True)
    path.write_text(f"{json.dumps(header)}\n{rest}")
    assert read_records(path).header["dirty"] is True
    text = Page(write_report([folder], tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "0123abc with uncommitted changes" in text
    assert "after step 400" in text


def test_records_are_read_without_importing_a_model(run: MakeRun, tmp_path: Path) -> None:
    run("a", nlayers=1)
    program = (
        "import sys; from flashsigmoid.report import write_report\n"
        f"write_report([{str(tmp_path / 'runs')!r}], {str(tmp_path / 'page.html')!r})\n"
        "rooms = ('models', 'training', 'diagnostics', 'recipes')\n"
        "sys.exit([room for room in rooms if f'flashsigmoid.{room}' in sys.modules] or None)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.long
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (500, "light"), (1200, "dark")])
@pytest.mark.parametrize("runs", ["seeds", "pair"])
def test_a_browser_shows_the_page(
    request: pytest.FixtureRequest, tmp_path: Path, runs: str, width: int, scheme: str
) -> None:
    """Nothing overflows sideways, every figure has a size, and dark mode is dark."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    out = write_report([request.getfixturevalue(runs)], tmp_path / "page.html")
    # the page forbids scripts, so that a copy without that rule measures itself
    probe = (
        "<script>document.title = JSON.stringify({"
        "wide: document.documentElement.scrollWidth, window: innerWidth,"
        "small: [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width < 200).length,"
        "page: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,"
        "line: getComputedStyle(document.querySelector('#loss-step-0-axes_1 path[style*=\"--arm-0\"]')).stroke"
        "})</script></body>"
    )
    source = re.sub(r"<meta http-equiv.*?>", "", out.read_text(encoding="utf-8")).replace("</body>", probe)
    copy = tmp_path / "copy.html"
    copy.write_text(source, encoding="utf-8")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=2000 --dump-dom"
    )
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = subprocess.run(
        [
            chromium,
            *options.split(),
            *dark,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},2000",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert seen["window"] == width
    assert seen["wide"] <= width
    assert seen["small"] == 0

    def brightness(colour: str) -> int:
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert (brightness(seen["page"]) < brightness(seen["ink"])) == (scheme == "dark")
    palette = DARK if scheme == "dark" else LIGHT
    assert seen["line"] == "rgb({}, {}, {})".format(*bytes.fromhex(palette[0][1:]))
