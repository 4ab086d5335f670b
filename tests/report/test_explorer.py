"""The explorer: driven in a browser, what it shows is what the artifacts hold; where there is nothing, it says so."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, chromium, find_chromium

from flashsigmoid.record import RecordWriter
from flashsigmoid.report import explorer, write_report
from flashsigmoid.report.explorer import NO_PLOTLY, NO_SNAPSHOTS

STEPS, LAYERS, HEADS = (0, 100, 600), (0, 2, 3), (0, 1)
TEXT = [*"To be,\n</script><!--", "né", "\N{REPLACEMENT CHARACTER}"]
needs_plotly = pytest.mark.skipif(importlib.util.find_spec("plotly") is None, reason="plotly is not installed")


def add_snapshots(folder: Path, *, seed: int, grid: tuple[int, int] = (0, 0), steps: tuple[int, ...] = STEPS) -> Path:
    """Give a run snapshots as training leaves them; of an image if it has a grid."""
    rows, columns = grid
    patches = [f"row {row}, column {column}" for row in range(rows) for column in range(columns)]
    tokens = ["class token", *patches] if rows else TEXT
    rng, n = np.random.default_rng(seed), len(tokens)
    with RecordWriter(folder / "records.jsonl", resume_step=10**6) as writer:
        for step in steps:
            weights = rng.random((len(LAYERS), len(HEADS), n, n))
            np.savez_compressed(
                folder / f"attention-{step:08d}.npz",
                weights=(weights if rows else np.tril(weights)).astype(np.float16),
                norms=rng.random((len(LAYERS), len(HEADS), n), dtype=np.float32),
                layers=np.array(LAYERS),
                heads=np.array(HEADS),
                tokens=np.array(tokens),
                image=rng.integers(0, 256, (3 if rows else 0, 8 * rows, 8 * columns), np.uint8),
                grid=np.array(grid),
            )
            writer.write("attention_snapshot", step=step, artifact=f"attention-{step:08d}.npz")
    return folder


def arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    with np.load(folder / f"attention-{step:08d}.npz") as file:
        return dict(file)


@pytest.fixture
def texts(run: Callable[..., Path]) -> list[Path]:
    """Both arms on text, with snapshots; softmax's are of fewer steps."""
    sigmoid, softmax = run("sigmoid"), run("softmax", attention="softmax")
    return [add_snapshots(sigmoid, seed=1), add_snapshots(softmax, seed=2, steps=(0, 600))]


@pytest.fixture
def images(image_run: Callable[..., Path]) -> list[Path]:
    """Both arms on an image of 3 x 4 patches."""
    folders = [image_run(name, attention=name) for name in ("sigmoid", "softmax")]
    return [add_snapshots(folder, seed=seed, grid=(3, 4)) for seed, folder in enumerate(folders)]


def test_runs_without_snapshots_say_so_and_an_old_explorer_goes(run, tmp_path) -> None:
    run("sigmoid")
    (tmp_path / "report-explorer.html").write_text("of yesterday")
    page = write_report([tmp_path / "runs"], tmp_path).read_text()
    assert NO_SNAPSHOTS in page
    assert not (tmp_path / "report-explorer.html").exists()


