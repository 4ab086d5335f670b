"""The page: one HTML file that needs nothing beside it, and the figures as PNG in a folder beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import classifiers, recognisers
from .arms import BIGRAM, FLOOR, SEED, Arm, Run, differing, group_arms, load_runs, show, value_of
from .classifiers import are_classifiers, are_of_images
from .document import document, write_whole
from .explorer import explorer_page
from .figures import Drawing, accuracy_drawing, colour_variable, layer_drawing, loss_drawings
from .hearing import hearing_drawing
from .long_audio import long_drawing
from .maps import maps_drawing
from .recognisers import are_of_speech, are_of_text
from .summary import (
    base_of,
    below_text,
    difference_text,
    loss_unit,
    norm_text,
    seeds_text,
    statement,
    steps_text,
    title,
    warnings,
)
from .watched import watched_drawings
from .words import loss_text, time_text

_SAMPLE_CHARACTERS = 1500
_STATISTICS = (
    (
        "attn_norm",
        "Attention norm |A V|",
        "The L2 norm of A V of a token, heads concatenated, before the output projection; mean over tokens. "
        "Without its bias, sigmoid attention starts about n / 2 times too large (arXiv:2409.04431).",
    ),
    (
        "row_mass",
        "Row mass",
        "What the weights of a row add up to, mean over rows. Softmax makes it 1; sigmoid leaves it free.",
    ),
    (
        "sink",
        "Share of the first token",
        "The part of a row's weights that lies on the first token, mean over rows. "
        "A large share is an attention sink (arXiv:2410.10781).",
    ),
)


def write_report(runs: Iterable[str | Path], out: str | Path) -> Path:
    """Compare runs on one page.

    Runs that differ in nothing but the seed are one arm. The page is one file that opens offline: style and
    figures are within. The figures are also written as PNG, to the folder <name of the page>-figures beside; the
    explorer, a page of 5 MB and more, to <name of the page>-explorer.html, where a run has snapshots of its attention
    and plotly is installed; else the page says which of the two is missing. Each file appears complete or not at all.

    Args:
        runs: run directories, or folders of them.
        out: the page, *.html, or a folder in which it becomes report.html. Missing folders are made.

    Returns:
        The path of the page.

    Raises:
        ValueError: a folder is missing, holds no run, or its records are damaged.
    """
    arms = group_arms(load_runs(runs))
    page = Path(out)
    if page.suffix.lower() not in (".html", ".htm"):
        page = page / "report.html"
    statistics = [layer_drawing(arms, *statistic) for statistic in _STATISTICS]
    pictures = [maps_drawing(arms), hearing_drawing(arms), long_drawing(arms)]
    watched = watched_drawings(arms)
    drawings = [accuracy_drawing(arms), *loss_drawings(arms), *statistics, *pictures, *watched]
    folder = page.with_name(f"{page.stem}-figures")
    folder.mkdir(parents=True, exist_ok=True)
    for drawing in drawings:
        png = folder / f"{drawing.name}.png"
        if drawing.panels:
            write_whole(png, drawing.png())
        else:
            png.unlink(missing_ok=True)  # of an earlier report of the same name
    explorer, (html, missing) = page.with_name(f"{page.stem}-explorer.html"), explorer_page(arms)
    if html:
        write_whole(explorer, html.encode())
        link = f'<a href="{escape(quote(explorer.name))}">the explorer</a>'
        offer = f"<p>Any weight of one validation sample, by step, layer, head and token: {link}.</p>"
    else:
        explorer.unlink(missing_ok=True)
        offer = f'<p class="missing">{escape(missing)}</p>'
    write_whole(page, _page(arms, {drawing.name: drawing for drawing in drawings}, offer).encode())
    return page


def _page(arms: Sequence[Arm], drawings: dict[str, Drawing], explorer: str) -> str:
    heading, (lead, *facts) = escape(title(arms)), map(escape, statement(arms))
    curves, attention = _figure_names(arms, drawings)
    watched = "".join(_figure(drawing) for name, drawing in drawings.items() if name[:6] == "probe-" and drawing.panels)
    curves, attention = ("".join(_figure(drawings[name]) for name in names) for names in (curves, attention))
    # nothing may be loaded, and no script may run; the pixels of attention maps are within the page
    pixels = "img-src data:;" if any(drawings[name].panels for name in ("attention-maps", "hearing")) else ""
    body = f"""<main>
