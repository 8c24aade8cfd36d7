"""The questions that people ask of a workspace, as macros of its catalog: `FROM shares('demo-0', 'base')`.

Names of parameters are never names of columns, which a macro would take for the parameter.
"""

from typing import NamedTuple


class Macro(NamedTuple):
    """One table macro. parameters: as DuckDB wants them, with defaults; example: arguments to try it with."""

    parameters: str
    comment: str
    sql: str


# 95%, as in group_shares (Wilson 1927).
_Z = 1.959963984540054
SCALARS = {
    "wilson_low": (
        "k, n",
        "lower end of the 95% Wilson interval of k of n",
        f"CASE WHEN n > 0 THEN greatest(0, (k + {_Z**2 / 2} - {_Z} * sqrt(k * (n - k) / n + {_Z**2 / 4}))"
        f" / (n + {_Z**2})) END",
    ),
    "wilson_high": (
        "k, n",
        "upper end of the 95% Wilson interval of k of n",
        f"CASE WHEN n > 0 THEN least(1, (k + {_Z**2 / 2} + {_Z} * sqrt(k * (n - k) / n + {_Z**2 / 4}))"
        f" / (n + {_Z**2})) END",
    ),
}

MACROS: dict[str, Macro] = {
    "shares": Macro(
        "run, model",
        "shares of every perceived group by subject, with interval and floor; subject null: pooled over prompts; "
        "least, most: the share if no unknown image, or every one, were of the group",
        """SELECT g.split, p.subject, p.text, g.axis, g."group", g.count, g.n, g.share, g.low, g.high,
       sqrt((1 - 1 / count(*) OVER (PARTITION BY g.split, g.prompt_id, g.axis, g.judge_id)) / nullif(g.n, 0)) AS floor,
       d.unknown, g.count / nullif(g.n + d.unknown, 0) AS least,
       (g.count + d.unknown) / nullif(g.n + d.unknown, 0) AS most, g.judge_id
FROM group_shares AS g LEFT JOIN prompts AS p USING (run_id, prompt_id)
LEFT JOIN disparities AS d
  ON d.run_id = g.run_id AND d.model_id = g.model_id AND d.judge_id = g.judge_id AND d.split = g.split
 AND d.axis = g.axis AND d.measure = 'l2' AND d.target = 'uniform'
 AND d.level = CASE WHEN g.prompt_id IS NULL THEN 'pooled' ELSE 'prompt' END
 AND d.prompt_id IS NOT DISTINCT FROM g.prompt_id
WHERE g.run_id = run AND g.model_id = model
ORDER BY g.split, g.axis, p.subject NULLS FIRST, g."group\"""",
    ),
    "before_after": Macro(
        "run",
        "what a run changed: every measure before and after, paired, with n and sampling floor of the aligned model",
        """SELECT c.split, c.axis, c.measure, c.before, c.after, c.difference, c.difference_low, c.difference_high,
       c.ratio, c.ratio_low, c.ratio_high, d.n, d.floor, c.judge_id
FROM comparisons AS c
LEFT JOIN disparities AS d
  ON d.run_id = c.run_id AND d.model_id = c.model_id AND d.judge_id = c.judge_id AND d.split = c.split
 AND d.axis = c.axis AND d.measure = c.measure AND d.level = 'mean' AND d.target = 'uniform'
WHERE c.run_id = run
ORDER BY c.split, c.axis, c.measure""",
    ),
    "by_group": Macro(
        "run, model",
        "every number that exists by perceived group, on held-out prompts: share, scores, diversity; null: no image",
        """SELECT axis, 'share' AS measure, 'share' AS unit, "group", share AS value, low, high, n, judge_id AS said_by
FROM group_shares WHERE run_id = run AND model_id = model AND split = 'eval' AND prompt_id IS NULL
UNION ALL
SELECT axis, measure, unit, "group", value, low, high, n, scorer_id
FROM group_scores WHERE run_id = run AND model_id = model AND split = 'eval'
UNION ALL
SELECT axis, 'vendi_score', 'effective number', "group", value, low, high, n, features_id
FROM group_diversities WHERE run_id = run AND model_id = model AND split = 'eval'
ORDER BY axis, measure, "group\"""",
    ),
    "gaps": Macro(
        "run",
        "how far perceived groups are apart in each score before and after, with what chance gives (MetricFrame's "
        "overall, difference and ratio)",
        """SELECT g.axis, g.measure, CASE WHEN g.model_id = d.base_model_id THEN 'before' ELSE 'after' END AS which,
       g.overall, g.group_min, g.group_max, g.difference, g.difference_low, g.difference_high, g.null_high,
       g.ratio, g.ratio_low, g.ratio_high, g.groups, g.n, g.unknown, g.scorer_id
FROM group_gaps AS g JOIN decisions AS d ON d.run_id = g.run_id AND g.model_id IN (d.base_model_id, d.model_id)
WHERE g.run_id = run AND g.split = 'eval'
ORDER BY g.axis, g.measure, which DESC""",
    ),
    "worst_prompts": Macro(
        "run, model, top := 10, wanted_target := 'uniform'",
        "the held-out prompts with the largest disparity (L2), with interval, floor, null band and unknowns",
        """SELECT d.axis, p.text, d.value, d.low, d.high, d.floor, d.null_low, d.null_high, d.n, d.unknown, d.judge_id,
       d.prompt_id
FROM disparities AS d JOIN prompts AS p USING (run_id, prompt_id)
WHERE d.run_id = run AND d.model_id = model AND d.split = 'eval' AND d.level = 'prompt' AND d.measure = 'l2'
  AND d.target = wanted_target
QUALIFY row_number() OVER (PARTITION BY d.axis, d.judge_id ORDER BY d.value DESC, d.prompt_id) <= top
ORDER BY d.axis, d.value DESC, d.prompt_id""",
    ),
    "cells": Macro(
        "run, model",
        "intersectional cells: perceived groups of all axes at once, zeros included, over neutral prompts; "
        "intervals are Wilson's, as if images of one prompt were not alike; group_shares has the judge's over prompts",
        # Axes are put in order in the few distinct cells, not in every image; so with prompts below.
        """WITH RECURSIVE vocabulary AS (
    SELECT axis, "group", dense_rank() OVER (ORDER BY axis) AS position
    FROM (SELECT axis, "group" FROM group_shares WHERE run_id = run
          UNION SELECT axis, "group" FROM populations WHERE run_id = run)
    -- Crossed axes are cells already.
    WHERE NOT contains(axis, ' & ')
), grid AS (
    SELECT 0 AS filled, CAST([] AS VARCHAR[]) AS cell
    UNION ALL
    SELECT filled + 1, list_append(cell, v."group") FROM grid JOIN vocabulary AS v ON v.position = filled + 1
), seen AS (
    SELECT classifier_id, prompt_id, sample_id, string_agg(axis || chr(31) || label, chr(30)) AS perceived,
           bool_and(status = 'ok') AS counted
    FROM attributes WHERE run_id = run AND model_id = model GROUP BY ALL
), unsorted AS (
    SELECT classifier_id, prompt_id, CASE WHEN counted THEN perceived END AS perceived, count(*) AS images
    FROM seen GROUP BY ALL
), counts AS (
    SELECT u.classifier_id, p.split, CAST(sum(u.images) AS BIGINT) AS count,
           [string_split(part, chr(31))[2] FOR part IN list_sort(string_split(u.perceived, chr(30)))] AS cell
    FROM unsorted AS u JOIN prompts AS p ON p.run_id = run AND p.prompt_id = u.prompt_id AND p.kind = 'neutral'
    GROUP BY ALL
), totals AS (
    SELECT classifier_id, split, CAST(coalesce(sum(count) FILTER (cell IS NOT NULL), 0) AS BIGINT) AS n,
           CAST(coalesce(sum(count) FILTER (cell IS NULL), 0) AS BIGINT) AS unknown
    FROM counts GROUP BY ALL
)
SELECT t.split, array_to_string(g.cell, ' x ') AS cell, coalesce(c.count, 0) AS count, t.n,
       coalesce(c.count, 0) / nullif(t.n, 0) AS share, wilson_low(coalesce(c.count, 0), t.n) AS low,
       wilson_high(coalesce(c.count, 0), t.n) AS high, t.unknown, t.classifier_id
FROM totals AS t
CROSS JOIN (SELECT cell FROM grid WHERE filled = (SELECT max(position) FROM vocabulary)) AS g
LEFT JOIN counts AS c USING (classifier_id, split, cell)
ORDER BY t.split, t.classifier_id, share DESC, g.cell""",
    ),
    "changes": Macro(
        "run",
        "which held-out prompts changed (L2): permutation test image by image from the same noise, with Holm's and "
        "Benjamini-Hochberg's corrections; text null: the mean over prompts",
        """SELECT c.axis, p.text, c.before, c.after, c.difference, c.n, c.changed, c.p_value, c.p_holm,
       c.p_benjamini_hochberg, c.judge_id
FROM prompt_changes AS c LEFT JOIN prompts AS p USING (run_id, prompt_id)
WHERE c.run_id = run AND c.split = 'eval'
ORDER BY c.axis, c.p_value, c.difference, p.text""",
    ),
    "nights": Macro(
        "wanted_target := 'uniform'",
        "drift: the mean held-out disparity (L2) of every run's models in the order of their first start",
        """SELECT s.started_at, d.run_id, d.axis,
       CASE WHEN d.model_id = c.base_model_id THEN 'before' WHEN d.model_id = c.model_id THEN 'after' END AS which,
       d.model_id, d.value, d.low, d.high, d.floor, d.null_low, d.null_high, d.n, d.unknown, c.verdict, d.judge_id
FROM disparities AS d
JOIN (SELECT run_id, min(started_at) AS started_at FROM starts GROUP BY run_id) AS s USING (run_id)
LEFT JOIN decisions AS c USING (run_id)
WHERE d.split = 'eval' AND d.level = 'mean' AND d.measure = 'l2' AND d.target = wanted_target
ORDER BY s.started_at, d.run_id, d.axis, which DESC""",
    ),
    "cost": Macro(
        "run",
        "what a run took by stage: pieces of work, items, hours, items a second of work, and GPU-hours (null: on the "
        "CPU); a piece counts with the process that did it, a training in several processes with each of them",
        # A training in several processes is one row, of the first process, whose device is '4 x cuda'.
        """SELECT t.stage, t.device, count(*) AS pieces, CAST(sum(t.items) AS BIGINT) AS items,
       sum(t.seconds) / 3600 AS hours,
       sum(t.items) / nullif(sum(t.seconds), 0) AS items_a_second,
       sum(t.seconds * coalesce(TRY_CAST(regexp_extract(t.device, '^([0-9]+) x ', 1) AS BIGINT), 1))
           FILTER (NOT regexp_matches(t.device, '(^| )cpu$')) / 3600 AS gpu_hours
FROM timings AS t
WHERE t.run_id = run
GROUP BY ALL
ORDER BY hours DESC""",
    ),
    "images_behind": Macro(
        "run, model, prompt, wanted_axis, wanted_group := NULL, said_by := NULL",
        "the images behind a share: prompt is a prompt's id, text or subject; no group: all, unknown ones included; "
        "no classifier named: by the judge of the run's figures, or by all before they are made",
        # One image may be drawn for two purposes, and then lies in two shards. From the least to the greatest id: other
        # images' bytes are then skipped, row group by row group.
        """WITH chosen AS (
    SELECT sample_id, label, confidence, status, classifier_id
    FROM attributes
    WHERE run_id = run AND model_id = model AND axis = wanted_axis AND (
        wanted_group IS NULL OR (status = 'ok' AND label = wanted_group)
    ) AND prompt_id IN (
        SELECT p.prompt_id FROM prompts AS p WHERE p.run_id = run AND prompt IN (p.prompt_id, p.text, p.subject)
    ) AND classifier_id = coalesce(
        said_by, (SELECT any_value(judge_id) FROM disparities WHERE run_id = run), classifier_id)
), drawn AS MATERIALIZED (
    SELECT DISTINCT sample_id, sample_index, seed FROM samples
    WHERE run_id = run AND model_id = model AND sample_id IN (SELECT sample_id FROM chosen)
), pictures AS (
    SELECT sample_id, any_value(image) AS image FROM images
    WHERE run_id = run AND sample_id BETWEEN (SELECT min(sample_id) FROM drawn) AND (SELECT max(sample_id) FROM drawn)
      AND sample_id IN (SELECT sample_id FROM drawn)
    GROUP BY ALL
)
SELECT c.sample_id, c.label, c.confidence, c.status, c.classifier_id, d.seed, i.image
FROM chosen AS c JOIN drawn AS d USING (sample_id) LEFT JOIN pictures AS i USING (sample_id)
ORDER BY c.classifier_id, d.sample_index""",
    ),
    "flips": Macro(
        "run",
        "the same prompt and seed before and after: how many images changed their perceived group, and to which",
        """WITH drawn AS (
    SELECT DISTINCT model_id, prompt_id, sample_id, sample_index FROM samples WHERE run_id = run
), perceived AS (
    SELECT a.model_id, a.prompt_id, s.sample_index, a.axis, a.classifier_id,
           CASE WHEN a.status = 'ok' THEN a.label ELSE 'unknown' END AS label
    FROM attributes AS a JOIN drawn AS s USING (model_id, prompt_id, sample_id) WHERE a.run_id = run
), pairs AS (
    SELECT b.prompt_id, b.axis, b.classifier_id, b.label AS label_before, a.label AS label_after, count(*) AS images
    FROM decisions AS d
    JOIN perceived AS b ON b.model_id = d.base_model_id
    JOIN perceived AS a ON a.model_id = d.model_id AND a.prompt_id = b.prompt_id AND a.sample_index = b.sample_index
                       AND a.axis = b.axis AND a.classifier_id = b.classifier_id
    WHERE d.run_id = run
    GROUP BY ALL
)
SELECT split, axis, label_before, label_after, images,
       CAST(sum(images) OVER (PARTITION BY split, axis, classifier_id, label_before) AS BIGINT) AS of_before,
       classifier_id
FROM (
    SELECT p.split, c.axis, c.classifier_id, c.label_before, c.label_after, CAST(sum(c.images) AS BIGINT) AS images
    FROM pairs AS c JOIN prompts AS p ON p.run_id = run AND p.prompt_id = c.prompt_id AND p.kind = 'neutral'
    GROUP BY ALL
)
ORDER BY split, axis, classifier_id, label_before, images DESC, label_after""",
    ),
    "unknowns": Macro(
        "run",
        "what became of the images at each classifier: how many have a group, and why the others have none",
        """SELECT split, kind, model_id, axis, status, images, CAST(sum(images) OVER whole AS BIGINT) AS n,
       images / sum(images) OVER whole AS share, classifier_id
FROM (
    SELECT p.split, p.kind, a.model_id, a.axis, a.status, a.classifier_id, CAST(sum(a.images) AS BIGINT) AS images
    FROM (
        SELECT prompt_id, model_id, axis, status, classifier_id, count(*) AS images
        FROM attributes WHERE run_id = run GROUP BY ALL
    ) AS a
    JOIN prompts AS p ON p.run_id = run AND p.prompt_id = a.prompt_id
    GROUP BY ALL
)
WINDOW whole AS (PARTITION BY split, kind, model_id, axis, classifier_id)
ORDER BY split, kind, model_id, axis, classifier_id, images DESC, status""",
    ),
    "neighbours": Macro(
        "run, sample",
        "the other images of the populations that an image belongs to, and the side each is on",
        """WITH members AS (
    SELECT round, population_id, winner_sample_id AS sample_id, 'preferred' AS side
    FROM preferences WHERE run_id = run
    UNION
    SELECT round, population_id, loser_sample_id, 'dispreferred' FROM preferences WHERE run_id = run
)
SELECT DISTINCT other.round, other.population_id, other.side, other.sample_id, other.sample_id = sample AS itself
FROM members AS other
WHERE (other.round, other.population_id) IN (
    SELECT (round, population_id) FROM members AS own WHERE own.sample_id = sample
)
ORDER BY other.round, other.population_id, other.side DESC, other.sample_id""",
    ),
}
