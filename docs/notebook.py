"""A workspace in pictures: `marimo run docs/notebook.py -- --workspace workspace` (needs `pip install .[notebook]`).

It reads the catalog that any DuckDB client opens, and imports nothing of popalign. `popalign catalog rebuild` first, if
the workspace was moved or has new runs.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="popalign workspace")


@app.cell
def _():
    import os
    from pathlib import Path

    import duckdb
    import marimo as mo
    from matplotlib import pyplot

    chosen = mo.cli_args().get("workspace") or os.environ.get("POPALIGN_WORKSPACE") or "workspace"
    catalog = duckdb.connect(Path(str(chosen)) / "catalog.duckdb", read_only=True)

    def rows_of(sql, *values):
        found = catalog.execute(sql, values)
        names = [column[0] for column in found.description]
        plain = [[round(value, 4) if isinstance(value, float) else value for value in row] for row in found.fetchall()]
        return [dict(zip(names, row, strict=True)) for row in plain]

    return catalog, chosen, mo, pyplot, rows_of


@app.cell
def _(catalog, chosen, mo):
    runs = [row[0] for row in catalog.sql("SELECT run_id FROM decisions ORDER BY run_id").fetchall()]
    mo.stop(not runs, mo.md(f"No run in `{chosen}` has come to a decision yet."))
    run = mo.ui.dropdown(runs, value=runs[-1], label="run")
    mo.vstack([run])
    return (run,)


@app.cell
def _(catalog, mo, rows_of, run):
    decision = catalog.execute(
        "SELECT verdict, reason, base_model_id, model_id FROM decisions WHERE run_id = ?", [run.value]
    )
    verdict, reason, base, model = decision.fetchone()
    before_after = rows_of(
        """SELECT axis, measure, before, after, ratio, ratio_low, ratio_high, n, floor, judge_id
        FROM before_after(?) WHERE split = 'eval'""",
        run.value,
    )
    mo.vstack(
        [
            mo.md(f"## {verdict}\n{reason}"),
            mo.md("Held-out prompts, perceived attributes; ratios are after / before with 95% intervals."),
            mo.ui.table(before_after, selection=None),
        ]
    )
    return base, before_after, model


@app.cell
def _(base, model, mo, pyplot, rows_of, run):
    def shares_of(which):
        return rows_of(
            """SELECT subject, axis, "group", share, low, high FROM shares(?, ?)
            WHERE split = 'eval' AND subject IS NOT NULL ORDER BY axis, "group", subject""",
            run.value,
            which,
        )

    before, after = shares_of(base), shares_of(model)

    def bars(axis):
        subjects = sorted({row["subject"] for row in before if row["axis"] == axis})
        groups = sorted({row["group"] for row in before if row["axis"] == axis})
        figure, plots = pyplot.subplots(
            1, len(groups), sharey=True, figsize=(3.2 * len(groups), 0.32 * len(subjects) + 1.4)
        )
        for plot, group in zip(plots, groups, strict=True):
            for rows, marker, colour, name, shift in (
                (before, "o", "#D55E00", "before", 0.15),
                (after, "s", "#0072B2", "after", -0.15),
            ):
                mine = {row["subject"]: row for row in rows if row["axis"] == axis and row["group"] == group}
                here = [subject for subject in subjects if subject in mine and mine[subject]["share"] is not None]
                heights = [subjects.index(subject) + shift for subject in here]
                shares = [mine[subject]["share"] for subject in here]
                spread = [
                    [max(0, mine[subject]["share"] - mine[subject]["low"]) for subject in here],
                    [max(0, mine[subject]["high"] - mine[subject]["share"]) for subject in here],
                ]
                plot.errorbar(shares, heights, xerr=spread, fmt=marker, color=colour, label=name, markersize=4)
            plot.axvline(1 / len(groups), color="black", linewidth=0.8, linestyle=":")
            plot.set(
                title=group,
                xlim=(0, 1),
                ylim=(-0.5, len(subjects) - 0.5),
                xlabel="share",
                yticks=range(len(subjects)),
                yticklabels=subjects,
            )
        plots[0].legend(loc="best", fontsize=8)
        figure.tight_layout()
        return figure

    axes = sorted({row["axis"] for row in before})
    shares = [bars(axis) for axis in axes]
    mo.vstack([mo.md("## Shares by occupation\nDotted: the target. Bars: 95% Wilson intervals."), *shares])
    return (shares,)


@app.cell
def _(base, catalog, mo, run):
    worst = catalog.execute(
        "SELECT prompt_id, text, axis, value FROM worst_prompts(?, ?, top := 3)", [run.value, base]
    ).fetchall()

    def images_of(prompt_id, axis):
        found = catalog.execute(
            "SELECT label, status, image FROM images_behind(?, ?, ?, ?) WHERE image IS NOT NULL LIMIT 16",
            [run.value, base, prompt_id, axis],
        )
        return [
            mo.image(image, width=72, alt=label or status, caption=label or status)
            for label, status, image in found.fetchall()
        ]

    gallery = [(text, axis, value, images_of(prompt_id, axis)) for prompt_id, text, axis, value in worst]
    mo.vstack(
        [mo.md("## The most uneven held-out prompts, before")]
        + [
            mo.vstack([mo.md(f"**{text}** ({axis}, L2 {value:.2f})"), mo.hstack(images, wrap=True, justify="start")])
            for text, axis, value, images in gallery
        ]
    )
    return (gallery,)


@app.cell
def _(catalog, mo, pyplot):
    nights = catalog.sql("SELECT run_id, axis, value, low, high FROM nights() WHERE which = 'before'").fetchall()
    names = list(dict.fromkeys(row[0] for row in nights))
    trend, plot = pyplot.subplots(figsize=(7, 3))
    for number, axis in enumerate(sorted({row[1] for row in nights})):
        mine = [row for row in nights if row[1] == axis]
        places = [names.index(row[0]) + 0.08 * number for row in mine]
        values = [row[2] for row in mine]
        spread = [[max(0, row[2] - row[3]) for row in mine], [max(0, row[4] - row[2]) for row in mine]]
        plot.errorbar(places, values, yerr=spread, fmt="o-", capsize=3, label=axis)
    plot.set(ylabel="mean disparity (L2)", ylim=(0, None), xticks=range(len(names)), xticklabels=names)
    plot.tick_params("x", rotation=30)
    plot.legend(fontsize=8)
    trend.tight_layout()
    mo.vstack([mo.md("## The base model, run after run\nHeld-out neutral prompts, 95% intervals."), trend])
    return nights, trend


@app.cell
def _(mo, rows_of, run):
    cost = rows_of("FROM cost(?)", run.value)
    mo.vstack([mo.md("## Where the time went"), mo.ui.table(cost, selection=None)])
    return (cost,)


if __name__ == "__main__":
    app.run()