def test_without_plotly_the_report_says_what_is_missing(texts, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(explorer.importlib.util, "find_spec", lambda name: None)
    page = write_report(texts, tmp_path).read_text()
    assert "pip install &#x27;flashsigmoid[report]&#x27;" in page
    assert NO_PLOTLY.partition("'")[0] in page
    assert not (tmp_path / "report-explorer.html").exists()


@pytest.mark.parametrize("fault", ["cut", "shape", "missing array", "other tokens"])
def test_a_damaged_snapshot_is_an_error(texts, tmp_path, fault) -> None:
    path = texts[0] / "attention-00000100.npz"
    found = arrays(texts[0], 100)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif fault == "shape":
        np.savez(path, **{**found, "norms": found["norms"][:1]})
    elif fault == "missing array":
        del found["heads"]
        np.savez(path, **found)
    else:
        np.savez(path, **{**found, "tokens": found["tokens"][::-1]})
    with pytest.raises(ValueError, match="attention snapshot"):
        write_report(texts, tmp_path)


@needs_plotly
def test_the_pages_are_linked_and_load_nothing(texts, run, tmp_path) -> None:
    run("third", sigmoid_bias=0.0)
    out = write_report([tmp_path / "runs"], tmp_path / "a report.html")
    report, page = out.read_text(), (tmp_path / "a report-explorer.html").read_text()
    assert 'href="a%20report-explorer.html"' in report
    assert len(report) < 500_000
    assert "<script src" not in page
    assert page.count("</script>") == 3  # hostile tokens end none
    assert "default-src 'none'; img-src data:;" in page
    assert "No snapshots: sigmoid, sigmoid_bias=0." in page


@pytest.fixture
def browser(tmp_path: Path):
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with chromium(path, tmp_path / "profile") as driven:
        yield driven


def shown(browser: Browser, **state: int | str) -> None:
    """Wait until the page shows what was asked for."""
    items = " && ".join(f"s.{key} === {json.dumps(value)}" for key, value in state.items())
    browser.wait(f"(s => {items})(JSON.parse(document.body.dataset.drawn || '{{}}'))", 30.0)


def matrix(browser: Browser, plot: str, trace: int = 0, field: str = "z") -> np.ndarray:
    """The numbers that a plot of plotly draws."""
    return np.array(browser.run(f"document.getElementById('{plot}').data[{trace}].{field}"))


def expected(folder: Path, step: int, layer: int, head: int) -> np.ndarray:
    return arrays(folder, step)["weights"][LAYERS.index(layer), HEADS.index(head)].astype(np.float64)


@needs_plotly
@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 390])
def test_a_reader_picks_step_layer_head_and_token_of_a_text(texts, browser: Browser, tmp_path, width) -> None:
    out = write_report(texts, tmp_path)
    browser.resize(width, 900)
    browser.open(out)
    browser.run("document.querySelector('a[href$=\"explorer.html\"]').click()")  # from the report, as a reader
    browser.wait("location.pathname.endsWith('-explorer.html')")
    shown(browser, step=600, layer=3, head=0, token=len(TEXT) - 1)
    for i, folder in enumerate(texts):
        assert np.array_equal(matrix(browser, f"map-{i}"), expected(folder, 600, 3, 0))

    browser.choose("#layer", 2)
    browser.choose("#head", 1)
    browser.click("#strip-1 button:nth-child(6)")
    shown(browser, step=600, layer=2, head=1, token=5)
    assert browser.run("document.getElementById('token').value") == "5"
    for i, folder in enumerate(texts):
        weights = expected(folder, 600, 2, 1)
        assert np.array_equal(matrix(browser, f"map-{i}"), weights)
        assert not np.array_equal(weights, expected(folder, 600, 3, 0))
        facts = browser.run(f"document.getElementById('facts-{i}').textContent")
        assert facts.startswith(f"token 5, “,”: row mass {weights[5].sum():.3g}".rstrip("0"))
        pressed = f"document.querySelector('#strip-{i} [aria-pressed=true]').textContent"
        assert browser.run(pressed) == ","
        # dots through training: of this head and token
        steps = [step for step in STEPS if (folder / f"attention-{step:08d}.npz").exists()]
        dots = browser.run(f"document.getElementById('row_mass').data[{2 * i + 1}]")
        assert dots["x"] == steps
        assert dots["y"] == pytest.approx([expected(folder, step, 2, 1)[5].sum() for step in steps], rel=1e-6)
        dots = browser.run(f"document.getElementById('attn_norm').data[{2 * i + 1}]")
        norms = [arrays(folder, step)["norms"][1, 1, 5] for step in steps]
        assert dots["y"] == pytest.approx(norms, rel=2**-10)  # float16

    # a step that one of the arms has only
    browser.choose("#step", 1)
    shown(browser, step=100)
    assert np.array_equal(matrix(browser, "map-0"), expected(texts[0], 100, 2, 1))
    assert browser.run("document.getElementById('shown-1').hidden") is True
    assert "not recorded" in browser.run("document.getElementById('facts-1').textContent")

    # a click on the map picks the query of that row
    browser.choose("#step", 0)
    browser.click("#map-0 .nsewdrag", across=0.3, down=(3 + 0.5) / len(TEXT))
    shown(browser, step=0, token=3)
    browser.choose("#scale", "same")
    shown(browser, step=0, scale="same")
    tops = {browser.run(f"document.getElementById('map-{i}').data[0].zmax") for i in (0, 1)}
    assert tops == {max(expected(folder, 0, 2, 1).max() for folder in texts)}

    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.complaints == []


@needs_plotly
@pytest.mark.long
@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_a_reader_picks_a_patch_of_an_image(images, browser: Browser, tmp_path, width, dark) -> None:
    out = write_report(images, tmp_path)
    browser.resize(width, 900, dark=dark)
    browser.open(out.with_name("report-explorer.html"))
    shown(browser, step=600, layer=3, head=0, token=0)
    browser.choose("#layer", 0)
    # a patch in row 2, column 1 of the picture at the left
    browser.click("#patches-1 .xy .nsewdrag, #patches-1 [data-subplot=xy].nsewdrag", across=1.5 / 4, down=2.5 / 3)
    token = 1 + 2 * 4 + 1
    shown(browser, layer=0, token=token)
    for i, folder in enumerate(images):
        weights = expected(folder, 600, 0, 0)
        assert np.array_equal(matrix(browser, f"map-{i}"), weights)
        assert np.array_equal(matrix(browser, f"patches-{i}", 1), weights[token, 1:].reshape(3, 4))
        assert "row 2, column 1" in browser.run(f"document.getElementById('facts-{i}').textContent")
    ink, page = browser.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")

    def brightness(colour: str) -> int:
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    assert (brightness(ink) > brightness(page)) == dark
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.complaints == []


@needs_plotly
@pytest.mark.long
def test_the_driver_hears_complaints(texts, browser: Browser, tmp_path) -> None:
    """What is loaded and what fails is heard, so that none of it in the tests above says something."""
    page = write_report(texts, tmp_path).with_name("report-explorer.html")
    source = page.read_text().replace("</main>", '<img src="https://example.invalid/x.png"></main><script>f()</script>')
    page.write_text(source)
    browser.open(page)
    browser.wait("document.body.dataset.drawn")
    assert any("f is not defined" in complaint for complaint in browser.complaints)
    assert any("example.invalid" in complaint for complaint in browser.complaints)
