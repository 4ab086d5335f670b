"""report/ of runs on images: accuracy and its errors, parity said either way, maps drawn from their file, speed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from report.reading import Page, arms_of, told

from flashsigmoid.record import RecordWriter
from flashsigmoid.report import accuracy_statement, summary_rows, write_report
from flashsigmoid.report.arms import accuracy_differences
from flashsigmoid.report.figures import _loss_limits
from flashsigmoid.report.maps import maps_drawing, read_maps
from flashsigmoid.report.summary import warnings

ImageRun = Callable[..., Path]


# words


ERROR = " the standard error of the difference, 1.41 points by the number of validation images"


@pytest.mark.parametrize(
    ("sigmoid", "difference", "verdict"),
    [
        (
            0.90,
            "The accuracy of sigmoid is 1.00 points below that of softmax, within",
            ": at parity, as far as these runs can",
        ),
        (
            0.93,
            "Not at parity: the accuracy of sigmoid is 2.00 points above that of softmax, beyond",
            ", by a factor of 1.41; ",
        ),
        (
            0.85,
            "Not at parity: the accuracy of sigmoid is 6.00 points below that of softmax, beyond",
            ", by a factor of 4.24.",
        ),
        (0.91, "The accuracy of sigmoid is that of softmax, within", ": at parity, as far as these runs can tell."),
    ],
)
def test_parity_of_one_seed_is_measured_by_the_validation_images(
    image_run: ImageRun, sigmoid, difference, verdict
) -> None:
    folders = [image_run("a", accuracy=sigmoid), image_run("b", attention="softmax", accuracy=0.91)]
    said = accuracy_statement(folders)
    assert difference + ERROR + verdict in said[-1]
    assert ("no proof of a difference" in said[-1]) == (sigmoid == 0.93)
    assert all(sentence in told(*folders) for sentence in said)
    assert (
        f"The validation accuracy ended at {sigmoid:.1%} ± 1.0% for sigmoid and 91.0% ± 1.0% for softmax; the most "
        "frequent class alone gets 12.0%; ± is the standard error"
    ) in said[0]


def test_parity_of_several_seeds_is_measured_by_their_differences(image_run: ImageRun) -> None:
    """Seed by seed +1, -2 and -2 points: mean -1, standard deviation sqrt 3, standard error 1."""
    for seed, (ours, theirs) in enumerate([(0.91, 0.90), (0.88, 0.90), (0.89, 0.91)]):
        image_run(f"a{seed}", seed=seed, accuracy=ours)
        last = image_run(f"b{seed}", seed=seed, attention="softmax", accuracy=theirs)
    spread, error = accuracy_differences(*arms_of(last.parent))
    assert spread.values == pytest.approx((0.01, -0.02, -0.02))
    assert error == pytest.approx(0.01)
    row = summary_rows([last.parent])[0]
    assert row["accuracy"] == "89.3% ± 1.0% (88.0% to 91.0%)"
    assert row["minus softmax, points"] == "-1.00 ± 1.00"
    assert "(seed by seed -2.00 to +1.00, standard deviation 1.73)" in told(last.parent)
    assert "1.00 points over 3 seeds" in told(last.parent)
    assert not [text for text in warnings(arms_of(last.parent)) if "spread" in text]


def test_without_a_standard_error_nothing_is_said_of_parity(image_run: ImageRun) -> None:
    folders = [image_run("a", error=None), image_run("b", attention="softmax", accuracy=0.91, error=None)]
    assert "1.00 points below that of softmax; without a standard error on record that says nothing" in told(*folders)
    assert "Not at parity" not in told(*folders)
    assert "±" not in told(*folders)


def test_an_unfinished_arm_is_not_compared(image_run: ImageRun) -> None:
    folders = [image_run("a", stop=300), image_run("b", attention="softmax")]
    assert "parity" not in told(*folders)
    assert summary_rows(folders)[0]["minus softmax, points"] == "open"


@pytest.mark.parametrize(
    ("accuracy", "error", "above", "learned"),
    [(0.9, 0.01, "78", True), (0.14, 0.01, "2.0", False), (1.0, 0.0, "inf", True)],
)
def test_how_far_above_the_most_frequent_class(image_run: ImageRun, accuracy, error, above, learned) -> None:
    folder = image_run("a", accuracy=accuracy, error=error)
    assert summary_rows([folder])[0]["standard errors above it"] == above
    text = told(folder)
    assert f"That is {above} standard errors above the most frequent class for sigmoid" in text
    assert ("fewer than 3 are no sign of learning: sigmoid." in text) == (not learned)


def test_speed_and_files_left_out(image_run: ImageRun) -> None:
    folders = [
        image_run("a", step_ms=50.0, skipped=3),
        image_run("b", attention="softmax", step_ms=40.0, skipped=None, majority=None),
    ]
    ours, theirs = summary_rows(folders)
    assert (ours["time per step"], theirs["time per step"]) == ("50.0 ms", "40.0 ms")
    assert (ours["images per second"], theirs["images per second"]) == ("1,280", "1,600")
    assert (ours["corrupt files left out"], theirs["corrupt files left out"]) == ("3", "not recorded")
    assert (ours["most frequent class"], theirs["most frequent class"]) == ("12.0%", "not recorded")
    assert "sigmoid: three corrupt files left out." in warnings(arms_of(*folders))
    assert tuple(ours) == tuple(theirs)


def test_runs_on_images_without_an_accuracy_have_a_page(image_run: ImageRun, tmp_path: Path) -> None:
    """As of a pretraining: losses and speed, no word of bigrams or accuracy."""
    folder = image_run("a")
    records = (folder / "records.jsonl").read_text().splitlines()
    (folder / "records.jsonl").write_text("\n".join(line for line in records if "accuracy" not in line) + "\n")
    row = summary_rows([folder])[0]
    assert "accuracy" not in row
    assert row["time per step"] == "50.0 ms"
    text = Page(write_report([folder], tmp_path / "page.html").read_text("utf-8")).text
    assert "bigram" not in text
    assert "Accuracy" not in text
    assert "final validation loss, nats per image" in text


# figures


def test_the_loss_of_images_is_shown_from_its_beginning(pair: Path) -> None:
    limits = _loss_limits(arms_of(pair))
    assert limits is not None
    assert limits[0] < 0.3
    assert limits[1] > 2.3


def test_maps_are_read_from_the_last_file_that_is_there(image_run: ImageRun, tmp_path: Path) -> None:
    (arm,) = arms_of(image_run("a"))
    maps = read_maps(arm.runs[0])
    assert maps is not None
    assert maps.maps.shape == (2, 3, 2, 4, 4)
    assert (arm.runs[0].path / "attention-maps.npz").exists()
    (arm.runs[0].path / "attention-maps.npz").unlink()
    assert read_maps(arm.runs[0]) is None
    assert not maps_drawing([arm]).panels
    assert "Attention maps" in Page(write_report([arm.runs[0].path], tmp_path / "page.html").read_text("utf-8")).text


@pytest.mark.parametrize("damage", ["cut", "bits", "key", "shape", "text"])
def test_damaged_maps_are_one_error(image_run: ImageRun, tmp_path: Path, damage: str) -> None:
    path = image_run("a") / "attention-maps.npz"
    with np.load(path) as file:
        arrays = dict(file)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "bits":
        content = bytearray(path.read_bytes())
        start = content.index(b"maps.npy") + 200
        content[start : start + 60] = bytes(60)
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("no arrays")
    else:
        arrays |= {"sums": arrays["sums"][:1]} if damage == "shape" else {}
        np.savez(path, **{name: array for name, array in arrays.items() if (name, damage) != ("maps", "key")})
    with pytest.raises(ValueError, match=r"attention maps must be whole arrays that fit, got .*attention-maps.npz: "):
        write_report([path.parent], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_page_of_images_stands_alone(pair: Path, tmp_path: Path) -> None:
    out = write_report([pair], tmp_path / "page.html")
    source = out.read_text(encoding="utf-8")
    page = Page(source)
    names = sorted(file.stem for file in (tmp_path / "page-figures").iterdir())
    assert names == ["accuracy", "attention-maps", "attn-norm", "loss-step", "loss-time"]

    # the only pixels are those of the maps, and they are within
    assert "default-src 'none'; img-src data:; style-src" in source
    assert not re.search(r"https?:|file:|@import|//[a-z]", re.sub(r"base64,[\w+/=\s]+", "", source))
    links = [value for _, name, value in page.attributes if name in ("href", "xlink:href", "src")]
    pixels = [value for value in links if value.startswith("data:image/png;base64,")]
    assert all(value.startswith("#") for value in links if value not in pixels)
    # two arms of two images: each beside two heads of three layers
    assert len(pixels) == 2 * 2 * (1 + 3 * 2)
    assert page.text.count("layer 2") == 2
    assert page.text.count("<four>") == 2
    # what a row adds up to: under each map, and 1 for softmax
    (ours, theirs) = arms_of(pair)
    for arm in (ours, theirs):
        maps = read_maps(arm.runs[0])
        assert maps is not None
        for value in maps.sums.flatten():
            assert f"{value:.2f}" in page.text
    assert page.text.count("1.00") >= 12
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))

    assert "of the class token" in page.text
    assert "final validation accuracy ± 1.0%" in page.text
    assert ">90.0%<" in source
    assert all(sentence in page.text for sentence in accuracy_statement([pair]))
    assert "not recorded" not in page.text
    assert not {"Text", "Row mass"} & set(re.findall(r"<h[23]>(.*?)</h[23]>", source))
    assert "<td>600</td><td>90.0% ± 1.0%</td><td>0.300</td>" in source
    assert "In loss, sigmoid and softmax end equal to three decimals." in page.text
    assert re.findall(r'<tr class="differs"><th scope="row">(.*?)</th>', source) == ["attention"]

    write_report([pair], out)
    assert out.read_text(encoding="utf-8") == source


def test_maps_that_are_not_finite_are_drawn(image_run: ImageRun, tmp_path: Path) -> None:
    """Of a run that broke: the sums say it."""
    path = image_run("a") / "attention-maps.npz"
    with np.load(path) as file:
        arrays = {
            name: np.full_like(array, np.nan) if name in ("maps", "sums") else array for name, array in file.items()
        }
    np.savez(path, **arrays)
    source = write_report([path.parent], tmp_path / "page.html").read_text("utf-8")
    assert source.count(">nan</text>") == 12


def test_large_pictures_are_thinned_out(image_run: ImageRun, tmp_path: Path) -> None:
    """Noise of 500 pixels a side, which no PNG makes small: 14 tiles of it would be 10 MB."""
    path = image_run("a") / "attention-maps.npz"
    with np.load(path) as file:
        arrays = dict(file)
    noise = np.random.default_rng(0).integers(0, 256, (2, 3, 500, 400), dtype=np.uint8)
    np.savez(path, **(arrays | {"images": noise, "classes": np.array(["great white shark", "tench"])}))
    source = write_report([path.parent], tmp_path / "page.html").read_text("utf-8")
    assert source.count("data:image/png") == 14
    assert len(source) < 1e6
    assert "great white…" in source


def test_maps_of_one_arm_only_are_told(image_run: ImageRun) -> None:
    arms = arms_of(image_run("a", query="mean"), image_run("b", attention="softmax", maps=False))
    drawing = maps_drawing(arms)
    assert [panel.title for panel in drawing.panels] == ["sigmoid"]
    assert "of all tokens, their mean" in drawing.caption
    assert drawing.caption.endswith("Not recorded: softmax.")


@pytest.mark.long
def test_maps_need_no_model(pair: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from flashsigmoid.report import write_report\n"
        f"write_report([{str(pair)!r}], {str(tmp_path / 'page.html')!r})\n"
        "rooms = [f'flashsigmoid.{room}' for room in ('models', 'training', 'diagnostics', 'recipes')]\n"
        "sys.exit([room for room in (*rooms, 'timm', 'torchvision') if room in sys.modules] or None)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


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