<header><h1>{heading}</h1><p class="lead">{lead}</p>
<ul class="lead">{"".join(f"<li>{fact}</li>" for fact in facts)}</ul></header>
{_warnings(arms)}
{_cards(arms)}
<section><h2>{"Accuracy and loss" if are_classifiers(arms) else "Loss"}</h2><div class="pair">{curves}</div></section>
<section><h2>Attention</h2>{attention}{explorer}</section>
{f"<section><h2>Under the microscope</h2>{watched}</section>" if watched else ""}
{f"<section><h2>Text</h2>{_samples(arms)}</section>" if are_of_text(arms) else ""}
<section><h2>Settings</h2>{_settings(arms)}</section>
<section><h2>Runs and provenance</h2>{_runs(arms)}{_provenance(arms)}</section>
</main>"""
    return document(heading, body, allowed=pixels)


def _figure_names(arms: Sequence[Arm], drawings: dict[str, Drawing]) -> tuple[Sequence[str], Sequence[str]]:
    """The curves and the figures of attention that are shown; what only language models record is no gap elsewhere."""
    if are_of_speech(arms):
        joined, heard = ([name] if drawings[name].panels else [] for name in ("long-audio", "hearing"))
        return ("loss-step", "loss-time", *joined), ("attn-norm", *heard)
    if are_of_text(arms):
        return ("loss-step", "loss-time"), ("attn-norm", "row-mass", "sink")
    recorded = [name for name in ("row_mass", "sink") if any(arm.layers(name) for arm in arms)]
    curves = ("accuracy", "loss-step") if are_classifiers(arms) else ("loss-step", "loss-time")
    return curves, ("attn-norm", *(name.replace("_", "-") for name in recorded), "attention-maps")


def _warnings(arms: Sequence[Arm]) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings(arms))
    return f'<aside aria-label="To bear in mind"><ul>{items}</ul></aside>' if items else ""


def _cards(arms: Sequence[Arm]) -> str:
    base = base_of(arms)
    cards = []
    for arm in arms:
        value, what, facts = _loss_card(arm, base)
        if are_classifiers(arms):
            value, what, facts = _accuracy_card(arm, base)
        if are_of_speech(arms):
            value, what, facts = _error_card(arm, base)
        if are_of_images(arms):
            facts |= classifiers.speed_rows(arm)
        facts |= {
            "steps": steps_text(arm),
            "seed" if len(arm.runs) == 1 else "seeds": seeds_text(arm),
            "time": time_text(arm.time_s),
        }
        rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v)
        cards.append(
            f'<article style="border-top-color:{colour_variable(arm)}"><h3>{escape(arm.label)}</h3>'
            f'<p class="value">{value}</p><p class="unit">{escape(what)}</p><dl>{rows}</dl></article>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _loss_card(arm: Arm, base: Arm) -> tuple[str, str, dict[str, str]]:
    """The final loss, what it is, and what stands below it."""
    finals = arm.finals.values
    facts = {
        "over seeds": f"{loss_text(min(finals))} to {loss_text(max(finals))}" if len(finals) > 1 else "",
        f"minus {base.label}": "" if arm is base else difference_text(arm, base),
        "best on the way": "" if arm.bests == arm.finals or not arm.bests.values else loss_text(arm.bests.mean),
    }
    if are_of_text([arm]):
        facts |= {"below bigram": below_text(arm, BIGRAM), "below any bigram": below_text(arm, FLOOR)}
    value = loss_text(arm.finals.mean) if finals else "not finite"
    return value, f"final validation loss, {loss_unit([arm])}", facts | {"first |A V|": norm_text(arm)}


def _accuracy_card(arm: Arm, base: Arm) -> tuple[str, str, dict[str, str]]:
    """The final accuracy, what it is, and what stands below it."""
    value, _, beside = classifiers.accuracy_text(arm).partition(" ")
    label, facts = classifiers.accuracy_label([arm, base]), classifiers.rows(arm, base)
    del facts[label]
    facts["loss"] = f"{loss_text(arm.finals.mean)}" if arm.finals.values else "not finite"
    return value, f"final validation {label} {beside}".strip(), facts | {"first |A V|": norm_text(arm)}


def _error_card(arm: Arm, base: Arm) -> tuple[str, str, dict[str, str]]:
    """The final character errors, and what stands below them."""
    facts = recognisers.rows(arm, base)
    value, _, beside = facts.pop("character errors").partition(" ")
    facts["loss"] = f"{loss_text(arm.finals.mean)}" if arm.finals.values else "not finite"
    return value, f"final validation character errors {beside}".strip(), facts | {"first |A V|": norm_text(arm)}


def _figure(drawing: Drawing) -> str:
    heading = f"<h3>{escape(drawing.title)}</h3>"
    if not drawing.panels:
        return f'<figure>{heading}<p class="missing">not recorded</p></figure>\n'
    panels = "".join(f'<div class="panel">{svg}</div>' for svg in drawing.svgs())
    caption = f"<figcaption>{escape(drawing.caption)}</figcaption>"
    return f'<figure>{heading}<div class="panels {drawing.name}">{panels}</div>{caption}</figure>\n'


def _samples(arms: Sequence[Arm]) -> str:
    cards = []
    for arm in arms:
        found = next(((run, *sample) for run in arm.runs if (sample := run.sample()) is not None), None)
        body = '<p class="missing">not recorded</p>'
        if found is not None:
            run, record, text = found
            when = "" if record.step is None else f", after {record.step:,} steps"
            # a young model may well write control characters
            text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
            cut = " …" if len(text) > _SAMPLE_CHARACTERS else ""
            body = (
                f'<p class="unit">seed {escape(show(run.seed))}{when}</p>'
                f"<pre>{escape(text[:_SAMPLE_CHARACTERS])}{cut}</pre>"
            )
        cards.append(f"<article><h3>{_name(arm)}</h3>{body}</article>")
    return f'<div class="samples">{"".join(cards)}</div>'


def _settings(arms: Sequence[Arm]) -> str:
    """The fields that differ, marked, and those that do not, folded."""
    settings = [arm.settings for arm in arms]
    names = [name for name in dict.fromkeys(name for each in settings for name in each) if name != SEED]
    differ = differing(settings)
    equal = [name for name in names if name not in differ]

    def cell(each: dict[str, Any], name: str) -> str:
        return escape(show(each[name])) if name in each else "<em>not set</em>"

    rows = [_row(escape(name), [cell(each, name) for each in settings], "differs") for name in differ]
    rows.append(_row(SEED, [escape(seeds_text(arm)) for arm in arms]))
    table = _table(rows, ["", *map(_name, arms)])
    if not equal:
        return table
    heading = "All settings" if len(arms) == 1 else f"{len(equal)} settings that all arms share"
    shared = _table([_row(escape(name), [cell(settings[0], name)]) for name in equal])
    return f"{table}<details><summary>{heading}</summary>{shared}</details>"


def _runs(arms: Sequence[Arm]) -> str:
    rows, has_accuracy, label = [], are_classifiers(arms), classifiers.accuracy_label(arms)
    for arm in arms:
        for run in arm.runs:
            final, best = run.final, run.best
            of = f" of {run.planned_steps:,}" if run.is_unfinished else ""
            cells = [
                show(run.seed),
                f"{run.steps:,}{of}",
                *([classifiers.run_accuracy_text(run)] if has_accuracy else []),
                "" if final is None else loss_text(value_of(final)),
                "" if best is None else f"{loss_text(value_of(best))} at step {best.step:,}",
                time_text(run.time_s),
                str(run.file.header.get("started", "")).replace("T", " ").replace("+00:00", " UTC"),
            ]
            rows.append(_row(_name(arm), map(escape, cells)))
    return _table(
        rows,
        ["arm", "seed", "steps", *([label] if has_accuracy else []), "final loss", "best loss", "time", "started"],
    )


def _provenance(arms: Sequence[Arm]) -> str:
    """Each fact once where all runs agree on it, else with the runs that it belongs to."""
    runs = [(f"{arm.label}, seed {show(run.seed)}", run) for arm in arms for run in arm.runs]
    facts: dict[str, Callable[[Run], str]] = {
        "hardware": lambda run: _pairs(run.file.header.get("hardware")),
        "versions": lambda run: _pairs(run.file.header.get("versions")),
        "commit": _commit,
        "command": lambda run: str(run.file.header.get("command", "")),
        "resumed": _resumed,
    }
    rows = []
    for name, fact in facts.items():
        owners: dict[str, list[str]] = {}
        for owner, run in runs:
            owners.setdefault(fact(run), []).append(owner)
        for text, whose in owners.items():
            value = f"<code>{escape(text)}</code>" if name == "command" else escape(text)
            of = "" if len(whose) == len(runs) else f"<br><small>{escape('; '.join(whose))}</small>"
            if text:
                rows.append(f'<tr><th scope="row">{name}</th><td class="wrap">{value}{of}</td></tr>')
    return _table(rows)


def _name(arm: Arm) -> str:
    return f'<i class="dot" style="background:{colour_variable(arm)}"></i>{escape(arm.label)}'


def _row(name: str, cells: Iterable[str], mark: str = "") -> str:
    attribute = f' class="{mark}"' if mark else ""
    return f'<tr{attribute}><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _table(rows: Sequence[str], head: Sequence[str] = ()) -> str:
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{"".join(rows)}</tbody></table></div>\n'


def _pairs(facts: object) -> str:
    if not isinstance(facts, dict):
        return ""
    return ", ".join(f"{name} {show(value)}" for name, value in facts.items() if value is not None)


def _commit(run: Run) -> str:
    commit, dirty = run.file.header.get("commit"), run.file.header.get("dirty")
    if commit is None:
        return "not from a git tree"
    return f"{commit} with uncommitted changes" if dirty else str(commit)


def _resumed(run: Run) -> str:
    return "; ".join(f"after step {each['step']:,}" for each in run.file.header.get("resumed", ()))
