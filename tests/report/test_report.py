"""report/: every claim comes from the records, nothing comes from outside, no damage is hidden."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from flashsigmoid.record import RecordWriter, read_records
from flashsigmoid.report import summary_rows, write_report
from flashsigmoid.report.arms import Arm, Point, group_arms, load_runs, paired_differences
from flashsigmoid.report.figures import DARK, LIGHT, layer_drawing, smooth
from flashsigmoid.report.summary import number_text, statement, title, warnings

MakeRun = Callable[..., Path]
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes, ids and text of a page; fails where tags do not close."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def arms_of(*folders: Path) -> list[Arm]:
    return group_arms(load_runs(folders))


def told(*folders: Path) -> str:
    return " ".join(statement(arms_of(*folders)))


@pytest.fixture
def seeds(run: MakeRun) -> Path:
    """Three arms of three seeds; seed by seed sigmoid - softmax is 0.01, 0.03, 0.02."""
    for seed, (sigmoid, softmax) in enumerate([(1.84, 1.83), (1.85, 1.82), (1.86, 1.84)]):
        run(f"sigmoid-{seed}", seed=seed, final=sigmoid)
        run(f"softmax-{seed}", seed=seed, attention="softmax", final=softmax, first_norm=1.4)
        last = run(f"without-{seed}", seed=seed, final=2.0 + sigmoid, sigmoid_bias=0.0, first_norm=84.0)
    return last.parent


# arms


def test_arms_are_settings_without_the_seed_and_the_pair_comes_first(seeds: Path) -> None:
    arms = arms_of(seeds)
    assert [arm.label for arm in arms] == ["sigmoid", "softmax", "sigmoid, sigmoid_bias=0.0"]
    assert [[run.seed for run in arm.runs] for arm in arms] == [[0, 1, 2]] * 3
    assert title(arms) == "Sigmoid against softmax attention"


def test_a_run_named_twice_counts_once(run: MakeRun) -> None:
    folder = run("sigmoid")
    assert len(load_runs([folder, folder.parent, folder / ".." / "sigmoid"])) == 1


def test_differences_are_paired_by_seed(seeds: Path) -> None:
    sigmoid, softmax, _ = arms_of(seeds)
    spread = paired_differences(sigmoid, softmax)
    assert spread.values == pytest.approx((0.01, 0.03, 0.02))
    assert spread.mean == pytest.approx(0.02)
    assert spread.deviation == pytest.approx(0.01)


def test_other_seeds_give_one_difference_of_means_and_are_told(run: MakeRun) -> None:
    folders = [
        run("a", seed=0, final=1.8),
        run("b", seed=1, final=1.9),
        run("c", seed=7, final=1.7, attention="softmax"),
    ]
    sigmoid, softmax = arms_of(*folders)
    assert paired_differences(sigmoid, softmax).values == pytest.approx((0.15,))
    assert "different seeds: sigmoid 0 and 1 and softmax 7" in " ".join(warnings([sigmoid, softmax]))


@pytest.mark.parametrize(
    ("paths", "rule"),
    [([], "at least one run"), (["missing"], "got missing, which is no folder"), (["."], "found none at or below")],
)
def test_no_runs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], rule: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rule):
        write_report(paths, tmp_path / "out")
    with pytest.raises(ValueError, match=rule):
        summary_rows(paths)
    assert list(tmp_path.iterdir()) == []


# words


def test_the_statement_has_the_numbers(seeds: Path) -> None:
    text = told(seeds)
    for claim in (
        "Three arms of the recipe demo, sigmoid, softmax and “sigmoid, sigmoid_bias=0.0”, differ in two settings",
        "They were trained for 600 steps, with seeds 0, 1 and 2.",
        "(nats per byte, mean of 3 seeds) ended at 1.850 for sigmoid, 1.830 for softmax and 3.850 for",
        "Sigmoid ends 0.020 above softmax (seed by seed +0.010 to +0.030, standard deviation 0.010, standard "
        "error of the mean 0.006).",
        "Sigmoid and softmax are below the 2.480 of a bigram model of the same text, "
        "“sigmoid, sigmoid_bias=0.0” is not below.",
        "are below the 2.350 that the best function of the previous token alone could reach, “sigmoid,",
    ):
        assert claim in text
    assert warnings(arms_of(seeds)) == []


def test_a_planted_number_changes_the_text(run: MakeRun) -> None:
    folders = [run("a", final=1.85), run("b", attention="softmax", final=1.83)]
    assert "ended at 1.850 for sigmoid and 1.830 for softmax" in told(*folders)
    assert "Sigmoid ends 0.020 above softmax." in told(*folders)
    assert "Both arms are below the 2.480" in told(*folders)
    with RecordWriter(folders[0] / "records.jsonl", resume_step=599) as writer:
        writer.write("val/loss", 2.6, unit="nats_per_token", step=600)
        writer.write("val/loss_bytes", 2.6, unit="nats_per_byte", step=600)
    text = told(*folders)
    assert "ended at 2.600 for sigmoid (best on the way" in text
    assert "Sigmoid ends 0.770 above softmax." in text
    assert "Softmax is below the 2.480 of a bigram model of the same text, sigmoid is not below." in text


def test_equal_ends_are_called_equal(run: MakeRun) -> None:
    assert "Sigmoid and softmax end equal to three decimals." in told(
        run("a", final=1.85), run("b", attention="softmax", final=1.85)
    )


def test_a_run_that_breaks_is_said_in_words(run: MakeRun) -> None:
    folders = [run("a", broken_at=300), run("b", attention="softmax")]
    arms = arms_of(*folders)
    text = told(*folders)
    assert "Sigmoid ended without a finite validation loss (best on the way: " in text
    assert "Softmax is below the 2.480 of a bigram model of the same text, sigmoid is not below." in text
    assert "ends " not in text
    assert "sigmoid: train/loss became nan at step 300." in warnings(arms)
    assert "No difference between sigmoid and softmax is given: they cannot be compared yet." in warnings(arms)
    assert summary_rows(folders)[0]["minus softmax"] == "open"


def test_a_broken_seed_is_left_out_of_the_mean_and_told(run: MakeRun) -> None:
    folders = [
        run("a", seed=0, final=1.8),
        run("b", seed=1, broken_at=100),
        run("c", seed=0, attention="softmax"),
        run("d", seed=1, attention="softmax"),
    ]
    text = told(*folders)
    assert "for sigmoid (" in text
    assert "without one run, unfinished or not finite)" in text
    assert "the 2.480 of a bigram model of the same text, sigmoid is below in 1 of 2 runs." in text
    assert "sigmoid of seed 1: train/loss became nan at step 100." in warnings(arms_of(*folders))
    assert summary_rows(folders)[0]["below bigram"] == "1 of 2 seeds"


def test_an_unfinished_run_is_said_in_words(run: MakeRun) -> None:
    folders = [run("a", stop=250), run("b", attention="softmax")]
    assert "Sigmoid is unfinished and stands at a validation loss of" in told(*folders)
    assert "sigmoid is unfinished: 250 of 600 steps are recorded." in warnings(arms_of(*folders))
    assert summary_rows(folders)[0]["steps"] == "250 of 600"
    assert "above" not in told(*folders)


def test_missing_kinds_are_said(run: MakeRun) -> None:
    folder = run("a", without=("baseline", "val", "attn_norm"))
    assert "no validation loss on record" in told(folder)
    assert "sigmoid has no validation loss on record." in warnings(arms_of(folder))
    row = summary_rows([folder])[0]
    assert (row["below bigram"], row["first |A V|"]) == ("not recorded", "not recorded")
    without_baseline = run("b", without=("baseline",))
    assert "sigmoid has no bigram baseline on record." in warnings(arms_of(without_baseline))
    assert "bigram" not in told(without_baseline)


def test_a_baseline_of_another_unit_is_no_baseline(run: MakeRun) -> None:
    folder = run("a", without=("val/loss_bytes",))
    assert "bigram" not in told(folder)
    assert "sigmoid has no bigram baseline on record." in warnings(arms_of(folder))


def test_losses_of_two_units_are_not_subtracted(run: MakeRun) -> None:
    folders = [run("a", without=("val/loss_bytes",)), run("b", attention="softmax")]
    assert "Some losses are per byte and some per token." in warnings(arms_of(*folders))
    assert summary_rows(folders)[0]["minus softmax"] == "open"


def test_training_loss_is_drawn_in_the_unit_of_validation(run: MakeRun) -> None:
    plain, tokens = arms_of(run("a"), run("b", attention="softmax", bytes_per_token=3.0))
    assert plain.bytes_per_token == 1.0
    assert tokens.bytes_per_token == pytest.approx(3.0)
    assert tokens.train_losses[0].mean == pytest.approx(
        plain.train_losses[0].mean,
        abs=5 * math.sqrt(2) * 0.05,  # standard deviations of the difference
    )


def test_summary_rows_have_the_same_columns(seeds: Path) -> None:
    rows = summary_rows([seeds])
    assert len({tuple(row) for row in rows}) == 1
    assert [row["arm"] for row in rows] == ["sigmoid", "softmax", "sigmoid, sigmoid_bias=0.0"]
    assert rows[0]["final loss, nats per byte"] == "1.850 (1.840 to 1.860)"
    assert rows[0]["minus softmax"] == "+0.020 ± 0.006"
    assert [row["below bigram"] for row in rows] == ["yes", "yes", "no"]
    assert rows[0]["time"] == "2.0 min"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (84.4, "84.4"), (1234.0, "1234"), (0.0123, "0.0123"), (1e-9, "1.00e-09"), (math.nan, "nan")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number_text(value) == text


def test_an_arm_of_zeros_leaves_the_others_their_decades(tmp_path: Path) -> None:
    for bias, norm in ((None, 1.0), (0.0, 100.0), (-math.inf, 0.0)):
        with RecordWriter(
            tmp_path / str(bias) / "records.jsonl", {"attention": "sigmoid", "sigmoid_bias": bias}
        ) as writer:
            for step in (0, 10):
                writer.write("attn_norm/layer_0", norm, step=step)
    drawing = layer_drawing(group_arms(load_runs([tmp_path])), "attn_norm", "Norm", "")
    found = {}
    for panel in drawing.panels:
        axes = Figure().subplots()
        panel.draw(axes)
        value = np.asarray(axes.lines[0].get_ydata())[0]
        found[panel.title] = (axes.transData.transform((0.0, value))[1] - axes.bbox.y0) / axes.bbox.height
    low, middle, high = sorted(found.values())
    assert low == pytest.approx(0.0, abs=0.01)
    assert middle > 0.1  # on a linear axis: 0.01
    assert high > 0.9


def test_smoothing_keeps_a_straight_line_and_nan() -> None:
    line = [Point(step, None, float(step), step, step) for step in range(1000)]
    smoothed = smooth(line)
    assert len(smoothed) <= 300
    assert all(point.mean == pytest.approx(point.step) for point in smoothed[10:-10])
    broken = smooth([*line, *(Point(1000 + i, None, math.nan, math.nan, math.nan) for i in range(1000))])
    assert math.isnan(broken[-1].mean)


# the page


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


def test_classifiers_are_compared_by_accuracy(tmp_path):
    """Three seeds of one arm, one of the other: percent, ranges, and the constant answer; no word of bigrams."""
    for attention, accuracies in (("sigmoid", (0.9, 0.91, 0.89)), ("softmax", (0.925,))):
        for seed, accuracy in enumerate(accuracies):
            settings = {"recipe": "digits", "attention": attention, "seed": seed, "steps": 2}
            with RecordWriter(tmp_path / f"{attention}-{seed}" / "records.jsonl", settings) as writer:
                for step, share in ((0, 0.1), (2, accuracy)):
                    writer.write("val/accuracy", share, step=step)
                    writer.write("val/loss", 1.0 - share, unit="nats_per_image", step=step)
                writer.write("baseline/majority", 0.117, step=0)
    rows = {row["arm"]: row for row in summary_rows([tmp_path])}
    assert rows["sigmoid"]["accuracy"] == "90.0% (89.0% to 91.0%)"
    assert rows["softmax"]["accuracy"] == "92.5%"
    assert rows["sigmoid"]["most frequent class"] == "11.7%"
    assert not [column for column in rows["sigmoid"] if "bigram" in column]
    text = write_report([tmp_path], tmp_path / "report").read_text()
    assert "The validation accuracy ended at 90.0% (89.0% to 91.0%) for sigmoid and 92.5% for softmax; the most" in text
    assert "bigram" not in text


def test_encoders_are_compared_by_the_accuracy_of_neighbours(tmp_path):
    for attention, accuracy in (("sigmoid", 0.75), ("softmax", 0.5)):
        settings = {"recipe": "simclr_digits", "attention": attention, "seed": 0, "steps": 2}
        with RecordWriter(tmp_path / attention / "records.jsonl", settings) as writer:
            for step in (0, 2):
                writer.write("val/knn_accuracy", accuracy * step / 2, step=step)
                writer.write("val/loss", 3.0 - step, unit="nats_per_view", step=step)
            writer.write("baseline/majority", 0.117, step=0)
    rows = {row["arm"]: row for row in summary_rows([tmp_path])}
    assert rows["sigmoid"]["kNN accuracy"] == "75.0%"
    text = write_report([tmp_path], tmp_path).read_text("utf-8")
    assert "The validation kNN accuracy ended at 75.0% for sigmoid and 50.0% for softmax; the most frequent" in text
    assert "final validation kNN accuracy" in text
    assert "bigram" not in text
